"""The CUDA kernels on a real GPU, natively: what the emulated device (test_cuda_kernels.py) cannot
show.

Bodies that need none are `check_*`: test_cuda_backend.py runs them on the emulated device, so
that they work on the day.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_cuda_kernels import DTYPES, TOKENS, bound, same_bits, sizes

from slab_kernels.backends import cuda, dispatch
from slab_kernels.backends.cuda import driver, images, nvrtc, plan, tiles
from slab_kernels.backends.cuda import launch as launching
from slab_kernels.backends.cuda.layout import TENSORS, CudaState
from slab_kernels.format import PackedLayout
from slab_kernels.nn import SlabLinear
from slab_kernels.testing import SHAPES, VALUE_LAYOUTS, oracle, random_packed

pytestmark = pytest.mark.gpu
BACKEND = dispatch.backend("cuda")
DEVICE, native = "cuda", BACKEND.linear
PLAIN = PackedLayout(1024, 4096, "fp16", rank=1)
EVERYTHING = PackedLayout(300, 4104, "int4", 32, rank=2, adapter_rank=4)
Layer = namedtuple("Layer", "packed state x bias exact magnitude")
both_types = pytest.mark.parametrize("dtype", DTYPES)
both_layouts = pytest.mark.parametrize("layout", [PLAIN, EVERYTHING], ids=["plain", "everything"])


@functools.lru_cache(maxsize=8)
def layer(layout: PackedLayout, dtype: torch.dtype, integers: bool, device: str = DEVICE) -> Layer:
    """The same numbers on every device; the oracle's sums are made on it."""
    packed = random_packed(layout, seed=layout.out_features, integers=integers).to(device)
    generator = torch.Generator().manual_seed(layout.rank)
    shape = (max(TOKENS), layout.in_features)
    x = (
        torch.randint(-2, 3, shape, generator=generator)
        if integers
        else torch.randn(shape, generator=generator)
    )
    x, bias = (
        x.to(device, dtype),
        torch.randint(-9, 10, (layout.out_features,), generator=generator).float().to(device),
    )
    return Layer(packed, BACKEND.prepare(packed, dtype), x, bias, *oracle(x, packed, bias))


def here() -> plan.Gpu:
    return cuda.device_of(torch.cuda.current_device()).gpu


def launches(state: CudaState, M: int):
    """What a call with M tokens launches: the adapter's kernel or None, the linear's."""
    return launching.launches(sizes(state), M, state.dtype, here())


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """cuBLAS adds in fp32, as the bounds want it, and no fault of one test is reported by the
    next."""
    for name in ("fp16", "bf16"):
        monkeypatch.setattr(
            torch.backends.cuda.matmul, f"allow_{name}_reduced_precision_reduction", False
        )
    yield
    torch.cuda.synchronize()


@pytest.fixture
def forced(monkeypatch):
    """forced(tile, tokens of a warp, splits): the linear's plan, whatever the model says; adapters
    keep theirs."""

    def force(*how):
        def chosen(s, M, gpu):
            return (
                plan.choose(s, M, gpu) if s.values == plan.DENSE else plan.evaluate(s, M, gpu, *how)
            )

        monkeypatch.setattr(launching, "choose", chosen)
        launching.launches.cache_clear()

    yield force
    launching.launches.cache_clear()


@pytest.fixture
def forgetful(monkeypatch):
    """Call it, and the driver has loaded nothing yet."""
    return lambda: [
        monkeypatch.setattr(driver, name, {}) for name in ("_modules", "_loaded", "_functions")
    ]


def check_exact(linear, device, dtype, values, rank, shapes, tokens) -> None:
    """Small integers come out bit for bit, whatever the order of summation; but cuBLAS, which
    multiplies a rebuilt weight, may round shares of K, or a sum before the bias."""
    for N, K, adapter_rank in shapes:
        it = layer(PackedLayout(N, K, *values, rank, adapter_rank), dtype, True, device)
        for M in tokens:
            y = linear(it.x[:M], it.state, it.bias)
            exact = it.exact[:M]
            off, allowed = (y.double() - exact).abs(), bound(it.magnitude[:M], exact, dtype, K)
            rebuilt = (
                device == DEVICE
                and M > 64
                and isinstance(launches(it.state, M)[1].plan, plan.Rebuild)
            )
            assert bool((off <= allowed).all()) if rebuilt else torch.equal(y, exact.to(dtype)), (
                N,
                K,
                adapter_rank,
                M,
            )


