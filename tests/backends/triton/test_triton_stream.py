"""The Triton backend on the stream that the CUDA backend prepares too: the PTX of the kernel that
rebuilds a weight executed, what runs for how many tokens, the check of a device's first use, and
one copy in memory for both backends. No GPU."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pairwise import grid
from sass import counter as sass

pytest.importorskip("triton")

from triton_programs import Emulated

from slab_kernels import FusedSlabLinear, SlabLinear
from slab_kernels.backends import cuda, dispatch, one_launch
from slab_kernels.backends import triton as backend
from slab_kernels.backends.cuda import layout, unpack
from slab_kernels.backends.cuda.layout import CudaState
from slab_kernels.backends.triton import (
    configs,
    kernels,
    launch,
    rebuild,
    sparse,
    sparse_kernel,
    stream,
)
from slab_kernels.backends.triton.launch import TritonState
from slab_kernels.backends.triton.rows import TileConfig, TritonDevice
from slab_kernels.bench import correctness, tune_weight
from slab_kernels.bench import tune as tuning
from slab_kernels.errors import ArgumentTypeError, BackendError, RangeError, ShapeError
from slab_kernels.format import PackedLayout, bits
from slab_kernels.testing import ROUNDOFF, oracle, random_packed

BACKEND = backend.BACKEND
HALF = (torch.float16, torch.bfloat16)
VALUES = (
    ("fp16", None), ("bf16", None), ("int8", 32), ("int8", None), ("int4", 64), ("int4", None),
    ("int4", 128), ("int3", 32),
)  # fmt: skip
H100 = TritonDevice("NVIDIA H100 80GB HBM3", 132, 232448, 90)
OUTPUTS = {
    (rebuild, "rebuild_kernel"): ("w_ptr",),
    (sparse_kernel, "decode_kernel"): ("y_ptr",),
    (kernels, "sum_kernel"): ("y_ptr",),
}


@pytest.fixture
def nvidia(monkeypatch):
    """CPU tensors count as an NVIDIA GPU's, whose first use comes out right."""
    monkeypatch.setattr(launch, "speaks_ptx", lambda device: True)
    monkeypatch.setattr(stream, "_TRUSTED", {})
    monkeypatch.setattr(sparse, "self_check", lambda device: True, raising=False)
    monkeypatch.setattr(backend, "device_of", lambda index: H100)


@pytest.fixture
def emulated(nvidia, monkeypatch):
    """The kernels, each in its emulator; memory that torch hands out holds NaN."""
    found = {}
    for (module, name), outputs in OUTPUTS.items():
        found[name] = Emulated(getattr(module, name), outputs)
        monkeypatch.setattr(module, name, found[name])
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        made = new_empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    return found


