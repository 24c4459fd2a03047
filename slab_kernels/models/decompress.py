"""A packed folder back to a dense checkpoint, which plain transformers and other engines open."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..device import usual_torch
from ..format import TABLE_NAMES, PackedLayout, cast, weight_dtype
from ..nn import Int8Embedding
from ..paths import expanded
from .experts import Held, Slices, expert_slices, stored_slices
from .folder import Checkpoint, hub_folder, write_index
from .hub import HubArguments
from .model_config import WEIGHTS_KEY, config_dtype
from .output import OutputFolder
from .packed import (
    ModelCheckpoint,
    check_tensors_fit,
    packed_skeleton,
    read_packed,
    read_tables,
)
from .packed_config import read_layouts, reading
from .shards import TensorEntry, write_json, write_shard
from .side_files import copy_side_files
from .stored_names import Form, Forms
from .tables import read_table, table_modules, table_names
from .ties import retie_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD, PACKED_CARD = "README.md", "README.packed.md"


@usual_torch()
def decompress(
    path: Path | str,
    out: Path | str,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> list[str]:
    """Write the dense checkpoint that a packed folder stands for, shard by shard.

    Args:
        path: a folder written by `compress` or `save`, or its name on the Hugging Face hub.
        out: the folder to write, empty or not there; on failure nothing of it stays.
        dtype: of the weights that were packed; default: what config.json names, else that of most
            other weights.
        verify: compare what is read with its checksums.
        trust_remote_code: run the Python code in the folder, of which some models are made.
        revision, subfolder, token: of a model on the hub: a branch, tag or commit; the folder in
            its repository (or in a folder here); what opens private ones
            (`models.hub.HubArguments`).
        progress: called with the number of tensors written and of all, after each of them.

    Returns: files of the folder that were not carried along, each "name (reason)"; weights and
        hidden files are not named.
    Raises: CheckpointError, VersionError; RangeError if a weight does not fit `dtype`, DtypeError
        if `dtype` is none of weights.
    """
    dtype = None if dtype is None else weight_dtype(dtype)
    hub = HubArguments(revision, subfolder, token, trust_remote_code)
    packed, out = Checkpoint(hub_folder(path, hub), verify=verify), expanded(out)
    layouts = read_layouts(packed)
    dtype = dtype or config_dtype(packed.config)
    skeleton = packed_skeleton(packed, layouts, trust_remote_code)
    owners = _owners(layouts) | dict.fromkeys(table_names(skeleton), "")
    dtype = dtype or _usual_dtype(packed, owners)
    checkpoint = check_tensors_fit(packed, skeleton)
    slices = expert_slices(skeleton)
    shards = _dense_shards(checkpoint, layouts, table_modules(skeleton), dtype, slices)
    _put_experts(shards, skeleton, slices)
    total = sum(map(len, shards.values()))
    steps = itertools.count(1)

    def step() -> None:
        if progress is not None:
            progress(next(steps), total)

    with OutputFolder(out, {}, resume=None):
        write_index(out, [_write(out / file, forms, step) for file, forms in shards.items()])
        skipped = copy_side_files(checkpoint.folder, out)
        _set_card_aside(out)
        config = dict(checkpoint.config)
        for key in ("quantization_config", WEIGHTS_KEY):
            config.pop(key, None)
        if any(entry.tied for entry in read_tables(packed).values()):
            retie_config(config)
        for key in {"dtype", *config} & {"dtype", "torch_dtype"}:
            config[key] = str(dtype).removeprefix("torch.")
        write_json(out / "config.json", config)
    return skipped


def _set_card_aside(out: Path) -> None:
    """Rename the card that `compress` wrote, which says how a packed folder is opened.

    The base model's card, if the folder has one, gets its name README.md back.
    """
    card = out / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if "\nlibrary_name: slab-kernels\n" not in text:
        return
    card.rename(out / PACKED_CARD)
    named = re.search(r"The card of the base model is \[(README\.base(?:\.\d+)?\.md)\]", text)
    if named and (out / named[1]).is_file():
        (out / named[1]).rename(card)


def _write(file: Path, forms: Forms, step: Callable[[], None]) -> dict[str, TensorEntry]:
    """Write one shard, and call `step` for every tensor; returns the shard's table."""

    def get(name: str) -> Tensor:
        tensor = forms[name].make()
        step()
        return tensor

    return write_shard(file, {name: form.spec for name, form in forms.items()}, get)


