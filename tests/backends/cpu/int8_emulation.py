"""The products with int8 activations (csrc/int8.h, csrc/int16.h) once more, from the packed
tensors alone.

Integers are computed as integers, everything that the kernels round to fp32 before it becomes an
integer is fp32 here too, and the sums are fp64: the kernels differ from this by their fp32 sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from slab_kernels.backends import factors
from slab_kernels.format import PackedWeight, bits, plane_unit, unpack

BLOCK = 128  # inputs of a block of the stream
PIECE = 32  # inputs that share a step of x in the product for few tokens
MANY_PIECE = 64  # and in the one for many
LEAST = {"int8": 8.0, "int4": 0.0, "int3": 0.0}  # units that a merged sign term must reach
FINEST = 2.0**-100  # the smallest unit of a merged panel


class Result(NamedTuple):
    """y [M, N] fp64; size [M, N], the sum of the terms' magnitudes, with which fp32 errors grow;
    bound [M, N], how far y may be from the exact product."""

    y: Tensor
    size: Tensor
    bound: Tensor


class Weight(NamedTuple):
    """The parts of a weight, inputs padded to whole blocks.

    q: [N, Kp] integers. scale: [N, Kp] fp32, of every entry. level: [N, Kp] integers, 0 at kept
    entries. unit: what a level of 1 is of u v. U: [N, R], V: [Kp, R], fp32 as the kernels have
    them. adapter: [N, Kp] fp64.
    """

    q: Tensor
    scale: Tensor
    level: Tensor
    unit: float
    U: Tensor
    V: Tensor
    adapter: Tensor


def weight_of(packed: PackedWeight) -> Weight:
    """The parts of a packed weight of integers."""
    layout, K = packed.layout, packed.in_features
    i0, i1 = bits.kept_positions(packed.metadata)
    values = bits.unpack_values(packed.values, layout.values)
    q = bits.scatter_positions(values, i0, i1)
    Kp = q.shape[1]
    scale = packed.scales.float().repeat_interleave(Kp // packed.scales.shape[1], 1)
    parts = unpack(packed)
    N = packed.out_features
    level, U, V = torch.zeros(N, K), torch.zeros(N, 1), torch.zeros(K, 1)
    if layout.rank:
        level = parts.B[:, :K].float()
        U, V = factors.beside_results(*packed.sign_factors())
        V = V[:K]
    adapter = torch.zeros(N, K, dtype=torch.float64)
    if layout.adapter_rank:
        adapter = parts.P.double() @ parts.Q.double()[:K].T
    extra = -K % BLOCK
    columns = lambda t: pad(t[:, :K], (0, extra))  # noqa: E731
    return Weight(
        columns(q).int(), columns(scale), columns(level).int(), plane_unit(layout.planes),
        U, pad(V, (0, 0, 0, extra)), columns(adapter),
    )  # fmt: skip


def lift_of(most: Tensor) -> Tensor:
    """What keeps quotients by tiny numbers finite."""
    return torch.where(most < 2.0**-60, 2.0**100, 1.0)


def over(limit: float, most: Tensor) -> Tensor:
    """limit / most, 0 where that is 0. torch divides a number by a tensor in two roundings, a
    tensor by a tensor in one."""
    return torch.where(most > 0, torch.full_like(most, limit) / most, 0)


def quantised(x: Tensor, cover: str) -> tuple[Tensor, Tensor]:
    """[..., Kp] fp32 -> integers and steps of that shape; a piece's shift is on its integers.

    cover: what the 255 integers of a piece lie over: its "range", with 0 in it; as much on either
        side of 0, "symmetric"; or so much that two of a group add up to 127 at most, "pairs".
    """
    pieces = x.unflatten(-1, (-1, PIECE))
    most = pieces.abs().amax(-1, keepdim=True)
    if cover == "pairs":
        a, b, c, d = pieces.abs().unflatten(-1, (-1, 4)).unbind(-1)
        crossed = torch.maximum(a, b) + torch.maximum(c, d)
        pairs = torch.maximum(crossed, torch.maximum(a + b, c + d))
        most = pairs.amax(-1, keepdim=True)
    lift = lift_of(most)
    low, high = -most * lift, most * lift
    if cover == "range":
        low = pieces.amin(-1, True).clamp(max=0) * lift
        high = pieces.amax(-1, True).clamp(min=0) * lift
    limit = {"range": 126.5, "symmetric": 127.0, "pairs": 126.0}[cover]
    half = (high - low) * 0.5
    factor = over(limit, half)
    step = half / torch.full_like(half, limit) / lift
    centre = ((high * 0.5 + low * 0.5) * factor).round()
    n = (pieces * lift * factor).round()
    assert bool(((n - centre).abs() <= 127).all()), "what is stored has 8 bits"
    if cover == "pairs":
        two = n.abs().unflatten(-1, (-1, 4)).topk(2, -1).values.sum(-1)
        assert bool((two <= 127).all()), "what a table holds has 8 bits"
    return n.int().flatten(-2), step.double().expand_as(n).flatten(-2)


def around_largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., Kp] fp32 -> what `many` multiplies of it, fp64, and how far that may be from x.

    The first input of largest magnitude of each piece stays what it is.
    """
    pieces = x.unflatten(-1, (-1, MANY_PIECE))
    size = pieces.abs()
    largest = size == size.amax(-1, keepdim=True)
    largest &= largest.int().cumsum(-1) == 1
    most = size.masked_fill(largest, 0).amax(-1, keepdim=True)
    lift = lift_of(most)
    factor = over(127.0, most * lift)
    step = (most * lift / torch.full_like(most, 127.0) / lift).double()
    n = torch.where(largest, 0, pieces * lift * factor).round()
    assert bool((n.abs() <= 127).all()), "what is stored has 8 bits"
    multiplied = torch.where(largest, pieces.double(), n.double() * step)
    error = torch.where(largest, 0, step / 2)
    return multiplied.flatten(-2), error.flatten(-2)


