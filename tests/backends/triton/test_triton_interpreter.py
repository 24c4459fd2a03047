"""The Triton kernels in Triton's interpreter, on CPU tensors: the problem grid in fp32 and fp16,
the op, the modules.

Triton reads TRITON_INTERPRET when it is imported, and whoever compiles ahead of time needs it
unset: this file runs in processes of its own. `make test` starts them; a plain `pytest` does in
test_triton_backend.py. What the interpreter cannot show (bf16, `prmt` on pairs, TF32) is
executed as PTX: test_triton_kernels.py.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import os

import numpy
import pytest
import torch
from pairwise import grid, label

if os.environ.get("TRITON_INTERPRET") != "1":
    why = (
        "needs TRITON_INTERPRET=1 before Triton is imported: run by `make test`, and by "
        "test_triton_backend.py in a process of its own"
    )
    pytest.skip(why, allow_module_level=True)
pytest.importorskip("triton")

import triton.language as tl
import triton_checks as checks
from triton.runtime import interpreter

from slab_kernels import SlabLinear
from slab_kernels.backends import dispatch
from slab_kernels.backends import triton as backend
from slab_kernels.backends.base import LinearProblem
from slab_kernels.backends.triton import launch
from slab_kernels.backends.triton.configs import choose
from slab_kernels.backends.triton.rows import DEFAULTS, TileConfig
from slab_kernels.errors import BackendError
from slab_kernels.format import PackedLayout
from slab_kernels.testing import VALUE_LAYOUTS, random_packed

DEVICE, BACKEND = "cpu", backend.BACKEND
DTYPES = (torch.float16, torch.float32)
CORE = (("fp16", None), ("bf16", None), ("int8", 128), ("int4", None))
every_type = pytest.mark.parametrize("dtype", DTYPES)


class _Nothing:
    """What is restored where nothing was replaced."""

    def restore(self) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def nothing_made_twice():
    """Triton's interpreter replaces every function of its language anew whenever a kernel calls
    another function, though the kernel's launch has done so: a third of the time of these tests.
    Here it does where they are not replaced yet. And it makes a table of all types whenever it asks
    for numpy's name of one, which is kept here. Both are functions of Triton's own; a version that
    has them under other names takes longer."""
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(interpreter, "_patch_lang"):
            patch.setattr(interpreter, "_patch_lang", _replacing_once(interpreter._patch_lang))
        if hasattr(interpreter, "_get_np_dtype"):
            patch.setattr(interpreter, "_get_np_dtype", _remembering(interpreter._get_np_dtype))
        yield


def _replacing_once(replace_all):
    def replace(fn):
        languages = [it for it in fn.__globals__.values() if it is tl or it is tl.core]
        missing = not languages or any(tl.core.is_builtin(it.load) for it in languages)
        return replace_all(fn) if missing else _Nothing()

    return replace


def _remembering(ask):
    of_number = functools.cache(ask)

    def of_any(type_):
        element = type_.element_ty if isinstance(type_, tl.block_type) else type_
        return ask(element) if isinstance(element, tl.pointer_type) else of_number(element)

    return of_any


@pytest.fixture(autouse=True)
def clean(monkeypatch, poisoned):
    """Uninitialised memory is NaN everywhere, and modules come here."""
    assert bool(torch.zeros(3).new_empty(3).isnan().all()) and bool(torch.empty(3).isnan().all())
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        every = metafunc.config.getoption("full")
        cases = (checks.grid if every else checks.lean_grid)(DTYPES)
        metafunc.parametrize("case", cases, ids=label)


def test_the_problem_grid(case):
    checks.check_case(case, DEVICE, TileConfig(*case.tile))


@pytest.mark.parametrize("make", [checks.grid, checks.lean_grid])
def test_any_two_choices_of_the_grid_meet(make):
    """Tokens, splits and shape choose the tile: a small one would take minutes on the largest
    product."""
    cases = make(DTYPES)
    for pair in itertools.combinations(checks.Case._fields, 2):
        if pair[1] == "tile" and pair[0] in checks.DEALT_BY_COST:
            continue
        left, right, both = (
            {tuple(getattr(case, name) for name in names) for case in cases}
            for names in (pair[:1], pair[1:], pair)
        )
        assert len(both) == len(left) * len(right), pair


# ---- launches


@pytest.mark.parametrize("M, K", [(3, 40), (3, 129), (20, 130)])
@every_type
def test_strided_and_unaligned_activations(dtype, M, K):
    checks.check_strided(DEVICE, M, K, dtype)


@pytest.mark.parametrize("values", CORE, ids=str)
def test_error_is_that_of_a_dense_weight(values):
    checks.check_error_is_that_of_a_dense_weight(DEVICE, torch.float16, values)


@pytest.mark.parametrize("adapter_rank", [0, 20])
@every_type
def test_shares_of_K(dtype, adapter_rank):
    """Eight shares of seven steps, the last one empty; of eight steps without a tail."""
    for K in (64 * 6 + 3, 64 * 8):
        checks.check_shares_of_K(
            DEVICE, PackedLayout(33, K, "int8", 128, 1, adapter_rank), dtype, TileConfig(16, 64, 64)
        )


def term_by_term(a, b, dtype=None):
    """numpy.matmul, each sum in the order of its terms wherever it stands: OpenBLAS's AVX2 kernels
    sum the last rows in another order."""
    out = numpy.zeros((a.shape[0], b.shape[1]), dtype or a.dtype)
    for k in range(a.shape[1]):
        out += a[:, k : k + 1].astype(out.dtype) * b[k : k + 1].astype(out.dtype)
    return out


@every_type
def test_a_token_alone(dtype, monkeypatch):
    """With as many programs as this device wants: K is split, and z is summed from several."""
    monkeypatch.setattr(numpy, "matmul", term_by_term)
    layout = PackedLayout(33, 772, "int4", 32, 2, 4)
    sizes = launch.sizes_of(checks.layer(layout, dtype, False, DEVICE).state)
    for M in (1, 16):
        assert (
            backend.splits(
                sizes,
                M,
                choose(sizes, M, 8 * dtype.itemsize, backend.device_of(None)),
                backend.device_of(None),
            )
            > 1
        )
    checks.check_a_token_alone(DEVICE, layout, dtype)


@grid(**{
    "dtype": DTYPES,
    "values": CORE[::3],
    "rank, adapter_rank": ((0, 0), (1, 0), (2, 20), (0, 20)),
})  # fmt: skip
def test_fused_weights(dtype, values, rank, adapter_rank):
    checks.check_fused(DEVICE, dtype, values, rank, adapter_rank, (1, 20))
    for planes, rows in ((3, (40, 1, 17)), (2, (16, 33)), (1, (1, 2, 3, 4))):
        checks.check_fused(
            DEVICE,
            dtype,
            values,
            rank,
            adapter_rank,
            (5,),
            rows,
            68,
            TileConfig(16, 16, 64),
            planes,
        )


@grid(**{
    "dtype": DTYPES,
    "values": VALUE_LAYOUTS,
    "rank, adapter_rank": ((0, 0), (1, 0), (4, 0), (1, 100)),
})  # fmt: skip
def test_the_weight_rebuilt(dtype, values, rank, adapter_rank):
    for N, K, planes in ((1, 3, 2), (33, 260, 1), (20, 92, 2), (20, 92, 3)):
        checks.check_dense(DEVICE, dtype, values, rank, adapter_rank, N, K, planes)


@every_type
def test_kept_is_what_the_mask_says(dtype):
    checks.check_kept_is_what_the_mask_says(DEVICE, dtype)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@grid(dtype=DTYPES, bad=(float("nan"), float("inf"), -float("inf")), M=(1, 8, 70))
def test_nan_and_infinity_propagate(dtype, bad, M):
    checks.check_nan_and_infinity_propagate(DEVICE, dtype, bad, M)


@pytest.mark.parametrize("adapter_rank", [0, 4])
def test_rows_of_x_beyond_two_to_the_31_elements(adapter_rank):
    """Three of them, 2^30 + 24 numbers apart, in 4 GiB that are reserved and never committed
    (Linux's MAP_NORESERVE)."""
    stride, it = (
        (1 << 30) + 24,
        checks.layer(
            PackedLayout(17, 40, "fp16", rank=1, adapter_rank=adapter_rank),
            torch.float16,
            True,
            DEVICE,
        ),
    )
    with mmap.mmap(
        -1, 2 * (2 * stride + 40), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    ) as room:
        x = torch.frombuffer(room, dtype=torch.float16).as_strided((3, 40), (stride, 1))
        x.copy_(it.x[:3])
        assert torch.equal(
            launch.linear(x, it.state, None, TileConfig(16, 16, 64), 1, 1), it.exact[:3].half()
        )
        del x


def test_the_largest_tile_needs_no_real_row():
    """N = 1, K = 3, M = 1 in every shipped configuration: all but one lane of each is beyond an
    end."""
    for dtype, row in itertools.product(DTYPES, DEFAULTS):
        it = checks.layer(PackedLayout(1, 3, "int8", None, 1, 2), dtype, True, DEVICE)
        if not row.config.rebuild:
            assert torch.equal(
                launch.linear(it.x[:1], it.state, it.bias, row.config, 1, 1),
                (it.exact[:1] + it.bias.double()).to(dtype),
            )


def test_many_tokens_rebuild_the_weight(monkeypatch):
    """Whatever surrounds the call: autocast is not to change x's type."""
    monkeypatch.setattr(backend, "choose", lambda *_: TileConfig(rebuild=True))
    for dtype, adapter_rank in itertools.product(DTYPES, (0, 3)):
        it = checks.layer(PackedLayout(37, 132, "int8", 128, 1, adapter_rank), dtype, True, DEVICE)
        want = (it.exact[:40] + it.bias.double()).to(dtype)
        assert torch.equal(BACKEND.linear(it.x[:40], it.state, it.bias), want)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(BACKEND.linear(it.x[:40], it.state, it.bias), want)
        assert BACKEND.linear(it.x[:0], it.state).shape == (0, 37)


def test_autocast_leaves_the_op_alone():
    it = checks.layer(PackedLayout(37, 132, "int8", 128, 1, 3), torch.float16, False, DEVICE)
    want = BACKEND.linear(it.x[:5], it.state)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert checks.same_bits(BACKEND.linear(it.x[:5], it.state), want)


# ---- the op and the modules


@every_type
def test_gradients(dtype):
    checks.check_gradients(DEVICE, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("M", [1, 20])
@every_type
def test_opcheck(dtype, M):
    checks.check_opcheck(DEVICE, M, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile(compiler):
    checks.check_compile(DEVICE, compiler)


def test_modules():
    checks.check_modules(DEVICE)


def test_export():
    module = SlabLinear.from_packed(
        random_packed(PackedLayout(17, 40, "fp16", rank=1)), torch.randn(17)
    ).prepare(torch.float32)
    program = torch.export.export(
        module, (torch.randn(4, 40),), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},)
    )
    x = torch.randn(5, 40)
    assert torch.equal(program.module()(x), module(x)) and "linear_triton" in str(program.graph)


def test_reasons(monkeypatch):
    """bf16 comes out wrong without a word, so it is refused; by choice of its own, dispatch takes
    the CPU backend."""
    problem = LinearProblem(1, 24, 200, dtype=torch.float32)
    assert BACKEND.not_supported_reasons(problem) == []
    with pytest.raises(
        BackendError,
        match="'triton' cannot run .* bfloat16 activations on cpu: "
        "Triton's interpreter computes bfloat16 wrongly",
    ):
        SlabLinear.from_packed(random_packed(PackedLayout(16, 64)))(
            torch.ones(1, 64, dtype=torch.bfloat16)
        )
    assert any(
        "unset it" in reason
        for reason in BACKEND.not_supported_reasons(LinearProblem(1, 24, 200, device="cuda"))
    )
    monkeypatch.delenv(dispatch.ENVIRONMENT)
    assert dispatch.select(problem).name in ("cpu", "triton")
    with pytest.raises(TypeError, match="float64"):
        state = BACKEND.prepare(random_packed(PackedLayout(16, 64)), torch.float32)
        BACKEND.linear(torch.ones(1, 64, dtype=torch.float64), state)