def whole(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(y, x, parts, bias=None) -> None:
    """y is the product of small integers, without an error."""
    expected = torch.cat([oracle(x, part)[0] for part in parts], -1)
    expected = expected if bias is None else expected + bias.double()
    assert y.dtype == x.dtype and torch.equal(y.double(), expected.to(x.dtype).double())


# The weight rebuilt


@grid(**{
    "dtype": HALF,
    "values, group": VALUES,
    "rank": (0, 1, 2, 5),
    "adapter": (0, 16, 5),
    "planes": (1, 2, 3),
    "N, K": ((64, 256), (77, 172), (1, 3), (33, 130)),
})  # fmt: skip
def test_the_weight_rebuilt_is_the_weight(
    emulated, dtype, values, group, rank, adapter, planes, N, K
):
    """Small integers to the bit. Random ones of rank 0 and 1 are the stream's own fp32 numbers
    rounded once; a higher rank adds in fp32, an adapter rounds once more."""
    shape = PackedLayout(N, K, values, group, rank, adapter, planes=planes)
    for integers in (True, False):
        packed = random_packed(shape, seed=rank, integers=integers)
        state = layout.prepare((packed,), dtype)
        W = stream.dense(state)
        assert W.shape == (N, K) and W.dtype == dtype and W.stride(0) % 8 == 0
        if integers:
            assert torch.equal(W.double(), packed.dense().double())
            continue
        want = unpack.dense(state)
        if rank <= 1 and not adapter:
            assert torch.equal(W, want.to(dtype))
            continue
        size = oracle(torch.eye(K, dtype=torch.float64), packed)[1].T
        if adapter:
            ((P, Q),) = unpack.adapters(state)
            want = want + P.float() @ Q.float()
        most = size * 2 * ROUNDOFF[dtype] + size * 2.0**-20 + 2.0**-23
        assert bool(((W.double() - want.double()).abs() <= most).all())


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("values", ["fp16", "int8", "int4"])
def test_every_pattern_at_every_place_of_a_block(emulated, values, planes):
    """Six blocks, so that each of the six patterns stands at every lane, step and register."""
    shape = PackedLayout(32, 6 * 128, values, 32 if values == "int4" else None, 1, planes=planes)
    packed = random_packed(shape, integers=True)
    row, group = torch.arange(32)[:, None], torch.arange(6 * 32)
    nibbles = torch.tensor(bits.LEGAL_NIBBLES)[(row + group + group // 32) % 6]
    packed = replace(
        packed, metadata=(nibbles[:, ::2] | nibbles[:, 1::2] << 4).to(packed.metadata.dtype)
    )
    W = stream.dense(layout.prepare((packed,), torch.float16))
    assert torch.equal(W.double(), packed.dense().double())


@pytest.mark.parametrize("rows", [(40, 1, 70), (96,)])
def test_many_tokens_rebuild_some_rows_at_a_time(emulated, monkeypatch, rows):
    """Of every part; the next rows take the same memory, and so no more of it is asked for."""
    monkeypatch.setattr(stream, "REBUILT_ROWS", 64)
    parts = [
        random_packed(PackedLayout(n, 132, "int4", 32, 1, 3), seed=n, integers=True) for n in rows
    ]
    state = BACKEND.prepare_fused(parts, torch.bfloat16)
    x, bias = whole((2, 50, 132), torch.bfloat16), whole((sum(rows),), torch.float32, 2)
    y = BACKEND.linear(x, state, bias)
    exact(y.view(100, -1), x.view(100, -1), parts, bias)
    launched = emulated["rebuild_kernel"].launched
    assert [pairs for _, (_, pairs, *_), _ in launched] == [
        -(-min(64, n - start) // 32) for n in rows for start in range(0, n, 64)
    ]
    assert not emulated["decode_kernel"].launched


# Instructions a weight of the kernel that rebuilds, measured (3.7.1) and a tenth.
MOST = {"fp16": 9.2, "int8": 12.0, "int4": 12.5}


ARCHITECTURES = (80, 86, 89, 90, 120)


@pytest.mark.parametrize("values", MOST)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_machine_code_that_rebuilds(nvidia, monkeypatch, arch, values):
    """Eight stores of eight bytes a thread, no register spilled, and few instructions.

    Next to one sign, of which the instructions are counted, each case has no signs or many, in
    turn, so that each architecture and each value type meets both.
    """
    kernel = Emulated(rebuild.rebuild_kernel, ("w_ptr",), arch, execute=False)
    monkeypatch.setattr(rebuild, "rebuild_kernel", kernel)
    turn = ARCHITECTURES.index(arch) + list(MOST).index(values)
    for rank, planes in ((1, 1), ((0, 1), (4, 3))[turn % 2]):
        shape = PackedLayout(64, 256, values, None, rank, planes=planes)
        stream.dense(layout.prepare((random_packed(shape),), torch.float16))
    for compiled, *_ in kernel.launched:
        assert compiled.ptx.count("st.global") == compiled.ptx.count("st.global.b64") == 8
        assert not compiled.stack and not compiled.local and not compiled.shared_bytes
    one = kernel.launched[0][0]
    usage = {one.name: sass.Usage(one.registers, one.stack, one.local)}
    instructions = sass.parse(one.sass, usage)[one.name].instructions
    count = sum(i.base != "NOP" for i in instructions) / 32  # a thread rebuilds 32 weights
    assert count <= MOST[values] and one.registers <= 64, (count, one.registers)


# What runs for how many tokens


@pytest.mark.parametrize("M", [1, 16, 17, 40, 64, 65, 128, 129])
@pytest.mark.parametrize("values, last", [("fp16", 128), ("int4", 64)])
def test_few_tokens_are_decoded_and_many_rebuild(emulated, values, last, M):
    """A tile of 16 tokens decodes the weight for itself."""
    packed = random_packed(PackedLayout(40, 136, values, None, 1), integers=True)
    state = BACKEND.prepare(packed, torch.float16)
    x = whole((M, 136), torch.float16)
    exact(BACKEND.linear(x, state), x, [packed])
    decoded, rebuilt = (emulated[f"{name}_kernel"].launched for name in ("decode", "rebuild"))
    assert (len(decoded), len(rebuilt)) == ((1, 0) if last >= M else (0, 1))
    if decoded:
        assert decoded[0][1][0] == -(-M // 16)


@pytest.mark.parametrize("rank, last", [(0, 128), (1, 128), (2, 64), (4, 64), (8, 32), (16, 16)])
def test_of_a_higher_rank_fewer_tokens_share_a_tile(rank, last):
    assert [m for m in (1, 16, last, last + 1, 4096) if stream.decodes(m, rank)] == [
        m for m in (1, 16, last) if m <= last
    ]


def test_no_tokens(emulated):
    state = BACKEND.prepare(random_packed(PackedLayout(40, 136)), torch.float16)
    for empty in ((0, 136), (2, 0, 136)):
        assert BACKEND.linear(torch.empty(empty, dtype=torch.float16), state).shape == (
            *empty[:-1], 40,
        )  # fmt: skip
    assert not emulated["decode_kernel"].launched


# What is prepared


def test_both_backends_prepare_the_same_bytes(nvidia):
    for values, group in VALUES:
        packed = random_packed(PackedLayout(40, 136, values, group, 2, 3))
        for dtype in HALF:
            mine, theirs = BACKEND.prepare(packed, dtype), cuda.BACKEND.prepare(packed, dtype)
            assert type(mine) is type(theirs) is CudaState
            for ours, other in zip(mine, theirs, strict=True):
                same = isinstance(ours, torch.Tensor)
                assert torch.equal(ours, other) if same else ours == other


def test_what_takes_the_plain_kernels(nvidia, monkeypatch):
    """fp32 activations, devices without PTX, and numbers that only fp32 factors hold."""
    packed = random_packed(PackedLayout(40, 136, "fp16", None, 2, planes=2, factors="fp32"))
    assert type(BACKEND.prepare(packed, torch.float32)) is TritonState
    large = replace(packed, U=torch.full((40, 2), 5e4), V=torch.full((136, 2), 0.75))
    with pytest.raises(RangeError, match="U times the largest level"):
        layout.prepare((large,), torch.float16)
    assert type(BACKEND.prepare(large, torch.float16)) is TritonState
    assert type(BACKEND.prepare(packed, torch.float16)) is CudaState
    monkeypatch.setattr(launch, "speaks_ptx", lambda device: False)
    assert type(BACKEND.prepare(packed, torch.float16)) is TritonState


def test_more_row_pairs_than_a_grid_has_take_the_plain_kernels(nvidia, monkeypatch):
    assert stream.fits((32 * 65535,)) and not stream.fits((32 * 65535 + 1,))
    monkeypatch.setattr(stream, "MOST_PAIRS", 3)
    for rows, state in (((96,), CudaState), ((97,), TritonState), ((33, 33), TritonState)):
        parts = [random_packed(PackedLayout(n, 136)) for n in rows]
        assert type(BACKEND.prepare_fused(parts, torch.float16)) is state
        theirs = cuda.BACKEND.prepare_fused(parts, torch.float16)
        assert BACKEND.takes(theirs, torch.float16) is (state is CudaState)


@pytest.mark.parametrize("error", [None, RuntimeError("no\nsuch instruction")])
def test_a_device_that_fails_its_first_use_takes_the_plain_kernels(nvidia, monkeypatch, error):
    """It is asked once, and one sentence says so."""
    asked = []

    def check(device):
        asked.append(device)
        if error:
            raise error
        return False

    monkeypatch.setattr(sparse, "self_check", check, raising=False)
    packed = random_packed(PackedLayout(40, 136))
    with pytest.warns(RuntimeWarning) as told:
        states = [BACKEND.prepare(packed, dtype) for dtype in (*HALF, *HALF)]
    assert all(type(state) is TritonState for state in states)
    assert len(asked) == len(told) == 1
    said = "could not be tried (RuntimeError: no such instruction)" if error else "differ from"
    assert said in str(told[0].message) and "\n" not in str(told[0].message)
    assert not BACKEND.takes(cuda.BACKEND.prepare(packed, torch.float16), torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BACKEND.prepare(packed, torch.float16)


def test_nothing_is_prepared_while_a_graph_is_captured(nvidia, monkeypatch):
    """The capture of the layer's device counts; afterwards the first use is made as ever."""
    current = [0]

    @contextlib.contextmanager
    def on(device):
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 1)
    monkeypatch.setattr(launch, "current", on)
    capturing, other = torch.device("cuda", 1), torch.device("cuda", 2)
    said = "a layer on cuda:1 cannot be prepared while a CUDA graph is captured; call prepare"
    for refused in (
        lambda: stream.usable(capturing, torch.float16),
        lambda: one_launch.refuse_capture(capturing),
    ):
        with pytest.raises(BackendError, match=said):
            refused()
    assert stream.usable(other, torch.float16) and stream._TRUSTED == {2: True}
    asked = []
    monkeypatch.setattr(one_launch, "refuse_capture", asked.append)
    for made in (BACKEND, cuda.BACKEND):
        made.prepare(random_packed(PackedLayout(40, 136)), torch.float16)
    assert asked == [torch.device("cpu")] * 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), OSError("no room for a file")])
def test_a_first_use_that_the_machine_prevents_is_tried_again(nvidia, monkeypatch, error):
    checks = iter([error, None])

    def check(device):
        if found := next(checks):
            raise found
        return True

    monkeypatch.setattr(sparse, "self_check", check)
    packed = random_packed(PackedLayout(40, 136))
    with pytest.raises(type(error), match=str(error)):
        BACKEND.prepare(packed, torch.float16)
    assert type(BACKEND.prepare(packed, torch.float16)) is CudaState


def test_activations_are_checked_in_words(nvidia):
    state = BACKEND.prepare(random_packed(PackedLayout(40, 136)), torch.float16)
    with pytest.raises(
        ArgumentTypeError, match="x is torch.bfloat16, but this weight was prepared"
    ):
        BACKEND.linear(whole((2, 136), torch.bfloat16), state)
    with pytest.raises(ShapeError, match="takes in_features=136 last"):
        BACKEND.linear(whole((2, 135), torch.float16), state)
    with pytest.raises(ShapeError, match=r"bias has shape \[39\]"):
        BACKEND.linear(whole((2, 136), torch.float16), state, torch.zeros(39))


# One copy for both backends


@pytest.fixture
def chosen(nvidia, monkeypatch):
    """A list whose last backend is the one that dispatch chooses."""
    backends = [cuda.BACKEND]
    monkeypatch.setattr(dispatch, "select", lambda problem, name=None: backends[-1])
    return backends


def test_a_layer_that_changes_its_backend_holds_one_copy(chosen):
    layer = SlabLinear.from_packed(random_packed(PackedLayout(40, 136, "int4", 32, 1, 3)))
    states = []
    for wanted in (cuda.BACKEND, BACKEND, cuda.BACKEND):
        chosen.append(wanted)
        layer.prepare(torch.float16)
        ((made,),) = layer._linears.values()
        assert made.backend is wanted and layer.backend == wanted.name
        states.append(made.state)
    assert {id(state) for state in states} == {id(states[0])}
    assert len({state.stream.data_ptr() for state in states}) == 1
    layer.prepare(torch.bfloat16)  # another type takes other bytes
    other = layer._linears[torch.bfloat16][0].state
    assert other.stream.data_ptr() != states[0].stream.data_ptr()


def test_a_state_of_other_tensors_is_not_taken_over(chosen):
    layer = SlabLinear.from_packed(random_packed(PackedLayout(40, 136)))
    layer.prepare(torch.float16)
    before = layer._linears[torch.float16][0].state
    layer._buffers["values"].neg_()
    chosen.append(BACKEND)
    layer.prepare(torch.float16)
    after = layer._linears[torch.float16][0].state
    assert not torch.equal(before.stream, after.stream)


@pytest.mark.parametrize("second", ["int4", "int8"])
def test_fused_layers_hold_one_copy_too(chosen, second):
    """In one launch, or one by one where the weights differ."""
    layouts = [PackedLayout(40, 136, "int4", 32, 1), PackedLayout(24, 136, second, 32, 1)]
    fused = FusedSlabLinear([SlabLinear.from_packed(random_packed(it)) for it in layouts])
    found = []
    for wanted in (cuda.BACKEND, BACKEND):
        chosen.append(wanted)
        fused.prepare(torch.float16)
        (made,) = fused._linears[torch.float16]
        assert made.backend is wanted
        parts = made.state if type(made.state) is tuple else ((made.state, 64),)
        found.append([part.stream.data_ptr() for part, _ in parts])
    assert found[0] == found[1] and len(found[0]) == (1 if second == "int4" else 2)


def test_what_is_compiled_ahead_of_a_capture(nvidia, monkeypatch):
    """Every count with a kernel of its own, and a bias of fp32 as under autocast."""
    called = []
    monkeypatch.setattr(
        BACKEND,
        "linear",
        lambda x, state, bias=None: called.append((x.shape, x.dtype, bias is not None and bias)),
    )
    state = BACKEND.prepare(random_packed(PackedLayout(40, 136)), torch.float16)
    on_gpu = SimpleNamespace(is_cuda=True, new_zeros=torch.zeros)
    assert not called
    BACKEND.make_ready(SimpleNamespace(**{**state._asdict(), "stream": on_gpu}))
    assert [shape for shape, *_ in called] == [(M, 136) for M in (1, 2, 16) for _ in range(2)]
    assert {dtype for _, dtype, _ in called} == {torch.float16}
    for without, (_, _, bias) in zip(called[::2], called[1::2], strict=True):
        assert without[2] is False and (bias.shape, bias.dtype) == ((40,), torch.float32)


def test_a_tuple_of_no_states_is_not_taken_over(nvidia):
    for one in (BACKEND, cuda.BACKEND):
        assert one.adopt((), torch.float16) is None


# The op


@pytest.mark.parametrize("M", [3, 200])
def test_gradients_are_those_of_the_dense_weight(emulated, M):
    parts = [random_packed(PackedLayout(n, 132, "int8", 64, 1, 4), seed=n) for n in (33, 8)]
    state = BACKEND.prepare_fused(parts, torch.float16)
    W = torch.cat([part.dense() for part in parts])
    x = torch.randn(M, 132).half().requires_grad_()
    bias = torch.zeros(41, requires_grad=True)
    grad = torch.randn(M, 41).half()
    BACKEND.linear(x, state, bias).backward(grad)
    torch.testing.assert_close(x.grad.float(), grad.float() @ W, rtol=4e-3, atol=2e-2)
    torch.testing.assert_close(bias.grad, grad.float().sum(0), rtol=4e-3, atol=2e-2)
    assert torch.equal(BACKEND.linear(x.detach(), state), BACKEND.linear(x, state).detach())


def test_fake_kernels_have_the_shapes_and_strides_of_the_real_ones(emulated):
    ops = torch.ops.slab_kernels
    for K in (136, 131):
        state = BACKEND.prepare(random_packed(PackedLayout(24, K, rank=1)), torch.float16)
        meta = CudaState(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in state))
        real, fake = ops.dense_triton_stream(*state), ops.dense_triton_stream(*meta)
        for made in (real, fake):
            assert (made.shape, made.dtype) == ((24, K), torch.float16)
        assert real.stride() == fake.stride()
        for shape in ((K,), (0, K), (2, 3, K)):
            y = BACKEND.linear(torch.empty(shape, dtype=torch.float16, device="meta"), meta)
            assert (y.shape, y.is_contiguous()) == ((*shape[:-1], 24), True)
    with pytest.raises(RuntimeError, match="x has 7 features, the weight 131"):
        BACKEND.linear(torch.empty(2, 7, dtype=torch.float16, device="meta"), meta)


def test_describe(nvidia, monkeypatch):
    from slab_kernels.backends.base import LinearProblem

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    problem = LinearProblem(1, 4096, 4096, "int4", 128, 1, 0, torch.float16, "cuda")
    said = {M: BACKEND.describe(replace(problem, M=M)) for M in (1, 64, 65)}
    assert said[1] == (
        "NVIDIA H100 80GB HBM3: sparse tensor cores on the stream of the cuda backend"
    )
    assert said[64].endswith("in 4 tiles of tokens") and "rebuilt dense" in said[65]
    assert "rebuilt dense" in BACKEND.describe(replace(problem, M=64, rank=16))
    assert "4 warps" in BACKEND.describe(replace(problem, dtype=torch.float32))
    monkeypatch.setitem(stream._TRUSTED, 0, False)
    assert "64 rows x 16 tokens" in BACKEND.describe(problem)
    assert configs.choose(stream.sizes_of(
        layout.prepare((random_packed(PackedLayout(40, 136)),), torch.float16)), 129, 16, H100
    ).rebuild  # fmt: skip


@pytest.mark.parametrize("config, M, kernel", [
    (TileConfig(), 3, "decode_kernel"), (TileConfig(), 40, "decode_kernel"),
    (TileConfig(rebuild=True), 40, "rebuild_kernel"),
])  # fmt: skip
def test_a_stream_is_tuned_by_what_runs(emulated, monkeypatch, config, M, kernel):
    """Also: the memory that a run takes is poisoned, and for decoding 16 tokens are checked."""
    plain = correctness.tolerance  # on CPU tensors it expects fp32 sums of exact products
    monkeypatch.setattr(correctness, "tolerance", lambda *args, rounds: plain(*args, rounds=True))
    shape = PackedLayout(40, 136, "int4", 32, 1, 4)
    above, up_to = (0, 16) if M <= 16 else (32, 64)
    problem = tuning.Problem(shape, torch.float16, (M,), above, up_to)
    weight = tune_weight.Weight(problem, H100, "cpu", lambda size: 2)
    assert weight.streamed and weight.sizes == stream.sizes_of(weight.state)
    weight.check(config, M)
    assert {name for name, it in emulated.items() if it.launched} == {kernel}
    assert len(weight.calls(config, M)) == 2
