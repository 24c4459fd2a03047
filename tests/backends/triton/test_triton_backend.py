"""The Triton backend around its kernels, without a GPU and without the interpreter: refusals,
states, the op's outside."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from test_import_cost import PROBE
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from slab_kernels import SlabLinear
from slab_kernels.backends import dispatch
from slab_kernels.backends import triton as backend
from slab_kernels.backends.base import LinearProblem
from slab_kernels.backends.triton import launch, rows
from slab_kernels.backends.triton.rows import TileConfig
from slab_kernels.errors import BackendError, RangeError, ShapeError
from slab_kernels.format import PackedLayout, bits
from slab_kernels.testing import SHAPES, VALUE_LAYOUTS, random_packed

BACKEND = backend.BACKEND
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OPS = ("linear_triton", "linear_triton_frozen")
SMALL = PackedLayout(24, 200, "fp16", rank=1, adapter_rank=3)
GPU = LinearProblem(1, 24, 200, dtype=torch.float16, device="cuda")
CPU = (
    "it runs on CUDA tensors; on CPU tensors only in Triton's interpreter, with TRITON_INTERPRET=1"
)
HERE = Path(__file__).parent

with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
pytestmark = pytest.mark.skipif(
    backend.interpreted(), reason="asks what happens without TRITON_INTERPRET=1"
)


def half(*shape):
    return torch.ones(shape, dtype=torch.float16)


@with_triton
def test_everything_in_tritons_interpreter(request):
    """test_triton_interpreter.py in a process of its own: Triton reads TRITON_INTERPRET when it is
    imported."""
    options = [f"--{name}" for name in ("full", "quick") if request.config.getoption(name)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *options,
        str(HERE / "test_triton_interpreter.py"),
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {
        "TRITON_INTERPRET": "1"
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent)
    assert done.returncode == 0 and re.search(r"\d+ passed", done.stdout), (
        done.stdout[-8000:] + done.stderr[-2000:]
    )


# ---- refusals


@with_triton
def test_reasons(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert BACKEND.missing("cuda") is None and BACKEND.refusals(GPU) == []
    for change, reason in (
        ({"device": "cpu"}, CPU),
        ({"device": "mps"}, "it runs on CUDA tensors, not on mps"),
        (
            {"dtype": torch.float64},
            "activations must be float16, bfloat16 or float32, not torch.float64",
        ),
        ({"rank": 17}, "rank=17 of the sign term is above 16"),
        ({"values": "fp4"}, "values='fp4' is unknown; it runs fp16, bf16, int8, int4, int3"),
    ):
        assert BACKEND.refusals(replace(GPU, **change)) == [reason]
    assert BACKEND.refusals(replace(GPU, rank=16, adapter_rank=4096)) == []
    assert len(BACKEND.refusals(LinearProblem(1, 24, 200, "fp4", rank=99, dtype=torch.int8))) == 4
    assert BACKEND.refusals(GPU, (7, 5)) == ["compute capability must be 8.0 or above, not 7.5"]
    assert BACKEND.refusals(GPU, (8, 0)) == BACKEND.refusals(GPU, (12, 1)) == []


def test_what_this_machine_lacks(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert (
        BACKEND.missing("cuda")
        == BACKEND.missing("cpu")
        == "Triton is not installed: pip install triton"
    )
    assert BACKEND.not_supported_reasons(GPU) == ["Triton is not installed: pip install triton"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert BACKEND.not_supported_reasons(GPU) == [f"torch {torch.__version__} sees no CUDA device"]
    assert BACKEND.not_supported_reasons(replace(GPU, device="cpu")) == [CPU]


def test_reasons_in_the_interpreter(monkeypatch):
    """Only "1" turns it on: so Triton reads it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for value, on in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        for dtype in (torch.float16, torch.float32):
            assert BACKEND.not_supported_reasons(replace(GPU, device="cpu", dtype=dtype)) == (
                [] if on else [CPU]
            )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reasons = BACKEND.not_supported_reasons(replace(GPU, device="cpu", dtype=torch.bfloat16))
    assert reasons == ["Triton's interpreter computes bfloat16 wrongly"]
    assert BACKEND.not_supported_reasons(replace(GPU, device="cpu", values="bf16")) == []
    assert BACKEND.not_supported_reasons(GPU) == [
        "TRITON_INTERPRET=1 runs it on CPU tensors only; unset it"
    ]


