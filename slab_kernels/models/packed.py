"""Packed layers in a model: put in place of dense ones, checked, and read from a checkpoint.

Everything that is read is checked before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from reprlib import repr as short
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentTypeError, CheckpointError, ShapeError
from ..format import PackedLayout, PackedWeight
from ..nn import SlabLinear
from .experts import unstack_named
from .folder import Checkpoint
from .model_config import check_counts
from .packed_config import QUANT_METHOD, TABLES_KEY, module_entry, quantization_entry, reading
from .shards import TensorEntry
from .skeleton import folder_skeleton
from .stored_names import Forms, StoredNames
from .tables import (
    TableEntry,
    Tables,
    parse_tables,
    swap_tables,
    table_modules,
    table_names,
)
from .ties import settle, tied_names, untie

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packed_skeleton(
    checkpoint: Checkpoint, layouts: Mapping[str, PackedLayout], trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model on meta with a SlabLinear for every entry of `layouts`, and the folder's tables.

    Raises: CheckpointError where they do not fit the model, and as `folder_skeleton`.
    """
    check_counts(checkpoint.config, checkpoint.entries, checkpoint.folder)
    model = folder_skeleton(checkpoint.folder, trust_remote_code=trust_remote_code)
    swap_in(model, layouts, read_tables(checkpoint))
    return model


def read_tables(checkpoint: Checkpoint) -> dict[str, TableEntry]:
    """The embeddings of int8 rows of a packed folder. Raises: CheckpointError."""
    return parse_tables(quantization_entry(checkpoint), str(checkpoint.folder))


def swap_in(
    model: PreTrainedModel,
    layouts: Mapping[str, PackedLayout],
    tables: Tables = MappingProxyType({}),
) -> None:
    """Put empty modules on meta in place of what is packed.

    They are a SlabLinear for every nn.Linear that `layouts` names, among them those of stacked
    experts, and an Int8Embedding for every nn.Embedding that `tables` names.

    Raises: CheckpointError where they do not fit the model.
    """
    unstack_named(model, layouts)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for name, layout in layouts.items():
        linear = modules.get(name)
        if type(linear) is not nn.Linear:
            raise CheckpointError(
                f"config.json lists the compressed module {name!r}, which {type(model).__name__} "
                "has not as nn.Linear; packed folders open as the whole model, by "
                "AutoModelForCausalLM or slab_kernels.load"
            )
        if (linear.out_features, linear.in_features) != (layout.out_features, layout.in_features):
            raise CheckpointError(
                f"module {name} is {layout.out_features}x{layout.in_features} in "
                f"quantization_config and {linear.out_features}x{linear.in_features} in the model "
                "that config.json describes"
            )
        has_bias, dtype = linear.bias is not None, linear.weight.dtype
        model.set_submodule(name, SlabLinear(layout, has_bias, device="meta", dtype=dtype))
    swap_tables(model, tables)
    tied = tied_names(model)
    if any(f"{name}.weight" in (*tied, *tied.values()) for name in (*layouts, *tables)):
        untie(model)  # a packed weight is no other tensor


class ModelCheckpoint:
    """A checkpoint under the names of a model: tensors renamed and rebuilt as transformers does.

    entries: the model's name -> entry; the dtype, shape and size are those of the model's tensor,
        the file is that of its first part. buffers: names of the model's buffers.
    """

    def __init__(self, checkpoint: Checkpoint, stored: StoredNames, buffers: set[str]):
        self._checkpoint, self._stored, self.buffers = checkpoint, stored, buffers
        self.folder, self.config = checkpoint.folder, checkpoint.config
        self.entries = {}
        for name, origin in stored.origins.items():
            size = math.prod(origin.shape) * origin.dtype.itemsize
            first = checkpoint.entries[origin.stored[0]]
            self.entries[name] = replace(first, dtype=origin.dtype, shape=origin.shape, nbytes=size)

    def get(self, name: str) -> Tensor:
        """The tensor `name` of the model. Raises: as `Checkpoint.get`."""
        return self._stored.get(name, self._checkpoint.get)

    def stored_forms(self, names: Iterable[str]) -> Forms:
        """What to write for tensors that stay as they are.

        Making one raises CheckpointError if it holds numbers that are not finite.
        """
        origins = self._stored.origins
        buffers = {s for name in self.buffers & origins.keys() for s in origins[name].stored}

        def read(stored: str) -> Tensor:
            tensor = self._checkpoint.get(stored)
            check_finite(stored, tensor, stored in buffers)
            return tensor

        return self._stored.forms(names, read)


