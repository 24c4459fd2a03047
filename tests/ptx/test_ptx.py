"""The PTX interpreter of tests/ptx: single instructions against values worked out by hand, and
control flow.
"""

import struct

import numpy as np
import pytest

from ptx import Memory, Module, launch
from ptx.programs import bf16_exact, evaluate, f32, run, u16, u32

INTEGER = [
    ("prmt.b32 %r9, %r0, %r1, 0x7531;", [0x33221100, 0x77665544], 0x77553311),
    (
        "prmt.b32 %r9, %r0, %r1, %r2;",
        [0x80221100, 0x77665544, 0xB0],
        0x0000FF00,
    ),  # nibble 0xB: sign of byte 3
    ("prmt.b32.rc16 %r9, %r0, %r1, %r2;", [0x33221100, 0, 1], 0x33223322),
    ("prmt.b32.b4e %r9, %r0, %r1, %r2;", [0x33221100, 0x77665544, 1], 0x66770011),
    ("lop3.b32 %r9, %r0, %r1, %r2, 0x96;", [0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA], 0x96969696),
    ("lop3.b32 %r9, %r0, %r1, %r2, 0xE2;", [0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA], 0xE2E2E2E2),
    ("lop3.b32 %r9, %r0, 0xff, %r2, 0xEA;", [0x12345678, 0, 0x64006400], 0x64006478),
    ("bfe.u32 %r9, %r0, 8, 12;", [0xABCDEF12], 0xDEF),
    ("bfe.s32 %r9, %r0, 8, 4;", [0x00000F00], -1),
    ("bfe.s32 %r9, %r0, 28, 8;", [0x80000000], -8),
    ("bfe.u32 %r9, %r0, 40, 8;", [0x80000000], 0),
    ("bfi.b32 %r9, %r0, %r1, 4, 8;", [0xFFF, 0x12345678], 0x12345FF8),
    ("shf.l.wrap.b32 %r9, %r0, %r1, 36;", [0x89ABCDEF, 0x01234567], 0x12345678),
    ("shf.l.clamp.b32 %r9, %r0, %r1, 36;", [0x89ABCDEF, 0x01234567], 0x89ABCDEF),
    ("shf.r.wrap.b32 %r9, %r0, %r1, 8;", [0x89ABCDEF, 0x01234567], 0x6789ABCD),
    ("shl.b32 %r9, %r0, %r1;", [1, 32], 0),
    ("shr.s32 %r9, %r0, 40;", [0x80000000], -1),
    ("shr.u32 %r9, %r0, 4;", [0x80000000], 0x08000000),
    ("mul.hi.u32 %r9, %r0, %r1;", [0xFFFFFFFF, 0xFFFFFFFF], 0xFFFFFFFE),
    ("mul.hi.s32 %r9, %r0, %r1;", [-1, 5], -1),
    ("mad.lo.s32 %r9, %r0, %r1, %r2;", [7, -3, 1], -20),
    ("div.s32 %r9, %r0, %r1;", [-7, 2], -3),
    ("rem.s32 %r9, %r0, %r1;", [-7, 2], -1),
    ("div.u32 %r9, %r0, %r1;", [0xFFFFFFFF, 16], 0x0FFFFFFF),
    ("min.s32 %r9, %r0, %r1;", [-1, 1], -1),
    ("min.u32 %r9, %r0, %r1;", [-1, 1], 1),
    ("popc.b32 %r9, %r0;", [0xF0F00001], 9),
    ("clz.b32 %r9, %r0;", [0x00010000], 15),
    ("clz.b32 %r9, %r0;", [0], 32),
    ("bfind.u32 %r9, %r0;", [0x00010000], 16),
    ("brev.b32 %r9, %r0;", [0x00000001], 0x80000000),
    ("dp4a.s32.s32 %r9, %r0, %r1, %r2;", [0x01FF0203, 0x01010101, 10], 15),
    ("neg.s32 %r9, %r0;", [5], -5),
    ("abs.s32 %r9, %r0;", [-5], 5),
    ("cvt.s32.s8 %r9, %r0;", [0x80], -128),
    ("cvt.u32.u8 %r9, %r0;", [0x180], 0x80),
    ("cvt.sat.s8.s32 %r9, %r0;", [300], 127),
    ("cvt.u16.u32 %h1, %r0; cvt.u32.u16 %r9, %h1;", [0x12345], 0x2345),
    ("mov.b32 {%h1, %h2}, %r0; mov.b32 %r9, {%h2, %h1};", [0x12345678], 0x56781234),
    ("cvt.u64.u32 %d0, %r0; mov.b64 {%r1, %r9}, %d0;", [0x12345678], 0),
    ("{ .reg .pred p; setp.ne.b32 p, %r0, 0; selp.b32 %r9, 3, 4, p; }", [1], 3),
    (
        "setp.lt.s32 %p1, %r0, 0; setp.gt.and.s32 %p2|%p3, %r0, -5, %p1; selp.b32 %r9, 1, 0, %p2;",
        [-3],
        1,
    ),
    ("setp.lt.s32 %p1, %r0, 0; setp.gt.or.u32 %p2, %r0, 9, !%p1; selp.b32 %r9, 1, 0, %p2;", [7], 1),
    ("setp.lo.u32 %p1, %r0, %r1; @%p1 mov.u32 %r9, 1; @!%p1 mov.u32 %r9, 2;", [-1, 1], 2),
    (
        "setp.eq.f32 %p1|%p2, %r0, %r0; selp.b32 %r9, 1, 0, %p2;",
        [0x7FC00000],
        1,
    ),  # NaN == NaN is false
    ("setp.neu.f32 %p1, %r0, %r0; selp.b32 %r9, 1, 0, %p1;", [0x7FC00000], 1),
    ("setp.ne.f32 %p1, %r0, %r0; selp.b32 %r9, 1, 0, %p1;", [0x7FC00000], 0),
    ("setp.gtu.f32 %p1, %r0, 0f3F800000; selp.b32 %r9, 1, 0, %p1;", [0x7FC00000], 1),
]


