"""`slab_kernels.save`: a model with SlabLinear modules written as a packed folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..device import usual_torch
from ..errors import ArchitectureError, ArgumentError, CheckpointError
from ..format import PackedLayout
from ..nn import SlabLinear
from ..paths import expanded
from .blocks import find_blocks
from .experts import unstack_named
from .folder import write_index
from .model_config import config_dict
from .output import OutputFolder
from .packed import check, packed_modules, packed_names, swap_in
from .packed_config import quantization_config
from .shards import TensorEntry, shard_name, write_json, write_shard
from .skeleton import config_skeleton
from .stored_names import Form, stored_forms
from .tables import Tables, tables_of
from .ties import holds, tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@usual_torch()
def save(model: nn.Module, path: Path | str, tokenizer: Any = None) -> None:
    """Write a model with SlabLinear modules as a folder that `load` opens; config.json last.

    Args:
        model: of transformers.
        path: an empty folder, or one that is not there.
        tokenizer: one of transformers, to be written beside the model.

    Raises: ArchitectureError for a model without a Hugging Face config, or with other layers than
        its config describes; CheckpointError if nothing in the model is compressed, a weight is on
        meta, or the folder cannot be written; ArgumentError for a tokenizer that cannot be saved.
    """
    if not isinstance(model, nn.Module):
        raise ArchitectureError(
            f"{short(model)} is no model; give one of transformers with packed layers"
        )
    if not (tokenizer is None or hasattr(tokenizer, "save_pretrained")):
        raise ArgumentError(f"tokenizer={short(tokenizer)} must be one of transformers")
    modules = packed_modules(model)
    _check_packed(model, modules)
    state, tied = model.state_dict(), tied_names(model) if holds(model) else {}
    if empty := [name for name, t in state.items() if t.is_meta]:
        raise CheckpointError(f"{empty[0]!r} is on meta and has no values; load the model first")
    layouts = {name: module.layout for name, module in modules.items()}
    _check_described(model, layouts, tables_of(model), state, tied)
    out = expanded(path)
    with OutputFolder(out, {}, resume=None):
        _write_shards(model, {n: t for n, t in state.items() if n not in tied}, out)
        _write_rest(model, modules, tokenizer, out)


def _check_packed(model: nn.Module, modules: Mapping[str, SlabLinear]) -> None:
    """Refuse a model that cannot be written as a packed folder.

    Raises: CheckpointError, ArchitectureError.
    """
    if not modules:
        check(model)
        raise CheckpointError(
            f"{type(model).__name__} holds no SlabLinear module; compress it first, or use "
            "save_pretrained"
        )
    if not hasattr(getattr(model, "config", None), "to_json_string"):
        raise ArchitectureError(
            f"{type(model).__name__} has no Hugging Face config, from which `load` could build it; "
            "keep its state_dict with torch.save instead"
        )


def _check_described(
    model: PreTrainedModel,
    layouts: Mapping[str, PackedLayout],
    tables: Tables,
    state: Mapping[str, Tensor],
    tied: Mapping[str, str],
) -> None:
    """Refuse a model of which `load` would build another one from the config.

    state: the model's tensors. tied: those of them that are not written.

    Raises: ArchitectureError.
    """
    if type(model).__module__.startswith("transformers_modules."):
        return  # code of a folder's, which may not run here
    described = config_skeleton(copy.deepcopy(model.config))
    unstack_named(described, layouts)
    linears = {name for name, module in described.named_modules() if type(module) is nn.Linear}
    if strange := sorted(layouts.keys() - linears):
        raise ArchitectureError(
            f"{strange[0]!r} is packed, and {type(described).__name__} of the config has no such "
            "nn.Linear; merge LoRA first (model = model.merge_and_unload()), put the parts of a "
            "FusedSlabLinear back where they were, and save then"
        )
    swap_in(described, layouts, tables)
    names, expected = state.keys() - tied.keys(), described.state_dict()
    wanted = expected.keys() - (tied_names(described).keys() if tied else set())
    for what, differing in (
        ("lacks", wanted - names),
        ("has the further", names - expected.keys()),
    ):
        if differing:
            raise ArchitectureError(
                f"the model {what} tensor {min(differing)!r} compared with its config, so the "
                "folder could not be opened; change the config to fit"
            )
    for name in names:
        found, asked = list(state[name].shape), list(expected[name].shape)
        if found != asked:
            raise ArchitectureError(
                f"tensor {name!r} has shape {found}, and {asked} by the model's config; "
                "change that to fit"
            )


def _write_shards(model: PreTrainedModel, tensors: Mapping[str, Tensor], out: Path) -> None:
    """Write a shard for every decoder block, one for what is outside them, and the index."""
    try:
        path, blocks = find_blocks(model)
        prefixes = [f"{path}.{index}." for index in range(len(blocks))]
    except ArchitectureError:
        prefixes = []
    left, tables = dict(tensors), []
    for number, prefix in enumerate([*prefixes, ""], start=1):
        inside = [name for name in left if name.startswith(prefix)]
        part = {name: left.pop(name) for name in inside}
        file = out / shard_name(number, len(prefixes) + 1)
        tables.append(_write_shard(model, part, file))
    write_index(out, tables)


def _write_shard(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], file: Path
) -> dict[str, TensorEntry]:
    # Packed tensors keep the model's names, as `compress` writes them; the rest those of the
    # checkpoint that the model came from.
    packed = packed_names(model)
    forms = stored_forms(model, {name: t for name, t in tensors.items() if name not in packed})
    for name in tensors.keys() & packed:
        t = tensors[name]
        forms[name] = Form(t.dtype, tuple(t.shape), partial(tensors.__getitem__, name))
    specs = {name: form.spec for name, form in forms.items()}
    return write_shard(file, specs, lambda name: forms[name].make())


def _write_rest(
    model: PreTrainedModel, modules: Mapping[str, SlabLinear], tokenizer: Any, out: Path
) -> None:
    """Write the tokenizer, the generation config and at last config.json."""
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(out)
    before = dict(getattr(model.config, "quantization_config", None) or {})
    layouts = {name: module.layout for name, module in modules.items()}
    config = config_dict(model)
    config["quantization_config"] = quantization_config(layouts, before, tables_of(model))
    write_json(out / "config.json", config)
