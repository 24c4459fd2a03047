"""The PTX interpreter of tests/ptx: single instructions against values worked out by hand, and
planted faults, each found."""

import shutil
import struct
import subprocess

import numpy as np
import pytest
from ptx import Memory, Module, PtxError, launch

WIDTHS = {2: ("%h", "b16"), 4: ("%r", "b32"), 8: ("%d", "b64")}
REGISTERS = ".reg .b16 %h<20>; .reg .b32 %r<40>; .reg .f32 %f<20>; .reg .b64 %d<20>; .reg .pred %p<10>;"


def program(body, parameters="", shared=""):
    head = f".version 8.0\n.target sm_90\n.address_size 64\n{shared}\n.visible .entry k({parameters})"
    return f"{head}\n{{\n{REGISTERS}\n{body}\nret;\n}}"


def run(body, *arrays, block=32, grid=1, shared="", shared_bytes=0, read_only=(), **options):
    """Run a kernel whose parameters p0, p1, ... are the arrays' addresses, loaded into %d10, %d11, ..."""
    parameters = ", ".join(f".param .u64 p{k}" for k in range(len(arrays)))
    head = "\n".join(f"ld.param.u64 %d{10 + k}, [p{k}];" for k in range(len(arrays)))
    module = Module(program("mov.u32 %r30, %tid.x;\n" + head + "\n" + body, parameters, shared))
    memory = Memory()
    for k, a in enumerate(arrays):
        memory.map(a.ctypes.data, a.reshape(-1).view(np.uint8), writable=k not in read_only)
    buffer = struct.pack(f"<{len(arrays)}Q", *(a.ctypes.data for a in arrays))
    return launch(module["k"], (grid,), (block,), buffer, memory, shared_bytes, **options)


def evaluate(code, *inputs, out=np.uint32):
    """Each thread's inputs are in %h0/%r0/%d0, ... by their width; the code leaves its result in register 9
    of out's width."""
    inputs = [np.atleast_1d(np.asarray(a)) for a in inputs]
    n = max(a.size for a in inputs)
    inputs = [np.ascontiguousarray(np.resize(a, n)) for a in inputs]
    result = np.zeros(n, out)
    lines = []
    for k, a in enumerate([result, *inputs]):
        prefix, ty = WIDTHS[a.dtype.itemsize]
        lines.append(f"mad.wide.u32 %d{10 + k}, %r30, {a.dtype.itemsize}, %d{10 + k};")
        if k:
            lines.append(f"ld.global.{ty} {prefix}{k - 1}, [%d{10 + k}];")
    prefix, ty = WIDTHS[result.dtype.itemsize]
    run("\n".join(lines) + f"\n{code}\nst.global.{ty} [%d10], {prefix}9;", result, *inputs, block=n)
    return result


def u32(*values):
    return np.array([v & 0xFFFFFFFF for v in values], np.uint32)


def u16(*values):
    return np.array(values, np.uint16)


def f32(*values):
    return np.array(values, np.float32)


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
    ("setp.lt.s32 %p1, %r0, 0; setp.gt.and.s32 %p2|%p3, %r0, -5, %p1; selp.b32 %r9, 1, 0, %p2;", [-3], 1),
    ("setp.lt.s32 %p1, %r0, 0; setp.gt.or.u32 %p2, %r0, 9, !%p1; selp.b32 %r9, 1, 0, %p2;", [7], 1),
    ("setp.lo.u32 %p1, %r0, %r1; @%p1 mov.u32 %r9, 1; @!%p1 mov.u32 %r9, 2;", [-1, 1], 2),
    ("setp.eq.f32 %p1|%p2, %r0, %r0; selp.b32 %r9, 1, 0, %p2;", [0x7FC00000], 1),  # NaN == NaN is false
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


def bf16_exact(x):
    """f64 to bf16 bits, nearest even, by brute force over the neighbours."""
    candidates = np.arange(0x7F80, dtype=np.uint32)
    values = (candidates << 16).view(np.float32).astype(np.float64)
    distance = np.abs(values - abs(x))
    best = candidates[distance == distance.min()]
    return int(best[best % 2 == 0][0] if len(best) == 2 else best[0]) | (0x8000 if np.signbit(x) else 0)


