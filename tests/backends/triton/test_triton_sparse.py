"""Decoding by sparse tensor cores in Triton: the PTX of every program that ships, executed.

Weights are prepared as a CUDA stream; accesses are checked against their tensors' bounds, shared
memory for races, and what torch hands out holds NaN. Small integers must come out to the bit.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from pairwise import grid, grid_of, subset

pytest.importorskip("triton")

from triton_programs import Emulated

from slab_kernels.backends.cuda import layout
from slab_kernels.backends.triton import kernels, sparse, sparse_kernel
from slab_kernels.backends.triton.sparse import Configuration
from slab_kernels.format import PackedLayout, ceil_div
from slab_kernels.testing import ROUNDOFF, oracle, random_packed

HALF = (torch.float16, torch.bfloat16)
VALUES = (
    ("fp16", None), ("bf16", None), ("int8", 32), ("int8", 128), ("int8", None),
    ("int4", 32), ("int4", 64), ("int4", None), ("int3", 64),
)  # fmt: skip
# Rank, sign planes and tokens of a program.
TERMS = (
    (0, 1, 8), (0, 1, 16), (1, 1, 8), (1, 1, 16), (1, 2, 8), (1, 3, 8), (1, 2, 16), (1, 3, 16),
    (2, 1, 1), (2, 1, 8), (3, 3, 8), (4, 2, 8), (5, 2, 4), (8, 1, 4), (7, 2, 1), (9, 3, 1),
    (10, 2, 2), (16, 1, 2),
)  # fmt: skip


@pytest.fixture
def emulated(monkeypatch):
    """The kernels, each in its emulator: name -> Emulated, whose `launched` says what ran."""
    found = {}
    for module, name in ((sparse_kernel, "decode_kernel"), (kernels, "sum_kernel")):
        found[name] = Emulated(getattr(module, name), ("y_ptr",))
        monkeypatch.setattr(module, name, found[name])
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        made = new_empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    return found


def whole(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(y, x, parts, bias=None) -> None:
    """y is the product of small integers, without an error."""
    expected = torch.cat([oracle(x, part)[0] for part in parts], -1)
    expected = expected if bias is None else expected + bias.double()
    assert y.dtype == x.dtype and torch.equal(y.double(), expected.to(x.dtype).double())


def test_the_grid_has_every_program():
    """As many tokens, and as many tiles of sign products, as `configuration` ever chooses."""
    programs = {(tokens, ceil_div(rank * tokens, 8)) for rank, _, tokens in TERMS}
    chosen = {
        (sparse.tile_tokens(M, rank), ceil_div(rank * sparse.tile_tokens(M, rank), 8))
        for rank, M in itertools.product(range(17), range(1, 17))
    }
    assert {tokens for tokens, _ in chosen} == set(sparse.TOKENS)
    assert chosen <= programs


# What a program is compiled for, which takes seconds; K is an argument of its launches. Any two
# settings of a program meet. The bias comes after all sums, so it meets what they are kept in.
PROGRAMS = [
    (dtype, *values, tokens, warps, bias_type)
    for dtype in HALF
    for values in VALUES
    for tokens in (8, 16)
    for warps in (8, 16)
    for bias_type in (None, torch.float32, torch.bfloat16)
]
FEW_PROGRAMS = subset(
    PROGRAMS,
    lambda program: (program[0], program[1:3], *program[3:5]),
    each=lambda program: (program[0], program[3], program[5]),
)
LENGTHS = {8: (1, 1100), 16: (172, 2176)}  # K, by warps


def launches(programs):
    return [(*program, K) for program in programs for K in LENGTHS[program[4]]]


@grid_of(
    "dtype, values, group, tokens, warps, bias_type, K",
    launches(PROGRAMS),
    few=launches(FEW_PROGRAMS),
)
def test_every_kind_of_values_is_exact_on_small_integers(
    emulated, dtype, values, group, tokens, warps, bias_type, K
):
    """Rounds of whole blocks, a last round with warps that have none, inputs beyond K, rows and
    tokens beside every tile."""
    packed = random_packed(PackedLayout(37, K, values, group, 1), integers=True)
    x = whole((tokens - 1, K), dtype)
    bias = None if bias_type is None else whole((37,), bias_type, 2)
    state = layout.prepare((packed,), dtype)
    y = sparse.decode(x, state, bias, Configuration(tokens, warps, 1, 1))
    exact(y, x, (packed,), bias)


TERM_CASES = [
    (dtype, values, *term, *warps_and_k)
    for dtype in HALF
    for values in ("fp16", "int8", "int4")
    for term in TERMS
    for warps_and_k in ((8, 1100), (16, 2200))
]


def parts_of(case) -> tuple[object, ...]:
    """What makes the program of a term case: its terms by their planes and tiles of products."""
    dtype, values, rank, planes, tokens, warps, _ = case
    return dtype, values, planes if rank else 0, tokens, ceil_div(rank * tokens, 8), warps


@grid_of(
    "dtype, values, rank, planes, tokens, warps, K",
    TERM_CASES,
    few=subset(TERM_CASES, parts_of, each=lambda case: case[2:5]),
)
def test_every_kind_of_sign_term_is_exact_on_small_integers(
    emulated, dtype, values, rank, planes, tokens, warps, K
):
    shape = PackedLayout(30, K, values, None, rank, planes=planes)
    packed = random_packed(shape, seed=rank, integers=True)
    x = whole((3 if tokens == 2 else tokens, K), dtype)
    state = layout.prepare((packed,), dtype)
    y = sparse.decode(x, state, None, Configuration(tokens, warps, 1, 1))
    exact(y, x, (packed,))


@grid(**{
    "dtype": HALF,
    "values": ("fp16", "int8", "int4"),
    "rank, planes": ((0, 1), (1, 1), (2, 3)),
    "adapter": (16, 100, 300),
    "parts": (1, 2, 4),
    "warps, splits, z_splits": ((8, 1, 1), (16, 1, 4), (8, 4, 2), (16, 2, 1)),
    "M": (1, 9),
})  # fmt: skip
def test_adapters_parts_and_shares_of_K(
    emulated, dtype, values, rank, planes, adapter, parts, warps, splits, z_splits, M
):
    """Five K blocks, so that the last of four shares has none."""
    group = None if values == "fp16" else 128
    packed = [
        random_packed(PackedLayout(n, 520, values, group, rank, adapter, planes=planes), n, True)
        for n in (40, 1, 32, 65)[:parts]
    ]
    x = whole((M, 520), dtype)
    x *= torch.arange(520) % 9 == 0  # z is rounded to the activations' type; so it stays small.
    bias = whole((sum(part.out_features for part in packed),), dtype, 2)
    state = layout.prepare(packed, dtype)
    tokens = sparse.tile_tokens(M, rank)
    y = sparse.decode(x, state, bias, Configuration(tokens, warps, splits, z_splits))
    exact(y, x, packed, bias)


@pytest.mark.parametrize(
    "dtype, values, group, rank, planes, adapter",
    [
        (torch.float16, "int4", None, 1, 1, 16),
        (torch.bfloat16, "fp16", None, 0, 1, 0),
        (torch.bfloat16, "int8", 32, 3, 2, 0),
    ],
)
def test_a_token_has_the_same_bits_whatever_comes_with_it(
    emulated, dtype, values, group, rank, planes, adapter
):
    """For every number of tokens up to 16, and beside tokens of NaN and of infinities."""
    shape = PackedLayout(32, 1300, values, group, rank, adapter, planes=planes)
    state = layout.prepare((random_packed(shape),), dtype)
    x = random((16, 1300), dtype)

    def result(x):
        return sparse.decode(x, state, None, sparse.configuration(state, x.shape[0], 132))

    y = result(x)
    assert bool(y.isfinite().all())
    for M in (1, 2, 7, 8, 9):
        assert torch.equal(result(x[:M]), y[:M]), M
    for M in (8, 16):
        beside = x[:M].clone()
        beside[1::2] = torch.tensor([float("nan"), float("inf")], dtype=dtype).repeat(650)
        assert torch.equal(result(beside)[::2], y[:M:2]), M


@pytest.mark.parametrize("K", [1151, 1150])
def test_any_strides_and_alignment_of_x(emulated, K):
    """Rows an odd number of elements apart, columns apart, an odd first address, an odd K."""
    packed = random_packed(PackedLayout(32, K, "int8", None, 1), integers=True)
    state = layout.prepare((packed,), torch.float16)
    configuration = sparse.configuration(state, 3, 132)
    x = whole((3, K), torch.float16)
    room = torch.full((4 * (K + 9),), 7.0, dtype=torch.float16)
    for start, row, column in ((0, K + 2, 1), (0, K + 3, 1), (1, K + 2, 1), (0, 1, 3), (2, K, 1)):
        view = room.as_strided((3, K), (row, column), start)
        view.copy_(x)
        exact(sparse.decode(view, state, None, configuration), x, (packed,))
    for single in (room[1:].as_strided((1, K), (K, 1)), room.as_strided((1, K), (1, 1))):
        single.copy_(x[:1])
        exact(sparse.decode(single, state, None, configuration), x[:1], (packed,))


def test_a_storage_may_begin_in_the_middle_of_a_word(emulated):
    """As one from DLPack may, whose storage offset is 0, or 1 where the address is a word's."""
    K = 1150
    packed = random_packed(PackedLayout(32, K, "int8", None, 1), integers=True)
    state = layout.prepare((packed,), torch.float16)
    x = whole((3, K), torch.float16)
    room = torch.zeros(3 * K + 8, dtype=torch.float16).view(torch.uint8)
    storage = torch.from_numpy(room.numpy()[2:]).view(torch.float16)
    for start in (0, 1):
        view = storage.as_strided((3, K), (K, 1), start)
        view.copy_(x)
        assert (view.data_ptr() % 4, view.storage_offset()) == (2 - 2 * start, start)
        y = sparse.decode(view, state, None, sparse.configuration(state, 3, 132))
        exact(y, x, (packed,))
        assert sparse._words(view).data_ptr() % 4 == 0


