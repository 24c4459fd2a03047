"""Decomposition methods: pure functions (weight, input statistics, settings) -> Decomposition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..calibration import CalibrationError, InputStats
from ..format import (
    GROUP_SIZES,
    INTEGER_RANGES,
    VALUE_TYPES,
    Decomposition,
    DtypeError,
    RangeError,
    ShapeError,
    ValueTypeError,
)
from .config import Config
from .magnitude import magnitude
from .slab import SlabConfig, slab
from .slab_paper import SlabPaperConfig, slab_paper
from .sparsegpt import SparseGPTConfig, sparsegpt
from .wanda import wanda


class MethodError(ValueError):
    """An unknown method, or an option that the method does not have."""


@dataclass(frozen=True)
class Method:
    """One row of METHODS. statistics: "none", "diagonal" or "gram", what `function` reads of InputStats."""

    name: str
    function: Callable[[Tensor, InputStats | None, Config], Decomposition]
    config: type[Config]
    statistics: str
    description: str
    ranked: bool = False


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "slab",
            slab,
            SlabConfig,
            "gram",
            "SLaB's format solved in the Gram metric (ours, the default)",
            True,
        ),
        Method(
            "slab-paper",
            slab_paper,
            SlabPaperConfig,
            "diagonal",
            "SLaB as published (arXiv 2604.04493)",
            True,
        ),
        Method("sparsegpt", sparsegpt, SparseGPTConfig, "gram", "SparseGPT (arXiv 2301.00774)"),
        Method("wanda", wanda, Config, "diagonal", "Wanda (arXiv 2306.11695)"),
        Method("magnitude", magnitude, Config, "none", "largest absolute values"),
    )
}


@torch.no_grad()
def decompose(
    weight: Tensor,
    stats: InputStats | None = None,
    method: str = "slab",
    pattern: str = "2:4",
    rank: int = 1,
    values: str = "fp16",
    group_size: int | None = 128,
    **options,
) -> Decomposition:
    """Decompose one linear weight.

    Args:
        weight: [N,K] (out_features, in_features), any float dtype and device; not changed.
        stats: of the layer's inputs; what a method needs is `METHODS[method].statistics`.
        method: a key of METHODS.
        pattern: "n:m" to keep n of every m inputs, or "p%" to remove p percent of every row.
        rank: of U V^T; methods without it ignore this.
        values: type of the kept values; "int8" and "int4" give a Decomposition on its integer grid.
        group_size: inputs a scale, 32, 64, 128 or None for one scale a row; only for integers.
        options: fields of `METHODS[method].config`.

    Returns: fp32 tensors on the weight's device.

    Raises: MethodError, PatternError, ShapeError, RangeError, ValueTypeError, DtypeError or CalibrationError (all
        ValueErrors), before anything is computed.
    """
    if method not in METHODS:
        raise MethodError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
    chosen = METHODS[method]
    known = [field.name for field in fields(chosen.config)]
    own = [name for name in known if name not in ("pattern", "rank", "values", "group_size")]
    if unknown := [name for name in options if name not in own]:
        raise MethodError(
            f"method {method!r} has no option {unknown[0]!r}; it has {', '.join(own) if own else 'none'}"
        )
    config = chosen.config(pattern, rank, values, group_size, **options)
    _check_weight(weight)
    _check_config(weight, config, chosen)
    _check_stats(weight, stats, chosen)
    if stats is not None:
        stats = stats.to(weight.device)
    return chosen.function(weight.detach().float(), stats, config)


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 2 or 0 in weight.shape:
        raise ShapeError(f"weight has shape {tuple(weight.shape)}, expected [out_features, in_features]")
    if not weight.is_floating_point():
        raise DtypeError(f"weight is {weight.dtype}, expected a float dtype")
    if bad := int((~weight.isfinite()).sum()):
        raise RangeError(
            f"the weight has {bad} NaN or infinite entries of {weight.numel()}; its checkpoint is damaged"
        )


def _check_config(weight: Tensor, config: Config, method: Method) -> None:
    N, K = weight.shape
    pattern = config.parsed
    if pattern.structured and K % pattern.group:
        raise ShapeError(
            f"in_features={K} must be a multiple of {pattern.group} for pattern {config.pattern!r}; leave this layer "
            "dense or choose an unstructured pattern such as '50%'"
        )
    if method.ranked and not 1 <= config.rank <= min(N, K):
        raise ShapeError(f"rank={config.rank} must lie in 1 .. {min(N, K)} for a weight of {N} x {K}")
    if config.values not in VALUE_TYPES:
        raise ValueTypeError(f"values={config.values!r} is unknown; choose one of {', '.join(VALUE_TYPES)}")
    if config.values in INTEGER_RANGES and config.group_size is not None:
        if config.group_size not in GROUP_SIZES:
            raise ShapeError(
                f"group_size={config.group_size} must be one of {', '.join(map(str, GROUP_SIZES))} or None"
            )
        if pattern.structured and config.group_size % pattern.group:
            raise ShapeError(
                f"group_size={config.group_size} must be a multiple of {pattern.group} for pattern {config.pattern!r}"
            )


def _check_stats(weight: Tensor, stats: InputStats | None, method: Method) -> None:
    N, K = weight.shape
    if method.statistics == "none":
        return
    what = "the Gram matrix" if method.statistics == "gram" else "the mean squares"
    if stats is None or getattr(stats, "gram" if method.statistics == "gram" else "mean_square") is None:
        raise CalibrationError(
            f"method {method.name!r} needs {what} of the layer's inputs: update() an "
            f"InputStats(in_features={K}, needs={method.statistics!r}) with them and pass it as stats"
        )
    if stats.in_features != K:
        raise CalibrationError(
            f"statistics of in_features={stats.in_features} do not fit a weight of {N} x {K}"
        )
    if stats.drift is not None and stats.drift.shape != weight.shape:
        raise CalibrationError(
            f"drift has shape {tuple(stats.drift.shape)}, expected that of the weight, {N} x {K}"
        )
