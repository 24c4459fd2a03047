"""Powers of two of rows, by which kernels multiply what they rebuild in 16 bits.

For every row: scales and u times the power are finite fp16 numbers, the sign term stays below 2^15,
and the largest scale comes to 2^-8 ... 2^-7 where the sign term allows it.
"""

from __future__ import annotations

import pytest
import torch

from slab_kernels.backends.cuda import layout
from slab_kernels.backends.cuda.powers import row_powers
from slab_kernels.format import PackedLayout
from slab_kernels.testing import random_packed


def scale_rows(*scales: float) -> torch.Tensor:
    return torch.tensor(scales).to(torch.bfloat16)[:, None]


def test_the_largest_scale_of_a_row_decides():
    scales = torch.tensor([[1.0, 0.25], [3e-5, -6e-5], [1e4, 0.0], [0.0, 2.0**-7]]).bfloat16()
    powers = row_powers(scales, None, None, 1.0)
    size = scales.float().abs().amax(1) * powers
    assert ((size >= 2.0**-8) & (size < 2.0**-7)).all()
    assert powers.tolist() == [2.0**-8, 2.0**7, 2.0**-21, 2.0**-1]


@pytest.mark.parametrize("scale", [0.0, 2.0**-133, 1e-38, 1e-20, 1.0, 1e20, 3e38])
@pytest.mark.parametrize("u", [0.0, 2.0**-24, 1e-4, 1.0, 65504.0])
@pytest.mark.parametrize("v", [0.0, 2.0**-24, 0.7, 8.0])
@pytest.mark.parametrize("rank", [1, 3])
def test_nothing_overflows_and_a_power_has_an_inverse(scale, u, v, rank):
    U, V = torch.full((1, rank), u).half(), torch.full((rank, 128), v).half()
    for largest in (1.0, 1.5, 1.75):
        (power,) = row_powers(scale_rows(scale), U, V, largest).tolist()
        mantissa, exponent = torch.frexp(torch.tensor(power))
        assert mantissa == 0.5 and -126 <= exponent - 1 <= 126
        assert (scale_rows(scale).float() * power).half().isfinite().all()
        assert (U.float() * power * largest).half().isfinite().all()
        assert rank * u * v * largest * power <= 2.0**15
        if not scale and not u:
            assert power == 1.0
        elif scale and rank * u * max(v, 1.0) * largest * 2.0**-7 / scale < 2.0**14:
            assert scale * power < 2.0**-7 or power == 2.0**-126


@pytest.mark.parametrize("values", ["int8", "int4", "int3"])
@pytest.mark.parametrize("rank, planes", [(0, 1), (1, 1), (2, 3)])
def test_a_state_has_the_power_of_every_row(values, rank, planes):
    shape = PackedLayout(40, 200, values, 64, rank=rank, planes=planes)
    parts = [random_packed(shape, seed=seed) for seed in (1, 2)]
    state = layout.prepare(parts, torch.float16)
    assert state.powers is not None and state.powers.shape == (128,)
    for part, powers in zip(parts, state.powers.split(64), strict=True):
        assert part.scales is not None
        scales = part.scales.float().abs().amax(1)
        if values != "int8":  # Codes are 4 q in rows g of a tile and 64 q in rows g + 8.
            codes = torch.where(torch.arange(40) % 16 < 8, 4.0, 64.0)
            scales = scales / codes
        sized = (scales * powers[:40])[scales > 0]
        assert (sized < 2.0**-7).all() and (powers[40:] == 1).all()
        if not rank:
            assert (sized >= 2.0**-8).all()


def test_other_states_have_none():
    for values, dtype in (("fp16", torch.float16), ("int8", torch.bfloat16)):
        packed = random_packed(PackedLayout(16, 64, values))
        assert layout.prepare((packed,), dtype).powers is None
