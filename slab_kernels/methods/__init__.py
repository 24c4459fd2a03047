"""Decomposition methods: pure functions (weight, input statistics, settings) -> Decomposition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, DtypeError, MethodError, RangeError, ShapeError
from ..format import GROUP_SIZES, INTEGER_RANGES, MAX_PLANES, WEIGHT_DTYPES, Decomposition
from ..settings import Rule, rules
from .config import Config
from .eora import EoraConfig, eora
from .hassle_free import HassleFreeConfig, hassle_free
from .inputs import InputStats
from .magnitude import magnitude
from .oats import OatsConfig, SslcConfig, oats, sslc
from .slab import SlabConfig, slab
from .slab_paper import SlabPaperConfig, slab_paper
from .slim import SlimConfig, slim
from .sparsegpt import SparseGPTConfig, sparsegpt
from .threebasil import ThreeBasilConfig, alps, threebasil
from .wanda import wanda

USUAL_EXPONENTS = 24  # of a weight's largest number; others are scaled by a power of two meanwhile
COMMON = tuple(field.name for field in fields(Config))


@dataclass(frozen=True)
class Method:
    """One row of METHODS.

    statistics: "none", "diagonal" or "gram", what `function` reads of InputStats.
    signs: whether it has the term (U V^T) * B, so that `rank` and `planes` mean something.
    adapter: its adapter's rank where none is given, as a share of min(N, K); None: it has no P Q^T.
    """

    name: str
    function: Callable[[Tensor, InputStats | None, Config], Decomposition]
    config: type[Config]
    statistics: str
    description: str
    signs: bool = False
    adapter: float | None = None

    def adapter_rank(self, shape: tuple[int, int], wanted: int | None) -> int:
        """The rank of P Q^T for a weight of `shape` (N, K): the one wanted, else the method's own share of min(N, K)."""
        if self.adapter is None or wanted is not None:
            return wanted or 0
        return max(1, round(self.adapter * min(shape))) if self.adapter else 0

    def options(self) -> dict[str, tuple[Any, Rule]]:
        """What only this method has: name -> default and rule."""
        return {
            entry.name: (entry.default, rule)
            for entry, rule in rules(self.config)
            if entry.name not in COMMON
        }


TENTH = 0.1  # of min(N, K): SLiM, section 4
SIXTY_FOURTH = 1 / 64  # 64 for a layer of 4096: 3BASiL, section 5
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "slab",
            slab,
            SlabConfig,
            "gram",
            "S + (U V^T) * B + P Q^T solved together in the Gram metric (ours, the default)",
            True,
            0.0,
        ),
        Method(
            "slab-paper",
            slab_paper,
            SlabPaperConfig,
            "diagonal",
            "SLaB as published (arXiv 2604.04493)",
            True,
        ),
        Method(
            "threebasil",
            threebasil,
            ThreeBasilConfig,
            "gram",
            "3BASiL (arXiv 2603.01376)",
            adapter=SIXTY_FOURTH,
        ),
        Method(
            "hassle-free",
            hassle_free,
            HassleFreeConfig,
            "gram",
            "HASSLE-free (arXiv 2502.00899)",
            adapter=SIXTY_FOURTH,
        ),
        Method("sslc", sslc, SslcConfig, "gram", "SSLC (arXiv 2510.26446)", adapter=SIXTY_FOURTH),
        Method("oats", oats, OatsConfig, "gram", "OATS (arXiv 2409.13652)", adapter=SIXTY_FOURTH),
        Method("slim", slim, SlimConfig, "gram", "SLiM (arXiv 2410.09615)", adapter=TENTH),
        Method(
            "eora",
            eora,
            EoraConfig,
            "gram",
            "EoRA on a pruner (arXiv 2410.21271)",
            adapter=SIXTY_FOURTH,
        ),
        Method("alps", alps, ThreeBasilConfig, "gram", "ALPS (arXiv 2406.07831)"),
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
    planes: int = 1,
    adapter_rank: int | None = None,
    adapter_values: str = "int8",
    **options,
) -> Decomposition:
    """Decompose one linear weight.

    Args:
        weight: [N,K] (out_features, in_features), any float dtype and device; not changed.
        stats: of the layer's inputs; what a method needs is `METHODS[method].statistics`.
        method: a key of METHODS.
        pattern: "n:m" to keep n of every m inputs, or "p%" to remove p percent of every row.
        rank: of U V^T, 0 for none; methods without a sign term ignore this and `planes`.
        planes: signs of a pruned entry, 1 to 3, each worth half the one before.
        adapter_rank: of P Q^T; None is the method's own (`Method.adapter`), 0 is none. Methods without one take None or 0.
        adapter_values: how P and Q will be stored, "int8" (codes of a row share a power of two) or "fp16".
        values: type of the kept values; "int8" and "int4" give a Decomposition on its integer grid.
        group_size: inputs a scale, 32, 64, 128 or None for one scale a row; only for integers.
        options: fields of `METHODS[method].config`.

    Returns: fp32 tensors on the weight's device.

    Raises: MethodError, PatternError, ShapeError, RangeError, ValueTypeError, DtypeError or CalibrationError (all
        ValueErrors), before anything is computed.
    """
    config = check_settings(
        method, pattern, rank, values, group_size, planes, adapter_rank, adapter_values, options
    )
    chosen = METHODS[method]
    _check_weight(weight)
    config = check_shape(config, chosen, tuple(weight.shape), adapter_rank)
    _check_stats(weight, stats, chosen)
    if isinstance(stats, InputStats):
        stats = stats.to(weight.device)
    W = weight.detach().float()
    shift = _shift(W)
    if not shift:
        return chosen.function(W, stats, config)
    if isinstance(stats, InputStats) and stats.drift is not None:
        stats = replace(stats, drift=torch.ldexp(stats.drift, torch.tensor(-shift)))
    found = chosen.function(torch.ldexp(W, torch.tensor(-shift)), stats, config)
    parts = {name: getattr(found, name) for name in ("S", "scales", "U", "P")}
    back = {n: torch.ldexp(t, torch.tensor(shift)) for n, t in parts.items() if t is not None}
    return replace(found, **back)


