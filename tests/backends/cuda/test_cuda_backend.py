"""The CUDA backend around its kernels, without a GPU: prepared layouts, refusals, the registered
op, SlabLinear's path to it.

`emulated` lets the op take CPU tensors and interprets what it launches, so that all but the
driver is the real thing.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import test_cuda_gpu as gpu
import torch
from emulation import run
from prefill_cases import H100
from test_cuda_kernels import A100, DTYPES, sizes
from test_import_cost import PROBE
from torch._subclasses.fake_tensor import FakeTensorMode

from slab_kernels import reference
from slab_kernels.backends import cuda, dispatch
from slab_kernels.backends.base import Backend, LinearProblem
from slab_kernels.backends.cuda import BIAS, driver, layout, plan, tiles, unpack
from slab_kernels.backends.cuda import launch as launching
from slab_kernels.backends.cuda.device import CudaDevice
from slab_kernels.backends.cuda.launch import kernel_names
from slab_kernels.backends.cuda.layout import CudaState
from slab_kernels.errors import BackendError, RangeError, ShapeError
from slab_kernels.format import PackedLayout
from slab_kernels.nn import SlabLinear
from slab_kernels.testing import SHAPES, VALUE_LAYOUTS, oracle, random_packed

BACKEND = cuda.BACKEND
OPS = ("linear_cuda", "linear_cuda_frozen")
SMALL = PackedLayout(24, 200, "fp16", rank=1, adapter_rank=3)


def half(*shape):
    return torch.ones(shape, dtype=torch.float16)


@pytest.fixture
def emulated(monkeypatch):
    """The op on CPU tensors, and a dispatch that finds no fault with them. Yields the device, to be
    replaced."""
    device = SimpleNamespace(gpu=A100)
    real = cuda.CudaBackend.not_supported_reasons

    def reasons(self, problem):
        return real(self, replace(problem, device="cpu"))[:-1]  # the last one: not on cpu

    def interpreted(x, state, bias, to):
        return run(x, state, bias, to.gpu)

    monkeypatch.setattr(cuda.CudaBackend, "not_supported_reasons", reasons)
    monkeypatch.setattr(cuda, "device_of", lambda _: CudaDevice(device.gpu, None))
    monkeypatch.setattr(cuda, "linear", interpreted)
    cuda.register()
    with torch.library._scoped_library(cuda.NAMESPACE, "IMPL") as library:
        for name in OPS:
            library.impl(name, cuda._linear, "CPU")
        yield device


# ---- prepare and back


@pytest.mark.parametrize("values, group_size", VALUE_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stream_holds_the_weight(dtype, values, group_size):
    """`dense` and `adapters` undo `prepare`: to the bit where both types hold the numbers, else to
    one rounding each."""
    for integers, (N, K), rank in (
        (i, shape, r) for i in (True, False) for shape in SHAPES for r in (0, 1, 2, 16)
    ):
        for adapter_rank in {0, min(5, N), min(33, N)}:
            packed_layout = PackedLayout(N, K, values, group_size, rank, adapter_rank)
            packed = random_packed(packed_layout, seed=K, integers=integers)
            state = layout.prepare((packed,), dtype)
            assert state[BIAS:] == (
                K,
                (N,),
                layout.STREAM_VALUES[values],
                (group_size or 128) // 32,
                1,
                dtype,
            )
            assert (
                state.stream.shape[:2] == (-(-N // 32), -(-K // 128))
                and state.stream.shape[2] % 16 == 0
            )
            assert all(t.is_contiguous() for t in state[:BIAS] if t is not None)
            W = unpack.dense(state)
            if adapter_rank:
                ((left, right),) = unpack.adapters(state)
                W = W + left.float() @ right.float()
            off = (W - packed.dense()).abs().max()
            most = float(oracle(torch.eye(K), packed)[1].max())
            assert off == 0 if integers else off <= 3 * most * torch.finfo(dtype).eps, (
                N,
                K,
                rank,
                adapter_rank,
            )


@pytest.mark.parametrize("values, group_size", [("fp16", None), ("int8", 64), ("int4", None)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_parts_keep_their_own_factors(dtype, values, group_size):
    """Rows of each part start at a multiple of 32; magnitudes of V and Q differ by powers of two
    between the parts."""
    rows, K, parts = (33, 5, 48, 16), 260, []
    for i, n in enumerate(rows):
        part = random_packed(PackedLayout(n, K, values, group_size, 2, 4), seed=n, integers=True)
        parts.append(replace(part, V=part.V * 4**i, Q=part.Q / 2**i))
    state = layout.prepare(parts, dtype)
    assert (
        state.rows == rows
        and state.stream.shape[0] == 2 + 1 + 2 + 1
        and state.V.shape == (4, 2, 384)
    )
    factors = unpack.adapters(state)
    W = unpack.dense(state) + torch.cat([left.float() @ right.float() for left, right in factors])
    assert torch.equal(W, torch.cat([part.dense() for part in parts]))
    most = state.V.float().abs().amax(-1)
    assert bool(((most >= 0.5) & (most < 1)).all()), "v * x never exceeds x"


@pytest.mark.parametrize(
    "values, group_size, bits",
    [("fp16", None, 9.5), ("bf16", None, 9.5), ("int8", 128, 5.625), ("int4", 128, 3.625)],
)
def test_bits_per_weight_of_the_stream(values, group_size, bits):
    """Those of the format: nothing is added on the way to the tensor cores."""
    for N, K in ((64, 256), (32, 1152)):
        packed = random_packed(PackedLayout(N, K, values, group_size, rank=1))
        assert layout.prepare((packed,), torch.bfloat16).stream.numel() * 8 / (N * K) == bits
        assert packed.bits_per_weight(factors=False) == bits


# ---- refusals


def test_parts_that_do_not_go_together():
    base = PackedLayout(16, 64, "int8", 32, 1, 2)
    with pytest.raises(ShapeError, match="one launch takes 1 to 4 weights, not 0"):
        layout.prepare((), torch.float16)
    with pytest.raises(ShapeError, match="one launch takes 1 to 4 weights, not 5"):
        layout.prepare([random_packed(base)] * 5, torch.float16)
    changes = {"in_features": 128, "group_size": 64, "rank": 0, "adapter_rank": 0, "values": "int4"}
    for name, other in changes.items():
        pair = [random_packed(base), random_packed(replace(base, **{name: other}))]
        words = (
            f"weights of one launch must agree in {name}, but these have {getattr(base, name)} and "
            f"{other}"
        )
        with pytest.raises(ShapeError, match=re.escape(words)):
            layout.prepare(pair, torch.float16)
        if name != "in_features":  # FusedSlabLinear still runs them, one by one
            assert len(BACKEND.prepare_fused(pair, torch.float16)) == 2
    assert BACKEND.prepare_fused(
        [random_packed(base), random_packed(replace(base, out_features=7))]
    ).rows == (16, 7)


def test_numbers_that_fp16_kernels_cannot_hold():
    packed = random_packed(PackedLayout(16, 64, "bf16", None, 1, 1, factors="fp32"))
    packed.values[3, 5] = 1e5
    with pytest.raises(
        RangeError,
        match=r"a bf16 value does not fit torch.float16 activations' kernels; "
        "use torch.bfloat16 ones",
    ):
        BACKEND.prepare(packed, torch.float16)
    packed.values[3, 5] = 1.0
    for left, right in (("U", "V"), ("P", "Q")):
        factors = {left: torch.full((16, 1), 1e5), right: torch.full((64, 1), 0.5)}
        words = (
            f"{left}, scaled so that the other factor is below 1, does not fit torch.float16; use "
            "bfloat16 activations"
        )
        with pytest.raises(RangeError, match=re.escape(words)):
            BACKEND.prepare(replace(packed, **factors), torch.float16)
        BACKEND.prepare(replace(packed, **factors), torch.bfloat16)


@pytest.mark.parametrize(
    "planes, most", [(1, 65504), (2, 43648), (3, 37408)]
)  # fp16 numbers whose 1.5 and 1.75 times still round to 65504 at most
def test_levels_of_several_ranks_must_fit_fp16(planes, most):
    """Their kernel rounds u times the largest level; of rank 1 u multiplies fp32 sums and need fit
    only itself."""
    for rank, largest in ((2, most), (1, 65504)):
        packed = random_packed(
            PackedLayout(16, 64, "fp16", None, rank, planes=planes, factors="fp32")
        )
        V = torch.full((64, rank), 0.75)  # stays as it is: medians come to [1/2, 1)
        U = torch.full((16, rank), float(largest))
        state, x = (
            BACKEND.prepare(replace(packed, U=U, V=V), torch.float16),
            torch.eye(64)[:9].half() * 2.0**-6,
        )
        y, exact = (
            run(x, state),
            oracle(x, packed := replace(packed, U=U.half().float(), V=V))[0],
        )
        assert (
            bool(((y.double() - exact).abs() <= exact.abs() * 2.0**-9 + 2.0**-24).all())
            and packed.layout.planes == planes
        )
        with pytest.raises(
            RangeError, match="does not fit torch.float16; use bfloat16 activations"
        ):
            BACKEND.prepare(replace(packed, U=U + 64, V=V), torch.float16)
        BACKEND.prepare(replace(packed, U=U + 64, V=V), torch.bfloat16)


def test_prepare_refuses_activations_that_no_kernel_takes():
    with pytest.raises(TypeError, match="float32"):
        BACKEND.prepare(random_packed(PackedLayout(16, 64, "fp16", rank=1)), torch.float32)


def test_activations_and_biases_are_checked_in_words():
    state = BACKEND.prepare(random_packed(SMALL))
    assert state.dtype == torch.float16, "the default"
    with pytest.raises(
        TypeError,
        match="x is torch.bfloat16, but this weight was prepared for torch.float16 activations",
    ):
        BACKEND.linear(torch.ones(2, 200, dtype=torch.bfloat16), state)
    for x in (half(2, 199), half(), half(200, 1)):
        words = f"x has shape {list(x.shape)}, but this weight takes in_features=200 last"
        with pytest.raises(ShapeError, match=re.escape(words)):
            cuda.check_stream(x, state, None)
    for bias in (half(23), half(1, 24), half(48)[::2]):
        words = f"bias has shape {list(bias.shape)}, expected [24], contiguous"
        with pytest.raises(ShapeError, match=re.escape(words)):
            cuda.check_stream(half(2, 200), state, bias)
    for wrong in (torch.float64, torch.int32):
        with pytest.raises(
            TypeError, match=f"bias is {wrong}, it must be float32, float16 or bfloat16"
        ):
            cuda.check_stream(half(2, 200), state, torch.ones(24, dtype=wrong))
    with pytest.raises(TypeError, match="bias is on meta, x on cpu"):
        cuda.check_stream(half(2, 200), state, torch.ones(24, device="meta"))
    for x, good in itertools.product(
        (half(200), half(2, 3, 200)), (None, half(24), half(24).float(), half(24).bfloat16())
    ):
        cuda.check_stream(x, state, good)


def test_x_on_another_device_is_refused():
    state = BACKEND.prepare(random_packed(SMALL))
    with pytest.raises(TypeError, match="x is on meta"):
        cuda._linear(half(2, 200).to("meta"), *state[:BIAS], None, *state[BIAS:])


def test_reasons():
    good, missing = LinearProblem(1, 24, 200, dtype=torch.float16, device="cuda"), driver.missing()
    assert BACKEND.not_supported_reasons(good) == ([missing] if missing else [])
    if torch.version.cuda is None:
        assert (
            missing
            == f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
        )
    for change, reason in (
        ({"device": "cpu"}, "it runs on CUDA tensors, not on cpu"),
        ({"dtype": torch.float32}, "activations must be float16 or bfloat16, not torch.float32"),
        ({"dtype": torch.float64}, "activations must be float16 or bfloat16, not torch.float64"),
        ({"rank": tiles.MOST_RANK + 1}, "rank=17 of the sign term is above 16"),
        ({"values": "fp4"}, "values='fp4' is unknown; it runs fp16, bf16, int8, int4, int3"),
    ):
        assert reason in BACKEND.not_supported_reasons(replace(good, **change)), change
    assert set(
        BACKEND.not_supported_reasons(replace(good, rank=tiles.MOST_RANK, adapter_rank=4096))
    ) <= {missing}
    assert (
        len(BACKEND.not_supported_reasons(LinearProblem(1, 24, 200, "fp4", rank=99, device="mps")))
        == 4
    )


def test_a_forced_backend_says_why_not(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "cuda")
    with pytest.raises(
        BackendError,
        match=r"'cuda' cannot run .*activations must be .*float32; "
        "it runs on CUDA tensors, not on cpu",
    ):
        SlabLinear.from_packed(random_packed(SMALL))(torch.ones(1, 200))


# ---- what is prepared when


@pytest.mark.parametrize("one_dtype, prepared", [(True, DTYPES), (False, DTYPES[:1])])
def test_a_second_dtype_prepares_anew_where_states_serve_one(monkeypatch, one_dtype, prepared):
    seen = []

    class Fake(Backend):
        name = "fake"

        def prepare(self, packed, dtype=None):
            assert not torch.is_inference_mode_enabled()
            seen.append(dtype)
            return dtype, packed

        def linear(self, x, state, bias=None):
            assert not one_dtype or x.dtype == state[0]
            return reference.linear(x, state[1], bias)

    Fake.one_dtype, backend = one_dtype, Fake()
    monkeypatch.setattr(dispatch, "select", lambda problem, name=None: backend)
    module = SlabLinear.from_packed(random_packed(SMALL))
    for dtype in (*DTYPES, *DTYPES):
        with torch.inference_mode():
            assert module(torch.ones(1, 200, dtype=dtype)).dtype == dtype
    assert tuple(seen) == prepared


@pytest.mark.parametrize("gpu", [A100, H100], ids=lambda gpu: gpu.name)
def test_kernels_are_loaded_with_the_weight(monkeypatch, gpu):
    """On the weight's device, all of them: the first call may stand in a graph capture."""
    loaded, registered, stream = (
        [],
        [],
        SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=3)),
    )
    state = CudaState(
        stream,
        V=None,
        U=None,
        P=half(1, 2, 32, 8),
        Q=None,
        powers=None,
        dense=None,
        P_rows=None,
        in_features=200,
        rows=(24,),
        values=layout.INT8,
        group_steps=2,
        planes=1,
        dtype=torch.bfloat16,
    )
    monkeypatch.setattr(layout, "prepare", lambda parts, dtype: state)
    monkeypatch.setattr(driver, "load", lambda name, device: loaded.append((name, device)))
    monkeypatch.setattr(cuda, "register", lambda: registered.append(True))
    monkeypatch.setattr(cuda, "device_of", {3: CudaDevice(gpu, lambda *_: None)}.get)
    packed = random_packed(PackedLayout(24, 200, "int8", 64, rank=2))
    assert BACKEND.prepare(packed, torch.bfloat16) is state
    assert registered and loaded == [
        (name, 3) for name in kernel_names(sizes(state), torch.bfloat16, gpu)
    ]
    assert ("adapter_bf16_t16", 3) in loaded and ("linear_bf16_int8_any_t64", 3) in loaded
    assert any(name.startswith("prefill") for name, _ in loaded) == (gpu is H100)


