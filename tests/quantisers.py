"""Weights as other libraries quantise them, number by number, from a written-out definition.

Each function takes the sizes of a linear and a generator, draws codes and scales, and gives the
tensors of a checkpoint and the dense weight [N, K] fp32 that they stand for. Nothing here is taken
from `slab_kernels`: words are put together with Python integers.
"""

from __future__ import annotations

import torch

GROUP = 16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output whose code is at each place of a word


def words(codes: list[int], bits: int) -> list[int]:
    """Codes as int32 words, the first in the lowest bits; the last word may be half empty."""
    each, packed = 32 // bits, []
    for start in range(0, len(codes), each):
        word = sum(code << bits * place for place, code in enumerate(codes[start : start + each]))
        packed.append(word - (1 << 32) if word >> 31 else word)
    return packed


def rows_packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.tensor([words(row, bits) for row in codes.tolist()], dtype=torch.int32)


def drawn(N, K, bits, generator, groups=None):
    """Codes [N, K], zero points [N, G] and fp16 scales [N, G]."""
    G = -(-K // GROUP) if groups is None else groups
    top = 1 << bits
    codes = torch.randint(0, top, (N, K), generator=generator)
    zeros = torch.randint(0, top, (N, G), generator=generator)
    scales = (torch.rand(N, G, generator=generator) * 0.05 + 0.01).half()
    return codes, zeros, scales


def weight_of(codes, zeros, scales, group_of) -> torch.Tensor:
    N, K = codes.shape
    dense = torch.empty(N, K)
    for k in range(K):
        g = int(group_of[k])
        dense[:, k] = scales[:, g].float() * (codes[:, k] - zeros[:, g]).float()
    return dense


def gptq(N, K, generator, bits=4, act_order=False, v2=False):
    codes, zeros, scales = drawn(N, K, bits, generator)
    group_of = torch.arange(K) // GROUP
    if act_order:
        group_of = group_of[torch.randperm(K, generator=generator)]
    stored_zeros = zeros if v2 else (zeros - 1) % (1 << bits)
    tensors = {
        "qweight": rows_packed(codes, bits).T.contiguous(),
        "qzeros": rows_packed(stored_zeros.T, bits),
        "scales": scales.T.contiguous(),
    }
    if act_order or not v2:
        tensors["g_idx"] = group_of.int()
    return tensors, weight_of(codes, zeros, scales, group_of)


def awq(N, K, generator):
    codes, zeros, scales = drawn(N, K, 4, generator)
    order = [start + place for start in range(0, N, 8) for place in AWQ_ORDER]
    tensors = {
        "qweight": rows_packed(codes.T[:, order], 4),
        "qzeros": rows_packed(zeros.T[:, order], 4),
        "scales": scales.T.contiguous(),
    }
    return tensors, weight_of(codes, zeros, scales, torch.arange(K) // GROUP)


def fp8(N, K, generator, block=(10, 12), scale_dtype=torch.float32, suffix="_scale_inv"):
    """One scale for each block of rows and columns, smaller at the edges; None: one in all."""
    codes = torch.randn(N, K, generator=generator).mul_(30).to(torch.float8_e4m3fn)
    rows, columns = block or (N, K)
    n, k = -(-N // rows), -(-K // columns)
    scale = torch.rand(n, k, generator=generator) * 0.01 + 0.002
    if scale_dtype is torch.float8_e8m0fnu:
        scale = 2.0 ** torch.randint(-9, -6, (n, k), generator=generator)
    scale = scale.to(scale_dtype)
    dense = (
        codes.float() * scale.float()[torch.arange(N)[:, None] // rows, torch.arange(K) // columns]
    )
    stored = scale.reshape(()) if block is None else scale
    extra = {"activation_scale": torch.tensor(0.5)} if block is None else {}
    return {"weight": codes, f"weight{suffix}": stored, **extra}, dense


def packed_int(N, K, generator, bits=4, symmetric=False, act_order=False, channel=False):
    """pack-quantized of compressed-tensors; codes and zero points are stored plus 2^(bits - 1)."""
    codes, zeros, scales = drawn(N, K, bits, generator, groups=1 if channel else None)
    if symmetric:
        zeros = torch.full_like(zeros, 1 << bits - 1)
    group_of = torch.zeros(K).long() if channel else torch.arange(K) // GROUP
    if act_order:
        group_of = group_of[torch.randperm(K, generator=generator)]
    tensors = {
        "weight_packed": rows_packed(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([N, K]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = rows_packed(zeros.T, bits).T.contiguous()
    if act_order:
        tensors["weight_g_idx"] = group_of.int()
    return tensors, weight_of(codes, zeros, scales, group_of)


def int8_rows(N, K, generator):
    """int-quantized: a byte a number, and a scale for each row."""
    codes = torch.randint(-128, 128, (N, K), generator=generator)
    scale = (torch.rand(N, 1, generator=generator) * 0.002 + 0.001).bfloat16()
    tensors = {"weight": codes.to(torch.int8), "weight_scale": scale}
    return tensors, codes.float() * scale.float()


def fp8_rows(N, K, generator):
    tensors, dense = fp8(N, K, generator, (1, K), torch.bfloat16, "_scale")
    return tensors | {"input_scale": torch.ones(1)}, dense


def fp8_blocks(N, K, generator):
    return fp8(N, K, generator, (16, 24), torch.float32, "_scale")


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4(E, K, N, generator):
    """A stack [E, K, N]: blocks [E, N, K / 32, 16], the even inputs in the low half of a byte."""
    codes = torch.randint(0, 16, (E, N, K), generator=generator)
    exponents = torch.randint(118, 124, (E, N, K // 32), generator=generator)
    pairs = codes.reshape(E, N, K // 32, 16, 2)
    blocks = pairs[..., 0] + 16 * pairs[..., 1]
    values = torch.tensor([*FP4, *(-v for v in FP4)])[codes]
    scales = 2.0 ** (exponents - 127).float().repeat_interleave(32, -1)
    dense = (values * scales).transpose(1, 2).contiguous()
    return {"_blocks": blocks.to(torch.uint8), "_scales": exponents.to(torch.uint8)}, dense
