"""triton_programs:

Triton kernels compiled without a GPU, and their PTX executed by the interpreter.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton_programs import Emulated, compile_kernel, run

from ptx import PtxError


@triton.jit
def gemm(a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
         MASKED: tl.constexpr, STORE_MASKED: tl.constexpr, SHIFT: tl.constexpr,
         PRECISION: tl.constexpr):  # fmt: skip
    """c [M, N] = a [M, K] b [K, N], all contiguous; SHIFT elements too far in a."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        a_at, b_at = (
            a_ptr + m[:, None] * K + k[None, :] + SHIFT,
            b_ptr + k[:, None] * N + n[None, :],
        )
        if MASKED:
            a = tl.load(a_at, mask=(m < M)[:, None] & (k < K)[None, :], other=0)
            b = tl.load(b_at, mask=(k < K)[:, None] & (n < N)[None, :], other=0)
        else:
            a, b = tl.load(a_at), tl.load(b_at)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    at = c_ptr + m[:, None] * N + n[None, :]
    if STORE_MASKED:
        tl.store(at, total.to(c_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
    else:
        tl.store(at, total.to(c_ptr.dtype.element_ty))


@triton.jit
def scaled(x_ptr, y_ptr, n, scale, negative, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(x_ptr + i, mask=i < n) * scale
    tl.store(y_ptr + i, tl.where(negative, -x, x), mask=i < n)


TYPES = (torch.float16, torch.bfloat16, torch.float32)


def multiply(
    dtype,
    M,
    N,
    K,
    tile=(32, 32, 32),
    masked=True,
    store_masked=True,
    shift=0,
    emulated=None,
    numbers=None,
):
    """c and what was launched; small integers, whose products and sums are exact in all types."""
    rng = np.random.default_rng(M)
    make = numbers or (lambda *shape: torch.from_numpy(rng.integers(-2, 3, shape)).to(dtype))
    a, b, c = make(M, K), make(K, N), torch.full((M, N), float("nan"), dtype=dtype)
    emulated = emulated or Emulated(gemm, ("c_ptr",))
    grid = (-(-M // tile[0]), -(-N // tile[1]))
    precision = "tf32x3" if dtype == torch.float32 else "ieee"
    emulated[grid](
        a, b, c, M, N, K, *tile, masked, store_masked, shift, precision, num_warps=4, num_stages=3
    )
    return c.double(), a.double() @ b.double(), emulated.launched[-1]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(64, 32, 96), (50, 41, 77), (1, 17, 5), (33, 40, 48)])
def test_a_triton_gemm_is_exact_on_small_integers(dtype, M, N, K):
    """Whole tiles without masks, and tails with them."""
    c, expected, (compiled, _, counts) = multiply(
        dtype, M, N, K, masked=M != 64, store_masked=M != 64
    )
    assert torch.equal(c, expected)
    assert counts["mma.sync"] and counts["bar.sync"] and counts["st.global"]
    shape = {torch.float16: "m16n8k16.row.col.f32.f16", torch.bfloat16: "m16n8k16.row.col.f32.bf16"}
    assert shape.get(dtype, "m16n8k8.row.col.f32.tf32") in compiled.ptx
    assert ("ldmatrix.sync.aligned.m8n8.x4.trans" in compiled.ptx) == (dtype != torch.float32)
    if M == 64:
        assert counts["cp.async"] and "cp.async.cg.shared.global" in compiled.ptx


def test_three_tf32_products_keep_22_bits():
    rng = torch.Generator().manual_seed(0)
    c, expected, _ = multiply(
        torch.float32, 32, 32, 64, numbers=lambda *s: torch.randn(*s, generator=rng)
    )
    error = (c - expected).abs().max().item()
    assert 0 < error < 64 * 2.0**-21  # a single tf32 product is off by 2^-11 a term


@pytest.mark.parametrize("dtype", TYPES)
def test_planted_faults_are_found(dtype):
    with pytest.raises(PtxError, match="gemm: line .*out-of-bounds global read .* past the end"):
        multiply(dtype, 64, 32, 96, masked=False, shift=16)
    with pytest.raises(PtxError, match="out-of-bounds global read .* past the end"):
        multiply(dtype, 50, 41, 77, masked=False)
    with pytest.raises(PtxError, match="out-of-bounds global write .* past the end"):
        multiply(dtype, 50, 32, 96, store_masked=False)
    with pytest.raises(PtxError, match="write to read-only memory"):
        multiply(dtype, 50, 41, 77, emulated=Emulated(gemm, ("a_ptr",)))


def test_triton_stores_a_small_tile_by_all_warps():
    """Why `run` allows equal writes: four warps, a tile for one."""
    small = {"M": 16, "N": 16, "K": 32, "tile": (16, 16, 16)}
    c, expected, _ = multiply(torch.float32, **small)
    assert torch.equal(c, expected)
    with pytest.raises(PtxError, match="two warps write the same bytes at once"):
        multiply(torch.float32, **small, emulated=Emulated(gemm, ("c_ptr",), equal_writes=False))


SIGNATURE = {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32", "scale": "fp32", "negative": "u1"}


def test_compile_errors(monkeypatch):
    for signature, constants, names in [
        (SIGNATURE, {}, "B"), ({k: v for k, v in SIGNATURE.items() if k != "n"}, {"B": 32}, "n"),
        (SIGNATURE, {"B": 32, "n": 1}, "n"), (SIGNATURE | {"m": "i32"}, {"B": 32}, "m"),
    ]:  # fmt: skip
        text = f"scaled: in neither or both of signature and constants, or unknown: {names}$"
        with pytest.raises(ValueError, match=text):
            compile_kernel(scaled, signature, constants)
    with pytest.raises(ValueError, match="divisible, but no argument: B"):
        compile_kernel(scaled, SIGNATURE, {"B": 32}, divisible=["B", "n"])
    with pytest.raises(RuntimeError, match="cannot be compiled"):
        compile_kernel(scaled.fn, SIGNATURE, {"B": 32})
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        compile_kernel(scaled, SIGNATURE, {"B": 32})


def test_arguments_are_checked():
    compiled = compile_kernel(scaled, SIGNATURE, {"B": 32}, divisible=["n"])
    again = dict(reversed(SIGNATURE.items()))
    assert compiled is compile_kernel(scaled, again, {"B": 32}, divisible=["n"])
    x, y = torch.arange(48.0), torch.zeros(48)
    good = {"x_ptr": x, "y_ptr": y, "n": 48, "scale": 0.5, "negative": True}
    run(compiled, (2,), good, ["y_ptr"])
    assert torch.equal(y, -x / 2)
    for change, message in [
        ({"n": 47}, "n is not a multiple of 16"), ({"n": 2**40}, f"n = {2**40}: "),
        ({"n": x}, "n is a tensor, not an i32"),
        ({"B": 32}, "scaled takes x_ptr, y_ptr, n, scale, negative; given"),
        ({"x_ptr": x.half()}, r"x_ptr is not a tensor of \*fp32"),
        ({"x_ptr": 16}, "x_ptr is not a tensor"),
        ({"x_ptr": x.to(torch.complex64)}, "x_ptr is not a tensor"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run(compiled, (2,), good | change, ["y_ptr"])
    with pytest.raises(ValueError, match="takes"):
        run(compiled, (2,), good, ["z_ptr"])
    with pytest.raises(PtxError, match="read-only"):
        run(compiled, (2,), good, ["x_ptr"])


@triton.jit(do_not_specialize=["n"])
def copied(x_ptr, y_ptr, n, stride, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y_ptr + i, tl.load(x_ptr + i * stride, mask=i < n), mask=i < n)


def test_emulated_chooses_the_signature_of_tritons_launcher():
    """Integers of 1 are constants unless they are open, multiples of 16 are promised, addresses
    too.
    """
    x, y = torch.arange(64.0), torch.zeros(64)
    emulated = Emulated(copied, ("y_ptr",))
    for at, n, stride in [(0, 32, 1), (0, 1, 1), (1, 16, 2), (0, 2, 16), (0, 1, 2**31)]:
        y.zero_()
        emulated[(2,)](x[at:], y, n, stride, B=16, num_warps=1)
        assert torch.equal(y[:n], x[at::stride][:n]) and not y[n:].any()
    found = [(c.signature.get("stride"), c.divisible) for c, _, _ in emulated.launched]
    both = frozenset({"x_ptr", "y_ptr"})
    assert found[:3] == [(None, both), (None, both), ("i32", {"y_ptr"})]
    assert found[3:] == [("i32", both | {"stride"}), ("i64", both | {"stride"})]
    assert emulated.launched[0][0] is emulated.launched[1][0]  # whatever n is
    with pytest.raises(PtxError, match="out-of-bounds global read .* past the end"):
        emulated[(2,)](x[33:], y, 32, 1, B=16, num_warps=1)


def test_launches_that_are_compiled_only():
    x, y = torch.empty(1 << 20, device="meta"), torch.empty(1 << 20, device="meta")
    emulated = Emulated(scaled, ("y_ptr",), arch=90, execute=False)
    emulated[(1 << 15,)](x, y, 1 << 20, 2.0, False, 32)
    ((compiled, grid, counts),) = emulated.launched
    assert (
        compiled.arch == 90
        and ".target sm_90" in compiled.ptx
        and grid == (1 << 15,)
        and not counts
    )