def test_bf16_conversion_rounds_ties_to_even():
    x = u32(0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF808000, 0x7F7FFFFF, 0x7F800001, 0x80000000)
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
        (rng.integers(0x3E00, 0x4100, 64) | rng.integers(0, 2, 64) << 15).astype(np.uint16) for _ in range(3)
    )
    wide = [(v.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for v in (a, b, c)]
    pair = [v.astype(np.uint32) | v[::-1].astype(np.uint32) << 16 for v in (a, b, c)]
    got = evaluate("fma.rn.bf16x2 %r9, %r0, %r1, %r2;", *pair)
    exact = [bf16_exact(x) for x in wide[0] * wide[1] + wide[2]]
    assert (got & 0xFFFF).tolist() == exact
    assert (got >> 16).tolist() == exact[::-1]
    got = evaluate("fma.rn.bf16x2 %r9, %r0, %r1, 0x80008000;", *pair[:2])
    assert (got & 0xFFFF).tolist() == [bf16_exact(x) for x in wide[0] * wide[1]]
    signs = evaluate("fma.rn.bf16x2 %r9, %r0, %r1, %r2;", u32(0x80000000), u32(0x3F803F80), u32(0x80008000))
    assert signs[0] == 0x80000000  # -0 * 1 + -0 = -0 and 0 * 1 + -0 = +0


def test_fma_f32_is_fused():
    a = f32(1 + 2**-23)
    assert evaluate("fma.rn.f32 %r9, %r0, %r0, %r1;", a, f32(-(1 + 2**-22)), out=np.float32)[0] == 2.0**-46
    # 1.5 + 1.5 * 2^-23 is half way between two f32; the addend, too small for the f64 sum, decides
    x = evaluate(
        "fma.rn.f32 %r9, %r0, %r1, %r2;", f32(1 + 2**-23), f32(1.5), f32(-(2.0**-60)), out=np.float32
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
    assert evaluate("mul.ftz.f32 %r9, %r0, %r1;", f32(2.0**-100), f32(2.0**-40), out=np.float32)[0] == 0


# ---- control flow ------------------------------------------------------------------------------------------


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
        "setp.gt.u32 %p1, %r30, 35; @%p1 exit; mad.wide.u32 %d1, %r30, 4, %d10; st.global.u32 [%d1], %r30;",
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
    mov.u64 %rd5, depot; cvta.local.u64 %rd5, %rd5; st.u32 [%rd5+4], %r2; ld.local.u32 %r3, [depot+4];
    mov.u64 %rd6, table; ld.const.u32 %r4, [table+8];
    add.u32 %r1, %r1, %r3; add.u32 %r1, %r1, %r4;
    mov.u32 %r5, %ctaid.x; mul.wide.u32 %rd2, %r5, 4; add.s64 %rd1, %rd1, %rd2; st.global.u32 [%rd1], %r1;
    ret; }"""
    out = np.zeros(5, np.uint32)
    memory = Memory()
    memory.map(out.ctypes.data, out.view(np.uint8))
    stats = launch(
        Module(text)["k"], (5,), (1,), struct.pack("<IIQQ", 3, 4, 0, out.ctypes.data), memory, chunk=2
    )
    assert out.tolist() == [14] * 5
    assert (
        stats["st.global"] == 5 and stats["global_write_bytes"] == 20 and stats["global_write_sectors"] == 5
    )


# ---- warps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "b", "c", "expected"),
    [
        ("bfly", 1, 31, lambda t: t ^ 1),
        ("down", 4, 31, lambda t: np.where(t + 4 < 32, t + 4, t)),
        ("up", 3, 0, lambda t: np.where(t >= 3, t - 3, t)),
        ("idx", 5, 31, lambda t: t * 0 + 5),
        ("idx", 1, 0x1C1F, lambda t: t // 4 * 4 + 1),  # segments of 4 lanes
    ],
)
def test_shuffle(mode, b, c, expected):
    t = np.arange(64, dtype=np.uint32)
    got = evaluate(f"shfl.sync.{mode}.b32 %r9|%p1, %r0, {b}, {c}, -1;", t)
    assert got.tolist() == (expected(t % 32) + t // 32 * 32).tolist()


def test_shuffle_predicate_and_vote():
    t = np.arange(32, dtype=np.uint32)
    got = evaluate("shfl.sync.down.b32 %r1|%p1, %r0, 4, 31, -1; selp.b32 %r9, 1, 0, %p1;", t)
    assert got.tolist() == [1] * 28 + [0] * 4
    assert evaluate("setp.lt.u32 %p1, %r0, 3; vote.sync.ballot.b32 %r9, %p1, -1;", t).tolist() == [7] * 32


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(trans):
    data = np.arange(32 * 8, dtype=np.uint16)
    out = np.zeros((4, 32), np.uint32)
    run(
        f"""
        mad.wide.u32 %d1, %r30, 16, %d11; ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%d1];
        mov.u32 %r5, buf; mad.lo.u32 %r5, %r30, 16, %r5; st.shared.v4.u32 [%r5], {{%r1, %r2, %r3, %r4}};
        bar.warp.sync 0xffffffff;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r5];
        mad.wide.u32 %d2, %r30, 4, %d10; st.global.u32 [%d2], %r1; st.global.u32 [%d2+128], %r2;
        st.global.u32 [%d2+256], %r3; st.global.u32 [%d2+384], %r4;""",
        out,
        data,
        shared=".shared .align 16 .b8 buf[512];",
    )
    for k in range(4):
        matrix = data.reshape(4, 8, 8)[k]
        matrix = matrix.T if trans else matrix
        for lane in range(32):
            g, t = divmod(lane, 4)
            assert out[k, lane] == int(matrix[g, 2 * t]) | int(matrix[g, 2 * t + 1]) << 16


def layout(shape, stride):
    """A CuTe (thread, value) layout as a function to a column-major flat index."""

    def index(i, shape, stride):
        if isinstance(shape, int):
            return i * stride
        total = 0
        for s, d in zip(shape, stride, strict=True):
            n = int(np.prod(s)) if isinstance(s, int) else int(np.prod(np.hstack([np.ravel(x) for x in s])))
            total += index(i % n, s, d)
            i //= n
        return total

    return lambda t, v: index(t, shape[0], stride[0]) + index(v, shape[1], stride[1])


C_LAYOUT = layout(((4, 8), (2, 2)), ((32, 1), (16, 8)))
DENSE = {  # K, A (M x K), B (N x K): CuTe's MMA_Traits of SM80_16x8x16 and SM80_16x8x32
    2: (
        16,
        layout(((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))),
        layout(((4, 8), (2, 2)), ((16, 1), (8, 64))),
    ),
    1: (
        32,
        layout(((4, 8), (4, 2, 2)), ((64, 1), (16, 8, 256))),
        layout(((4, 8), (4, 2)), ((32, 1), (8, 128))),
    ),
}
SPARSE = {  # K, A in logical columns, metadata, B: SM80_SPARSE_16x8x32 and 16x8x64
    2: (
        32,
        layout(((4, 8), (4, 2, 2)), ((64, 1), (16, 8, 256))),
        layout(((2, 2, 8), (16, 2)), ((256, 0, 1), (0, 8))),
        layout(((4, 8), (2, 4)), ((16, 1), (8, 64))),
    ),
    1: (
        64,
        layout(((4, 8), (8, 2, 2)), ((128, 1), (16, 8, 512))),
        layout(((2, 2, 8), 32), ((8, 512, 1), 0)),
        layout(((4, 8), (4, 4)), ((32, 1), (8, 128))),
    ),
}
TYPES = {"f16": (2, "f32"), "bf16": (2, "f32"), "s8": (1, "s32")}


def encode(x, ty):
    """Small integers as the type's bit patterns, viewed as 32-bit words along the last axis."""
    if ty == "bf16":
        return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)
    return np.ascontiguousarray(x, {"f16": np.float16, "s8": np.int8}[ty]).view(np.uint32)


