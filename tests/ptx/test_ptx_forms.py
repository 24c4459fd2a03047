"""The PTX interpreter: instructions and forms that Triton's code needs and nvcc's does not."""

from __future__ import annotations

import numpy as np
import pytest

from ptx import PtxError
from ptx.programs import evaluate, f32, run, u32

# ---- tf32 ---------------------------------------------------------------------------------------


def tf32_mma(a, b, c):
    """One m16n8k8 on a warp whose registers a [4, 32], b [2, 32] and c [4, 32] are given; d [4,
    32].
    """
    out = np.zeros((4, 32), np.uint32)

    def load(first, n, at):
        return " ".join(f"ld.global.b32 %r{first + k}, [%d{at}+{128 * k}];" for k in range(n))

    run(
        f"""
        mad.wide.u32 %d0, %r30, 4, %d10; mad.wide.u32 %d1, %r30, 4, %d11;
        mad.wide.u32 %d2, %r30, 4, %d12;
        mad.wide.u32 %d3, %r30, 4, %d13; {load(0, 4, 1)} {load(4, 2, 2)} {load(6, 4, 3)}
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32
            {{%r10, %r11, %r12, %r13}}, {{%r0, %r1, %r2, %r3}}, {{%r4, %r5}},
            {{%r6, %r7, %r8, %r9}};
        st.global.b32 [%d0], %r10; st.global.b32 [%d0+128], %r11; st.global.b32 [%d0+256], %r12;
        st.global.b32 [%d0+384], %r13;""",
        out,
        *(np.ascontiguousarray(x) for x in (a, b, c)),
        read_only=(1, 2, 3),
    )
    return out


def test_tf32_fragments():
    """The ISA's formulas for m16n8k8 with .tf32, element by element: where a_i, b_i and c_i of a
    lane lie.
    """
    rng = np.random.default_rng(0)
    A, B, C = (
        rng.integers(-1000, 1000, shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8))
    )
    a, b, c, expected = (np.zeros((n, 32), np.float32) for n in (4, 2, 4, 4))
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(4):
            a[i, lane] = A[group if i in (0, 2) else group + 8, thread if i < 2 else thread + 4]
            row, column = group if i < 2 else group + 8, thread * 2 + (i & 1)
            c[i, lane], expected[i, lane] = C[row, column], (A @ B + C)[row, column]
        for i in range(2):
            b[i, lane] = B[thread + 4 * i, group]

    def dirty(x):
        return x.view(np.uint32) | rng.integers(0, 1 << 13, x.shape, dtype=np.uint32)

    assert np.array_equal(tf32_mma(a, b, c).view(np.float32), expected)
    # The lower 13 bits of a and b are no part of the number; those of c are.
    assert np.array_equal(tf32_mma(dirty(a), dirty(b), c).view(np.float32), expected)
    assert not np.array_equal(tf32_mma(a, b, dirty(c)).view(np.float32), expected)


def test_tf32_conversion():
    """To nearest, ties away from zero, 10 bits kept; infinite only beyond the largest."""
    x, expected = zip(
        (0x3F801000, 0x3F802000), (0x3F800FFF, 0x3F800000), (0x3F803000, 0x3F804000),
        (0xBF801000, 0xBF802000),
        (0x7F7FEFFF, 0x7F7FE000), (0x7F7FF000, 0x7F800000), (0xFF800000, 0xFF800000),
        (0x00001000, 0x00002000),
        (0x80000FFF, 0x80000000), strict=True,
    )  # fmt: skip
    assert evaluate("cvt.rna.tf32.f32 %r9, %r0;", u32(*x)).tolist() == list(expected)
    assert np.isnan(
        evaluate("cvt.rna.tf32.f32 %r9, %r0;", u32(0x7FFFFFFF, 0xFFC00000), out=np.float32)
    ).all()
    x = np.random.default_rng(1).standard_normal(64).astype(np.float32)
    high = evaluate("cvt.rna.tf32.f32 %r9, %r0;", x, out=np.float32)
    low = evaluate("cvt.rna.tf32.f32 %r1, %r0; sub.f32 %r9, %r0, %r1;", x, out=np.float32)
    assert np.array_equal(high + low, x) and (abs(low) <= abs(x) * 2.0**-11).all()


