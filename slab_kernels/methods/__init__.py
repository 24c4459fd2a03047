"""Decomposition methods: pure functions (weight, input statistics, settings) -> Decomposition.

    table           `METHODS`: every method's name, function, settings and needs
    config          the settings that all methods have
    settings        `LayerSettings`, the settings of one layer checked beside each other
    inputs          `InputStats`, what a method may know of a layer's inputs
    solvers/        algorithms that several methods share

Every other file is a method or two: slab (ours, the default), slab_paper, threebasil (with alps),
hassle_free, oats (with sslc), slim, eora, sparsegpt, wanda, magnitude. `decompose` is the public
function, and `decompose_layer` the same for checked settings.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CalibrationError, DtypeError, RangeError, ShapeError
from ..format import AUTO, WEIGHT_DTYPES, Decomposition
from .config import Config
from .inputs import InputStats
from .settings import LayerSettings
from .table import METHODS, Method, all_methods, check_options, find_method, origins, problems

__all__ = [
    "METHODS",
    "Config",
    "InputStats",
    "LayerSettings",
    "Method",
    "all_methods",
    "check_options",
    "decompose",
    "decompose_layer",
    "find_method",
    "origins",
    "problems",
]

USUAL_EXPONENTS = 24  # of a weight's largest number; others are scaled by a power of two meanwhile


@torch.no_grad()
def decompose(
    weight: Tensor,
    stats: InputStats | None = None,
    method: str = "slab",
    pattern: str = "2:4",
    rank: int = 1,
    values: str = "fp16",
    group_size: int | str | None = AUTO,
    planes: int = 1,
    adapter_rank: int | None = None,
    adapter_values: str = "int8",
    **options,
) -> Decomposition:
    """Decompose one linear weight.

    Args:
        weight: [N,K] (out_features, in_features), any float dtype and device; not changed.
        stats: of the layer's inputs; what a method needs is `Method.statistics`.
        method: a name of `all_methods()`.
        pattern: "n:m" to keep n of every m inputs, or "p%" to remove p percent of every row.
        rank: of U V^T, 0 for none; methods without a sign term ignore this and `planes`.
        values: type of the kept values; "int8", "int4" and "int3" give a Decomposition on their
            integer grid.
        group_size: inputs per scale, 32, 64, 128 or None for one scale per row; only for integers.
            "auto" is the largest of them that divides K, else the one that pads it least.
        planes: signs of a pruned entry, 1 to 3, each worth half the one before.
        adapter_rank: of P Q^T; None is the method's own (`Method.adapter`), 0 is none. Methods
            without one take None or 0.
        adapter_values: how P and Q will be stored, "int8" (the codes of a row share a power of
            two) or "fp16".
        options: what only this method has (`Method.options`).

    Returns: fp32 tensors on the weight's device. The decomposition carries `values`, the group
        size, `planes` and `adapter_values`, and `pack` stores it so.

    Raises: MethodError, PatternError, ShapeError, RangeError, ValueTypeError, DtypeError or
        CalibrationError (all ValueErrors), before anything is computed.
    """
    settings = LayerSettings.from_keywords(
        method=method,
        pattern=pattern,
        rank=rank,
        values=values,
        group_size=group_size,
        planes=planes,
        adapter_rank=adapter_rank,
        adapter_values=adapter_values,
        **options,
    )
    return decompose_layer(weight, stats, settings)


@torch.no_grad()
def decompose_layer(
    weight: Tensor, stats: InputStats | None, settings: LayerSettings
) -> Decomposition:
    """`decompose` with its settings in one object.

    A weight far from 1 is scaled by a power of two meanwhile, since its squares would not be fp32.
    """
    N, K = _check_weight(weight)
    chosen, config = settings.chosen, settings.config((N, K))
    _check_stats(weight, stats, chosen, config.rank)
    if isinstance(stats, InputStats):
        stats = stats.to(weight.device)
    W = weight.detach().float()
    shift = _shift(W)
    if not shift:
        return _with_types(chosen.function(W, stats, config), config)
    if isinstance(stats, InputStats) and stats.drift is not None:
        stats = replace(stats, drift=torch.ldexp(stats.drift, torch.tensor(-shift)))
    found = chosen.function(torch.ldexp(W, torch.tensor(-shift)), stats, config)

    def back(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.ldexp(t, torch.tensor(shift))

    S = torch.ldexp(found.S, torch.tensor(shift))
    found = replace(found, S=S, scales=back(found.scales), U=back(found.U), P=back(found.P))
    return _with_types(found, config)


def _with_types(found: Decomposition, config: Config) -> Decomposition:
    """What a method found, with the types that it is to be stored in, which none has to note.

    Kept values that a method has put on a grid are said to lie there by the method itself. A method
    of another package may leave integers to packing.
    """
    adapter = config.stored_adapter if found.P is not None else None
    found = replace(found, adapter_values=adapter)
    if found.scales is not None:
        return found
    group_size = config.grid.group_size if config.grid else None
    return replace(found, values=config.values, group_size=group_size)


def _shift(W: Tensor) -> int:
    """The power of two by which a weight is far from 1, or 0 where its numbers are usual."""
    exponent = int(torch.frexp(W.abs().max()).exponent)
    return min(max(exponent, -120), 120) if abs(exponent) > USUAL_EXPONENTS else 0


def _check_weight(weight: Tensor) -> tuple[int, int]:
    """(N, K). Raises: DtypeError, ShapeError or RangeError for what is no weight of a linear."""
    if not isinstance(weight, Tensor):
        raise DtypeError(
            f"weight is a {type(weight).__name__}, expected a torch tensor "
            "[out_features, in_features]"
        )
    if weight.dim() != 2 or 0 in weight.shape:
        raise ShapeError(
            f"weight has shape {tuple(weight.shape)}, expected [out_features, in_features]"
        )
    if weight.dtype not in WEIGHT_DTYPES:
        raise DtypeError(f"weight is {weight.dtype}, expected a float dtype of 16 bits or more")
    if weight.is_meta:
        raise DtypeError("weight is on meta and has no values; load it first")
    if bad := int((~weight.isfinite()).sum()):
        raise RangeError(
            f"the weight has {bad} NaN or infinite entries of {weight.numel()}; "
            "its checkpoint is damaged"
        )
    return weight.shape[0], weight.shape[1]


def _check_stats(weight: Tensor, stats: InputStats | None, method: Method, rank: int) -> None:
    """Raises: CalibrationError for statistics that the method cannot use with this weight."""
    N, K = weight.shape
    if method.statistics == "none":
        return
    if method.statistics == "gram":
        what, attribute = "the Gram matrix", "gram"
    else:
        what, attribute = "the mean squares", "mean_square"
    if not isinstance(stats, InputStats) or getattr(stats, attribute) is None:
        raise CalibrationError(
            f"method {method.name!r} needs {what} of the layer's inputs: update() an "
            f"InputStats(in_features={K}, needs={method.statistics!r}) with them and pass it as "
            "stats"
        )
    if stats.in_features != K:
        raise CalibrationError(
            f"statistics of in_features={stats.in_features} do not fit a weight of {N} x {K}"
        )
    if stats.drift is not None and stats.drift.shape != weight.shape:
        raise CalibrationError(
            f"drift has shape {tuple(stats.drift.shape)}, expected that of the weight, {N} x {K}"
        )
    given = stats.input_factor
    if given is not None and rank and given.shape != (K, rank):
        raise CalibrationError(
            f"input_factor has shape {tuple(given.shape)}, expected that of V, {K} x rank={rank}"
        )