def _usual_dtype(checkpoint: Checkpoint, packed: Container[str]) -> torch.dtype:
    """The dtype of most floating-point numbers that are not packed."""
    count: Counter[torch.dtype] = Counter()
    for name, entry in checkpoint.entries.items():
        if name not in packed and entry.dtype.is_floating_point:
            count[entry.dtype] += entry.nbytes // entry.dtype.itemsize
    return count.most_common(1)[0][0] if count else torch.float16


def _owners(layouts: dict[str, PackedLayout]) -> dict[str, str]:
    """Packed tensor -> its module."""
    return {f"{name}.{part}": name for name, layout in layouts.items() for part in layout.tensors()}


def _dense_shards(
    checkpoint: ModelCheckpoint,
    layouts: dict[str, PackedLayout],
    tables: Mapping[str, Int8Embedding],
    dtype: torch.dtype,
    slices: Slices,
) -> dict[str, Forms]:
    """Shard file -> the dense tensors to write in it, those of the packed file of that name.

    dtype: of the weights that were packed. slices: what experts have has the model's names here.
    """

    def weight(module: str) -> Form:
        layout = layouts[module]

        def make() -> Tensor:
            dense = read_packed(checkpoint.get, module, layout).dense()
            with reading(str(checkpoint.folder)):
                return cast(dense, dtype, f"{module}.weight")

        return Form(dtype, (layout.out_features, layout.in_features), make)

    def embedding(module: str) -> Form:
        table = tables[module]

        def make() -> Tensor:
            dense = read_table(checkpoint.get, module, table).dense()
            with reading(str(checkpoint.folder)):
                return cast(dense, dtype, f"{module}.weight")

        return Form(dtype, (table.num_embeddings, table.embedding_dim), make)

    owners = _owners(layouts)
    shards: dict[str, Forms] = {entry.file: {} for entry in checkpoint.entries.values()}
    for name, entry in checkpoint.entries.items():
        module, _, part = name.rpartition(".")
        if module in tables and part in TABLE_NAMES:
            if part == "codes":
                shards[entry.file][f"{module}.weight"] = embedding(module)
        elif name not in owners:
            forms = checkpoint.stored_forms([name])
            if name in slices:  # a bias, which a stack is made of, whatever it is called here
                forms = dict.fromkeys([name], *forms.values())
            shards[entry.file] |= forms
        elif name.endswith(".metadata"):  # one in every packed weight
            shards[entry.file][f"{owners[name]}.weight"] = weight(owners[name])
    return dict(sorted(shards.items()))


def _put_experts(shards: dict[str, Forms], skeleton: PreTrainedModel, slices: Slices) -> None:
    """Give weights and biases of experts' linears in `shards` the form that transformers has."""
    if not slices:
        return
    files = {name: file for file, forms in shards.items() for name in forms if name in slices}
    for stored, held in stored_slices(skeleton, slices).items():
        parts = {name: shards[files[name]].pop(name) for name in held.names}
        shards[files[held.names[0]]][stored] = _joined(held, parts, slices)


def _joined(held: Held, parts: Forms, slices: Slices) -> Form:
    """What stores the weights or biases `parts`, which are made when its turn comes."""
    first = parts[held.names[0]]
    if not held.whole:
        return first

    def make() -> Tensor:
        return held.joined({name: part.make() for name, part in parts.items()}, slices)

    empty = {name: torch.empty(part.shape, device="meta") for name, part in parts.items()}
    return Form(first.dtype, tuple(held.joined(empty, slices).shape), make)