@pytest.mark.parametrize("rank", (0, 1, 2, 4, 8))
@pytest.mark.parametrize("values", VALUE_LAYOUTS)
@both_types
def test_small_integers_are_exact(dtype, values, rank, poisoned):
    check_exact(
        native, DEVICE, dtype, values, rank, ((70, 260, 4), (33, 1030, 0), (512, 516, 0)), TOKENS
    )
    check_exact(
        native, DEVICE, dtype, values, rank, ((16, 128, 100),), TOKENS[:14]
    )  # rebuilt, bf16 could not hold W


def check_rebuilt(linear, device, dtype, values, rank, planes) -> None:
    """The rebuilt weight itself is exact to its one rounding: the identity as x leaves cuBLAS
    nothing to add."""
    N, K = 70, 260
    packed = random_packed(PackedLayout(N, K, *values, rank, planes=planes), N, integers=True).to(
        device
    )
    y = linear(torch.eye(K, device=device, dtype=dtype), BACKEND.prepare(packed, dtype))
    assert torch.equal(y.T, packed.dense().to(dtype))


@pytest.mark.parametrize("rank, planes", [(0, 1), (1, 1), (3, 1), (1, 2), (1, 3), (2, 3)])
@pytest.mark.parametrize("values", VALUE_LAYOUTS)
@both_types
def test_the_rebuilt_weight(monkeypatch, dtype, values, rank, planes, poisoned):
    monkeypatch.setattr(launching, "choose", plan.rebuild)
    launching.launches.cache_clear()
    check_rebuilt(native, DEVICE, dtype, values, rank, planes)
    launching.launches.cache_clear()


def check_against_fp64(linear, device, dtype, values, rank, adapter_ranks, shapes, tokens) -> None:
    """Every element within its own bound; with bias in the activations' type, in fp32 and
    without."""
    for (N, K), adapter_rank in ((shape, r) for shape in shapes for r in adapter_ranks):
        if max(rank, adapter_rank) > min(N, K):
            continue
        it = layer(PackedLayout(N, K, *values, rank, adapter_rank), dtype, False, device)
        for M in tokens:
            bias = (None, it.bias, it.bias.to(dtype))[M % 3]
            exact = it.exact[:M] - (it.bias.double() if bias is None else 0)
            error = (linear(it.x[:M], it.state, bias).double() - exact).abs()
            assert bool((error <= bound(it.magnitude[:M], exact, dtype, K)).all()), (
                N,
                K,
                adapter_rank,
                M,
            )


