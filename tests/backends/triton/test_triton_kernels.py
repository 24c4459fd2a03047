"""The Triton kernels' own PTX for sm_80, executed instruction by instruction, bf16 included:
launch.py runs unchanged.

Every access is checked against its tensor's bounds, shared memory for races, outputs start as
NaN. Tiles are those that an A100 would get, so that the text executed is the text shipped.
"""

from __future__ import annotations

import re

import pytest
import torch
from pairwise import grid

pytest.importorskip("triton")

from triton_programs import Emulated

from slab_kernels.backends.triton import configs, kernels, launch, rows
from slab_kernels.backends.triton.rows import TileConfig, TritonDevice
from slab_kernels.format import PackedLayout, plane_unit, unpack
from slab_kernels.testing import ROUNDOFF, error_bound, oracle, random_packed

A100 = TritonDevice("NVIDIA A100-SXM4-80GB", 108, 166912, 80)
HALF = (torch.float16, torch.bfloat16)
VALUES = (
    ("fp16", None),
    ("bf16", None),
    ("int8", 32),
    ("int8", None),
    ("int4", 64),
    ("int4", None),
)
SMALL = TileConfig(16, 16, 32, 1, 2)
OUTPUTS = {
    "linear_kernel": ("y_ptr",),
    "adapter_kernel": ("z_ptr",),
    "sum_kernel": ("y_ptr",),
    "dense_kernel": ("w_ptr",),
}


@pytest.fixture
def emulated(monkeypatch):
    """The kernels, each in its emulator: name -> Emulated, whose `launched` says what ran."""
    found = {name: Emulated(getattr(kernels, name), outputs) for name, outputs in OUTPUTS.items()}
    for name, emulator in found.items():
        monkeypatch.setattr(kernels, name, emulator)
    monkeypatch.setattr(launch, "speaks_ptx", lambda device: True)
    new_empty, empty = torch.Tensor.new_empty, torch.empty
    poisoned = lambda make: lambda *args, **kwargs: make(*args, **kwargs).fill_(float("nan"))  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
    monkeypatch.setattr(torch, "empty", poisoned(empty))
    return found