def multiply_on_warp(instruction, a, b, e=None, selector=0, guard=""):
    """Registers a (4, 32), b (n, 32), e (32) through one mma; the 16 x 8 result."""
    n = len(b)
    loads = [f"ld.global.b32 %r{k}, [%d1+{128 * k}];" for k in range(4)]
    loads += [f"ld.global.b32 %r{4 + k}, [%d2+{128 * k}];" for k in range(n)]
    regs = ", ".join(f"%r{4 + k}" for k in range(n))
    tail = "" if e is None else f", %r12, {selector}"
    out = np.zeros((32, 4), np.uint32)
    body = f"""
        mad.wide.u32 %d1, %r30, 4, %d11; mad.wide.u32 %d2, %r30, 4, %d12; mad.wide.u32 %d3, %r30, 4, %d13;
        {" ".join(loads)} ld.global.b32 %r12, [%d3];
        mov.b32 %r13, 0; setp.lt.u32 %p1, %r30, 16;
        {guard}{instruction} {{%r16, %r17, %r18, %r19}}, {{%r0, %r1, %r2, %r3}}, {{{regs}}},
            {{%r13, %r13, %r13, %r13}}{tail};
        mad.wide.u32 %d4, %r30, 16, %d10; st.global.v4.b32 [%d4], {{%r16, %r17, %r18, %r19}};"""
    run(
        body,
        out,
        np.ascontiguousarray(a),
        np.ascontiguousarray(b),
        np.zeros(32, np.uint32) if e is None else e,
    )
    values = out.view(np.int32 if ".s32.s8" in instruction else np.float32)
    result = np.zeros((16, 8), values.dtype)
    for t in range(32):
        for v in range(4):
            i = C_LAYOUT(t, v)
            result[i % 16, i // 16] = values[t, v]
    return result


def b_fragment(b, of, per, registers, ty):
    index = np.array(
        [[[of(t, r * per + j) for j in range(per)] for t in range(32)] for r in range(registers)]
    )
    return encode(b[index // 8, index % 8], ty)[..., 0]


@pytest.mark.parametrize("ty", TYPES)
def test_dense_mma_against_cute_layouts(ty):
    size, acc = TYPES[ty]
    k, a_of, b_of = DENSE[size]
    per, limit = 4 // size, 127 if ty == "s8" else 8
    rng = np.random.default_rng(1)
    a, b = rng.integers(-limit, limit, (16, k)), rng.integers(-limit, limit, (k, 8))
    index = np.array([[[a_of(t, r * per + j) for j in range(per)] for t in range(32)] for r in range(4)])
    fragment = encode(a[index % 16, index // 16], ty)[..., 0]
    got = multiply_on_warp(
        f"mma.sync.aligned.m16n8k{k}.row.col.{acc}.{ty}.{ty}.{acc}", fragment, b_fragment(b, b_of, per, 2, ty)
    )
    assert np.array_equal(got, a @ b)


def sparse_operands(ty, selector):
    size, _ = TYPES[ty]
    k, a_of, e_of, b_of = SPARSE[size]
    per, limit = 4 // size, 127 if ty == "s8" else 8
    rng = np.random.default_rng(2)
    patterns = np.array([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
    kept, values = patterns[rng.integers(0, 6, (16, k // 4))], rng.integers(-limit, limit, (16, k // 4, 2))
    dense = np.zeros((16, k // 4, 4), np.int64)
    np.put_along_axis(dense, kept, values, 2)
    b = rng.integers(-limit, limit, (k, 8))
    a = np.zeros((4, 32), np.uint32)
    metadata = rng.integers(0, 2**32, 32, dtype=np.uint32)  # the lanes that do not supply hold rubbish
    for t in range(32):
        for r in range(4):
            stored = []
            for j in range(per // 2):
                i = a_of(t, r * 2 * per + 4 * j)
                stored += list(values[i % 16, i // 16 // 4])
            a[r, t] = encode(np.array(stored), ty)[0]
        word = 0
        for v in range(32):
            if size == 2 and v % 16 < 4:
                i, shift = e_of(t, v // 16 * 16), 16 * (v // 16) + 4 * (v % 16)
                row, group = i % 16, i // 16 // 4 + v % 16
            elif size == 1 and v < 8:
                i, shift = e_of(t, 0), 4 * v
                row, group = i % 16, i // 16 // 4 + v
            else:
                continue
            first, second = kept[row, group]
            word |= int(first | second << 2) << shift
        # CuTe's layout gives lanes 2, 3 of a quad what lanes 0, 1 hold; the selector says which is read.
        if size == 1 or t % 4 // 2 == selector:
            metadata[t] = word
    return a, b_fragment(b, b_of, per, 4, ty), metadata, dense.reshape(16, k) @ b


def sparse_name(ty, ordered):
    size, acc = TYPES[ty]
    name = "mma.sp::ordered_metadata" if ordered else "mma.sp"
    return f"{name}.sync.aligned.m16n8k{SPARSE[size][0]}.row.col.{acc}.{ty}.{ty}.{acc}"


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("ty", "selector"), [("f16", 0), ("f16", 1), ("bf16", 0), ("bf16", 1), ("s8", 0)])
def test_sparse_mma_against_cute_layouts(ty, selector, ordered):
    a, b, metadata, expected = sparse_operands(ty, selector)
    assert np.array_equal(multiply_on_warp(sparse_name(ty, ordered), a, b, metadata, selector), expected)


def test_an_illegal_metadata_nibble_is_found():
    a, b, metadata, _ = sparse_operands("f16", 0)
    metadata[5] = metadata[5] & ~np.uint32(0xF0) | np.uint32(0x10)  # nibble 1 of lane 5: 1 then 0
    with pytest.raises(
        PtxError,
        match=r"k: line \d+: mma.sp.*illegal metadata nibble 0x1 for row 1, group 5.*thread \(5, 0, 0\)",
    ):
        multiply_on_warp(sparse_name("f16", True), a, b, metadata, 0)


def test_mma_by_half_a_warp_is_found():
    a, b, metadata, _ = sparse_operands("f16", 0)
    with pytest.raises(PtxError, match="mma executed by a partial warp"):
        multiply_on_warp(sparse_name("f16", True), a, b, metadata, 0, guard="@%p1 ")


# ---- global memory -----------------------------------------------------------------------------------------


def test_global_faults_are_found():
    data, out = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    store = "mad.wide.u32 %d1, %r30, 4, %d10; {}"
    with pytest.raises(
        PtxError, match=r"out-of-bounds global write of 4 bytes .*\(0 bytes past the end.*thread \(31, 0, 0\)"
    ):
        run(store.format("st.global.u32 [%d1+4], %r30;"), out)
    with pytest.raises(PtxError, match=r"out-of-bounds global read .*4 bytes before.*thread \(0, 0, 0\)"):
        run(store.format("ld.global.u32 %r1, [%d1+-4];"), out)
    with pytest.raises(PtxError, match="misaligned 8-byte global access"):
        run(store.format("ld.global.v2.u32 {%r1, %r2}, [%d1];"), out)
    with pytest.raises(
        PtxError, match=r"k: line \d+: st.global.u32 \[%d1\], %r30: write to read-only memory"
    ):
        run(store.format("st.global.u32 [%d1], %r30;"), data, read_only=(0,))
    with pytest.raises(PtxError, match="bytes of parameters"):
        launch(Module(program("", ".param .u64 a"))["k"], (1,), (32,), b"1234")


def test_an_unknown_opcode_is_named():
    with pytest.raises(
        PtxError, match=r"line \d+: tcgen05.frobnicate.b32 %r1: unknown opcode tcgen05.frobnicate"
    ):
        run("tcgen05.frobnicate.b32 %r1;")
    with pytest.raises(PtxError, match="trap"):
        run("trap;")


# ---- shared memory: what one thread writes and another reads -----------------------------------------------

SHARED = ".extern .shared .align 16 .b8 smem[];"
AT = "mov.u32 %r10, smem; mad.lo.u32 %r11, %r30, 16, %r10; mad.wide.u32 %d1, %r30, 16, %d10;"  # my 16 bytes
READ = "ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r12];"
NEIGHBOUR = "xor.b32 %r12, %r30, {}; mad.lo.u32 %r12, %r12, 16, %r10; " + READ.replace("{", "{{").replace(
    "}", "}}"
)
COPY = "cp.async.cg.shared.global [%r11], [%d1], 16; cp.async.commit_group;"


def run_shared(body, block=64, **options):
    data = np.arange(block * 4, dtype=np.uint32)
    out = np.zeros((block, 4), np.uint32)
    tail = "mad.wide.u32 %d2, %r30, 16, %d11; st.global.v4.u32 [%d2], {%r1, %r2, %r3, %r4};"
    options = {"shared_bytes": 16 * block} | options
    stats = run(f"{AT}\n{body}\n{tail}", data, out, block=block, shared=SHARED, **options)
    return out, data.reshape(block, 4), stats


def test_cp_async_arrives_at_the_wait():
    wait = "cp.async.wait_group 0; bar.sync 0;"
    for partner in (0, 1, 33):
        out, data, stats = run_shared(COPY + wait + NEIGHBOUR.format(partner))
        assert np.array_equal(out, data[np.arange(64) ^ partner])
    assert stats["cp.async"] == 2 and stats["shared_wavefronts"] == stats["shared_ideal"] == 16
    out, _, _ = run_shared(COPY + NEIGHBOUR.format(0), check_races=False)
    assert (out == 0xFFFFFFFF).all()  # poison


def test_cp_async_with_a_short_source_and_a_cache_hint():
    code = """createpolicy.fractional.L2::evict_first.b64 %d5, 1.0;
    cp.async.cg.shared.global.L2::cache_hint [%r11], [%d1], 16, %r13, %d5;"""
    out, data, _ = run_shared(
        f"shl.b32 %r13, %r30, 2; min.u32 %r13, %r13, 16; {code} cp.async.wait_all; {NEIGHBOUR.format(0)}"
    )
    expected = np.where(np.arange(4) < np.minimum(np.arange(64), 4)[:, None], data, 0)
    assert np.array_equal(out, expected)


COPY_FAULTS = {
    "not been waited for": COPY + "bar.sync 0;" + NEIGHBOUR.format(0),
    "not been waited": COPY + "cp.async.wait_group 1; bar.sync 0;" + NEIGHBOUR.format(0),
    "after a write by warp 1": COPY + "cp.async.wait_group 0; bar.warp.sync -1;" + NEIGHBOUR.format(32),
    "after a write by lane 1 of the same warp": COPY + "cp.async.wait_group 0;" + NEIGHBOUR.format(1),
    "after a write by lane 0 of the same warp": COPY
    + "bar.sync 0; cp.async.wait_group 0;"
    + "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r11];",
    "write by warp 0 after a read by warp 1": COPY
    + "cp.async.wait_group 0; bar.sync 0;"
    + NEIGHBOUR.format(32)
    + COPY,
    "write by warp 0 after a read by lane": COPY
    + "cp.async.wait_group 0; bar.sync 0;"
    + NEIGHBOUR.format(1)
    + COPY,
}


@pytest.mark.parametrize("message", COPY_FAULTS)
def test_a_cp_async_fault_is_found(message):
    with pytest.raises(PtxError, match=f"k: line .*race: .*{message}"):
        run_shared(COPY_FAULTS[message])


def test_a_missing_barrier_is_found():
    store = "st.shared.v4.u32 [%r11], {%r30, %r30, %r30, %r30};"
    out, _, _ = run_shared(store + "bar.sync 0;" + NEIGHBOUR.format(32))
    assert out[:, 0].tolist() == (np.arange(64) ^ 32).tolist()
    with pytest.raises(PtxError, match="read by warp 0 after a write by warp 1"):
        run_shared(store + NEIGHBOUR.format(32))
    with pytest.raises(PtxError, match="two warps write the same bytes"):
        run_shared("st.shared.u32 [smem], %r30;")
    with pytest.raises(PtxError, match="write by warp 1 after a write by warp 0"):
        run_shared(
            "setp.lt.u32 %p1, %r30, 32; @%p1 st.shared.u32 [smem], %r30; @!%p1 st.shared.u32 [smem], %r30;"
        )


def test_neighbouring_bytes_are_no_race():
    run_shared("add.u32 %r5, %r10, %r30; st.shared.u8 [%r5], %r30; ld.shared.u8 %r1, [%r5];")


def test_a_warp_needs_bar_warp_sync_between_its_lanes():
    store = "st.shared.v4.u32 [%r11], {%r30, %r30, %r30, %r30};"
    run_shared(store + "bar.warp.sync 0xffffffff;" + NEIGHBOUR.format(1))
    with pytest.raises(PtxError, match="after a write by lane 1 of the same warp"):
        run_shared(store + NEIGHBOUR.format(1))


GROUPS = "shr.u32 %r20, %r30, 6; add.u32 %r20, %r20, 1;"  # warps 0, 1 are group 1, warps 2, 3 group 2


def test_named_barriers_order_their_own_warps_only():
    store = GROUPS + "st.shared.v4.u32 [%r11], {%r30, %r30, %r30, %r30};"
    out, _, _ = run_shared(store + "bar.sync %r20, 64;" + NEIGHBOUR.format(32), block=128)
    assert out[:, 0].tolist() == (np.arange(128) ^ 32).tolist()
    with pytest.raises(PtxError, match="read by warp 0 after a write by warp 2, with no barrier"):
        run_shared(store + "bar.sync %r20, 64;" + NEIGHBOUR.format(64), block=128)
    # A later barrier of all warps, or a chain through a warp that takes part in both, orders them.
    run_shared(store + "bar.sync %r20, 64; bar.sync 0;" + NEIGHBOUR.format(64), block=128)
    # Group 1 runs ahead by a branch and still waits for group 2 at the common barrier.
    code = (
        store
        + """setp.eq.u32 %p1, %r20, 1; @%p1 bra ONE;
    bar.sync 2, 64; bra BOTH; ONE: bar.sync 1, 64; BOTH: bar.sync 0, 128;"""
    )
    run_shared(code + NEIGHBOUR.format(96), block=128)


def test_bar_arrive_releases_the_consumer():
    code = """setp.lt.u32 %p1, %r30, 32; @!%p1 bra CONSUMER;
    st.shared.v4.u32 [%r11], {%r30, %r30, %r30, %r30}; bar.arrive 3, 64; bra END;
    CONSUMER: bar.sync 3, 64; xor.b32 %r12, %r30, 32; mad.lo.u32 %r12, %r12, 16, %r10;
    ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r12];
    END:"""
    out, _, _ = run_shared(code + " mov.u32 %r5, 0;")
    assert out[32:, 0].tolist() == list(range(32))
    with pytest.raises(PtxError, match="read by warp 1 after a write by warp 0"):
        run_shared(
            code.replace("st.shared", "bar.arrive 3, 64; st.shared").replace(
                "; bar.arrive 3, 64; bra", "; bra"
            )
            + " mov.u32 %r5, 0;"
        )


DEADLOCKS = {
    "threads exited": "setp.lt.u32 %p1, %r30, 32; @%p1 exit; bar.sync 0;",
    "two barriers": "setp.lt.u32 %p1, %r30, 32; @%p1 bar.sync 1; @!%p1 bar.sync 2;",
    "too few threads": "bar.sync 1, 96;",
    "half a warp": "setp.lt.u32 %p1, %r30, 48; @%p1 bar.sync 0;",
    "part of a warp": "setp.lt.u32 %p1, %r30, 5; @%p1 exit; bar.warp.sync 0xffffffff;",
}


@pytest.mark.parametrize("name", DEADLOCKS)
def test_a_deadlock_is_found(name):
    with pytest.raises(
        PtxError, match=r"k: line \d+: .*bar.*deadlock: .* waits for threads that exited or wait elsewhere"
    ):
        run_shared(DEADLOCKS[name] + " mov.u32 %r1, 0;")


def test_barrier_misuse_is_found():
    with pytest.raises(PtxError, match="two thread counts"):
        run_shared("setp.lt.u32 %p1, %r30, 32; selp.b32 %r5, 64, 32, %p1; bar.sync 1, %r5;")
    with pytest.raises(PtxError, match="barrier 1: 64 threads arrived, 32 expected"):
        run_shared("bar.sync 1, 32;")
    with pytest.raises(PtxError, match="barrier 1 with 40 threads"):
        run_shared("bar.sync 1, 40;")


def test_shared_bounds_alignment_and_poison():
    out, _, _ = run_shared(NEIGHBOUR.format(0))
    assert (out == 0xFFFFFFFF).all()  # never written: NaN
    with pytest.raises(
        PtxError, match=r"shared access of 16 bytes at 0x3f0 is beyond the 1008 bytes.*thread \(63, 0, 0\)"
    ):
        run_shared(NEIGHBOUR.format(0), shared_bytes=1008)
    with pytest.raises(PtxError, match="misaligned 16-byte shared access"):
        run_shared("ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r11+8];", shared_bytes=2048)


def test_generic_addresses_of_shared_memory_round_trip():
    code = """mov.u64 %d3, smem; cvta.shared.u64 %d3, %d3; mad.wide.u32 %d4, %r30, 16, %d3;
    st.u32 [%d4], %r30; cvta.to.shared.u64 %d5, %d4; cvt.u32.u64 %r5, %d5; ld.shared.u32 %r1, [%r5];
    mad.wide.u32 %d6, %r30, 16, %d10; ld.u32 %r2, [%d6];"""
    out, data, _ = run_shared(code)
    assert out[:, 0].tolist() == list(range(64)) and np.array_equal(out[:, 1], data[:, 0])


def test_bank_conflicts_are_counted():
    _, _, stats = run_shared(
        "mad.lo.u32 %r5, %r30, 128, %r10; ld.shared.u32 %r1, [%r5];", block=32, shared_bytes=4096
    )
    assert stats["shared_wavefronts"] == 32 and stats["shared_ideal"] == 1
    _, _, stats = run_shared("ld.shared.u32 %r1, [smem];", block=32)  # broadcast
    assert stats["shared_wavefronts"] == stats["shared_ideal"] == 1


# ---- what nvcc makes ---------------------------------------------------------------------------------------

CUDA = r"""
#include <cuda_bf16.h>
#include <stdint.h>
struct P { const float* x; __nv_bfloat16* y; int n; int row[5]; };
extern "C" __global__ void soft(const P p) {
  extern __shared__ float s[];
  __shared__ float total[8];
  float sum = 0;
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) sum += s[i] = p.x[size_t(blockIdx.x) * p.n + i];
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if (threadIdx.x % 32 == 0) total[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < blockDim.x / 32; ++w) sum += total[w];
  for (int i = threadIdx.x; i < p.n; i += blockDim.x)
    p.y[size_t(blockIdx.x) * p.n + i] = __float2bfloat16(s[p.n - 1 - i] / sum + p.row[blockIdx.x % 5]);
}
"""


@pytest.mark.parametrize("arch", ["80", "90"])
def test_a_compiled_kernel(tmp_path, arch):
    assert shutil.which("nvcc"), "nvcc is needed: the PTX that it emits is what the interpreter is for"
    source = tmp_path / "k.cu"
    source.write_text(CUDA)
    subprocess.run(
        ["nvcc", "-std=c++17", "-O3", f"-arch=compute_{arch}", "-ptx", source, "-o", tmp_path / "k.ptx"],
        check=True,
    )
    rng = np.random.default_rng(3)
    n, rows = 300, 7
    x = rng.integers(1, 9, (rows, n)).astype(np.float32)
    y = np.zeros((rows, n), np.uint16)
    memory = Memory()
    memory.map(x.ctypes.data, x.reshape(-1).view(np.uint8), writable=False)
    memory.map(y.ctypes.data, y.reshape(-1).view(np.uint8))
    buffer = struct.pack("<QQ6i", x.ctypes.data, y.ctypes.data, n, *range(5))
    kernel = Module((tmp_path / "k.ptx").read_text())["soft"]
    buffer += bytes(kernel.parameter_bytes - len(buffer))
    launch(kernel, (rows,), (128,), buffer, memory, 4 * n)
    expected = x[:, ::-1] / x.sum(1, keepdims=True) + (np.arange(rows, dtype=np.float32) % 5)[:, None]
    assert np.array_equal(y, [[bf16_exact(float(v)) for v in row] for row in expected.astype(np.float32)])
