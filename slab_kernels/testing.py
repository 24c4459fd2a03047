"""The problem grid, the oracle and the tolerance table, which tests and benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from .format import INTEGER_RANGES, PackedLayout, PackedWeight, bits, plane_unit, unpack

TOKENS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 257)
RANKS = (0, 1, 2, 4)
ADAPTER_RANKS = (0, 16, 100)
# These (N, K) have tails of every kind: below one group, off a byte of signs, off a SIMD block, and
# with several groups of scales.
SHAPES = ((1, 3), (5, 7), (16, 64), (17, 172), (33, 260), (64, 256), (100, 388))
VALUE_LAYOUTS = (
    ("fp16", None),
    ("bf16", None),
    ("int8", 128),
    ("int8", None),
    ("int4", 32),
    ("int4", 128),
    ("int3", 32),
)
# The unit round-off of an output type.
ROUNDOFF = {
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float64: 2.0**-53,
}


def random_packed(
    layout: PackedLayout,
    seed: int = 0,
    integers: bool = False,
    device: torch.device | str = "cpu",
) -> PackedWeight:
    """A packed weight with random metadata, values, signs and factors; on a CPU it takes a second
    for 4096 x 4096. Kinds of devices have numbers of their own.

    With `integers`, every stored number is a small integer, so that any correct kernel is exact to
    the bit whatever its order of summation.
    """
    generator = torch.Generator(device).manual_seed(seed)
    N, K, Kp = layout.out_features, layout.in_features, layout.padded_in_features

    def normal(shape: tuple[int, ...], spread: float) -> Tensor:
        if integers:
            return torch.randint(-3, 4, shape, generator=generator, device=device).float()
        return torch.randn(shape, generator=generator, device=device) * spread

    nibbles = _random_nibbles(layout, generator)
    i0, i1 = (nibbles & 3).long(), (nibbles >> 2).long()
    group = 4 * torch.arange(Kp // 4, device=device)[:, None]
    kept_real = (torch.stack((i0, i1), -1) + group < K).flatten(1)
    pruned_real = (torch.stack(bits.pruned_positions(i0, i1), -1) + group < K).flatten(1)
    parts = {"metadata": nibbles[:, 0::2] | nibbles[:, 1::2] << 4}
    table = layout.tensors()
    if layout.values in INTEGER_RANGES:
        low, high = INTEGER_RANGES[layout.values]
        shape = N, Kp // 2
        q = torch.randint(
            low, high + 1, shape, generator=generator, dtype=torch.int8, device=device
        )
        parts["values"] = bits.pack_values(q * kept_real, layout.values)
        uniform = torch.rand(table["scales"][1], generator=generator, device=device)
        scales = uniform * 0.02 / high + 0.01 / high
        parts["scales"] = (torch.ones_like(scales) if integers else scales).to(torch.bfloat16)
    else:
        values = normal((N, Kp // 2), 0.02)
        parts["values"] = torch.where(kept_real, values, 0.0).to(table["values"][0])
    if layout.rank:
        shape = N, Kp // 16 * layout.planes
        signs = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device=device)
        level = bits.unpack_planes(signs, layout.planes)
        level = torch.where(pruned_real, level, 2**layout.planes - 1)
        parts["signs"] = bits.pack_planes(level, layout.planes)
    for rank, left, right in ((layout.rank, "U", "V"), (layout.adapter_rank, "P", "Q")):
        if not rank:
            continue
        pair = {left: normal((N, rank), 0.1), right: normal((Kp, rank), 0.1)}
        pair[right][K:] = 0
        shared = left == "P" and layout.adapter_values
        for name, t in pair.items():
            parts[name] = bits.pack_shared(t) if shared else t.to(table[name][0])
    return PackedWeight(layout, **parts)


def _random_nibbles(layout: PackedLayout, generator: torch.Generator) -> Tensor:
    """[N, Kp/4] uint8 on the generator's device: the metadata of every group, that of padding
    included."""
    N, K, Kp = layout.out_features, layout.in_features, layout.padded_in_features
    device = generator.device
    legal = torch.tensor(bits.LEGAL_NIBBLES, dtype=torch.uint8, device=device)
    shape = N, Kp // 4
    nibbles = legal[
        torch.randint(0, 6, shape, generator=generator, dtype=torch.int32, device=device)
    ]
    first = K // 4  # from this group on, fewer than four inputs are real
    nibbles[:, first + (K % 4 == 3) :] = bits.LEGAL_NIBBLES[0]
    if K % 4 == 3:
        among_three = legal[[0, 1, 3]]  # the pairs among positions 0, 1, 2
        nibbles[:, first] = among_three[
            torch.randint(0, 3, (N,), generator=generator, device=device)
        ]
    return nibbles


def oracle(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The exact result [M,N] in fp64, and the magnitude that rounding errors scale with.

    The magnitude is sum_j |w_ij| |x_j| (+ |bias|). It takes the terms apart, |S| |x| + |U| |V|^T
    |x| + |P| |Q|^T |x|, since kernels sum them apart.
    """
    terms, sizes = zip(*_terms(packed), strict=True)
    y = x.double() @ reduce(torch.add, terms).T
    magnitude = x.double().abs() @ reduce(torch.add, sizes).T
    if bias is not None:
        y, magnitude = y + bias.double(), magnitude + bias.double().abs()
    return y, magnitude


def error_bound(magnitude: Tensor, y: Tensor, dtype: torch.dtype, K: int) -> Tensor:
    """An elementwise bound on |kernel - oracle| for fp32 accumulation, then one rounding to
    `dtype`.

    The accumulation of K terms costs the probabilistic c * sqrt(K) * eps with c = 4, plus a few
    roundings of products.
    """
    return magnitude * 2.0**-24 * (8 + 4 * K**0.5) + y.abs() * ROUNDOFF[dtype] + 1e-30


def _terms(packed: PackedWeight) -> Iterator[tuple[Tensor, Tensor]]:
    """S, (U V^T) * B and P Q^T in fp64, [N,K], each with its magnitude, in which nothing
    cancels."""
    d = unpack(packed)
    yield d.S.double(), d.S.double().abs()
    if d.U is not None and d.V is not None and d.B is not None:
        U, V, B = d.U.double(), d.V.double(), d.B * plane_unit(d.planes)
        yield (U @ V.T) * B, (U.abs() @ V.abs().T) * B.abs()
    if d.P is not None and d.Q is not None:
        P, Q = d.P.double(), d.Q.double()
        yield P @ Q.T, P.abs() @ Q.abs().T
