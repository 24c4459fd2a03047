"""One linear and what to time on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import activations as accuracy
from ..backends.base import LinearProblem
from ..errors import ArgumentError
from ..format import INTEGER_RANGES, PackedLayout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One linear y[m,n] = x[m,k] W.T and what to time on it."""

    n: int
    k: int
    tokens: Sequence[int] = (1,)
    values: Sequence[str] = ("fp16",)
    # of the activations and the dense weight: a dtype, or "fp32", "bf16", "fp16"
    dtype: torch.dtype | str = torch.float32
    device: str = "cpu"
    group_size: int | None = 128  # inputs that a scale covers; ignored for fp16 and bf16 values
    rank: int = 1  # of the sign term; 0 = none
    backends: Sequence[str] | None = None  # default: all that can run it, without the reference
    min_seconds: float = 0.5  # that each row is timed at least
    adapter_rank: int = 0  # of P Q^T; 0 = none
    peers: bool = False  # whether other libraries' kernels are timed too
    prefill: str | None = None  # whether ours have a dense copy, as `SlabLinear.prepare` takes it
    # How x enters our products, each word as `SlabLinear.prepare` takes it. Where a weight has one
    # product for several words, it is timed once.
    activations: Sequence[str | None] = (None,)

    @property
    def kind(self) -> torch.dtype:
        """The dtype of the activations.

        Raises: ArgumentError for an unknown one.
        """
        if isinstance(self.dtype, str) and self.dtype in DTYPES:
            return DTYPES[self.dtype]
        if isinstance(self.dtype, torch.dtype) and self.dtype in DTYPES.values():
            return self.dtype
        raise ArgumentError(f"dtype={self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")

    @property
    def modes(self) -> list[str]:
        """The words of `activations`, each once, the environment's in place of None.

        Raises: ArgumentError for an unknown one.
        """
        return list(dict.fromkeys(map(accuracy.named, self.activations)))

    def layouts(self) -> list[PackedLayout]:
        """The layouts of our weights, one for each value type.

        Raises: ValueTypeError for an unknown one.
        """
        layouts = []
        for values in self.values:
            group_size = self.group_size if values in INTEGER_RANGES else None
            layouts.append(
                PackedLayout(self.n, self.k, values, group_size, self.rank, self.adapter_rank)
            )
        return layouts

    def problem(self, layout: PackedLayout, m: int) -> LinearProblem:
        """The product of m tokens with a weight of that layout."""
        return LinearProblem.of(layout, m, self.kind, torch.device(self.device).type)

    def random_weight(self) -> Tensor:
        """The same dense weight [n, k] every time."""
        generator = torch.Generator(self.device).manual_seed(2)
        return torch.randn(self.n, self.k, generator=generator, device=self.device, dtype=self.kind)

    def inputs(self) -> list[Tensor]:
        """The same activations [m, k] every time, for each token count."""
        generator = torch.Generator().manual_seed(1)
        return [
            torch.randn(m, self.k, generator=generator).to(self.device, self.kind)
            for m in self.tokens
        ]

    def facts(self) -> Row:
        """The columns that all rows share; contestants replace some of them."""
        return {
            "n": self.n,
            "k": self.k,
            "dtype": name_of(self.kind),
            "x_dtype": name_of(self.kind),
            "activations": "exact",
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "rank": 0,
            "adapter_rank": 0,
            "group_size": None,
            "prefill": "",
        }


def name_of(dtype: torch.dtype) -> str:
    """The short name of a dtype of DTYPES."""
    return next(name for name, kind in DTYPES.items() if kind == dtype)
