"""A corner of one compressed weight and the parts that it was split into, small enough for a
results file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..format import unpack
from ..models.folder import Checkpoint, hub_folder
from ..models.hub import ON_MAIN, HubArguments
from ..models.packed import read_packed
from ..models.packed_config import read_layouts
from ..models.source import open_source

LEVELS = 127  # a number is stored as one of -LEVELS to LEVELS steps


def weight_crop(
    folder: Path | str, dense: Path | str, size: int = 64, hub: HubArguments = ON_MAIN
) -> dict[str, Any]:
    """The first `size` rows and columns of a weight W and of its parts, W ≈ S + (U Vᵀ) ⊙ B + P Qᵀ.

    The weight is that of the packed module in the middle of the model.

    Args:
        folder: a packed folder. dense: the model that it was compressed from. hub: how that is
            found on the hub, and whether code in its folder may run.

    Returns: {"layer", "shape" of the crop, "step": the number that one level stands for, "parts":
        name -> int8 levels, row by row, in base64}. The parts are "weight", "sparse", "signs",
        "adapter" (where there is one) and "left", which is the weight without the others.
    Raises: CheckpointError for a folder that cannot be used; ArgumentError for a module that has
        another shape in the dense model.
    """
    checkpoint = Checkpoint(hub_folder(folder))
    layouts = read_layouts(checkpoint)
    layer = list(layouts)[len(layouts) // 2]
    parts = unpack(read_packed(checkpoint.get, layer, layouts[layer]))
    source = open_source(dense, hub)
    source.unstack_named(layouts)
    W = source.get(f"{layer}.weight").float()
    if W.shape != parts.S.shape:
        raise ArgumentError(
            f"{layer} is {list(W.shape)} in {dense} and {list(parts.S.shape)} in {folder}; "
            "give the model that was compressed"
        )
    N, K = min(size, W.shape[0]), min(size, W.shape[1])
    shown = {"weight": W[:N, :K], "sparse": parts.S[:N, :K]}
    if parts.B is not None and parts.U is not None and parts.V is not None:
        levels = parts.B[:N, :K] * 2.0 ** (1 - parts.planes)
        shown["signs"] = (parts.U[:N] @ parts.V[:K].T) * levels
    if parts.P is not None and parts.Q is not None:
        shown["adapter"] = parts.P[:N] @ parts.Q[:K].T
    explained = sum(part for name, part in shown.items() if name != "weight")
    shown["left"] = shown["weight"] - explained
    largest = max(float(part.abs().max()) for part in shown.values())
    step = largest / LEVELS or 1.0
    stored = {name: _stored(part, step) for name, part in shown.items()}
    return {"layer": layer, "shape": [N, K], "step": step, "parts": stored}


def _stored(part: Tensor, step: float) -> str:
    levels = (part / step).round().to(torch.int8).contiguous()
    return base64.b64encode(levels.numpy().tobytes()).decode()