@pytest.mark.parametrize("rank", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("values", VALUE_LAYOUTS)
@both_types
def test_the_problem_grid_against_fp64(dtype, values, rank, poisoned):
    shapes = (*SHAPES, (300, 1160), (520, 2088))  # the last ones with many CTAs and K-blocks
    check_against_fp64(native, DEVICE, dtype, values, rank, (0, 16, 64, 100), shapes, TOKENS)


def every_tile(it: tiles.CudaSizes):
    """Every tile, the tokens of its warps, the CTAs that share K and a ragged number of tokens."""
    for splits in (1, 3):
        for M in (1, 3, 7, 16):
            if M <= it.most_narrow_tokens:
                yield from ((tile, M, splits, M) for tile in plan.NARROW_TILES)
            yield from ((tile, it.wide_tokens, splits, M) for tile in plan.WIDE_TILES)
        for tile, tokens in itertools.product(plan.SPLIT_TILES, it.warp_tokens()):
            yield tile, tokens, splits, tokens * tile.warp_tokens + 3
    for table, tall in ((plan.WHOLE_TILES, False), (plan.TALL_TILES, True)):
        for tile, tokens in itertools.product(table, it.warp_tokens(tall)):
            yield tile, tokens, 1, tokens * tile.warp_tokens + 3


@pytest.mark.parametrize(
    "values, rank",
    [(("fp16", None), 0), (("fp16", None), 1), (("int8", 64), 1), (("int4", 128), 1)],
)
def test_every_tile_of_the_tables(forced, values, rank):
    it, gpu = layer(PackedLayout(149, 396, *values, rank), torch.float16, True), here()
    for tile, tokens, splits, M in every_tile(sizes(it.state)):
        if plan.evaluate(sizes(it.state), M, gpu, tile, tokens, splits):  # else it does not fit
            forced(tile, tokens, splits)
            y = native(it.x[:M], it.state, it.bias)
            assert torch.equal(y, it.exact[:M].half()), (tile, tokens, splits, M)


def check_strided(linear, device, M, K) -> None:
    """Columns of a wider matrix at any alignment, a transpose, batch dimensions, one row for all
    tokens."""
    it = layer(PackedLayout(33, K, "fp16", rank=1), torch.float16, True, device)
    want, wide = (
        it.exact[:M].half(),
        torch.full((M, K + 9), float("nan"), dtype=torch.float16, device=device),
    )
    for offset in (0, 1, 8):
        view = wide[:, offset : offset + K]
        view.copy_(it.x[:M])
        assert torch.equal(linear(view, it.state, it.bias), want), offset
        view.fill_(float("nan"))
    assert torch.equal(linear(it.x[:M].T.contiguous().T, it.state, it.bias), want)
    assert torch.equal(linear(it.x[:M].view(1, M, 1, K), it.state, it.bias), want.view(1, M, 1, 33))
    assert torch.equal(linear(it.x[:1].expand(M, K), it.state, it.bias), want[:1].expand(M, 33))


@pytest.mark.parametrize("K", [40, 129, 388])
@pytest.mark.parametrize("M", [3, 30, 90])
def test_strided_and_unaligned_activations(M, K, poisoned):
    check_strided(native, DEVICE, M, K)


@pytest.mark.parametrize("M", [1, 40, 100, 1000])
@pytest.mark.parametrize("values", [("fp16", None), ("bf16", None), ("int8", 128), ("int4", 128)])
@both_types
def test_error_is_at_most_that_of_cublas(dtype, values, M):
    """Root mean square against fp64, cuBLAS on the same weight rounded to the activations' type: at
    most 1.5 times."""
    it = layer(PackedLayout(1024, 4096, *values, 1), dtype, False)
    exact = it.exact[:M] - it.bias.double()
    dense = torch.nn.functional.linear(it.x[:M], it.packed.dense().to(dtype))
    ours, theirs = (
        float((y.double() - exact).square().mean().sqrt())
        for y in (native(it.x[:M], it.state), dense)
    )
    assert ours <= 1.5 * theirs


@pytest.mark.parametrize("M", [1, 16, 64, 300])
@both_layouts
def test_a_hundred_runs_give_the_same_bits(layout, M):
    it = layer(layout, torch.float16, False)
    assert (
        len(
            {
                native(it.x[:M], it.state, it.bias).view(torch.int16).cpu().numpy().tobytes()
                for _ in range(100)
            }
        )
        == 1
    )


def check_regimes(linear, device, layout, dtype, regimes) -> None:
    """Within a regime a token's result depends on no other token, nor on its place."""
    it = layer(layout, dtype, False, device)
    for tokens in regimes:
        most = max(tokens)
        largest = linear(it.x[:most], it.state, it.bias)
        for M in tokens:
            assert same_bits(linear(it.x[:M], it.state, it.bias), largest[:M]), M
        assert same_bits(linear(it.x[:most].roll(3, 0), it.state, it.bias), largest.roll(3, 0))


@both_layouts
@both_types
def test_a_token_does_not_depend_on_the_others(dtype, layout):
    state = layer(layout, dtype, False).state
    fused = [
        M for M in (65, 100, 129, 300, 777) if isinstance(launches(state, M)[1].plan, plan.Plan)
    ]  # else cuBLAS
    check_regimes(
        native,
        DEVICE,
        layout,
        dtype,
        ((1, 2, 5, 8, 9, 16), (17, 32, 40, 64), *([fused] if fused else [])),
    )


@pytest.mark.parametrize("M, loop", [(1, "narrow"), (12, "wide"), (60, "many")])
def test_launches_that_overlap_wait_for_each_other(forced, M, loop):
    """Adapter, linear and the sum of K-splits, back to back: a kernel that read too early would see
    the call before."""
    it = layer(PackedLayout(300, 4104, "fp16", None, 1, 4), torch.float16, True)
    tokens = {"narrow": M, "wide": sizes(it.state).wide_tokens, "many": 64}[loop]
    table = {"narrow": plan.NARROW_TILES, "wide": plan.WIDE_TILES, "many": plan.SPLIT_TILES}[loop]
    forced(next(tile for tile in table if (tile.warp_rows, tile.warp_inputs) == (4, 1)), tokens, 4)
    first, second = launches(it.state, M)
    assert first is not None and second.plan.splits == 4
    starts = [17 * i % (it.x.shape[0] - M) for i in range(200)]
    results = [native(it.x[start : start + M], it.state, it.bias) for start in starts]
    assert all(
        torch.equal(y, it.exact[start : start + M].half())
        for start, y in zip(starts, results, strict=True)
    )


@pytest.mark.parametrize("M", [1, 4, 16, 40])
@both_types
def test_a_chain_of_linears(dtype, M):
    """Each reads what the one before it wrote, and writes where an earlier one may still read: the
    allocator gives memory back at once. With a pause after each the bits are the same."""
    it = layer(PackedLayout(1024, 1024, "int4", 128, 2), dtype, False)

    def last(pause: bool) -> torch.Tensor:
        y = it.x[:M]
        for _ in range(6):  # Numbers shrink from one to the next; six leave some.
            y = native(y, it.state)
            if pause:
                torch.cuda.synchronize()
        return y

    want = last(pause=True)
    assert bool(want.isfinite().all()) and bool((want != 0).any())
    assert all(same_bits(last(pause=False), want) for _ in range(100))


@pytest.mark.parametrize("M", [1, 12, 40, 200])
@both_layouts
def test_graph_capture_and_replay(layout, M, forgetful):
    """The very first launch may be captured, for `prepare` has loaded every kernel. Replays see
    changed inputs."""
    it = layer(layout, torch.float16, False)
    want = [native(it.x[start : start + M], it.state, it.bias) for start in (0, 5, 400)]
    forgetful()
    state, x, graph = (
        BACKEND.prepare(it.packed, torch.float16),
        it.x[:M].clone(),
        torch.cuda.CUDAGraph(),
    )
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = native(x, state, it.bias)
    for start, expected in zip((0, 5, 400), want, strict=True):
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
        want = [native(it.x[i : i + M], it.state, it.bias) for i in range(2)]
        torch.cuda.synchronize()
        for call, (i, stream) in itertools.product(range(100), enumerate(streams)):
            with torch.cuda.stream(stream):
                if call == 0:
                    torch.cuda._sleep(
                        50_000_000
                    )  # clocks: x is written long after the launches were queued
                    xs[i].copy_(it.x[i : i + M])
                results[i].append(native(xs[i], it.state, it.bias))
        torch.cuda.synchronize()
        assert all(same_bits(y, want[i]) for i in range(2) for y in results[i])


def test_a_fresh_thread():
    """It has no current context, and memory of its own for the parameters."""
    it = layer(EVERYTHING, torch.float16, True)
    torch.cuda.synchronize()

    def work(i: int) -> list[bool]:
        starts = [(i, M) for M in (1, 40, 1, 100)]
        return [
            torch.equal(native(it.x[i : i + M], it.state, it.bias), it.exact[i : i + M].half())
            for i, M in starts
        ]

    with ThreadPoolExecutor(4) as threads:
        assert all(map(all, threads.map(work, range(4))))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_a_device_that_is_not_the_current_one():
    it = layer(EVERYTHING, torch.float16, True, "cuda:1")
    for M in (1, 40, 100):
        y = native(it.x[:M], it.state, it.bias)
        assert y.device == torch.device("cuda:1") and torch.equal(y, it.exact[:M].half())
    assert torch.cuda.current_device() == 0


@both_layouts
def test_nothing_is_allocated_but_results_and_nothing_is_kept(layout):
    it = layer(layout, torch.float16, False)
    for M in (1, 16, 40, 64):
        first, second = launches(it.state, M)
        native(it.x[:M], it.state, it.bias)
        torch.cuda.synchronize()
        used, calls = (
            torch.cuda.memory_allocated(),
            torch.cuda.memory_stats()["allocation.all.allocated"],
        )
        y = native(it.x[:M], it.state, it.bias)
        made = torch.cuda.memory_stats()["allocation.all.allocated"] - calls
        assert made == 1 + (first is not None) + (second.plan.splits > 1), M  # y, z, partial sums
        assert torch.cuda.memory_allocated() - used == -(-y.nbytes // 512) * 512, M
        del y
        assert torch.cuda.memory_allocated() == used


def test_a_dropped_layer_gives_its_memory_back():
    packed, _, x, *_ = layer(EVERYTHING, torch.float16, False)
    for _ in range(2):  # cuBLAS's workspace, if the first call makes one, stays
        used = torch.cuda.memory_allocated()
        module = SlabLinear.from_packed(packed)
        module(x[:70])
        assert torch.cuda.memory_allocated() > used
        del module
        gc.collect()
    assert torch.cuda.memory_allocated() == used


def test_an_offloaded_layer_works_from_its_stream_alone():
    packed, _, x, *_ = layer(EVERYTHING, torch.float16, False)
    module = SlabLinear.from_packed(packed.to("cpu").to(DEVICE))
    y, used = module(x[:70]), torch.cuda.memory_allocated()
    module.offload()
    assert torch.cuda.memory_allocated() < used and torch.equal(module(x[:70]), y)


@pytest.mark.parametrize("M", [1, 30, 100])
def test_opcheck(M):
    it = layer(PackedLayout(70, 260, "int8", 64, 2, 4), torch.float16, False)
    x, rest = it.x[:M], (*it.state[:TENSORS], it.bias.half(), *it.state[TENSORS:])
    torch.library.opcheck(torch.ops.slab_kernels.linear_cuda_frozen.default, (x, *rest))
    torch.library.opcheck(
        torch.ops.slab_kernels.linear_cuda.default, (x.clone().requires_grad_(), *rest)
    )


def test_compile_fullgraph():
    it = layer(PackedLayout(70, 260, "fp16", None, 1, 4), torch.float16, False)
    module = SlabLinear.from_packed(it.packed, it.bias.half()).prepare(torch.float16)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for M in (1, 3, 17, 100):
        with torch.no_grad():
            assert same_bits(compiled(it.x[:M]), module(it.x[:M])), M
        x, again = (it.x[:M].clone().requires_grad_() for _ in range(2))
        compiled(x).float().sum().backward()
        module(again).float().sum().backward()
        assert torch.allclose(x.grad, again.grad, rtol=2e-3, atol=1e-3), (
            M
        )  # the compiler may contract a * b + c


def test_module_on_a_gpu():
    """Half types on these kernels, fp32 on Triton's or the reference; gradients of x and bias;
    there and back again."""
    it = layer(PackedLayout(70, 260, "int8", 64, 2, 4), torch.float16, True)
    module = SlabLinear.from_packed(it.packed, it.bias)
    other = "reference" if dispatch.backend("triton").missing(DEVICE) else "triton"
    for dtype, name in (
        (torch.float32, other),
        (torch.float16, "cuda"),
        (torch.bfloat16, "cuda"),
        (torch.float16, "cuda"),
    ):
        assert torch.equal(module(it.x[:5].to(dtype)), it.exact[:5].to(dtype))
        assert module._linears[dtype][0].backend.name == name
    module.bias.requires_grad_()
    x = it.x[:5].clone().requires_grad_()
    module(x).float().sum().backward()
    assert torch.equal(x.grad, it.packed.dense().sum(0).half().expand(5, -1))
    assert torch.equal(module.bias.grad, torch.full_like(module.bias, 5))
    assert module.cpu()(it.x[:5].float().cpu()).device.type == "cpu"
    assert module.to(DEVICE)(it.x[:5]).is_cuda and module.backend == "cuda"


def check_fused(
    linear, device, dtype, rank, adapter_rank, tokens, rows=(100, 24, 37), K=272
) -> None:
    layouts = [PackedLayout(n, K, "int8", 128, rank, adapter_rank) for n in rows]
    parts = [random_packed(it, it.out_features, integers=True).to(device) for it in layouts]
    state, bias = (
        BACKEND.prepare_fused(parts, dtype),
        torch.randint(-5, 6, (sum(rows),), device=device).float(),
    )
    for M in tokens:
        x = torch.randint(-2, 3, (M, K), generator=torch.Generator().manual_seed(M)).to(
            device, dtype
        )
        exact = torch.cat([oracle(x, part)[0] for part in parts], -1) + bias.double()
        assert torch.equal(linear(x, state, bias), exact.to(dtype)), M


@pytest.mark.parametrize("rank, adapter_rank", [(0, 0), (1, 0), (2, 4), (0, 4)])
@both_types
def test_fused_projections(dtype, rank, adapter_rank, poisoned):
    check_fused(BACKEND.linear_fused, DEVICE, dtype, rank, adapter_rank, (1, 12, 40, 200))


def test_nvrtc_gives_the_same_bits_as_nvcc(monkeypatch, tmp_path, forgetful):
    if nvrtc.find(driver._toolkit()) is None:
        pytest.skip("no libnvrtc")
    capability = here().capability
    units = images.kernel_units(capability)
    if not all(images.ahead_of_time(unit, capability) for unit in units):
        pytest.skip("installed without nvcc: all other tests ran what NVRTC compiled")
    cases = [
        (layer(layout, dtype, False), M)
        for layout in (PLAIN, EVERYTHING)
        for dtype in DTYPES
        for M in (1, 16, 33, 100)
    ]
    before = [native(it.x[:M], it.state, it.bias) for it, M in cases]
    monkeypatch.setattr(images, "ahead_of_time", lambda *_: [])
    monkeypatch.setenv("SLAB_KERNELS_CACHE", str(tmp_path))
    forgetful()
    after = [native(it.x[:M], it.state, it.bias) for it, M in cases]
    assert list(tmp_path.iterdir()) and all(
        same_bits(a, b) for a, b in zip(after, before, strict=True)
    )


SCRIPT = """
import sys
from test_cuda_gpu import DTYPES, DEVICE, check_exact, launching, native, plan

def choose(sizes, M, gpu):  # K over groups and CTAs; above 64 tokens fused; above 100 rebuilt
    if M > 100 and sizes.values != plan.DENSE:
        return plan.rebuild(sizes, M, gpu)
    if M <= sizes.most_narrow_tokens:
        table, tokens = plan.NARROW_TILES, M
    elif M <= 16:
        table, tokens = plan.WIDE_TILES, sizes.wide_tokens
    else:
        table = plan.SPLIT_TILES if M <= 64 else plan.WHOLE_TILES
        tokens = next(tokens for tokens in sizes.warp_tokens() if tokens >= min(M, 64))
    splits = 2 if M <= 64 else 1
    found = (plan.evaluate(sizes, M, gpu, tile, tokens, splits) for tile in table)
    return next(filter(None, found))

launching.choose = choose
kinds = ((("fp16", None), 1, 3), (("int8", 64), 2, 0), (("int4", 32), 0, 0))
for values, rank, adapter_rank in kinds:
    for dtype in DTYPES:
        shapes = ((149, 204, adapter_rank),)
        check_exact(native, DEVICE, dtype, values, rank, shapes, map(int, sys.argv[1:]))
print("every result is right")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool):
    if not (
        sanitizer := shutil.which("compute-sanitizer")
        or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    ):
        pytest.skip("no compute-sanitizer")
    # Not ours to judge: how cuBLAS (110 tokens) shares memory, and torch's calls that ask for what
    # a device may lack.
    more, tokens = (
        (["--report-api-errors", "no"], "1 12 40 70 110")
        if tool == "memcheck"
        else ([], "1 12 40 70")
    )
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
        *tokens.split(),
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
