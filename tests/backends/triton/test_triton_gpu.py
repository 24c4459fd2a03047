"""The Triton kernels on a real GPU, natively: the bodies of triton_checks.py, and what the
interpreter cannot show."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton_checks as checks
from triton_checks import BACKEND, DTYPES, bound, same_bits

from slab_kernels import SlabLinear
from slab_kernels.backends import dispatch
from slab_kernels.backends import triton as backend
from slab_kernels.backends.triton import launch, stream
from slab_kernels.backends.triton.configs import choose
from slab_kernels.backends.triton.rows import DEFAULTS, TileConfig
from slab_kernels.format import PackedLayout
from slab_kernels.testing import ROUNDOFF, SHAPES, TOKENS, VALUE_LAYOUTS

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
PLAIN = PackedLayout(1024, 4096, "fp16", rank=1)
EVERYTHING = PackedLayout(300, 4104, "int4", 32, rank=2, adapter_rank=4)
every_type = pytest.mark.parametrize("dtype", DTYPES)
both_layouts = pytest.mark.parametrize("layout", [PLAIN, EVERYTHING], ids=["plain", "everything"])


def layer(
    layout: PackedLayout, dtype: torch.dtype, integers: bool, device: str = DEVICE
) -> checks.Layer:
    return checks.layer(layout, dtype, integers, device)


def chosen(it: checks.Layer, M: int) -> TileConfig:
    return choose(
        launch.sizes_of(it.plain),
        M,
        backend.bits_of(it.x.dtype),
        backend.device_of(torch.cuda.current_device()),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", (*SHAPES, (300, 1160), (520, 2088)), ids=str)
def test_the_problem_grid(dtype, shape, poisoned):
    """The interpreter's cases with every M of the same tile, so that a case is one kernel to
    compile; a second or two each."""
    for case in checks.grid((dtype,), (shape,)):
        if shape[1] > 1000:
            case = case._replace(adapter_rank=0)  # bf16 could not hold every z of small integers
        it = layer(PackedLayout(*shape, *case.values, case.rank, case.adapter_rank), dtype, True)
        config = chosen(it, case.M)
        for M in TOKENS:
            if chosen(it, M) == config:
                checks.check_case(case._replace(M=M), DEVICE, config)


@pytest.mark.parametrize("planes, rank", [(1, 0), (1, 1), (1, 2), (1, 7), (2, 1), (3, 2)])
@pytest.mark.parametrize("values", VALUE_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_the_stream(dtype, values, planes, rank, poisoned):
    """Decoded up to 16 tokens and a little beyond, then rebuilt: every kernel of the stream."""
    it = layer(PackedLayout(70, 388, *values, rank, 4, planes=planes), dtype, True)
    assert it.state is not it.plain, "the first use of the device came out wrong"
    for M in (1, 3, 8, 16, 40):
        y = BACKEND.linear(it.x[:M], it.state, it.bias)
        assert torch.equal(y, (it.exact[:M] + it.bias.double()).to(dtype)), M
    exact = it.exact[:200] + it.bias.double()  # cuBLAS may round a sum before the bias.
    magnitude = it.magnitude[:200] + it.bias.double().abs()
    off = (BACKEND.linear(it.x[:200], it.state, it.bias).double() - exact).abs()
    assert bool((off <= checks.stream_bound(magnitude, exact, dtype, 388)).all())


@pytest.mark.parametrize("K", [40, 129, 388])
@pytest.mark.parametrize("M", [3, 30, 90])
@every_type
def test_strided_and_unaligned_activations(dtype, M, K, poisoned):
    checks.check_strided(DEVICE, M, K, dtype)


@pytest.mark.parametrize("M", [1, 40, 257])
@pytest.mark.parametrize("values", [("fp16", None), ("bf16", None), ("int8", 128), ("int4", 128)])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_error_is_that_of_a_dense_weight(dtype, values, M):
    checks.check_error_is_that_of_a_dense_weight(DEVICE, dtype, values, (1024, 4096), M)


@every_type
def test_other_bodies(monkeypatch, dtype, poisoned):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    checks.check_kept_is_what_the_mask_says(DEVICE, dtype)
    for values, rank, adapter_rank in itertools.product(
        (("fp16", None), ("int4", 32)), (0, 1, 2), (0, 16)
    ):
        checks.check_dense(DEVICE, dtype, values, rank, adapter_rank, 100, 388)
        checks.check_fused(DEVICE, dtype, values, rank, adapter_rank, (1, 12, 40, 200))
    for bad, M in itertools.product((float("nan"), float("inf")), (1, 8, 70)):
        checks.check_nan_and_infinity_propagate(DEVICE, dtype, bad, M)
    for layout in (PLAIN, EVERYTHING):
        checks.check_a_token_alone(DEVICE, layout, dtype)
        checks.check_shares_of_K(DEVICE, layout, dtype, chosen(layer(layout, dtype, False), 5))
    checks.check_gradients(DEVICE, dtype)
    checks.check_opcheck(DEVICE, 30, dtype)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_and_modules(monkeypatch, compiler):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    checks.check_compile(DEVICE, compiler)
    checks.check_modules(DEVICE)


@pytest.mark.parametrize("row", DEFAULTS, ids=lambda row: row.config.describe())
@every_type
def test_every_default(dtype, row):
    device, M = backend.device_of(torch.cuda.current_device()), row.config.block_m + 3
    if (
        row.bits not in (None, backend.bits_of(dtype))
        or row.shared > device.shared_limit
        or row.config.rebuild
    ):
        pytest.skip("not for this")
    for rank in {min(row.rank or 2, 2), 1}:
        values = (row.values or ("fp16",))[0]
        it = layer(PackedLayout(149, 396, values, None, rank), dtype, True)
        assert torch.equal(
            launch.linear(it.x[:M], it.plain, None, row.config, 1, 1), it.exact[:M].to(dtype)
        )


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_very_many_tokens_rebuild_the_weight(dtype):
    it = layer(PackedLayout(149, 396, "int8", 128, 1), dtype, True)
    x, M = it.x.repeat(10, 1), 10 * max(TOKENS)
    assert chosen(it, M).rebuild
    assert torch.equal(
        BACKEND.linear(x, it.state, it.bias), (it.exact + it.bias.double()).to(dtype).repeat(10, 1)
    )


@pytest.mark.parametrize("M", [1, 16, 64, 257])
@both_layouts
def test_a_hundred_runs_give_the_same_bits(layout, M):
    it = layer(layout, torch.float16, False)
    assert (
        len(
            {
                BACKEND.linear(it.x[:M], it.state, it.bias)
                .view(torch.int16)
                .cpu()
                .numpy()
                .tobytes()
                for _ in range(100)
            }
        )
        == 1
    )


@pytest.mark.parametrize("M", [1, 12, 40, 200])
@both_layouts
def test_graph_capture_and_replay(layout, M):
    """Decoding without a bias may be captured at once, for `prepare` has compiled it; what else,
    after a first call."""
    it = layer(layout, torch.float16, False)
    bias = None if M <= 16 else it.bias
    want = [BACKEND.linear(it.x[start : start + M], it.state, bias) for start in (0, 5, 57)]
    x, graph = it.x[:M].clone(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = BACKEND.linear(x, it.state, bias)
    for start, expected in zip((0, 5, 57), want, strict=True):
        x.copy_(it.x[start : start + M])
        y.fill_(float("nan"))
        graph.replay()
        assert same_bits(y, expected), start


@both_layouts
def test_two_streams_at_once(layout):
    """Calls share nothing but the layer, neither partial sums nor z, and wait for what their stream
    does before them."""
    it, streams = layer(layout, torch.float16, False), [torch.cuda.Stream() for _ in range(2)]
    for M in (1, 40):
        xs, results = [torch.zeros_like(it.x[:M]) for _ in streams], [[], []]
        want = [BACKEND.linear(it.x[i : i + M], it.state, it.bias) for i in range(2)]
        torch.cuda.synchronize()
        for call, (i, own) in itertools.product(range(100), enumerate(streams)):
            with torch.cuda.stream(own):
                if call == 0:
                    torch.cuda._sleep(
                        50_000_000
                    )  # clocks: x is written long after the launches were queued
                    xs[i].copy_(it.x[i : i + M])
                results[i].append(BACKEND.linear(xs[i], it.state, it.bias))
        torch.cuda.synchronize()
        assert all(same_bits(y, want[i]) for i in range(2) for y in results[i])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_a_device_that_is_not_the_current_one():
    it = layer(EVERYTHING, torch.float16, True, "cuda:1")
    for M in (1, 40, 100):
        y = BACKEND.linear(it.x[:M], it.state, it.bias)
        assert y.device == torch.device("cuda:1") and torch.equal(
            y, (it.exact[:M] + it.bias.double()).half()
        )


@pytest.mark.parametrize("M", [1, 12, 40])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@both_layouts
def test_as_the_cuda_backend(layout, dtype, M):
    cuda = dispatch.backend("cuda")
    if cuda.missing("cuda"):
        pytest.skip(cuda.missing("cuda"))
    it = layer(layout, dtype, False)
    other = cuda.linear(it.x[:M], cuda.prepare(it.packed, dtype))
    most = bound(it.magnitude[:M], it.exact[:M], dtype, layout.in_features)
    off = (BACKEND.linear(it.x[:M], it.state).double() - other.double()).abs()
    assert bool(
        (off <= 2 * most + 4 * ROUNDOFF[dtype] * it.magnitude[:M]).all()
    )  # the other rounds v and v * x besides


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_layer_that_changes_its_backend_holds_one_copy(monkeypatch, dtype):
    """The CUDA kernels and Triton's read the same stream, whoever prepared it."""
    if missing := dispatch.backend("cuda").missing("cuda"):
        pytest.skip(missing)
    assert stream.usable(torch.device("cuda", torch.cuda.current_device()), dtype)
    it = layer(EVERYTHING, dtype, True)
    for names in (("cuda", "triton"), ("triton", "cuda")):
        made = SlabLinear.from_packed(it.packed)
        found = set()
        for name in names:
            monkeypatch.setenv(dispatch.ENVIRONMENT, name)
            made.prepare(dtype)
            found.add(made._linears[dtype][0].state.stream.data_ptr())
            for M in (1, 16, 40, 257):
                assert made.backend == name
                assert torch.equal(made(it.x[:M]), it.exact[:M].to(dtype))
        assert len(found) == 1