@pytest.mark.parametrize(("code", "inputs", "expected"), INTEGER, ids=[c[0][:40] for c in INTEGER])
def test_an_integer_instruction(code, inputs, expected):
    assert evaluate(code, *map(u32, inputs))[0] == expected & 0xFFFFFFFF


def test_64_bit_integers():
    a, b = np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(0x123456789ABCDEF0)
    assert evaluate("mul.hi.u64 %d9, %d0, %d1;", a, b, out=np.uint64)[0] == b - np.uint64(1)
    assert evaluate("mul.hi.s64 %d9, %d0, %d1;", a, b, out=np.uint64)[0] == a  # -1 * b
    assert (
        evaluate("mad.wide.u32 %d9, %r0, %r1, %d2;", u32(-1), u32(-1), b, out=np.uint64)[0]
        == int(b) + (2**32 - 1) ** 2 - 2**64
    )
    assert evaluate("mul.wide.s32 %d9, %r0, -2;", u32(-3), out=np.int64)[0] == 6
    assert evaluate("cvt.s64.s32 %d9, %r0;", u32(-3), out=np.int64)[0] == -3
    assert evaluate("shr.u64 %d9, %d0, 60;", a, out=np.uint64)[0] == 15
    assert evaluate("clz.b64 %r9, %d0;", np.uint64(2**64 - 1))[0] == 0


def test_bf16_conversion_rounds_ties_to_even():
    x = u32(
        0x3F808000,
        0x3F818000,
        0x3F808001,
        0x3F807FFF,
        0xBF808000,
        0x7F7FFFFF,
        0x7F800001,
        0x80000000,
    )
    expected = [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0xBF80, 0x7F80, 0x7FFF, 0x8000]
    assert evaluate("cvt.rn.bf16.f32 %h9, %r0;", x, out=np.uint16).tolist() == expected
    packed = evaluate("cvt.rn.bf16x2.f32 %r9, %r0, %r1;", f32(1.0), f32(-2.0))
    assert packed[0] == 0x3F80C000  # the first source is the upper half
    assert evaluate("cvt.f32.bf16 %r9, %h0;", u16(0xC040), out=np.float32)[0] == -3


def test_fp16_conversion():
    x = f32(1 + 2**-11, 1 + 3 * 2**-11, 65519, 65520, 2**-25, 2**-25 * 1.5, np.nan)
    expected = [0x3C00, 0x3C02, 0x7BFF, 0x7C00, 0x0000, 0x0001, 0x7FFF]
    assert evaluate("cvt.rn.f16.f32 %h9, %r0;", x, out=np.uint16).tolist() == expected
    assert evaluate("cvt.rz.f16.f32 %h9, %r0;", f32(65520), out=np.uint16)[0] == 0x7BFF
    assert evaluate("cvt.rn.f16x2.f32 %r9, %r0, %r1;", f32(1.0), f32(-2.0))[0] == 0x3C00C000
    assert evaluate("cvt.f32.f16 %r9, %h0;", u16(0xC000), out=np.float32)[0] == -2


