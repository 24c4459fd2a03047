"""Folders in the packed format: load and save. Everything read is checked before use."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from reprlib import repr as short

import torch
from torch import Tensor, nn

from ..device import resolve_device, usual_torch
from ..errors import ArchitectureError, ArgumentError, CheckpointError, ShapeError
from ..format import PackedLayout, PackedWeight, weight_dtype
from ..nn import SlabLinear
from ..paths import expanded
from .architecture import build_skeleton
from .blocks import find_blocks
from .folder import Checkpoint, check_counts, write_index
from .packed_config import QUANT_METHOD, quantization_config, read_layouts, reading
from .progress import Progress
from .shards import shard_name, write_json, write_shard
from .side_files import read_generation_config
from .source import config_dict, hub_folder, place
from .stored_names import Forms, StoredNames, stored_forms
from .ties import holds, settle, tied_names, untie


def packed_skeleton(
    checkpoint: Checkpoint, layouts: dict[str, PackedLayout], trust_remote_code: bool = False
) -> nn.Module:
    """The model on meta with a SlabLinear for every entry of `layouts`. Raises: CheckpointError where they do not fit."""
    check_counts(checkpoint.config, checkpoint.entries, checkpoint.folder)
    model = build_skeleton(checkpoint.folder, trust_remote_code=trust_remote_code)
    swap_in(model, layouts)
    return model


def swap_in(model: nn.Module, layouts: dict[str, PackedLayout]) -> None:
    """Put an empty SlabLinear on meta in place of every nn.Linear that `layouts` names. Raises: CheckpointError where they do not fit."""
    modules = dict(model.named_modules())
    for name, layout in layouts.items():
        linear = modules.get(name)
        if type(linear) is not nn.Linear:
            raise CheckpointError(
                f"config.json lists the compressed module {name!r}, which {type(model).__name__} has not as nn.Linear; "
                "packed folders open as the whole model, by AutoModelForCausalLM or slab_kernels.load"
            )
        if (linear.out_features, linear.in_features) != (layout.out_features, layout.in_features):
            raise CheckpointError(
                f"module {name} is {layout.out_features}x{layout.in_features} in quantization_config and "
                f"{linear.out_features}x{linear.in_features} in the model that config.json describes"
            )
        model.set_submodule(
            name,
            SlabLinear(layout, linear.bias is not None, device="meta", dtype=linear.weight.dtype),
        )
    tied = tied_names(model)
    if any(f"{name}.weight" in (*tied, *tied.values()) for name in layouts):
        untie(model)  # a packed weight is no other tensor


class ModelCheckpoint(Checkpoint):
    """A checkpoint under the names of a model, renamed and rebuilt as transformers does."""

    def __init__(self, checkpoint: Checkpoint, stored: StoredNames, buffers: set[str]):
        self.__dict__.update(checkpoint.__dict__)
        self._checkpoint, self._stored, self.buffers = checkpoint, stored, buffers
        self.entries = {}
        for name, origin in stored.origins.items():
            size = math.prod(origin.shape) * origin.dtype.itemsize
            first = checkpoint.entries[origin.stored[0]]
            self.entries[name] = replace(first, dtype=origin.dtype, shape=origin.shape, nbytes=size)

    def get(self, name: str) -> Tensor:
        return self._stored.get(name, self._checkpoint.get)

    def stored_forms(self, names: Iterable[str]) -> Forms:
        """What to write for tensors that stay as they are. Reading one raises CheckpointError if it is not finite."""
        origins = self._stored.origins
        buffers = {s for name in self.buffers & origins.keys() for s in origins[name].stored}
        return self._stored.forms(names, lambda s: read_dense(self._checkpoint, s, s in buffers))


def check_tensors_fit(checkpoint: Checkpoint, model: nn.Module) -> ModelCheckpoint:
    """Names and shapes of a folder against a skeleton, and dtypes of everything packed.

    Only tensors that the config calls tied and the folder holds apart are read; if they differ,
    `model` is untied.

    Returns: the checkpoint under the model's names.
    Raises: CheckpointError for missing, unexpected or misshapen tensors.
    """
    stored = StoredNames(model, checkpoint.entries)
    settle(model, stored, checkpoint.get)
    expected, packed = model.state_dict(), _packed_names(model)
    found = ModelCheckpoint(
        checkpoint, stored, {name for name, _ in model.named_buffers()} - packed
    )
    missing = sorted(expected.keys() - found.entries.keys() - tied_names(model).keys())
    for what, names in (("lacks", missing), ("holds the unexpected", sorted(stored.ignored))):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{checkpoint.folder} {what} tensor {names[0]!r}{more}; it does not belong to its config.json"
            )
    for name, entry in found.entries.items():
        want = expected[name]
        if entry.shape != tuple(want.shape):
            raise CheckpointError(
                f"tensor {name!r} has shape {list(entry.shape)}, expected {list(want.shape)}"
            )
        kinds = {entry.dtype.is_floating_point, want.dtype.is_floating_point}
        if entry.dtype != want.dtype and (name in packed or len(kinds) > 1):
            raise CheckpointError(f"tensor {name!r} is {entry.dtype}, expected {want.dtype}")
    return found


def packed_modules(model: nn.Module) -> dict[str, SlabLinear]:
    """Name -> module of every packed layer."""
    modules = model.named_modules(remove_duplicate=False)  # a layer that blocks share has two names
    return {name: module for name, module in modules if isinstance(module, SlabLinear)}


def _packed_names(model: nn.Module) -> set[str]:
    return {
        f"{name}.{part}"
        for name, module in packed_modules(model).items()
        for part in module.layout.tensors()
    }


def check(model: nn.Module) -> nn.Module:
    """The model, if every module that its config lists as packed is a SlabLinear.

    Raises: CheckpointError for a model that transformers opened without this library: its linears
    are random numbers; and for one in which something else took the place of a packed layer.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    entry = dict(config) if config is not None else {}
    if entry.get("quant_method") == QUANT_METHOD:
        packed = packed_modules(model)
        lost = [name for name in entry.get("modules") or {} if name not in packed]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            found = dict(model.named_modules()).get(lost[0])
            kind = "not there" if found is None else type(found).__name__
            seen = f"{lost[0]}{more} should be packed and is {kind}"
            if packed:
                raise CheckpointError(f"{seen}: it was replaced after the model had been opened")
            raise CheckpointError(
                f"{seen}: transformers opened this model without "
                "slab_kernels, so those weights are random numbers; import slab_kernels before from_pretrained, or use slab_kernels.load"
            )
    return model


