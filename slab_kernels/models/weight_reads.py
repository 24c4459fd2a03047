"""Finds code of a model that reads the weight of a linear, which a packed layer does not have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class WeightRead(AttributeError):
    """The model's code asked for the weight of this linear."""

    def __init__(self, linear: str):
        super().__init__(f"{linear} has no attribute 'weight'")
        self.linear = linear


class _WithoutWeight(nn.Linear):
    """A linear as the model's code finds a packed one: it computes, and has no `weight`."""

    full_name: str

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise WeightRead(self.full_name)
        return super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        return nn.functional.linear(input, weight, self.bias)


@contextmanager
def without_weight(linears: Mapping[str, nn.Linear]) -> Iterator[None]:
    """Inside, these linears and copies made of them hide their weight."""
    try:
        for name, linear in linears.items():
            linear.__class__ = _WithoutWeight
            linear.__dict__["full_name"] = name
        yield
    finally:
        for linear in linears.values():
            linear.__class__ = nn.Linear
            linear.__dict__.pop("full_name", None)