def few(x: Tensor, w: Weight) -> Result:
    """Kept values times x and levels times x v, each with integers of its own."""
    x = pad(x.float(), (0, -x.shape[-1] % BLOCK))
    n, step = quantised(x, "range")
    S = w.q.double() * w.scale.double()
    y = (n.double() * step) @ S.T
    size = (n.double() * step).abs() @ S.abs().T
    bound = (step / 2) @ S.abs().T
    for u, v in zip(w.U.double().T, w.V.T, strict=True):
        n, step = quantised(x * v, "pairs" if w.unit == 1.0 else "symmetric")
        F = w.level.double() * w.unit * u[:, None]
        y = y + (n.double() * step) @ F.T
        size = size + (n.double() * step).abs() @ F.abs().T
        bound = bound + (step / 2) @ F.abs().T
    return _with_adapter(x, w, y, size, bound)


def panels(w: Weight, values: str) -> tuple[Tensor, Tensor]:
    """The weight of the panels, [N, Kp] fp64, and how far each entry may be from the exact one."""
    unit = w.scale / (1 if values == "int8" else 16)
    kept = w.q.double() * w.scale.double()
    if not bool(w.level.any()):
        return kept, torch.zeros_like(kept)
    most_level = int(w.level.abs().amax())
    most_level = {1: 1, 2: 3, 3: 7}[{1.0: 1, 0.5: 2, 0.25: 3}[w.unit]]
    V = w.V.T.unflatten(1, (-1, BLOCK))  # R, blocks, 128
    most_v = V.abs().amax(-1)
    lift = lift_of(most_v[..., None])
    v = (V * lift * over(32767.0, most_v[..., None] * lift)).round().int().flatten(1)  # R, Kp
    at_inputs = most_v.repeat_interleave(BLOCK, 1)  # R, Kp
    most = torch.zeros_like(w.scale)
    for r in range(w.U.shape[1]):
        most = most + w.U[:, r, None].abs() * at_inputs[r]
    most = most * (w.unit * most_level)
    other = most * torch.tensor(1.0 / 126.0)
    fits = (unit.abs() > FINEST) & (most <= unit.abs() * 126.0)
    fits &= most >= unit.abs() * LEAST[values]
    used = torch.where(fits, unit, other)
    total = torch.zeros_like(w.level)
    for r in range(w.U.shape[1]):
        product = w.U[:, r, None] * at_inputs[r]
        ratio = torch.where(most == 0, 0, product / used) * (w.unit * 256.0)
        total = total + ((ratio.round().int() * v[r] + (1 << 14)) >> 15)
    if most_level == 1:
        integer = w.level * ((total + 128) >> 8)
    else:
        integer = (w.level * total + 128) >> 8
    pruned = integer.double() * used.double()
    rounding = 0.5 + w.U.shape[1] * most_level * 1.6 / 256 + 1e-4
    return kept + pruned, torch.where(w.level != 0, rounding * used.double().abs(), 0)