@pytest.mark.parametrize(
    "code",
    [
        "cvt.rn.tf32.f32 %r9, %r0;",  # sm_90
        "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 "
        "{%r1,%r2,%r3,%r4},{%r1,%r2},{%r1},{%r1,%r2,%r3,%r4};",
        """mma.sync.aligned.m16n8k8.row.col.satfinite.f32.tf32.tf32.f32
        {%r1,%r2,%r3,%r4},{%r1,%r2,%r3,%r4},{%r1,%r2},{%r1,%r2,%r3,%r4};""",
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 "
        "{%r1,%r2},{%r1,%r2,%r3,%r4},{%r1,%r2},{%r1,%r2};",
        "redux.sync.add.f32 %r9, %r0, -1;",
        "redux.sync.min.b32 %r9, %r0, -1;",
    ],
)
def test_other_forms_are_refused(code):
    with pytest.raises(PtxError, match="not implemented"):
        evaluate(code, u32(1))


# ---- other forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("clamp", [True, False])
def test_integer_mma_clamps_or_wraps(clamp):
    """A and B all -128: 32 * 2^14 = 2^19 are added to the accumulator."""
    out, start = np.zeros(32, np.int32), np.array([2**31 - 2**19, 5 - 2**31] * 16, np.int32)
    run(
        f"""mad.wide.u32 %d0, %r30, 4, %d10; mad.wide.u32 %d1, %r30, 4, %d11;
            ld.global.b32 %r1, [%d1];
        mov.b32 %r2, 0x80808080;
        mma.sync.aligned.m16n8k32.row.col{".satfinite" * clamp}.s32.s8.s8.s32
            {{%r3, %r4, %r5, %r6}}, {{%r2, %r2, %r2, %r2}}, {{%r2, %r2}}, {{%r1, %r1, %r1, %r1}};
        st.global.b32 [%d0], %r6;""",
        out,
        start,
    )
    assert out.tolist() == [2**31 - 1 if clamp else -(2**31), 5 - 2**31 + 2**19] * 16


def test_redux():
    rng = np.random.default_rng(2)
    x = rng.integers(0, 2**32, 64, dtype=np.uint32)
    for op, ty, function in [
        ("add", "s32", lambda v: v.sum(dtype=np.int64)),
        ("add", "u32", lambda v: v.sum(dtype=np.int64)),
        ("min", "s32", np.min), ("min", "u32", np.min),
        ("max", "s32", np.max), ("max", "u32", np.max),
        ("and", "b32", np.bitwise_and.reduce), ("or", "b32", np.bitwise_or.reduce),
        ("xor", "b32", np.bitwise_xor.reduce),
    ]:  # fmt: skip
        v = x.view(np.int32 if ty == "s32" else np.uint32)
        for members, guard in (([*range(32)], ""), ([0, 3, 31], "@%p1 ")):
            mask = sum(1 << k for k in members)
            code = f"""and.b32 %r1, %r30, 31; shl.b32 %r1, 1, %r1; and.b32 %r1, %r1, {mask:#x};
            setp.ne.u32 %p1, %r1, 0; mov.b32 %r9, 7;
            {guard}redux.sync.{op}.{ty} %r9, %r0, {mask:#x};"""
            expected = np.full((2, 32), 7)
            for warp in (0, 1):
                expected[warp, members] = (
                    int(function(v.reshape(2, 32)[warp, members])) & 0xFFFFFFFF
                )
            assert evaluate(code, x).tolist() == expected.reshape(-1).tolist(), (op, ty, guard)
    with pytest.raises(PtxError, match="redux.sync executed by a partial warp"):
        evaluate("setp.lt.u32 %p1, %r30, 16; @%p1 redux.sync.add.u32 %r9, %r0, 0xffffffff;", x)