def check_tensors_fit(checkpoint: Checkpoint, model: PreTrainedModel) -> ModelCheckpoint:
    """Compare names and shapes of a folder with a skeleton, and dtypes of everything packed.

    Only tensors that the config calls tied and the folder holds apart are read; if they differ,
    `model` is untied.

    Returns: the checkpoint under the model's names.
    Raises: CheckpointError for missing, unexpected or misshapen tensors.
    """
    stored = StoredNames(model, checkpoint.entries)
    settle(model, stored, checkpoint.get)
    expected, packed = model.state_dict(), packed_names(model)
    buffers = {name for name, _ in model.named_buffers()} - packed
    found = ModelCheckpoint(checkpoint, stored, buffers)
    missing = sorted(expected.keys() - found.entries.keys() - tied_names(model).keys())
    for what, names in (("lacks", missing), ("holds the unexpected", sorted(stored.ignored))):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{checkpoint.folder} {what} tensor {names[0]!r}{more}; it does not belong to its "
                "config.json"
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


def model_entries(
    checkpoint: Checkpoint, layouts: Mapping[str, PackedLayout]
) -> dict[str, TensorEntry]:
    """The tensors of a packed folder, those of packed modules by the model's names.

    `save_pretrained` of transformers may store them under others (for Mixtral, whose experts lie in
    `block_sparse_moe` there). Only then the model is built, without its weights.

    Raises: as `packed_skeleton`.
    """
    names = {f"{name}.{part}" for name, layout in layouts.items() for part in layout.tensors()}
    missing, entries = names - checkpoint.entries.keys(), dict(checkpoint.entries)
    if not missing:
        return entries
    origins = StoredNames(packed_skeleton(checkpoint, layouts), checkpoint.entries).origins
    for name in missing & origins.keys():
        entries[name] = entries.pop(origins[name].stored[0])
    return entries


def packed_modules(model: nn.Module) -> dict[str, SlabLinear]:
    """Name -> module of every packed layer."""
    modules = model.named_modules(remove_duplicate=False)  # a layer that blocks share has two names
    return {name: module for name, module in modules if isinstance(module, SlabLinear)}


def note_layouts(model: nn.Module) -> None:
    """Let the model's config say what its packed layers hold now, so that save_pretrained writes
    it."""
    owners = (getattr(model, "config", None), getattr(model, "hf_quantizer", None))
    layers = packed_modules(model)
    for owner in owners:
        entry: Any = getattr(owner, "quantization_config", None)
        stored = entry if isinstance(entry, dict) else vars(entry) if entry is not None else {}
        if modules := stored.get("modules"):
            now = {name: layer for name, layer in layers.items() if name in modules}
            found = {name: module_entry(layer.layout) for name, layer in now.items()}
            stored["modules"] = {**modules, **found}


def packed_names(model: nn.Module) -> set[str]:
    """The names of all packed tensors."""
    return {
        f"{name}.{part}"
        for name, module in packed_modules(model).items()
        for part in module.layout.tensors()
    } | table_names(model)


def check(model: nn.Module) -> nn.Module:
    """The model, if every module that its config lists as packed is a SlabLinear.

    Raises: CheckpointError for a model that transformers opened without this library: its linears
        are random numbers; and for one in which something else took the place of a packed layer.
        ArgumentTypeError for what is no model, such as the name of a folder.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"check takes an opened model, not {type(model).__name__} {short(model)}; a folder is "
            "checked by `slab-kernels check FOLDER`"
        )
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    entry = dict(config) if config is not None else {}
    if entry.get("quant_method") != QUANT_METHOD:
        return model
    packed = packed_modules(model)
    tables = table_modules(model)
    lost = [name for name in entry.get("modules") or {} if name not in packed]
    lost += [name for name in entry.get(TABLES_KEY) or {} if name not in tables]
    if not lost:
        return model
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    found = dict(model.named_modules()).get(lost[0])
    kind = "not there" if found is None else type(found).__name__
    seen = f"{lost[0]}{more} should be packed and is {kind}"
    if packed:
        raise CheckpointError(f"{seen}: it was replaced after the model had been opened")
    raise CheckpointError(
        f"{seen}: transformers opened this model without slab_kernels, so those weights are random "
        "numbers; import slab_kernels before from_pretrained, or use slab_kernels.load"
    )


def read_packed(get: Callable[[str], Tensor], name: str, layout: PackedLayout) -> PackedWeight:
    """The packed weight of the module `name`, checked to the last nibble.

    get: reads one tensor by its name.

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


def check_finite(name: str, t: Tensor, buffer: bool = False) -> None:
    """Refuse NaN and infinite numbers; `t` is read once and nothing is copied.

    buffer: whether `t` is no weight; there infinite numbers stand for "no bound" (masks, clamps),
        and may be.

    Raises: CheckpointError.
    """
    if not t.is_floating_point() or not t.numel():
        return
    ends = torch.stack(t.aminmax())
    if bool(ends.isnan().any()) or not (buffer or bool(ends.isfinite().all())):
        raise CheckpointError(f"tensor {name!r} holds NaN or infinite numbers of {t.dtype}")
