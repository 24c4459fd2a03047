"""The PTX interpreter: shuffles, ldmatrix and the matrix products, against layouts written as CuTe
writes them.
"""

import numpy as np
import pytest

from ptx import PtxError
from ptx.programs import evaluate, run

# ---- warps --------------------------------------------------------------------------------------


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
    assert (
        evaluate("setp.lt.u32 %p1, %r0, 3; vote.sync.ballot.b32 %r9, %p1, -1;", t).tolist()
        == [7] * 32
    )


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(trans):
    data = np.arange(32 * 8, dtype=np.uint16)
    out = np.zeros((4, 32), np.uint32)
    run(
        f"""
        mad.wide.u32 %d1, %r30, 16, %d11; ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%d1];
        mov.u32 %r5, buf; mad.lo.u32 %r5, %r30, 16, %r5;
        st.shared.v4.u32 [%r5], {{%r1, %r2, %r3, %r4}};
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


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count, trans):
    """The inverse of ldmatrix: lane j of the j-th eight lanes gives a row's address."""
    words = np.random.default_rng(count).integers(0, 1 << 32, (32, 4), np.uint32)
    out = np.zeros(256, np.uint16)
    registers = ", ".join(f"%r{k + 1}" for k in range(count))
    run(
        f"""
        mad.wide.u32 %d1, %r30, 16, %d11; ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%d1];
        mov.u32 %r5, buf; mad.lo.u32 %r6, %r30, 16, %r5;
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r6], {{{registers}}};
        bar.warp.sync 0xffffffff;
        ld.shared.v4.u32 {{%r1, %r2, %r3, %r4}}, [%r6];
        mad.wide.u32 %d2, %r30, 16, %d10; st.global.v4.u32 [%d2], {{%r1, %r2, %r3, %r4}};""",
        out,
        words,
        shared=".shared .align 16 .b8 buf[512];",
    )
    for k in range(4):
        matrix = np.full((8, 8), 0xFFFF, np.uint16)
        for lane in range(32 if k < count else 0):
            g, t = divmod(lane, 4)
            matrix[g, 2 * t : 2 * t + 2] = words[lane, k] & 0xFFFF, words[lane, k] >> 16
        matrix = matrix.T if trans else matrix
        assert np.array_equal(out.reshape(4, 8, 8)[k], matrix)


STORE = """
    mov.u32 %r5, buf; mad.lo.u32 %r6, %r30, 16, %r5;
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r6], {%r1, %r2, %r3, %r4};
    bar.warp.sync 0xffffffff;
    ld.shared.u32 %r1, [%r6];
"""


def test_faults_of_stmatrix():
    shared = ".shared .align 16 .b8 buf[512];"
    run(STORE, shared=shared)
    for old, new, message in (
        ("bar.warp.sync 0xffffffff;", "", "after a write by the warp's ldmatrix or stmatrix"),
        ("%r30, 16", "%r30, 8", "misaligned 16-byte shared access"),
        ("[%r6], {", "[%r6+16], {", "beyond the 512 bytes"),
        ("    stmatrix", "setp.eq.u32 %p1, %r30, 3;\n@!%p1 stmatrix", "by a partial warp"),
        ("[%r6], {", "[%r5], {", "different bytes to one place"),
        (".x4", ".x2", "stmatrix.x2 stores 2 registers"),
        ("m8n8", "m16n8", "is not implemented"),
    ):
        text = STORE if message != "different bytes to one place" else STORE.replace("%r2", "%r30")
        with pytest.raises(PtxError, match=message):
            run(text.replace(old, new, 1), shared=shared)


def layout(shape, stride):
    """A CuTe (thread, value) layout as a function to a column-major flat index."""

    def index(i, shape, stride):
        if isinstance(shape, int):
            return i * stride
        total = 0
        for s, d in zip(shape, stride, strict=True):
            n = (
                int(np.prod(s))
                if isinstance(s, int)
                else int(np.prod(np.hstack([np.ravel(x) for x in s])))
            )
            total += index(i % n, s, d)
            i = i // n
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
        return (
            (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16)
            .astype(np.uint16)
            .view(np.uint32)
        )
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
        mad.wide.u32 %d1, %r30, 4, %d11; mad.wide.u32 %d2, %r30, 4, %d12;
        mad.wide.u32 %d3, %r30, 4, %d13;
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
    index = np.array(
        [[[a_of(t, r * per + j) for j in range(per)] for t in range(32)] for r in range(4)]
    )
    fragment = encode(a[index % 16, index // 16], ty)[..., 0]
    got = multiply_on_warp(
        f"mma.sync.aligned.m16n8k{k}.row.col.{acc}.{ty}.{ty}.{acc}",
        fragment,
        b_fragment(b, b_of, per, 2, ty),
    )
    assert np.array_equal(got, a @ b)


def sparse_operands(ty, selector):
    size, _ = TYPES[ty]
    k, a_of, e_of, b_of = SPARSE[size]
    per, limit = 4 // size, 127 if ty == "s8" else 8
    rng = np.random.default_rng(2)
    patterns = np.array([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
    kept, values = (
        patterns[rng.integers(0, 6, (16, k // 4))],
        rng.integers(-limit, limit, (16, k // 4, 2)),
    )
    dense = np.zeros((16, k // 4, 4), np.int64)
    np.put_along_axis(dense, kept, values, 2)
    b = rng.integers(-limit, limit, (k, 8))
    a = np.zeros((4, 32), np.uint32)
    metadata = rng.integers(
        0, 2**32, 32, dtype=np.uint32
    )  # the lanes that do not supply hold rubbish
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
        # CuTe's layout gives lanes 2, 3 of a quad what lanes 0, 1 hold; the selector says which is
        # read.
        if size == 1 or t % 4 // 2 == selector:
            metadata[t] = word
    return a, b_fragment(b, b_of, per, 4, ty), metadata, dense.reshape(16, k) @ b


def sparse_name(ty, ordered):
    size, acc = TYPES[ty]
    name = "mma.sp::ordered_metadata" if ordered else "mma.sp"
    return f"{name}.sync.aligned.m16n8k{SPARSE[size][0]}.row.col.{acc}.{ty}.{ty}.{acc}"


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(
    ("ty", "selector"), [("f16", 0), ("f16", 1), ("bf16", 0), ("bf16", 1), ("s8", 0)]
)
def test_sparse_mma_against_cute_layouts(ty, selector, ordered):
    a, b, metadata, expected = sparse_operands(ty, selector)
    assert np.array_equal(
        multiply_on_warp(sparse_name(ty, ordered), a, b, metadata, selector), expected
    )


def test_an_illegal_metadata_nibble_is_found():
    a, b, metadata, _ = sparse_operands("f16", 0)
    metadata[5] = metadata[5] & ~np.uint32(0xF0) | np.uint32(0x10)  # nibble 1 of lane 5: 1 then 0
    with pytest.raises(
        PtxError,
        match=r"k: line \d+: mma.sp.*illegal metadata nibble 0x1 for row 1, group 5.*"
        r"thread \(5, 0, 0\)",
    ):
        multiply_on_warp(sparse_name("f16", True), a, b, metadata, 0)


def test_mma_by_half_a_warp_is_found():
    a, b, metadata, _ = sparse_operands("f16", 0)
    with pytest.raises(PtxError, match="mma executed by a partial warp"):
        multiply_on_warp(sparse_name("f16", True), a, b, metadata, 0, guard="@%p1 ")