def read_packed(get: Callable[[str], Tensor], name: str, layout: PackedLayout) -> PackedWeight:
    """One packed weight, checked to the last nibble.

    Raises: a FormatError that is a CheckpointError too; its message starts with the module's name.
    """
    tensors = {part: get(f"{name}.{part}") for part in layout.tensors()}
    with reading(name):
        packed = PackedWeight.from_tensors(
            tensors, layout.out_features, layout.in_features, layout.values, layout.group_size
        )
        if packed.layout != layout:
            raise ShapeError(f"its tensors make {packed.layout}, config.json says {layout}")
    return packed


def read_dense(checkpoint: Checkpoint, name: str, buffer: bool = False) -> Tensor:
    """A tensor that is not packed. Raises: CheckpointError."""
    t = checkpoint.get(name)
    check_finite(name, t, buffer)
    return t


def check_finite(name: str, t: Tensor, buffer: bool = False) -> None:
    """Raises: CheckpointError for NaN or infinite numbers. Reads `t` once and copies nothing.

    buffer: infinite numbers stand for no bound in what is no weight (masks, clamps), and may be there.
    """
    if not t.is_floating_point() or not t.numel():
        return
    ends = torch.stack(t.aminmax())
    if bool(ends.isnan().any()) or not (buffer or bool(ends.isfinite().all())):
        raise CheckpointError(f"tensor {name!r} holds NaN or infinite numbers of {t.dtype}")