@pytest.mark.parametrize("values", [("fp16", None), ("int8", 128), ("int4", 32), ("int3", None)])
@pytest.mark.parametrize(
    "rank, planes, adapter_rank", [(0, 1, 0), (1, 1, 16), (2, 3, 0), (5, 2, 5)]
)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_the_stream_rebuilt(dtype, values, rank, planes, adapter_rank, poisoned):
    shape = PackedLayout(149, 396, *values, rank, adapter_rank, planes=planes)
    it = layer(shape, dtype, True)
    assert torch.equal(stream.dense(it.state).double(), it.packed.dense().double())


SCRIPT = """
import torch
import triton_checks as checks
from test_triton_gpu import DEVICE, DTYPES
for case in checks.grid(DTYPES, ((100, 388),))[::5]:
    checks.check_case(case, DEVICE)
checks.check_dense(DEVICE, torch.float16, ("int8", 128), 2, 16, 100, 388)
print("every result is right")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool):
    if not (
        sanitizer := shutil.which("compute-sanitizer")
        or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    ):
        pytest.skip("no compute-sanitizer")
    more = (
        ["--report-api-errors", "no"] if tool == "memcheck" else []
    )  # torch's calls that ask for what a device may lack
    command = [
        sanitizer,
        "--tool",
        tool,
        *more,
        "--error-exitcode",
        "9",
        sys.executable,
        "-c",
        SCRIPT,
    ]
    # Without torch's cache every tensor is an allocation of its own, with ends that memcheck knows.
    environment = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parent,
        timeout=1800,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "every result is right" in said and "SUMMARY: 0 " in said, said[
        -4000:
    ]
