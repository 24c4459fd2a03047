"""The PTX interpreter: products of warpgroups against layouts written as CuTe writes them, and a
ring of tiles between a producer and a warpgroup, with planted faults."""

import numpy as np
import pytest

from ptx import PtxError, tensor_map
from ptx.programs import run
from ptx.test_ptx_matrix import layout

SHARED = ".extern .shared .align 1024 .b8 smem[];"
# CuTe's ALayout_64x16, ALayout_64x32 (compressed), CLayout_64xN: (thread, value) to row + 64 column
A_LAYOUT = layout(((4, 8, 4), (2, 2, 2)), ((128, 1, 16), (64, 8, 512)))
TYPES = ["f16", "bf16"]


def c_layout(n):
    return layout(((4, 8, 4), (2, 2, n // 8)), ((128, 1, 16), (64, 8, 512)))


def bits(x, ty):
    if ty == "f16":
        return np.ascontiguousarray(x, np.float16).view(np.uint16)
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def aligned(array, to=64):
    """A copy of the array's bytes at a multiple of `to`."""
    raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    store = np.zeros(raw.size + to, np.uint8)
    skip = -store.ctypes.data % to
    store[skip : skip + raw.size] = raw
    return store[skip : skip + raw.size]


def map_of(matrix, box_rows):
    """A map of a matrix of 16-bit words, for boxes of 64 columns."""
    rows, columns = matrix.shape
    pitch = matrix.strides[0]
    return aligned(
        np.frombuffer(
            tensor_map(matrix.ctypes.data, columns, rows, pitch, 64, box_rows, 128, 2), np.uint8
        )
    )


THREAD = np.arange(128)[:, None]


def fragments(a, ty):
    """A (64, 16 k) as [k][thread][4 words]."""
    column, row = np.divmod(A_LAYOUT(THREAD, np.arange(8)), 64)
    values = np.stack([bits(step[row, column], ty) for step in np.split(a, a.shape[1] // 16, 1)])
    return np.ascontiguousarray(values).view(np.uint32)


def unfragmented(c):
    """Sums [128][n / 2] as a matrix (64, n)."""
    n = 2 * c.shape[1]
    column, row = np.divmod(c_layout(n)(THREAD, np.arange(n // 2)), 64)
    d = np.full((64, n), np.nan, np.float32)
    d[row, column] = c
    return d


def names(prefix, count):
    return ", ".join(f"{prefix}{k}" for k in range(count))


def instruction(n, ty="f16", sparse=False, scale="1", signs="1, 1", selector=0, step=0):
    """The text of one wgmma: its sums are %c0, %c1, ..., its A is the four registers from
    %a{4 step} on, and %d9 holds the descriptor of B."""
    head = f"wgmma.mma_async{'.sp' if sparse else ''}.sync.aligned.m64n{n}k{32 if sparse else 16}"
    a = ", ".join(f"%a{4 * step + k}" for k in range(4))
    tail = f", %e0, {selector}" if sparse else ""
    return (
        f"{head}.f32.{ty}.{ty} {{{names('%c', n // 2)}}}, {{{a}}}, %d9{tail}, {scale}, {signs}, 0;"
    )


DESCRIPTOR = f"""
    and.b32 %r7, %r6, 0x3ffff;
    shr.u32 %r7, %r7, 4;
    cvt.u64.u32 %d9, %r7;
    or.b64 %d9, %d9, {1 << 62 | 64 << 32 | 1 << 16};
"""


def product(text, n, a_words, b, c=None, metadata=None, late=True, block=128, **options):
    """One warpgroup: fetches B (n rows of 64) by a tensor copy, A's and the metadata's words, and
    runs `text`; the sums as a matrix.
    """
    b_map = map_of(b, n)
    out = np.full((128, n // 2), np.nan, np.float32)
    start = np.zeros((128, n // 2), np.float32) if c is None else c
    metadata = np.zeros((4, 128), np.uint32) if metadata is None else metadata
    count = len(a_words)
    body = f"""
    .reg .b32 %a<{4 * count}>; .reg .b32 %e<4>; .reg .f32 %c<{n // 2}>;
    mov.u32 %r10, smem;
    setp.ne.u32 %p1, %r30, 0;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%r10], 1;
    fence.proxy.async.shared::cta;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], {128 * n};
    mov.u32 %r1, 0;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
        [%r10+1024], [%d12, {{%r1, %r1}}], [%r10];
READY:
    bar.sync 0;
    mul.wide.u32 %d1, %r30, 16;
    add.u64 %d1, %d1, %d11;
    mul.wide.u32 %d2, %r30, {2 * n};
    add.u64 %d3, %d2, %d13;
    add.u64 %d2, %d2, %d10;
    mul.wide.u32 %d4, %r30, 4;
    add.u64 %d4, %d4, %d14;
    """
    for k in range(count):
        body += f"ld.global.v4.b32 {{{', '.join(f'%a{4 * k + j}' for j in range(4))}}}, "
        body += f"[%d1+{2048 * k}];\n"
    body += "".join(f"ld.global.f32 %c{k}, [%d3+{4 * k}];\n" for k in range(n // 2))
    body += "".join(f"ld.global.b32 %e{k}, [%d4+{512 * k}];\n" for k in range(4))
    body += f"""
AGAIN:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10], 0;
    @!%p2 bra AGAIN;
    add.u32 %r6, %r10, 1024;
    {DESCRIPTOR}
    {text}
    """
    body += "".join(f"st.global.f32 [%d2+{4 * k}], %c{k};\n" for k in range(n // 2))
    arrays = (out, a_words, b_map, start, metadata)
    options = {"shared": SHARED, "shared_bytes": 1024 + 128 * n} | options
    # the matrix itself is no parameter, but may be read
    run(body, *arrays, b, block=block, late_products=late, **options)
    return unfragmented(out)


def steps(n, count, each=""):
    """A group of `count` dense products along K."""
    text = "wgmma.fence.sync.aligned;\n"
    for k in range(count):
        text += instruction(n, step=k) + "\nadd.u64 %d9, %d9, 2;\n"
    return text + "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"


def integers(seed, *shape):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("ty", TYPES)
@pytest.mark.parametrize("n", [8, 24, 64, 256])
def test_dense(n, ty, late):
    a, b, c = integers(n, 64, 64), integers(n + 1, n, 64), integers(n + 2, 128, n // 2)
    text = steps(n, 4).replace(".f16.f16", f".{ty}.{ty}")
    got = product(text, n, fragments(a, ty), bits(b, ty), c, late=late)
    assert np.array_equal(got, unfragmented(c) + a @ b.T)


@pytest.mark.parametrize("late", [True, False])
def test_signs_and_scale_d(late):
    n = 16
    a, b, c = integers(1, 64, 32), integers(2, n, 64), integers(3, 128, n // 2)
    words, b_words = fragments(a, "f16"), bits(b, "f16")
    text = "wgmma.fence.sync.aligned; {} add.u64 %d9, %d9, 2; {}"
    text += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    first, second = a[:, :16] @ b[:, :16].T, a[:, 16:] @ b[:, 16:32].T
    plus = instruction(n, step=1, scale="1")
    for scale, start in (("0", 0), ("1", 1)):
        one = instruction(n, scale=scale, signs="-1, 1")
        got = product(text.format(one, plus), n, words, b_words, c, late=late)
        assert np.array_equal(got, start * unfragmented(c) - first + second)
    one = "setp.lt.u32 %p5, %r30, 0;" + instruction(n, scale="%p5", signs="-1, -1")
    got = product(text.format(one, plus), n, words, b_words, c, late=late)
    assert np.array_equal(got, first + second)
    one = one.replace("%r30, 0;", "%r30, 5;")
    with pytest.raises(PtxError, match="scale-d differs in a warpgroup"):
        product(text.format(one, plus), n, words, b_words, c, late=late)


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize(("n", "ty"), [(8, "bf16"), (128, "f16")])
def test_sparse(n, ty, selector, late):
    """CuTe's ALayout_64x32 of kept values is that of 64 x 16; metadata of row g and g + 8 of a warp
    lies in lanes 4 g + 2 selector + (0, 1): k16 0 and 1, four bits for each group of four."""
    rng = np.random.default_rng(n + selector)
    kept, b = integers(n, 64, 16), integers(n + 1, n, 64)
    pairs = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
    chosen = pairs[rng.integers(0, 6, (64, 8))]  # of each row and group
    dense = np.zeros((64, 8, 4), np.float32)
    np.put_along_axis(dense, chosen, kept.reshape(64, 8, 2), 2)
    nibble = (chosen[..., 0] | chosen[..., 1] << 2).astype(np.uint32)
    metadata = rng.integers(0, 1 << 32, (4, 128), np.uint32)  # other lanes' words are not looked at
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        g, t = divmod(lane, 4)
        if t // 2 == selector:
            rows = 16 * warp + g + np.array([0, 8])
            half = nibble[rows][:, 4 * (t % 2) : 4 * (t % 2) + 4]
            metadata[0, thread] = (half << np.arange(0, 32, 4, dtype=np.uint32).reshape(2, 4)).sum()
    text = f"""wgmma.fence.sync.aligned; {instruction(n, ty, True, selector=selector)}
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"""
    words = fragments(kept, ty)
    got = product(text, n, words, bits(b, ty), metadata=metadata, late=late)
    assert np.array_equal(got, dense.reshape(64, 32) @ b[:, :32].T)
    metadata[0, 2 * selector + 1] ^= 15 << 8 if nibble[0, 6] != 15 else 0
    metadata[0, 2 * selector + 1] |= 15 << 8
    with pytest.raises(PtxError, match="illegal metadata nibble 0xf for row 0, group 6"):
        product(text, n, words, bits(b, ty), metadata=metadata, late=late)


DENSE = steps(16, 4)
FENCE, COMMIT = "wgmma.fence.sync.aligned;\n", "wgmma.commit_group.sync.aligned;\n"
WAIT = "wgmma.wait_group.sync.aligned 0;\n"
STRIDE = f"or.b64 %d9, %d9, {64 << 32};"
FAULTS = {  # what is found; whether also if products are computed at once; text, instead
    "ahead of the first wgmma.fence": (True, FENCE, ""),
    "written after the last wgmma.fence": (True, FENCE, FENCE + "mov.b32 %a1, 0;"),
    "register of wgmma was written after": (True, FENCE, FENCE + "mov.f32 %c3, 0f3F800000;"),
    "nobody waited for": (True, WAIT, ""),
    "nobody waited": (True, COMMIT, ""),
    "A of a wgmma was changed": (True, WAIT, "mov.b32 %a1, 0;" + WAIT),
    "sums of a wgmma were written": (False, WAIT, "mov.f32 %c3, 0f00000000;" + WAIT),
    "read by a wgmma of warpgroup 0": (True, WAIT, "st.shared.u32 [%r6], %r30;" + WAIT),
    "read by a wgmma": (True, COMMIT + WAIT, COMMIT + COMMIT
    + "wgmma.wait_group.sync.aligned 2; st.shared.u32 [%r6], %r30;" + WAIT),
    "what warp 1 wrote, with no wait": (True, FENCE,
    "setp.eq.u32 %p5, %r30, 32; @%p5 st.shared.u32 [%r6], %r30;" + FENCE),
    "what warp 0 wrote, with no fence.proxy.async": (True, FENCE,
    "setp.eq.u32 %p5, %r30, 0; @%p5 st.shared.u32 [%r6], %r30; bar.sync 0;" + FENCE),
    "stride between eight rows": (True, FENCE, f"xor.b64 %d9, %d9, {96 << 32};" + FENCE),
    "beyond the": (True, FENCE, f"xor.b64 %d9, %d9, {192 << 32};" + FENCE),
    "other swizzle": (True, FENCE, f"xor.b64 %d9, %d9, {1 << 62 | 2 << 62};" + FENCE),
    "base offset": (True, FENCE, f"or.b64 %d9, %d9, {1 << 49};" + FENCE),
    "first 128 bytes of 1024": (True, FENCE, "add.u64 %d9, %d9, 8;" + FENCE),
    "rows that pass the 128 bytes": (True, FENCE, "add.u64 %d9, %d9, 1;" + FENCE),
    "descriptor differs": (True, FENCE, "cvt.u64.u32 %d8, %r30; shr.u64 %d8, %d8, 6;"
    "shl.b64 %d8, %d8, 1; add.u64 %d9, %d9, %d8;" + FENCE),
    "deadlock: an instruction of a warpgroup": (True, FENCE,
    "setp.eq.u32 %p5, %r30, 77; @%p5 exit;" + FENCE),
}  # fmt: skip


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_is_found(message, late):
    at_once, old, new = FAULTS[message]
    assert DENSE.count(old) == 1
    a, b = integers(1, 64, 64), integers(2, 16, 64)
    words, b_words = fragments(a, "f16"), bits(b, "f16")
    text = DENSE.replace(old, new)
    if at_once or late:
        with pytest.raises(PtxError, match=message):
            product(text, 16, words, b_words, late=late)
    else:
        product(text, 16, words, b_words, late=late)


def test_sums_read_before_the_wait_are_nan():
    a, b = integers(1, 64, 64), integers(2, 16, 64)
    text = DENSE.replace(WAIT, "mov.b32 %r8, %c0;" + WAIT) + "mov.b32 %c0, %r8;"
    got = product(text, 16, fragments(a, "f16"), bits(b, "f16"))
    assert np.isnan(got).sum() == 128 and np.isfinite(got).sum() == 128 * 7


@pytest.mark.parametrize("late", [True, False])
def test_groups_are_waited_for_in_order(late):
    """Two groups with sums of their own; the first one's are there while the second one runs."""
    n = 8
    a, b = integers(1, 64, 32), integers(2, n, 64)
    second = instruction(n, step=1).replace("%c", "%k")
    text = f"""
    .reg .f32 %k<4>;
    mov.f32 %k0, 0f00000000; mov.f32 %k1, %k0; mov.f32 %k2, %k0; mov.f32 %k3, %k0;
    {FENCE} {instruction(n)} {COMMIT}
    add.u64 %d9, %d9, 2; {second} {COMMIT}
    wgmma.wait_group.sync.aligned 1;
    mov.b32 %a0, 0;
    mov.f32 %f1, %c0; mov.f32 %f2, %c1;
    {WAIT}
    add.f32 %c0, %f1, %k0; add.f32 %c1, %f2, %k1; add.f32 %c2, %c2, %k2; add.f32 %c3, %c3, %k3;
    """
    got = product(text, n, fragments(a, "f16"), bits(b, "f16"), late=late)
    assert np.array_equal(got, a @ b[:, :32].T)
    with pytest.raises(PtxError, match="A of a wgmma was changed"):
        wrong = text.replace("mov.b32 %a0, 0", "mov.b32 %a4, 0")
        product(wrong, n, fragments(a, "f16"), bits(b, "f16"), late=late)


def test_other_forms_are_refused():
    a, b = integers(1, 64, 64), integers(2, 16, 64)
    for old, new, message in (
        ("1, 1, 1, 0;", "1, 1, 1, 1;", "B not K-major"),
        ("1, 1, 1, 0;", "1, 2, 1, 0;", "a scale other than"),
        (".f32.f16.f16", ".f16.f16.f16", "is not implemented"),
        ("m64n16k16", "m64n24k16", "takes 12 sums"),
        ("{%a0, %a1, %a2, %a3}", "%d8", "A from 4 registers"),
        ("{%a0, %a1", "{%c0, %a1", "named twice"),
    ):
        with pytest.raises(PtxError, match=message):
            product(DENSE.replace(old, new), 16, fragments(a, "f16"), bits(b, "f16"))