@usual_torch()
def load(
    path: Path | str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A transformers causal language model with SlabLinear modules, ready for `generate`.

    Args:
        path: a folder written by `compress` or `save`, or its name on the Hugging Face hub.
        device: where every tensor goes; "auto" is a GPU if there is one.
        dtype: of activations and of everything not packed; default: as stored.
        verify: compare every tensor with its checksum, where the folder has them.
        trust_remote_code: run the Python code in the folder, of which some models are made.

    The model holds its own copy of the weights: the files may change or go afterwards.

    Raises: CheckpointError, VersionError, ArchitectureError, DtypeError; nothing is used before it
    is checked. A packed weight that breaks the format is a FormatError and a CheckpointError at once.
    """
    device, dtype = resolve_device(device), None if dtype is None else weight_dtype(dtype)
    checkpoint = Checkpoint(hub_folder(path), verify=verify)
    layouts = read_layouts(checkpoint)
    model = packed_skeleton(checkpoint, layouts, trust_remote_code)
    checkpoint = check_tensors_fit(checkpoint, model)
    for name, layout in layouts.items():
        packed, module = read_packed(checkpoint.get, name, layout), model.get_submodule(name)
        for part, tensor in packed.tensors().items():
            module._buffers[part] = tensor.to(device)
    packed_names, tied = _packed_names(model), tied_names(model)
    for name in checkpoint.entries.keys() - packed_names:
        t = checkpoint.get(name)
        t = t.to(device=device, dtype=dtype if dtype and t.is_floating_point() else t.dtype)
        check_finite(name, t, name in checkpoint.buffers)
        for alias in (name, *(n for n, other in tied.items() if other == name)):
            place(model, alias, t)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    for module in (
        model.modules()
    ):  # tables computed from the config, such as rotary frequencies, are in no checkpoint
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)
    if dtype is not None:
        model.config.dtype = dtype
    if hasattr(model, "generation_config"):
        model.generation_config = (
            read_generation_config(checkpoint.folder) or model.generation_config
        )
    model.config._name_or_path = str(checkpoint.folder)
    return model.eval()


def _check_described(
    model: nn.Module,
    layouts: dict[str, PackedLayout],
    state: dict[str, Tensor],
    tied: dict[str, str],
) -> None:
    """Raises: ArchitectureError if `load` would build another model from the config than this one
    with its `state`."""
    if type(model).__module__.startswith("transformers_modules."):
        return  # code of a folder's, which may not run here
    described = build_skeleton(config=copy.deepcopy(model.config))
    linears = {name for name, module in described.named_modules() if type(module) is nn.Linear}
    if strange := sorted(layouts.keys() - linears):
        raise ArchitectureError(
            f"{strange[0]!r} is packed, and {type(described).__name__} of the config has no such "
            "nn.Linear; put the parts of a FusedSlabLinear back where they were, and save then"
        )
    swap_in(described, layouts)
    names, expected = state.keys() - tied.keys(), described.state_dict()
    wanted = expected.keys() - (tied_names(described).keys() if tied else set())
    for what, strange in (("lacks", wanted - names), ("has the further", names - expected.keys())):
        if strange:
            raise ArchitectureError(
                f"the model {what} tensor {min(strange)!r} compared with its config, so the folder "
                "could not be opened; change the config to fit"
            )
    for name in names:
        if (found := tuple(state[name].shape)) != (wanted := tuple(expected[name].shape)):
            raise ArchitectureError(
                f"tensor {name!r} has shape {list(found)}, and {list(wanted)} by the model's config; "
                "change that to fit"
            )


@usual_torch()
def save(model: nn.Module, path: Path | str, tokenizer=None) -> None:
    """Write a model with SlabLinear modules as a folder that `load` opens; config.json last. `path` must be empty.

    Raises: ArchitectureError for a model without a Hugging Face config, or with other layers than
    its config describes; CheckpointError if nothing in the model is compressed, a weight is on meta,
    or the folder cannot be written; ValueError for a tokenizer that cannot be saved.
    """
    if not isinstance(model, nn.Module):
        raise ArchitectureError(
            f"{short(model)} is no model; give one of transformers with packed layers"
        )
    if not (tokenizer is None or hasattr(tokenizer, "save_pretrained")):
        raise ArgumentError(f"tokenizer={short(tokenizer)} must be one of transformers")
    modules = packed_modules(model)
    if not modules:
        check(model)
        raise CheckpointError(
            f"{type(model).__name__} holds no SlabLinear module; compress it first, or use save_pretrained"
        )
    if not hasattr(getattr(model, "config", None), "to_json_string"):
        raise ArchitectureError(
            f"{type(model).__name__} has no Hugging Face config, from which `load` could build it; "
            "keep its state_dict with torch.save instead"
        )
    state, tied = model.state_dict(), tied_names(model) if holds(model) else {}
    if empty := [name for name, t in state.items() if t.is_meta]:
        raise CheckpointError(f"{empty[0]!r} is on meta and has no values; load the model first")
    _check_described(model, {name: module.layout for name, module in modules.items()}, state, tied)
    out = expanded(path)
    with Progress(out, {}, resume=None):
        try:
            blocks_path, blocks = find_blocks(model)
            shards = [f"{blocks_path}.{index}." for index in range(len(blocks))]
        except ArchitectureError:
            shards = []
        names = state.keys() - tied.keys()
        tables = []
        for number, prefix in enumerate([*shards, ""]):
            part = {n: state[n] for n in names if n.startswith(prefix)}
            names -= part.keys()
            forms = stored_forms(model, part)
            specs = {n: (dtype, shape) for n, (dtype, shape, _) in forms.items()}
            made = lambda name, forms=forms: forms[name][2]()  # noqa: E731
            tables.append(write_shard(out / shard_name(number + 1, len(shards) + 1), specs, made))
        write_index(out, tables)
        if tokenizer is not None:
            tokenizer.save_pretrained(out)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(out)
        before = dict(getattr(model.config, "quantization_config", None) or {})
        config = config_dict(model)
        config["quantization_config"] = quantization_config(
            {name: m.layout for name, m in modules.items()}, before
        )
        write_json(out / "config.json", config)