def test_float_to_integer_flushes_subnormals():
    x = f32(2.0**-130, -(2.0**-130), 0.5)
    assert evaluate("cvt.rpi.s32.f32 %r9, %r0;", x, out=np.int32).tolist() == [1, 0, 1]
    assert evaluate("cvt.rpi.ftz.s32.f32 %r9, %r0;", x, out=np.int32).tolist() == [0, 0, 1]


def test_relu_of_infinity():
    x = f32(-np.inf, -1.0, 2.0, np.nan)
    got = evaluate("cvt.rn.relu.f16x2.f32 %r9, %r0, 0f3F800000;", x)
    assert got.tolist() == [0x3C00, 0x3C00, 0x40003C00, 0x7FFF3C00]
    got = evaluate("cvt.rn.relu.bf16x2.f32 %r9, 0f3F800000, %r0;", x)
    assert got.tolist() == [0x3F800000, 0x3F800000, 0x3F804000, 0x3F807FFF]


# ---- stores of several warps to one place -------------------------------------------------------

ONE = ".shared .align 16 .b8 one[16];"
READ = "ld.shared.u32 %r5, [one]; mad.wide.u32 %d1, %r30, 4, %d10; st.global.u32 [%d1], %r5;"


def together(code, equal_writes=True, block=64):
    """Threads store, %r1 = warp, %r2 = 7: what they read."""
    out = np.zeros(block, np.uint32)
    run(
        f"shr.u32 %r1, %r30, 5; mov.b32 %r2, 7; {code}",
        out,
        block=block,
        shared=ONE,
        equal_writes=equal_writes,
    )
    return set(out.tolist())


def test_equal_writes():
    same = "st.shared.u32 [one], %r2;"
    assert together(f"{same} bar.sync 0; {READ}") == {7}
    with pytest.raises(PtxError, match="two warps write the same bytes at once"):
        together(same, equal_writes=False)
    with pytest.raises(PtxError, match="two warps write different bytes to one place"):
        together("st.shared.u32 [one], %r1;")
    with pytest.raises(PtxError, match="two warps write different bytes to one place"):
        together("st.shared.v2.u32 [one], {%r2, %r1};")  # the second half differs
    with pytest.raises(PtxError, match="two lanes of a warp write different bytes"):
        together("st.shared.u32 [one], %r30;", block=32)
    with pytest.raises(
        PtxError, match="write by warp 1 after a write by warp 0"
    ):  # by two instructions
        together(
            "setp.eq.u32 %p1, %r1, 0; "
            "@%p1 st.shared.u32 [one], %r2; @!%p1 st.shared.u32 [one], %r2;"
        )
    # What a copy brings is not known yet when it is issued: never allowed.
    with pytest.raises(PtxError, match="two warps write the same bytes at once"):
        together("cp.async.cg.shared.global [one], [%d10], 16;")


def test_equal_writes_need_a_barrier_as_all_writes():
    same = "st.shared.u32 [one], %r2;"
    with pytest.raises(PtxError, match="read by warp 0 after a write by warp 1, with no barrier"):
        together(f"{same} {READ}")
    # Whichever warp counts as the writer, neither may write again before the other is known to be
    # done.
    for warp in (0, 1):
        again = f"bar.warp.sync -1; setp.eq.u32 %p1, %r1, {warp}; @%p1 st.shared.u32 [one], %r1;"
        text = f"write by warp {warp} after a (read|write) by warp {1 - warp}, with no barrier"
        with pytest.raises(PtxError, match=text):
            together(f"{same} {again}")
        assert together(f"{same} bar.sync 0; {again} bar.sync 0; {READ}") == {warp}
