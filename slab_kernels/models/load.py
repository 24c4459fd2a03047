"""`slab_kernels.load`: a packed folder opened as a transformers model with SlabLinear modules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..device import resolve_device, usual_torch
from ..format import PackedLayout, weight_dtype
from ..nn.preparation import check_words, prepare_opened
from .folder import Checkpoint, hub_folder
from .hub import HubArguments
from .model_config import read_generation_config
from .packed import (
    ModelCheckpoint,
    check_finite,
    check_tensors_fit,
    packed_names,
    packed_skeleton,
    read_packed,
)
from .packed_config import QUANT_METHOD, read_layouts
from .skeleton import place
from .tables import read_table, set_row_types, table_modules
from .ties import all_names, tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@usual_torch()
def load(
    path: Path | str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    prefill: str | None = None,
    activations: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> PreTrainedModel:
    """A transformers causal language model with SlabLinear modules, ready for `generate`.

    The model holds its own copy of the weights: the files may change or go afterwards. On a GPU its
    packed layers are prepared for activations of its dtype, so that the first call may be captured
    into a CUDA graph; on a CPU the first call prepares them.

    Args:
        path: a folder written by `compress` or `save`, or its name on the Hugging Face hub.
        device: where every tensor goes; "auto" is a GPU if there is one.
        dtype: of activations and of everything not packed; default: as stored.
        verify: compare every tensor with its checksum, where the folder has them.
        trust_remote_code: run the Python code in the folder, of which some models are made.
        revision, subfolder, token: of a model on the hub: a branch, tag or commit; the folder in
            its repository (or in a folder here); what opens private ones
            (`models.hub.HubArguments`).
        prefill: "packed", "dense" or "auto": whether dense copies of the packed weights serve many
            tokens, for 16 bits per weight of GPU memory (`slab_kernels.prepare`). Default:
            SLAB_KERNELS_PREFILL, else "packed".
        activations: "int8" or "exact": how x enters the products of packed layers on a CPU
            (`SlabLinear.prepare`). Default: SLAB_KERNELS_CPU_ACTIVATIONS, else "int8".

    Raises: CheckpointError, VersionError, ArchitectureError, DtypeError; nothing is used before it
        is checked. A packed weight that breaks the format is a FormatError and a CheckpointError at
        once. ArgumentError for another word; BackendError for prefill="dense" where no copy can be
        kept; RangeError for a layer that does not fit activations of `dtype`.
    """
    check_words(prefill, activations)
    device, dtype = resolve_device(device), None if dtype is None else weight_dtype(dtype)
    hub = HubArguments(revision, subfolder, token, trust_remote_code)
    checkpoint = Checkpoint(hub_folder(path, hub), verify=verify)
    layouts = read_layouts(checkpoint)
    model = packed_skeleton(checkpoint, layouts, trust_remote_code)
    _fill(model, check_tensors_fit(checkpoint, model), layouts, device, dtype)
    set_row_types(model, dtype or model.dtype)
    if dtype is not None:
        model.config.dtype = dtype
    if hasattr(model, "generation_config"):
        stored = read_generation_config(checkpoint.folder)
        model.generation_config = stored or model.generation_config
    model.config._name_or_path = str(checkpoint.folder)
    _attach_quantizer(model)
    prepare_opened(model, model.dtype, prefill, activations)
    return model.eval()


def _fill(
    model: PreTrainedModel,
    checkpoint: ModelCheckpoint,
    layouts: dict[str, PackedLayout],
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Read every tensor of the checkpoint into the skeleton, on `device`.

    dtype: of what is not packed; None: as stored.
    """
    for name, layout in layouts.items():
        module = model.get_submodule(name)
        for part, tensor in read_packed(checkpoint.get, name, layout).tensors().items():
            module._buffers[part] = tensor.to(device)
    for name, embedding in table_modules(model).items():
        for part, tensor in read_table(checkpoint.get, name, embedding)._asdict().items():
            embedding._buffers[part] = tensor.to(device)
    tied = tied_names(model)
    for name in checkpoint.entries.keys() - packed_names(model):
        t = checkpoint.get(name)
        t = t.to(device=device, dtype=dtype if dtype and t.is_floating_point() else t.dtype)
        check_finite(name, t, name in checkpoint.buffers)
        for alias in all_names(name, tied):
            place(model, alias, t)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    # Tables computed from the config, such as rotary frequencies, are in no checkpoint.
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)


def _attach_quantizer(model: PreTrainedModel) -> None:
    """Give the model what `from_pretrained` gives it: `save_pretrained` then writes checksums.

    Where this library could not register with transformers, the model does without.
    """
    from transformers.quantizers import auto

    known = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    if all(QUANT_METHOD in methods for methods in known):
        entry = model.config.quantization_config
        model.hf_quantizer = auto.AutoHfQuantizer.from_config(entry, pre_quantized=True)
