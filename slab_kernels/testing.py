"""The problem grid, the oracle and the tolerance table: shared by tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from .format import INTEGER_RANGES, PackedLayout, PackedWeight, bits, plane_unit

TOKENS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 257)
RANKS = (0, 1, 2, 4)
ADAPTER_RANKS = (0, 16, 100)
# [N, K] with tails in every direction: below one group, off a byte of signs, off a SIMD block, several scale groups.
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
# Unit round-off of what a kernel may lose on its way: fp32 accumulation, then one rounding to the output type.
ROUNDOFF = {
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float64: 2.0**-53,
}


def random_packed(layout: PackedLayout, seed: int = 0, integers: bool = False) -> PackedWeight:
    """A packed weight with random metadata, values, signs and factors; fast enough for 11008x4096.

    With `integers`, every stored number is a small integer, so that any correct kernel is exact to the bit whatever
    its order of summation.
    """
    generator = torch.Generator().manual_seed(seed)
    N, K, Kp = layout.out_features, layout.in_features, layout.padded_in_features

    def normal(shape: tuple[int, ...], spread: float) -> Tensor:
        if integers:
            return torch.randint(-3, 4, shape, generator=generator).float()
        return torch.randn(shape, generator=generator) * spread

    legal = torch.tensor(bits.LEGAL_NIBBLES, dtype=torch.uint8)
    nibbles = legal[torch.randint(0, 6, (N, Kp // 4), generator=generator, dtype=torch.int32)]
    padding = (
        K // 4 if K % 4 != 3 else K // 4 + 1
    )  # from this group on fewer than three inputs are real
    nibbles[:, padding:] = bits.LEGAL_NIBBLES[0]
    if K % 4 == 3:
        three = legal[[0, 1, 3]]  # the pairs among positions 0, 1, 2
        nibbles[:, K // 4] = three[torch.randint(0, 3, (N,), generator=generator)]
    i0, i1 = (nibbles & 3).long(), (nibbles >> 2).long()
    group = 4 * torch.arange(Kp // 4)[:, None]
    kept_real = (torch.stack((i0, i1), -1) + group < K).flatten(1)
    pruned_real = (torch.stack(bits.pruned_positions(i0, i1), -1) + group < K).flatten(1)
    parts = {"metadata": nibbles[:, 0::2] | nibbles[:, 1::2] << 4}
    table = layout.tensors()
    if layout.values in INTEGER_RANGES:
        low, high = INTEGER_RANGES[layout.values]
        q = torch.randint(low, high + 1, (N, Kp // 2), generator=generator, dtype=torch.int8)
        q *= kept_real
        parts["values"] = bits.pack_values(q, layout.values)
        scales = torch.rand(table["scales"][1], generator=generator) * 0.02 / high + 0.01 / high
        parts["scales"] = (torch.ones_like(scales) if integers else scales).to(torch.bfloat16)
    else:
        values = normal((N, Kp // 2), 0.02)
        parts["values"] = torch.where(kept_real, values, 0.0).to(table["values"][0])
    if layout.rank:
        signs = torch.randint(
            0, 256, (N, Kp // 16 * layout.planes), generator=generator, dtype=torch.uint8
        )
        level = torch.where(
            pruned_real, bits.unpack_planes(signs, layout.planes), 2**layout.planes - 1
        )
        parts["signs"] = bits.pack_planes(level, layout.planes)
    for rank, left, right in ((layout.rank, "U", "V"), (layout.adapter_rank, "P", "Q")):
        if rank:
            parts[left], parts[right] = normal((N, rank), 0.1), normal((Kp, rank), 0.1)
            parts[right][K:] = 0
            shared = left == "P" and layout.adapter_values
            for name in (left, right):
                parts[name] = (
                    bits.pack_shared(parts[name]) if shared else parts[name].to(table[name][0])
                )
    return PackedWeight(layout, **parts)


def oracle(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The exact result in fp64 and the magnitude sum_j |w_ij||x_j| (+ |bias|) that rounding errors scale with.

    The magnitude takes the terms apart, |S||x| + |U||V|^T|x| + |P||Q|^T|x|, since kernels sum them apart.
    """
    d = _decomposition64(packed)
    W = d["S"] + d["L"] + d["A"]
    size = d["S"].abs() + d["L_size"] + d["A_size"]
    y, magnitude = x.double() @ W.T, x.double().abs() @ size.T
    if bias is not None:
        y, magnitude = y + bias.double(), magnitude + bias.double().abs()
    return y, magnitude


def error_bound(magnitude: Tensor, y: Tensor, dtype: torch.dtype, K: int) -> Tensor:
    """Elementwise bound on |kernel - oracle|: fp32 accumulation over K terms, then one rounding to `dtype`.

    The accumulation part is the probabilistic c * sqrt(K) * eps with c = 4, plus a few roundings of products.
    """
    return magnitude * 2.0**-24 * (8 + 4 * K**0.5) + y.abs() * ROUNDOFF[dtype] + 1e-30


def _decomposition64(packed: PackedWeight) -> dict[str, Tensor]:
    from .format import unpack

    d = unpack(packed)
    zero = torch.zeros_like(d.S, dtype=torch.float64)
    L = zero if d.U is None else (d.U.double() @ d.V.double().T) * d.B * plane_unit(d.planes)
    L_size = (
        zero
        if d.U is None
        else (d.U.double().abs() @ d.V.double().abs().T) * d.B.abs() * plane_unit(d.planes)
    )
    A = zero if d.P is None else d.P.double() @ d.Q.double().T
    A_size = zero if d.P is None else d.P.double().abs() @ d.Q.double().abs().T
    return {"S": d.S.double(), "L": L, "L_size": L_size, "A": A, "A_size": A_size}