def _shift(W: Tensor) -> int:
    """The power of two by which a weight is far from 1, or 0: what is beyond 2**+-60 has no squares
    in fp32."""
    exponent = int(torch.frexp(W.abs().max()).exponent)
    return min(max(exponent, -120), 120) if abs(exponent) > USUAL_EXPONENTS else 0


def check_settings(
    method: str, pattern: str, rank: int, values: str, group_size: int | None, planes: int, adapter_rank: int | None,
    adapter_values: str, options: dict,
) -> Config:  # fmt: skip
    """The settings in their plain types; refuses what no weight could have, before any is read.

    Raises: as `decompose`.
    """
    chosen = check_options(method, options)
    given = 0 if adapter_rank is None else adapter_rank
    config = chosen.config(
        pattern, rank, values, group_size, planes, given, adapter_values, **options
    )
    rank, planes, group_size = config.rank, config.planes, config.group_size
    if chosen.signs and chosen.adapter is None and not rank:
        raise ShapeError(
            f"rank=0: method {method!r} is nothing without its sign term; give at least 1"
        )
    if adapter_rank and chosen.adapter is None:
        able = ", ".join(m.name for m in METHODS.values() if m.adapter is not None)
        raise MethodError(
            f"method {method!r} has no adapter P Q^T, so adapter_rank={adapter_rank} has no meaning; {able} have one"
        )
    most = MAX_PLANES if chosen.signs and chosen.adapter is not None and rank else 1
    if planes > most:
        raise MethodError(
            f"planes={planes}: only 'slab' with a rank of at least 1 has several sign planes, 1 to {MAX_PLANES}"
        )
    if values in INTEGER_RANGES and group_size is not None:
        if group_size not in GROUP_SIZES:
            raise ShapeError(
                f"group_size={group_size} must be one of {', '.join(map(str, GROUP_SIZES))} or None"
            )
        if config.parsed.structured and group_size % config.parsed.group:
            raise ShapeError(
                f"group_size={group_size} must be a multiple of {config.parsed.group} for pattern {pattern!r}"
            )
    return config


def check_options(method: str, options: dict) -> Method:
    """The row of METHODS.

    Raises: MethodError for a method that is not there, or an option that it does not have.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise MethodError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
    own = METHODS[method].options()
    if unknown := [name for name in options if name not in own]:
        raise MethodError(
            f"method {method!r} has no option {unknown[0]!r}; it has {', '.join(own) if own else 'none'}"
        )
    return METHODS[method]


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise DtypeError(
            f"weight is a {type(weight).__name__}, expected a torch tensor [out_features, in_features]"
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
            f"the weight has {bad} NaN or infinite entries of {weight.numel()}; its checkpoint is damaged"
        )


def check_shape(
    config: Config, method: Method, shape: tuple[int, int], adapter_rank: int | None
) -> Config:
    """The settings for one weight of `shape` (N, K), with its adapter's rank.

    The rank of the sign term is 0 for a method without one.

    adapter_rank: as `decompose` takes it.

    Raises: ShapeError for a pattern that does not divide K, or a rank above min(N, K).
    """
    N, K = shape
    config = replace(
        config,
        rank=config.rank if method.signs else 0,
        adapter_rank=method.adapter_rank(shape, adapter_rank),
    )
    pattern = config.parsed
    if pattern.structured and K % pattern.group:
        raise ShapeError(
            f"in_features={K} must be a multiple of {pattern.group} for pattern {config.pattern!r}; leave this layer "
            "dense or choose an unstructured pattern such as '50%'"
        )
    for name in ("rank", "adapter_rank"):
        if getattr(config, name) > min(N, K):
            raise ShapeError(
                f"{name}={getattr(config, name)} must lie in 0 .. {min(N, K)} for a weight of {N} x {K}"
            )
    return config


def _check_stats(weight: Tensor, stats: InputStats | None, method: Method) -> None:
    N, K = weight.shape
    if method.statistics == "none":
        return
    what = "the Gram matrix" if method.statistics == "gram" else "the mean squares"
    if (
        not isinstance(stats, InputStats)
        or getattr(stats, "gram" if method.statistics == "gram" else "mean_square") is None
    ):
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