def test_importing_opens_no_library_and_reads_no_file():
    code = PROBE.replace("import typer", "import typer, torch, slab_kernels.nn").replace(
        "MODULE", "slab_kernels.backends.cuda as cuda"
    )
    cold = (
        "(cuda.driver.library, cuda.driver._properties, images.kernel_sources, nvrtc._find, "
        "cuda.device_of, cuda._register_once)"
    )
    code += (
        "from slab_kernels.backends.cuda import images, nvrtc\nassert not "
        f"any(f.cache_info().currsize for f in {cold})\n"
    )
    code += "assert not hasattr(torch.ops.slab_kernels, 'linear_cuda')\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["seen"] == []


# ---- the op


def test_registration_happens_once(monkeypatch):
    counted = []

    @functools.cache
    def slow():
        counted.append(True)
        time.sleep(0.05)  # functools.cache alone lets every thread in that comes meanwhile

    monkeypatch.setattr(cuda, "_register_once", slow)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: cuda.register(), range(8)))
    assert len(counted) == 1


def test_cpu_tensors_are_refused():
    cuda.register()
    state = BACKEND.prepare(random_packed(SMALL))
    for name in OPS:
        with pytest.raises(NotImplementedError, match=rf"slab_kernels::{name}' .*'CPU'"):
            getattr(torch.ops.slab_kernels, name)(half(1, 200), *state[:BIAS], None, *state[BIAS:])