def test_values_beyond_a_warps_blocks_do_not_reach_it(emulated):
    """A warp without a block reads another's, whose infinity must not become NaN by a zero."""
    packed = random_packed(PackedLayout(32, 1030, "fp16", None, 0))
    packed.values[3, 514] = float("inf")  # in the ninth K block
    state = layout.prepare((packed,), torch.float16)
    x = torch.ones(1, 1030, dtype=torch.float16)
    y = sparse.decode(x, state, None, Configuration(8, 8, 1, 1))
    assert y[0, 3] == float("inf") and bool(y.isfinite().sum() == 31)


@grid(dtype=HALF, values=("fp16", "int8", "int4"))
def test_random_numbers_stay_within_the_error_bound(emulated, dtype, values):
    packed = random_packed(PackedLayout(64, 1100, values, None, 1, 16))
    x = random((5, 1100), dtype)
    state = layout.prepare((packed,), dtype)
    y = sparse.decode(x, state, None, sparse.configuration(state, 5, 132))
    expected, magnitude = oracle(x, packed)
    # As a dense 16-bit linear rounds W, and z and v x besides.
    assert bool(((y.double() - expected).abs() <= magnitude * 3 * ROUNDOFF[dtype]).all())


@pytest.mark.parametrize("overlap, wrong", [(False, layout.INT4), (True, layout.W16)])
def test_the_check_of_a_first_use(monkeypatch, overlap, wrong):
    """It finds both programs right, and finds two lanes of one exchanged."""
    device = torch.device("cpu")
    emulator = Emulated(sparse_kernel.decode_kernel, ("y_ptr",), 90 if overlap else 80)
    monkeypatch.setattr(sparse, "overlaps", lambda device: overlap)
    monkeypatch.setattr(sparse_kernel, "decode_kernel", emulator)
    assert sparse.self_check(device)
    assert [(kernel.warps, grid) for kernel, grid, _ in emulator.launched] == [
        (8, (1, 1, 1)), (16, (1, 1, 1))
    ]  # fmt: skip
    dense = sparse.dense

    def exchanged(state):
        first = layout.VALUE_BYTES[wrong] + layout.METADATA_BYTES
        signs = state.stream[..., first : first + layout.SIGN_BYTES].view(torch.int64)
        if state.values == wrong:
            signs[..., [5, 6]] = signs[..., [6, 5]]
        return dense(state)

    monkeypatch.setattr(sparse, "dense", exchanged)
    assert not sparse.self_check(device)


def test_configurations():
    """Few rows or a long K are split; many tokens and ranks take several programs."""
    state = layout.prepare((random_packed(PackedLayout(64, 8192, "int4", None, 1, 16)),), HALF[0])
    assert sparse.configuration(state, 1, 132) == (8, 16, 2, 8)
    assert sparse.configuration(state, 16, 132) == (16, 16, 2, 8)
    assert sparse.configuration(state, 1, 1) == (8, 8, 1, 1)
    ranks = {1: (8, 16), 2: (1, 8), 4: (1, 8), 5: (1, 4), 8: (1, 4), 9: (1, 2), 16: (1, 2)}
    assert {r: (sparse.tile_tokens(1, r), sparse.tile_tokens(16, r)) for r in ranks} == ranks
