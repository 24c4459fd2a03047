"""A packed folder back to a dense checkpoint, which plain transformers and other engines open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..device import usual_torch
from ..format import PackedLayout, cast, weight_dtype
from ..paths import expanded
from .folder import WEIGHTS_KEY, Checkpoint, config_dtype, write_index
from .packed import ModelCheckpoint, check_tensors_fit, packed_skeleton, read_packed
from .packed_config import read_layouts, reading
from .progress import Progress
from .shards import write_json, write_shard
from .side_files import copy_side_files
from .source import hub_folder


@usual_torch()
def decompress(
    path: Path | str,
    out: Path | str,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
) -> list[str]:
    """Write the dense checkpoint that a packed folder stands for, shard by shard.

    Args:
        path: a folder written by `compress` or `save`, or its name on the Hugging Face hub.
        out: the folder to write, empty or not there; on failure nothing of it stays.
        dtype: of the weights that were packed; default: what config.json names, else that of most
        other weights.
        verify: compare what is read with its checksums.
        trust_remote_code: run the Python code in the folder, of which some models are made.

    Returns: files of the folder that were not carried along, each "name (reason)"; weights and
        hidden files are not named.
    Raises: CheckpointError, VersionError; RangeError if a weight does not fit `dtype`, DtypeError
        if `dtype` is none of weights.
    """
    dtype = None if dtype is None else weight_dtype(dtype)
    checkpoint, out = Checkpoint(hub_folder(path), verify=verify), expanded(out)
    layouts = read_layouts(checkpoint)
    owners = {
        f"{name}.{part}": name for name, layout in layouts.items() for part in layout.tensors()
    }
    dtype = dtype or config_dtype(checkpoint.config) or _usual_dtype(checkpoint, owners)
    checkpoint = check_tensors_fit(
        checkpoint, packed_skeleton(checkpoint, layouts, trust_remote_code)
    )
    forms = checkpoint.stored_forms(name for name in checkpoint.entries if name not in owners)

    def get(name: str) -> Tensor:
        if name in forms:
            return forms[name][2]()
        module = name.removesuffix(".weight")
        weight = read_packed(checkpoint.get, module, layouts[module]).dense()
        with reading(str(checkpoint.folder)):
            return cast(weight, dtype, name)

    with Progress(out, {}, resume=None):
        shards = _dense_shards(checkpoint, layouts, owners, dtype)
        write_index(out, [write_shard(out / file, specs, get) for file, specs in shards])
        skipped = copy_side_files(checkpoint.folder, out)
        config = dict(checkpoint.config)
        for key in ("quantization_config", WEIGHTS_KEY):
            config.pop(key, None)
        for key in {"dtype", *config} & {"dtype", "torch_dtype"}:
            config[key] = str(dtype).removeprefix("torch.")
        write_json(out / "config.json", config)
    return skipped


def _usual_dtype(checkpoint: Checkpoint, owners: dict[str, str]) -> torch.dtype:
    """The dtype of most floating-point numbers that are not packed."""
    count = Counter()
    for name, entry in checkpoint.entries.items():
        if name not in owners and entry.dtype.is_floating_point:
            count[entry.dtype] += entry.nbytes // entry.dtype.itemsize
    return count.most_common(1)[0][0] if count else torch.float16


def _dense_shards(
    checkpoint: ModelCheckpoint,
    layouts: dict[str, PackedLayout],
    owners: dict[str, str],
    dtype: torch.dtype,
) -> Iterator[tuple[str, dict]]:
    """Shard file, and name -> dtype and shape of the dense tensors to write in it.

    owners: packed tensor -> its module.
    """
    for file in sorted({entry.file for entry in checkpoint.entries.values()}):
        specs = {}
        for name, entry in checkpoint.entries.items():
            if name not in owners:
                if entry.file == file:
                    forms = checkpoint.stored_forms([name])
                    specs |= {stored: (kind, shape) for stored, (kind, shape, _) in forms.items()}
            elif name.endswith(".metadata") and entry.file == file:  # one in every packed weight
                layout = layouts[owners[name]]
                specs[f"{owners[name]}.weight"] = (dtype, (layout.out_features, layout.in_features))
        yield file, specs