def test_float_to_integer_saturates_and_rounds():
    x = f32(2.5, 3.5, -2.5, 1e20, -1e20, np.nan)
    assert evaluate("cvt.rni.s32.f32 %r9, %r0;", x, out=np.int32).tolist() == [
        2,
        4,
        -2,
        2**31 - 1,
        -(2**31),
        0,
    ]
    assert evaluate("cvt.rzi.s32.f32 %r9, %r0;", x[:3], out=np.int32).tolist() == [2, 3, -2]
    assert evaluate("cvt.rn.f32.s32 %r9, %r0;", u32(-3), out=np.float32)[0] == -3
    assert evaluate("cvt.rn.f32.u32 %r9, %r0;", u32(0xFFFFFFFF), out=np.float32)[0] == 2.0**32


def test_bf16_fma_rounds_once_and_multiplies_with_minus_zero():
    rng = np.random.default_rng(0)
    a, b, c = (
        (rng.integers(0x3E00, 0x4100, 64) | rng.integers(0, 2, 64) << 15).astype(np.uint16)
        for _ in range(3)
    )
    wide = [(v.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for v in (a, b, c)]
    pair = [v.astype(np.uint32) | v[::-1].astype(np.uint32) << 16 for v in (a, b, c)]
    got = evaluate("fma.rn.bf16x2 %r9, %r0, %r1, %r2;", *pair)
    exact = [bf16_exact(x) for x in wide[0] * wide[1] + wide[2]]
    assert (got & 0xFFFF).tolist() == exact
    assert (got >> 16).tolist() == exact[::-1]
    got = evaluate("fma.rn.bf16x2 %r9, %r0, %r1, 0x80008000;", *pair[:2])
    assert (got & 0xFFFF).tolist() == [bf16_exact(x) for x in wide[0] * wide[1]]
    signs = evaluate(
        "fma.rn.bf16x2 %r9, %r0, %r1, %r2;", u32(0x80000000), u32(0x3F803F80), u32(0x80008000)
    )
    assert signs[0] == 0x80000000  # -0 * 1 + -0 = -0 and 0 * 1 + -0 = +0


def test_fma_f32_is_fused():
    a = f32(1 + 2**-23)
    assert (
        evaluate("fma.rn.f32 %r9, %r0, %r0, %r1;", a, f32(-(1 + 2**-22)), out=np.float32)[0]
        == 2.0**-46
    )
    # 1.5 + 1.5 * 2^-23 is half way between two f32; the addend, too small for the f64 sum, decides
    x = evaluate(
        "fma.rn.f32 %r9, %r0, %r1, %r2;",
        f32(1 + 2**-23),
        f32(1.5),
        f32(-(2.0**-60)),
        out=np.float32,
    )[0]
    assert x == 1.5 + 2**-23


def test_packed_half_arithmetic():
    a, b = u32(0x3C004000), u32(0xC0003800)  # (2, 1), (0.5, -2)
    assert evaluate("mul.rn.f16x2 %r9, %r0, %r1;", a, b)[0] == 0xC0003C00
    assert evaluate("add.rn.f16x2 %r9, %r0, %r1;", a, b)[0] == 0xBC004100
    assert evaluate("sub.f16x2 %r9, %r0, %r1;", a, b)[0] == 0x42003E00
    assert evaluate("fma.rn.f16x2 %r9, %r0, %r1, %r0;", a, b)[0] == 0xBC004200
    assert (
        evaluate("add.rn.f16x2 %r9, %r0, 0xE480E480;", u32(0x64056400))[0] == 0xD7B0D800
    )  # 1029 - 1152, 1024 - 1152
    assert evaluate("neg.f16x2 %r9, %r0;", a)[0] == 0xBC00C000
    assert evaluate("abs.bf16x2 %r9, %r0;", u32(0xBF80C000))[0] == 0x3F804000
    assert evaluate("max.f16x2 %r9, %r0, %r1;", a, u32(0x7E00C000))[0] == 0x3C004000  # NaN loses
    assert evaluate("mul.bf16x2 %r9, %r0, %r1;", u32(0x3F804000), u32(0x40404040))[0] == 0x404040C0


def test_single_precision():
    assert evaluate("mul.f32 %r9, %r0, 0f40000000;", f32(1.5), out=np.float32)[0] == 3
    assert evaluate("div.rn.f32 %r9, %r0, %r1;", f32(1), f32(3), out=np.float32)[0] == np.float32(
        1
    ) / np.float32(3)
    assert np.signbit(evaluate("min.f32 %r9, %r0, %r1;", f32(0.0), f32(-0.0), out=np.float32)[0])
    assert (
        evaluate("mul.ftz.f32 %r9, %r0, %r1;", f32(2.0**-100), f32(2.0**-40), out=np.float32)[0]
        == 0
    )


# ---- control flow -------------------------------------------------------------------------------


def test_divergent_lanes_reconverge():
    code = """
    and.b32 %r1, %r0, 1; setp.eq.s32 %p1, %r1, 0; @%p1 bra EVEN;
    mul.lo.s32 %r9, %r0, 3; bra.uni JOIN;
    EVEN: add.s32 %r9, %r0, 100;
    JOIN: activemask.b32 %r2; add.s32 %r9, %r9, %r2;"""
    x = np.arange(32, dtype=np.uint32)
    assert evaluate(code, x).tolist() == (np.where(x % 2, x * 3, x + 100) + u32(-1)).tolist()


def test_loops_of_different_length():
    code = """
    mov.u32 %r9, 0; mov.u32 %r1, 0;
    $TOP: setp.ge.u32 %p1, %r1, %r0; @%p1 bra $OUT;
    add.u32 %r9, %r9, %r1; add.u32 %r1, %r1, 1; bra $TOP;
    $OUT: mov.u32 %r2, 0;"""
    x = np.arange(64, dtype=np.uint32)
    assert evaluate(code, x).tolist() == (x * (x - 1) // 2 * (x > 0)).tolist()


def test_a_jump_table():
    code = """
    T: .branchtargets A, B, C;
    brx.idx %r0, T;
    A: mov.u32 %r9, 10; bra END;
    B: mov.u32 %r9, 20; bra END;
    C: mov.u32 %r9, 30;
    END: mov.u32 %r1, 0;"""
    assert evaluate(code, u32(0, 1, 2, 1)).tolist() == [10, 20, 30, 20]


def test_exited_lanes_stay_out():
    out = np.zeros(40, np.uint32)  # and a ragged last warp
    run(
        "setp.gt.u32 %p1, %r30, 35; @%p1 exit; "
        "mad.wide.u32 %d1, %r30, 4, %d10; st.global.u32 [%d1], %r30;",
        out,
        block=40,
    )
    assert out.tolist() == [*range(36), 0, 0, 0, 0]


def test_struct_parameter_local_memory_constants_and_chunks():
    text = """
    .const .align 4 .u32 table[3] = {5, 6, 0x7};
    .visible .entry k(.param .align 8 .b8 s[24]) {
    .local .align 4 .b8 depot[8];
    .reg .b64 %rd<9>; .reg .b32 %r<9>;
    ld.param.u64 %rd1, [s+16]; ld.param.v2.u32 {%r1, %r2}, [s];
    mov.u64 %rd5, depot; cvta.local.u64 %rd5, %rd5;
    st.u32 [%rd5+4], %r2; ld.local.u32 %r3, [depot+4];
    mov.u64 %rd6, table; ld.const.u32 %r4, [table+8];
    add.u32 %r1, %r1, %r3; add.u32 %r1, %r1, %r4;
    mov.u32 %r5, %ctaid.x; mul.wide.u32 %rd2, %r5, 4; add.s64 %rd1, %rd1, %rd2;
    st.global.u32 [%rd1], %r1;
    ret; }"""
    out = np.zeros(5, np.uint32)
    memory = Memory()
    memory.map(out.ctypes.data, out.view(np.uint8))
    stats = launch(
        Module(text)["k"],
        (5,),
        (1,),
        struct.pack("<IIQQ", 3, 4, 0, out.ctypes.data),
        memory,
        chunk=2,
    )
    assert out.tolist() == [14] * 5
    assert (
        stats["st.global"] == 5
        and stats["global_write_bytes"] == 20
        and stats["global_write_sectors"] == 5
    )