@pytest.mark.parametrize("name", OPS)
def test_fake_kernels(name):
    cuda.register()
    op = getattr(torch.ops.slab_kernels, name)
    mode = FakeTensorMode()
    state = BACKEND.prepare(random_packed(SMALL))
    fake = [None if t is None else mode.from_tensor(t) for t in state[:BIAS]]
    for shape in ((200,), (0, 200), (7, 200), (2, 3, 200)):
        for dtype in DTYPES:
            with mode:
                x = torch.empty(shape, dtype=dtype)
                y = op(x, *fake, None, 200, [24, 8], 0, 4, 1, dtype)
            assert (y.shape, y.dtype, y.is_contiguous()) == ((*shape[:-1], 32), dtype, True)
    with mode, pytest.raises(RuntimeError, match="x has 199 features, the weight 200"):
        op(torch.empty(2, 199), *fake, None, 200, [24], 0, 4, 1, torch.float16)


@pytest.mark.parametrize("rank, adapter_rank", [(0, 0), (1, 0), (2, 3), (0, 4)])
@pytest.mark.parametrize("values", [("fp16", None), ("int8", 64), ("int4", 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_against_autograd(dtype, values, rank, adapter_rank):
    """Two fused parts of small integers: the gradient of x is right to the bit, whatever the
    leading dimensions. `register_linear_op` asks for it where x wants one, and has the bias's."""
    parts = [
        random_packed(PackedLayout(n, 200, *values, rank, adapter_rank), seed=n, integers=True)
        for n in (37, 16)
    ]
    state = layout.prepare(parts, dtype)
    W = torch.cat([part.dense() for part in parts])
    for shape in ((200,), (5, 200), (2, 3, 200)):
        x = torch.zeros(shape, requires_grad=True)
        grad = torch.randint(-2, 3, (*shape[:-1], 53)).to(dtype)
        (x @ W.T).backward(grad.float())
        assert torch.equal(cuda._input_gradient(grad, *state).to(dtype), x.grad.to(dtype))


# ---- SlabLinear to the op and into the interpreter


@pytest.mark.parametrize(
    "values, rank, adapter_rank", [(("fp16", None), 1, 0), (("int4", 32), 2, 3)]
)
def test_slab_linear_on_the_emulated_device(emulated, values, rank, adapter_rank):
    packed = random_packed(PackedLayout(37, 200, *values, rank, adapter_rank), integers=True)
    bias = torch.randint(-4, 5, (37,)).float()
    module = SlabLinear.from_packed(packed, bias)
    for shape in ((200,), (0, 200), (2, 9, 200), (70, 200)):
        for dtype in DTYPES:
            x = torch.randint(-2, 3, shape).to(dtype)
            y = module(x)
            assert module._linears[dtype][0].backend.name == "cuda"
            assert y.dtype == dtype and torch.equal(y, oracle(x, packed, bias)[0].to(dtype))
    assert len(module._linears) == 2 and module._linears[DTYPES[0]][0].state.dtype == DTYPES[0]
    module(torch.ones(1, 200))
    assert module._linears[torch.float32][0].backend.name != "cuda"
    with pytest.raises(ShapeError, match="takes in_features=200 last"):
        module(half(2, 199))


def test_gradients_through_the_op(emulated):
    """fp32 bias beside fp16 activations; without a gradient to come, the op without autograd."""
    module = SlabLinear.from_packed(
        packed := random_packed(replace(SMALL, rank=2), integers=True), torch.zeros(24)
    )
    module.bias.requires_grad_()
    y = module(x := half(3, 200).requires_grad_())
    y.float().sum().backward()
    assert torch.equal(x.grad, packed.dense().sum(0).half().expand(3, -1))
    assert torch.equal(module.bias.grad, torch.full((24,), 3.0))
    assert y.requires_grad and not SlabLinear.from_packed(packed)(x.detach()).requires_grad
    with torch.no_grad():
        assert not module(x).requires_grad


@pytest.mark.slow
def test_opcheck(emulated):
    state = BACKEND.prepare(random_packed(PackedLayout(24, 140, "int8", 64, 1, 3)))
    rest = (*state[:BIAS], half(24), *state[BIAS:])
    frozen, quick = (
        torch.ops.slab_kernels.linear_cuda_frozen.default,
        ("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(frozen, (half(2, 140), *rest), test_utils=quick)
    torch.library.opcheck(
        torch.ops.slab_kernels.linear_cuda.default, (half(2, 140).requires_grad_(), *rest)
    )


@pytest.mark.slow
def test_one_graph_for_every_number_of_tokens(emulated):
    module = SlabLinear.from_packed(random_packed(SMALL), torch.randn(24)).prepare(torch.float16)
    torch._dynamo.reset()  # Other tests of this process compile the same code.
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (2, 3, 20):
        x = torch.randn(M, 200).half()
        assert torch.equal(compiled(x), module(x))
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        (compiled(one).sum() + module(other).sum()).backward()
        assert torch.equal(one.grad, other.grad)


def test_autocast_leaves_the_op_alone(emulated):
    """As the fused kernels, which it cannot reach."""
    state, x = BACKEND.prepare(random_packed(SMALL)), torch.randn(70, 200).half()
    for emulated.gpu in (A100, replace(A100, gemm_rate=1 << 30, bandwidth=1 << 30, mma_rate=1)):
        want = BACKEND.linear(x, state)
        with torch.autocast("cpu", torch.bfloat16):
            y = BACKEND.linear(x, state)
        assert y.dtype == torch.float16 and torch.equal(y, want)


# ---- the bodies of test_cuda_gpu.py, so that they work on the day a GPU is at hand

CHECKS = {
    "exact": lambda f: gpu.check_exact(
        f, "cpu", DTYPES[0], ("int8", 128), 2, ((70, 260, 4),), (0, 1, 9, 33, 70)
    ),
    "fp64": lambda f: gpu.check_against_fp64(
        f, "cpu", DTYPES[1], ("int4", 32), 1, (0, 16, 100), SHAPES[2:4], (1, 9, 34)
    ),
    "strided": lambda f: gpu.check_strided(f, "cpu", 3, 129),
    "regimes": lambda f: gpu.check_regimes(
        f, "cpu", SMALL, DTYPES[1], ((1, 2, 16), (17, 40), (65, 129))
    ),
    "fused": lambda f: gpu.check_fused(f, "cpu", DTYPES[1], 2, 4, (1, 40, 200)),
}


@pytest.mark.parametrize("name", CHECKS)
def test_bodies_of_the_gpu_tests(name):
    CHECKS[name](lambda x, state, bias=None: run(x, state, bias, A100))


def test_the_body_of_the_rebuilt_weight(monkeypatch):
    monkeypatch.setattr(launching, "choose", plan.rebuild)
    launching.launches.cache_clear()
    gpu.check_rebuilt(
        lambda x, state: run(x, state, None, A100),
        "cpu",
        DTYPES[1],
        ("int4", 32),
        2,
        3,
    )
    launching.launches.cache_clear()
