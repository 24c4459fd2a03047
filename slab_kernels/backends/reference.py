"""The reference as a backend, last in the list: it runs every shape, type and device."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..format import PackedWeight
from .base import Backend, LinearProblem


class ReferenceBackend(Backend):
    name = "reference"

    def refusals(
        self, problem: LinearProblem, capability: tuple[int, int] | None = None
    ) -> list[str]:
        if not problem.dtype.is_floating_point:
            return [f"activations must be floating point, not {problem.dtype}"]
        return []

    def prepare(self, packed: PackedWeight, dtype: torch.dtype | None = None) -> tuple:
        ops.register()
        tensors = packed.tensors()
        for name, tensor in tensors.items():
            if tensor.is_inference():  # autograd can save a copy only
                tensors[name] = tensor.clone()
        return tuple(tensors.get(name) for name in ops.TENSOR_ARGUMENTS), packed.in_features

    def linear(self, x: Tensor, state: tuple, bias: Tensor | None = None) -> Tensor:
        tensors, in_features = state
        return torch.ops.slab_kernels.linear(x, *tensors, bias, in_features)


BACKEND = ReferenceBackend()