def many(x: Tensor, w: Weight, values: str) -> Result:
    """One int8 weight, or two where a row and block has two units."""
    x = pad(x.float(), (0, -x.shape[-1] % BLOCK))
    multiplied, error_x = around_largest(x)
    W, error = panels(w, values)
    y = multiplied @ W.T
    size = multiplied.abs() @ W.abs().T
    bound = error_x @ W.abs().T + x.double().abs() @ error.T
    return _with_adapter(x, w, y, size, bound)


def in_blocks(t: Tensor, inputs: int = BLOCK) -> Tensor:
    """[..., Kp] -> the largest magnitude of each block of so many inputs, of that shape."""
    most = t.abs().unflatten(-1, (-1, inputs)).amax(-1, keepdim=True)
    return most.expand(*most.shape[:-1], inputs).flatten(-2)


def mulhrs(a: Tensor, b: Tensor | int) -> Tensor:
    """Products of 16-bit integers over 2^15, rounded: what the instruction of that name has."""
    return (a * b + (1 << 14)) >> 15


def nearest(t: Tensor) -> Tensor:
    return t.round().int()


def wide_weight(w: Weight, values: str, group_size: int) -> tuple[Tensor, Tensor]:
    """The weight of `wide` as integers, and its steps, [N, Kp] both."""
    eight_bits = values == "int8"
    part = torch.tensor(1.0 / 4088)
    kept = torch.full_like(w.scale, 8.0)
    if eight_bits:
        kept = in_blocks(w.q.float(), group_size)
    there = kept > 0
    bound = torch.where(there, kept.clamp(min=4088 / 255) if eight_bits else kept, 0)
    step = torch.maximum(in_blocks(w.scale.abs() * (bound * part)), torch.tensor(2.0**-120))
    levels = {1.0: 1, 0.5: 3, 0.25: 7}[w.unit]
    V = w.V.T
    most_v = in_blocks(V)
    pruned = torch.zeros_like(w.scale)
    for u, most in zip(w.U.T, most_v, strict=True):
        pruned = pruned + u.abs()[:, None] * most
    step = torch.maximum(step, pruned * (w.unit * levels * part))
    inverse = 1.0 / step
    factor = nearest(torch.where(there, w.scale * inverse * (128.0 if eight_bits else 8.0), 0))
    entries = mulhrs(w.q << (8 if eight_bits else 12), factor)
    lift = lift_of(most_v)
    v = nearest(V * lift * over(32767.0, most_v * lift))
    uv = torch.zeros_like(entries)
    for u, most, integers in zip(w.U.T, most_v, v, strict=True):
        uv = uv + mulhrs(nearest(u[:, None] * most * (inverse * (8.0 * w.unit))), integers)
    return torch.where(w.level != 0, mulhrs(w.level * uv, 1 << 12), entries), step


def wide(x: Tensor, w: Weight, values: str, group_size: int) -> Result:
    """Many tokens with 16-bit integers: x and the weight in steps of a block."""
    x = pad(x.float(), (0, -x.shape[-1] % BLOCK))
    integers, row_step = wide_weight(w, values, group_size)
    most = in_blocks(x)
    lift = lift_of(most)
    step = most * lift / 4095 / lift
    n = nearest(x * lift * over(4095.0, most * lift))
    assert bool((n.abs() <= 4095).all()) and bool((integers.abs() <= 4096).all())
    rounded, W = n.double() * step.double(), integers.double() * row_step.double()
    y, size = rounded @ W.T, rounded.abs() @ W.abs().T
    levels = {1.0: 1, 0.5: 3, 0.25: 7}[w.unit]
    error = torch.where(w.level != 0, 0.7 + levels * w.U.shape[1] / 8, 1.001) * row_step.double()
    bound = (step.double() / 2) @ W.abs().T + x.double().abs() @ error.T
    return _with_adapter(x, w, y, size, bound)


def _with_adapter(x: Tensor, w: Weight, y: Tensor, size: Tensor, bound: Tensor) -> Result:
    return Result(y + x.double() @ w.adapter.T, size + x.double().abs() @ w.adapter.abs().T, bound)
