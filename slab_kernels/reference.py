"""The definition of the operation, in plain torch; every kernel is judged against it.

y[M,N] = x[M,K] @ W[N,K].T + bias,    W = S + (U V^T) * B + P Q^T
"""

from __future__ import annotations

import torch
from torch import Tensor

from .format import Decomposition, PackedWeight


def linear(x: Tensor, weight: PackedWeight | Decomposition, bias: Tensor | None = None) -> Tensor:
    """The fused linear by a dense weight; both in fp32, or fp64 where x is fp64.

    Args:
        x: [..., K], any floating dtype and strides.
        weight: packed, or any decomposition (every pattern, also those that `pack` refuses).
        bias: [N] or None.

    Returns: [..., N] in x's dtype.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):  # fp32 means fp32
        W = weight.dense().to(dtype)
        y = torch.nn.functional.linear(x.to(dtype), W, None if bias is None else bias.to(dtype))
    return y.to(x.dtype)