def test_its_place_in_dispatch(monkeypatch):
    """After the CUDA kernels and the CPU's, before the reference; where only those have a reason
    against them it is taken."""
    assert (
        dispatch.ORDER.index("cuda")
        < dispatch.ORDER.index("triton")
        < dispatch.ORDER.index("reference")
    )
    able = {name: [] for name in dispatch.ORDER}
    monkeypatch.setattr(dispatch, "explain", lambda problem: able)
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    assert dispatch.select(GPU).name == "cuda"
    able |= {"cuda": ["no"], "cpu": ["no"]}
    assert dispatch.select(GPU) is BACKEND


def test_a_forced_backend_gives_every_reason(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    words = (
        r"'triton' cannot run 24x200 with fp16 values, rank 17, .* on cpu: rank=17 .* above 16; "
        rf"{re.escape(CPU)}"
    )
    with pytest.raises(BackendError, match=words):
        SlabLinear.from_packed(random_packed(replace(SMALL, rank=17)))(torch.ones(1, 200))


def test_activations_and_biases_are_checked_in_words():
    state, check = (
        launch.prepare((random_packed(PackedLayout(24, 200)),), torch.float16),
        backend.check,
    )
    for x in (half(2, 199), half(), half(200, 1)):
        words = f"x has shape {list(x.shape)}, but this weight takes in_features=200 last"
        with pytest.raises(ShapeError, match=re.escape(words)):
            check(x, state, None)
    for wrong in (torch.float64, torch.int8, torch.complex64):
        with pytest.raises(
            TypeError,
            match=f"x is {wrong}, but the Triton kernels take float16, bfloat16 or float32",
        ):
            check(half(2, 200).to(wrong), state, None)
    with pytest.raises(TypeError, match="x is on meta, the weight on cpu"):
        check(half(2, 200).to("meta"), state, None)
    for bias in (half(23), half(1, 24), half(48)[::2]):
        words = f"bias has shape {list(bias.shape)}, expected [24], contiguous"
        with pytest.raises(ShapeError, match=re.escape(words)):
            check(half(2, 200), state, bias)
    for wrong in (torch.float64, torch.int32):
        with pytest.raises(
            TypeError, match=f"bias is {wrong}, it must be float32, float16 or bfloat16"
        ):
            check(half(2, 200), state, torch.ones(24, dtype=wrong))
    with pytest.raises(TypeError, match="bias is on meta, x on cpu"):
        check(half(2, 200), state, torch.ones(24, device="meta"))
    for x, bias in itertools.product(
        (half(200), half(2, 3, 200)), (None, half(24), half(24).float(), half(24).bfloat16())
    ):
        check(x, state, bias)


@pytest.mark.parametrize("made, asked", list(itertools.permutations(DTYPES, 2)))
def test_a_state_of_other_activations_is_refused_where_it_matters(made, asked):
    """16-bit values and adapters are read as the activations' type: another one would come out
    wrong without a word."""
    for layout in (SMALL, replace(SMALL, adapter_rank=0), PackedLayout(24, 200, "int8", 64, 1, 3)):
        state = launch.prepare((random_packed(layout),), made)
        x = torch.ones(1, 200, dtype=asked)
        read = [state.P.dtype] if layout.adapter_rank else []
        read += [state.values.dtype] if layout.values == "fp16" and asked != torch.float32 else []
        if all(dtype == asked for dtype in read):
            backend.check(x, state, None)
            continue
        with pytest.raises(
            TypeError, match=f"x is {asked}, but this weight was prepared for torch.* activations"
        ):
            BACKEND.linear(x, BACKEND.prepare(random_packed(layout), made))


# ---- states


@pytest.mark.parametrize("values, group_size", VALUE_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_weight_is_not_copied(dtype, values, group_size):
    """Unless its 16-bit values have another 16-bit type than the activations, or int3 is
    widened."""
    for N, K in SHAPES:
        packed = random_packed(PackedLayout(N, K, values, group_size, 2, 3))
        state = launch.prepare((packed,), dtype)
        same = values in ("int8", "int4") or (
            values != "int3" and dtype in (torch.float32, packed.values.dtype)
        )
        assert (state.values.data_ptr() == packed.values.data_ptr()) is same
        for name in ("metadata", "signs", "scales"):
            mine, stored = getattr(state, name), getattr(packed, name)
            assert mine is stored or mine.data_ptr() == stored.data_ptr()
        kind = values if same else launch.held_as(values, dtype)
        assert kind == (
            "int4"
            if values == "int3"
            else values
            if same
            else {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
        )
        held, stored = (
            bits.unpack_values(t, name)
            for t, name in ((state.values, kind), (packed.values, values))
        )
        assert state[8:] == (K, [N], kind, group_size or 0) and torch.equal(
            held.float(), stored.to(held.dtype).float()
        )
        assert all(t.is_contiguous() for t in state[:8] if t is not None)
        sizes = launch.sizes_of(state)
        assert sizes == rows.TritonSizes(K, (N,), kind, group_size or 0, 2, 16) and sizes.N == N


@pytest.mark.parametrize("rank, adapter_rank", [(0, 0), (1, 0), (4, 0), (0, 16), (1, 100)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_lie_as_the_kernels_read_them(dtype, rank, adapter_rank):
    """V by position in the group of four, so that a group's neighbours are neighbours; ranks of an
    adapter padded to 16."""
    for N, K in ((5, 7), (17, 172)):
        packed = random_packed(PackedLayout(N, K, "int4", 32, rank, adapter_rank), integers=True)
        state, Kp = launch.prepare((packed,), dtype), packed.layout.padded_in_features
        if rank:
            assert (
                state.U.shape == (rank, N)
                and state.V.shape == (1, rank, 4, Kp // 4)
                and state.U.dtype == state.V.dtype == torch.float32
            )
            V = torch.zeros(Kp, rank)
            for i in range(Kp):
                V[i] = state.V[0, :, i % 4, i // 4]
            assert not bool(V[K:].any())
            for r in range(rank):
                product = torch.outer(packed.U.float()[:, r], packed.V.float()[:K, r])
                assert torch.equal(torch.outer(state.U[r], V[:K, r]), product)
        else:
            assert state.U is state.V is state.signs is None
        if adapter_rank:
            padded = -(-adapter_rank // 16) * 16
            assert (
                state.P.shape == (N, padded)
                and state.Q.shape == (K, padded)
                and state.P.dtype == state.Q.dtype == dtype
            )
            assert torch.equal(
                state.P.float() @ state.Q.float().T, packed.P.float() @ packed.Q.float()[:K].T
            )
            assert not bool(state.P[:, adapter_rank:].any()) and not bool(
                state.Q[:, adapter_rank:].any()
            )
        else:
            assert state.P is state.Q is None


def test_numbers_that_fp16_kernels_cannot_hold():
    packed = random_packed(PackedLayout(16, 64, "bf16", None, 1, 1, factors="fp32"))
    packed.values[3, 5] = 1e5
    with pytest.raises(
        RangeError,
        match=r"a bf16 value does not fit torch.float16 activations' kernels; "
        "use torch.bfloat16 ones",
    ):
        BACKEND.prepare(packed, torch.float16)
    for dtype in DTYPES[1:]:
        BACKEND.prepare(packed, dtype)
    packed.values[3, 5] = 1.0
    for left, right in (("U", "V"), ("P", "Q")):
        large = replace(packed, **{left: torch.full((16, 1), 1e5), right: torch.full((64, 1), 0.5)})
        words = (
            f"{left}, scaled so that the other factor is below 1, does not fit torch.float16; use "
            "bfloat16 activations"
        )
        with pytest.raises(RangeError, match=re.escape(words)):
            BACKEND.prepare(large, torch.float16)
        for dtype in DTYPES[1:]:
            BACKEND.prepare(large, dtype)


def test_parts_that_share_a_launch_and_parts_that_do_not():
    base = PackedLayout(16, 64, "int8", 32, 1, 2)
    for name, other in {"group_size": 64, "rank": 2, "adapter_rank": 0, "values": "int4"}.items():
        pair = [random_packed(base), random_packed(replace(base, **{name: other}))]
        state = BACKEND.prepare_fused(pair, torch.float16)
        assert type(state) is tuple and all(
            isinstance(part, launch.TritonState) and rows == 16 for part, rows in state
        ), name
    assert type(BACKEND.prepare_fused([random_packed(base)] * 5, torch.float16)) is tuple
    parts = [random_packed(replace(base, out_features=n), seed=n) for n in (1, 17, 40)]
    state = BACKEND.prepare_fused(parts, torch.float16)
    assert (
        state.rows == [1, 17, 40]
        and launch.starts(state.rows) == (1, 18, 0)
        and state.V.shape == (3, 1, 4, 16)
    )
    for name in ("values", "metadata", "signs", "scales"):
        assert torch.equal(getattr(state, name), torch.cat([getattr(part, name) for part in parts]))
    assert state.P.shape == (58, 16) and state.Q.shape == (64, 48)
    assert (launch.starts([5]), launch.starts([1, 2, 3, 4])) == ((0, 0, 0), (1, 3, 6))
    assert BACKEND.prepare(parts[0]).Q.dtype == torch.float16, "the default"


# ---- the op


def test_registration_happens_once(monkeypatch):
    counted = []

    @functools.cache
    def slow():
        counted.append(True)
        time.sleep(0.05)  # functools.cache alone lets every thread in that comes meanwhile

    monkeypatch.setattr(backend, "_register_once", slow)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: backend.register(), range(8)))
    assert len(counted) == 1


@pytest.mark.parametrize("name", OPS)
def test_fake_kernels(name):
    op, mode = getattr(torch.ops.slab_kernels, name), FakeTensorMode()
    state = BACKEND.prepare(random_packed(SMALL))
    fake = [None if t is None else mode.from_tensor(t) for t in state[:8]]
    for shape, dtype in itertools.product(((200,), (0, 200), (7, 200), (2, 3, 200)), DTYPES):
        with mode:
            y = op(torch.empty(shape, dtype=dtype), *fake, None, 200, [24, 8], "fp16", 0)
        assert (y.shape, y.dtype, y.is_contiguous()) == ((*shape[:-1], 32), dtype, True)
    with mode, pytest.raises(RuntimeError, match="x has 199 features, the weight 200"):
        op(torch.empty(2, 199), *fake, None, *state[8:])
    with mode:
        W = torch.ops.slab_kernels.dense_triton(*fake, *state[8:], torch.bfloat16)
    assert (W.shape, W.dtype) == ((24, 200), torch.bfloat16)


def test_compile_traces_forward_and_backward_through_opaque_ops():
    """One graph, nothing launched: tensors without memory."""
    state, seen = BACKEND.prepare(random_packed(SMALL)), []
    meta = launch.TritonState(
        *(t if t is None or not isinstance(t, torch.Tensor) else t.to("meta") for t in state)
    )

    def record(graph, inputs):
        seen.append(
            [node.target for node in graph.graph.nodes if "slab_kernels" in str(node.target)]
        )
        return make_boxed_func(graph.forward)

    def step(x, bias):
        return BACKEND.linear(x, meta, bias).float().sum()

    x, bias = (
        torch.empty(3, 200, dtype=torch.float16, device="meta", requires_grad=True),
        torch.empty(24, device="meta", requires_grad=True),
    )
    torch.compile(step, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=record))(
        x, bias
    ).backward()
    ops = torch.ops.slab_kernels
    assert seen == [[ops.linear_triton.default], [ops.dense_triton.default]]
    assert (x.grad.shape, x.grad.dtype, bias.grad.dtype) == ((3, 200), torch.float16, torch.float32)
    with torch.no_grad():
        torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=record))(x, bias)
    assert seen[2:] == [[ops.linear_triton_frozen.default]]


def test_importing_loads_no_triton_and_reads_no_file():
    code = PROBE.replace("import typer", "import typer, torch, slab_kernels.nn").replace(
        "MODULE", "slab_kernels.backends.triton as it"
    )
    code += (
        "assert not hasattr(torch.ops.slab_kernels, 'linear_triton') and not "
        "it.device_of.cache_info().currsize\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["seen"] == [] and not [
        name for name in found["modules"] if name.split(".")[0] == "triton"
    ]


# ---- what is launched


@with_triton
@pytest.mark.parametrize(
    "M, splits, adapter_rank, launched",
    [
        (1, 1, 0, {"linear": (3, 1)}),
        (5, 4, 0, {"linear": (3, 4), "sum": (1,)}),
        (40, 1, 3, {"adapter": (1, 2), "linear": (9, 1)}),
        (16, 2, 100, {"adapter": (2, 2), "linear": (3, 2), "sum": (1,)}),
        (0, 2, 3, {}),
    ],
)
def test_grids(monkeypatch, M, splits, adapter_rank, launched):
    """z and sums of their own for every call, no launch for no token; fp32 tensors as they are, x
    without a copy."""
    from slab_kernels.backends.triton import kernels

    found = {}

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: found.update({self.name: (grid, args, kwargs)})

    for name in ("linear", "adapter", "sum"):
        monkeypatch.setattr(kernels, f"{name}_kernel", Recorder(name))
    state = launch.prepare(
        (random_packed(PackedLayout(40, 300, "int8", 128, 1, adapter_rank)),), torch.float16
    )
    x = half(M, 308)[:, :300]
    y = launch.linear(x, state, None, TileConfig(16, 16, 64), splits, 2)
    assert y.shape == (M, 40) and {name: grid for name, (grid, _, _) in found.items()} == launched
    if M:
        _, args, kwargs = found["linear"]
        assert (
            args[0].data_ptr() == x.data_ptr() and kwargs["MASKED"] and kwargs["SPLITS"] == splits
        )