def shipped(packed, M: int, dtype: torch.dtype) -> TileConfig:
    layout = packed.layout
    sizes = rows.TritonSizes(
        layout.in_features,
        (layout.out_features,),
        layout.values,
        layout.group_size or 0,
        layout.rank,
        -(-layout.adapter_rank // 16) * 16,
    )
    return configs.choose(sizes, M, 8 * dtype.itemsize, A100)


def whole(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x, packed, bias, y) -> None:
    expected, _ = oracle(x, packed, bias)
    torch.testing.assert_close(y.double(), expected.to(x.dtype).double(), rtol=0, atol=0)


@grid(**{
    "dtype": HALF,
    "values, group": VALUES,
    "rank, adapter": ((0, 0), (1, 0), (2, 16), (1, 100)),
})  # fmt: skip
def test_decoding_is_exact_on_small_integers_with_every_tail(
    emulated, dtype, values, group, rank, adapter
):
    """N, K and M beside every multiple; the shipped tile, masked."""
    packed = random_packed(
        PackedLayout(77, 172, values, group, rank, adapter), seed=rank, integers=True
    )
    x, bias = whole((5, 172), dtype), whole((77,), dtype, 2)
    state = launch.prepare((packed,), dtype)
    y = launch.linear(x, state, bias, shipped(packed, 5, dtype), 1, 2)
    exact(x, packed, bias, y)


@grid(**{
    "dtype": HALF,
    "values, group, rank, adapter": (
        ("fp16", None, 1, 0), ("bf16", None, 2, 0), ("int4", None, 2, 16), ("int3", 32, 1, 0),
    ),
    "planes": (2, 3),
})  # fmt: skip
def test_decoding_by_more_planes(emulated, dtype, values, group, rank, adapter, planes):
    packed = random_packed(
        PackedLayout(77, 172, values, group, rank, adapter, planes=planes),
        seed=planes,
        integers=True,
    )
    x, bias = whole((5, 172), dtype), whole((77,), dtype, 2)
    exact(
        x,
        packed,
        bias,
        launch.linear(x, launch.prepare((packed,), dtype), bias, shipped(packed, 5, dtype), 1, 2),
    )


@pytest.mark.parametrize("planes", [2, 3])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("dtype", HALF)
def test_levels_are_rounded_as_one_sign_is(emulated, dtype, rank, planes):
    """A pruned entry once; to bf16 of rank 1 both factors besides. fp16's halves of u leave 2^-22,
    or the least subnormals."""
    packed = random_packed(PackedLayout(64, 128, "fp16", None, rank, planes=planes))
    state, d = launch.prepare((packed,), dtype), unpack(packed)
    W, exact = (
        launch.dense(state, dtype).double(),
        oracle(torch.eye(128, dtype=torch.float64), packed)[0].T,
    )
    size = (d.U.double().abs() @ d.V.double().abs().T) * plane_unit(planes) * d.B.abs()
    roundings = 3 if (dtype, rank) == (torch.bfloat16, 1) else 1
    least = (2 + state.V.abs().max()) * 2.0**-25 if rank == 1 else 2.0**-25
    most = W.abs() * ROUNDOFF[dtype] * roundings * (1 + 2.0**-8) + size * 2.0**-22 + least
    assert bool(((W - exact).abs() <= most)[~d.mask].all())


# The interpreter's grid meets more of them in fp32; here is what it cannot show, three TF32
# products.
@pytest.mark.parametrize("values, group, planes, rank, adapter", [
    ("fp16", None, 1, 3, 0), ("bf16", None, 2, 1, 16), ("int8", 128, 1, 1, 16),
    ("int4", None, 1, 3, 0), ("int3", 64, 3, 1, 16),
])  # fmt: skip
def test_fp32_activations(emulated, values, group, planes, rank, adapter):
    """Three TF32 products keep 22 bits of either factor: fp32's bound on random numbers, exact on
    small integers."""
    layout = PackedLayout(70, 152, values, group, rank, adapter, planes=planes)
    x, bias = whole((3, 152), torch.float32), whole((70,), torch.float32)
    packed = random_packed(layout, integers=True)
    config = shipped(packed, 3, torch.float32)
    y = launch.linear(x, launch.prepare((packed,), torch.float32), bias, config, 2, 1)
    exact(x, packed, bias, y)
    packed, x = (
        random_packed(layout),
        torch.randn(3, 152, generator=torch.Generator().manual_seed(3)),
    )
    y = launch.linear(x, launch.prepare((packed,), torch.float32), None, config, 1, 1)
    expected, magnitude = oracle(x, packed)
    assert bool(
        (
            (y.double() - expected).abs() <= error_bound(magnitude, expected, torch.float32, 152)
        ).all()
    )


@pytest.mark.parametrize("M", [17, 40, 100])
@pytest.mark.parametrize(
    "dtype, values, rank",
    [(torch.float16, "fp16", 1), (torch.bfloat16, "int4", 1), (torch.bfloat16, "bf16", 2)],
)
def test_prefill_tiles(emulated, M, dtype, values, rank):
    """Every shipped tile for more tokens, two K-steps and a tail each; long K is for the GPU."""
    packed = random_packed(
        PackedLayout(130, 160, values, 32 if values == "int4" else None, rank), integers=True
    )
    x = whole((M, 160), dtype)
    config = shipped(packed, M, dtype)
    state = launch.prepare((packed,), dtype)
    if config.rebuild:
        pytest.skip("this many tokens rebuild the weight: test_the_weight_rebuilt")
    exact(x, packed, None, launch.linear(x, state, None, config, 1, 1))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize(
    "values, group, rank, adapter, planes",
    [
        ("fp16", None, 1, 0, 1),
        ("int8", 32, 3, 20, 1),
        ("int4", None, 0, 16, 1),
        ("int4", 128, 1, 0, 1),
        ("int3", 64, 2, 0, 2),
        ("bf16", None, 1, 0, 3),
    ],
)
def test_the_weight_rebuilt(emulated, dtype, values, group, rank, adapter, planes):
    packed = random_packed(
        PackedLayout(67, 140, values, group, rank, adapter, planes=planes), integers=True
    )
    W = launch.dense(launch.prepare((packed,), dtype), dtype)
    torch.testing.assert_close(W.double(), packed.dense().double(), rtol=0, atol=0)


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_a_whole_layer_without_tails_goes_by_wide_copies(emulated, planes):
    """K a multiple of the tile, N too: nothing is masked, and the loads are cp.async, of 16 bytes
    for values; signs are among them."""
    packed = random_packed(PackedLayout(64, 512, "fp16", None, 1, planes=planes), integers=True)
    x = whole((16, 512), torch.float16)
    exact(
        x,
        packed,
        None,
        launch.linear(
            x, launch.prepare((packed,), torch.float16), None, shipped(packed, 16, x.dtype), 2, 1
        ),
    )
    compiled = emulated["linear_kernel"].launched[0][0]
    assert (
        "cp.async.cg.shared.global" in compiled.ptx and "mma.sync.aligned.m16n8k16" in compiled.ptx
    )
    assert set(re.findall(r"ld\.global\.(\S+)", compiled.ptx)) == {"b32"}, (
        "nothing but u, before the loop"
    )


@pytest.mark.parametrize("splits", [2, 8])
@pytest.mark.parametrize("bias_type", [torch.float32, torch.bfloat16, None])
def test_shares_of_K_are_added_in_order(emulated, splits, bias_type):
    """More shares than K has steps leave some empty."""
    packed = random_packed(PackedLayout(20, 100, "int8", 32, 1, 16))
    x = torch.randn(2, 100, generator=torch.Generator().manual_seed(0)).half()
    bias = None if bias_type is None else whole((20,), bias_type)
    state = launch.prepare((packed,), torch.float16)
    y = launch.linear(x, state, bias, SMALL, splits, 2)
    assert torch.equal(y, launch.linear(x, state, bias, SMALL, splits, 2))
    expected, magnitude = oracle(x, packed, bias)
    # W, z and y are rounded to fp16 as a dense fp16 linear rounds W and y.
    assert bool(((y.double() - expected).abs() <= magnitude * 3 * 2.0**-11).all())


@pytest.mark.parametrize("planes", [1, 3])
def test_fused_weights_keep_their_own_factors(emulated, planes):
    parts = [
        random_packed(PackedLayout(n, 96, "int4", 32, 1, 16, planes=planes), seed=n, integers=True)
        for n in (40, 1, 17)
    ]
    x = whole((3, 96), torch.bfloat16)
    y = launch.linear(x, launch.prepare(parts, torch.bfloat16), None, SMALL, 1, 2)
    for part, out in zip(parts, y.split([40, 1, 17], -1), strict=True):
        exact(x, part, None, out)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("dtype", HALF)
def test_error_is_that_of_a_dense_weight_of_the_same_type(emulated, dtype, planes):
    packed = random_packed(PackedLayout(64, 512, "fp16", None, 1, planes=planes))
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = launch.linear(x, launch.prepare((packed,), dtype), None, shipped(packed, 16, dtype), 1, 1)
    W, (expected, _) = packed.dense(), oracle(x, packed)
    dense = (x.double() @ W.to(dtype).double().T).to(dtype).double()
    assert (y.double() - expected).norm() <= 1.5 * (dense - expected).norm()
