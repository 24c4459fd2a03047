"""A compressed linear whose floating-point numbers can be trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..format import Decomposition, plane_unit

SMALLEST_STEP = 1e-30  # of an integer grid, so that a step size stays above 0


class TrainableLinear(nn.Module):
    """A decomposition as a module: its floating-point parts are fp32 parameters.

    The mask, the signs and the integer codes are buffers, which no step can change.

    bias: [N] or None. Memory beside the parameters: a byte per entry for the mask, one for B, and
    four for the rebuilt weight; one per kept entry for integer codes.
    """

    mask: Tensor
    codes: Tensor
    B: Tensor | None

    def __init__(self, decomposition: Decomposition, bias: Tensor | None):
        super().__init__()
        d = decomposition.folded()
        self.shape = (d.S.shape[0], d.S.shape[1])
        self.planes, self.values, self.group_size = d.planes, d.values, d.group_size
        self.adapter_values = d.adapter_values
        self.register_buffer("mask", d.mask)
        kept = d.S.float()[d.mask]
        self.kept: nn.Parameter | None = None
        self.scales: nn.Parameter | None = None
        if d.scales is None:
            self.kept = nn.Parameter(kept)
        else:
            steps = self._steps(d.scales.float())[d.mask]
            self.register_buffer("codes", (kept / steps).round().to(torch.int8))
            self.scales = nn.Parameter(d.scales.float().clone())
        self.U, self.V = _parameter(d.U), _parameter(d.V)
        self.P, self.Q = _parameter(d.P), _parameter(d.Q)
        self.register_buffer("B", d.B)
        self.bias = _parameter(bias)

    def _steps(self, scales: Tensor) -> Tensor:
        """[N, groups] -> [N,K], the step of every entry."""
        return scales.repeat_interleave(self.group_size or self.shape[1], 1)[:, : self.shape[1]]

    def _kept(self, scales: Tensor | None) -> Tensor:
        """[kept entries], from the integer codes where there are step sizes."""
        if scales is not None:
            return self.codes * self._steps(scales)[self.mask]
        assert self.kept is not None
        return self.kept

    def weight(self) -> Tensor:
        """[N,K] fp32, differentiable in the parameters."""
        kept = self._kept(self.scales)
        if self.U is None or self.V is None or self.B is None:
            W = torch.zeros(self.shape, dtype=kept.dtype, device=kept.device)
        else:
            W = (self.U @ self.V.T) * (self.B * plane_unit(self.planes))
        W = W.masked_scatter(self.mask, kept)
        return W if self.P is None or self.Q is None else W + self.P @ self.Q.T

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight().to(input.dtype), bias)

    @torch.no_grad()
    def decomposition(self) -> Decomposition:
        """The numbers as they are now, folded."""
        scales = None
        if self.scales is not None:
            scales = self.scales.detach().clamp_min(SMALLEST_STEP).to(torch.bfloat16).float()
        S = torch.zeros(self.shape, device=self.mask.device)
        S[self.mask] = self._kept(scales).detach()
        return Decomposition(
            S,
            self.mask,
            _numbers(self.U),
            _numbers(self.V),
            self.B,
            _numbers(self.P),
            _numbers(self.Q),
            scales,
            self.values,
            self.group_size,
            self.planes,
            self.adapter_values,
        )


def _parameter(t: Tensor | None) -> nn.Parameter | None:
    return None if t is None else nn.Parameter(t.detach().float().clone())


def _numbers(parameter: nn.Parameter | None) -> Tensor | None:
    return None if parameter is None else parameter.detach().clone()
