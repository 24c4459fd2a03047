"""The PTX interpreter: tensor copies and their layout in shared memory."""

import numpy as np
import pytest

from ptx import Memory, Module, PtxError, launch, tensor_map
from ptx.programs import program, run

SHARED = ".extern .shared .align 1024 .b8 smem[];"
ROWS, COLUMNS, PITCH = 20, 72, 80  # a matrix of 16-bit words


def aligned(raw, to=64):
    """A copy at a multiple of `to`."""
    store = np.zeros(len(raw) + to, np.uint8)
    skip = -store.ctypes.data % to
    store[skip : skip + len(raw)] = np.frombuffer(raw, np.uint8)
    return store[skip : skip + len(raw)]


def body(column, row, size, change=("", "")):
    """Fetches one box and copies the shared memory that it fills to the first array."""
    text = f"""
    mov.u32 %r10, smem;
    setp.ne.u32 %p1, %r30, 0;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%r10], 1;
    fence.proxy.async.shared::cta;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], {size};
    mov.b32 %r1, {column};
    mov.b32 %r2, {row};
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r10+1024], [%d11, {{%r1, %r2}}], [%r10];
READY:
    bar.sync 0;
AGAIN:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10], 0;
    @!%p2 bra AGAIN;
    mov.u32 %r5, %r30;
NEXT:
    shl.b32 %r6, %r5, 2;
    add.u32 %r7, %r6, %r10;
    ld.shared.u32 %r8, [%r7+1024];
    cvt.u64.u32 %d1, %r6;
    add.u64 %d1, %d1, %d10;
    st.global.u32 [%d1], %r8;
    add.u32 %r5, %r5, 32;
    setp.lt.u32 %p3, %r5, {size // 4};
    @%p3 bra NEXT;
    """
    old, new = change
    assert not old or text.count(old) == 1
    return text.replace(old, new)


def fetch(column, row, box_columns, box_rows, swizzle, change=("", ""), **options):
    matrix = np.arange(1, ROWS * PITCH + 1, dtype=np.uint16).reshape(ROWS, PITCH)
    raw = tensor_map(
        matrix.ctypes.data, COLUMNS, ROWS, 2 * PITCH, box_columns, box_rows, swizzle, 2
    )
    size = 2 * box_columns * box_rows
    out = np.zeros(size // 2, np.uint16)
    run(
        body(column, row, size, change), out, aligned(raw), matrix, shared=SHARED,
        shared_bytes=1024 + size, **options,
    )  # fmt: skip
    return matrix, out


def expected(matrix, column, row, box_columns, box_rows, swizzle):
    """By hand: word by word, zeros outside, 16-byte pieces exchanged within eight rows of the
    swizzle's width."""
    out = np.zeros(box_rows * box_columns, np.uint16)
    for r in range(box_rows):
        for c in range(box_columns):
            at = 2 * (r * box_columns + c)
            piece, line = at // 16, at // 128
            piece ^= line % {0: 1, 32: 2, 64: 4, 128: 8}[swizzle]
            inside = 0 <= row + r < ROWS and 0 <= column + c < COLUMNS
            out[(16 * piece + at % 16) // 2] = matrix[row + r, column + c] if inside else 0
    return out


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 64, 16, 128),
        (64, 8, 64, 16, 128),  # past both ends
        (-8, -3, 64, 24, 128),  # before both starts
        (4, 2, 64, 8, 128),  # columns not at a multiple of 16 bytes
        (100, 0, 64, 8, 128),  # nothing inside
        (8, 1, 32, 16, 64),
        (8, 1, 16, 16, 32),
        (8, 1, 24, 10, 0),
    ],
)
def test_a_box_is_exact(box):
    matrix, out = fetch(*box)
    assert np.array_equal(out, expected(matrix, *box))


def test_only_the_matrix_is_read():
    """Nothing between the last column and the next row, though the box covers it."""
    matrix, out = fetch(64, 0, 64, 8, 128)
    assert set(out.tolist()) == {0, *matrix[:8, 64:72].reshape(-1).tolist()}


def test_a_map_in_the_parameters():
    matrix = np.arange(64 * 8, dtype=np.uint16).reshape(8, 64)
    out = np.zeros(64 * 8, np.uint16)
    text = "ld.param.u64 %d10, [p0]; mov.b64 %d9, p1; cvta.param.u64 %d11, %d9;"
    text = program(
        "mov.u32 %r30, %tid.x;" + text + body(0, 0, 1024),
        ".param .u64 p0, .param .align 64 .b8 p1[128]",
        SHARED,
    )
    memory = Memory()
    memory.map(matrix.ctypes.data, matrix.reshape(-1).view(np.uint8), writable=False)
    memory.map(out.ctypes.data, out.view(np.uint8))
    raw = tensor_map(matrix.ctypes.data, 64, 8, 128, 64, 8, 128, 2)
    params = np.array([out.ctypes.data], np.uint64).tobytes().ljust(64, b"\0") + raw
    launch(Module(text)["k"], (1,), (32,), params, memory, 2048)
    assert np.array_equal(out.reshape(8, 8, 8)[3, 1 ^ 3], matrix[3, 8:16])
    with pytest.raises(PtxError, match="there is no tensor map"):
        launch(Module(text)["k"], (1,), (32,), params[:64] + bytes(128), memory, 2048)


FAULTS = {
    "deadlock: .*lacks 0 of 1 arrivals and -64 bytes": ("[%r10], 2048", "[%r10], 1984"),
    "race: read of bytes of a cp.async": ("@!%p2 bra AGAIN;", ""),
    "not aligned to 64 bytes": ("[%d11, {", "[%d11+16, {"),
    "there is no tensor map|not aligned to": ("[%d11, {", "[%d12, {"),
    "not aligned to 128 bytes": ("[%r10+1024], [", "[%r10+1040], ["),
    "with no fence": ("fence.proxy.async.shared::cta;", ""),
    "beyond the 3072 bytes": ("[%r10+1024], [", "[%r10+2048], ["),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_is_found(message):
    with pytest.raises(PtxError, match=message):
        fetch(0, 0, 64, 16, 128, FAULTS[message])


def test_a_tile_may_begin_within_the_pattern_of_the_swizzle():
    """The address is what is swizzled: a tile that begins at the third 128 bytes of 1024."""
    change = ("[%r10+1024], [", "[%r10+1280], [")
    matrix, out = fetch(0, 0, 64, 14, 128)
    text = body(0, 0, 64 * 2 * 14, change).replace("+1024];", "+1280];")
    raw = tensor_map(matrix.ctypes.data, COLUMNS, ROWS, 2 * PITCH, 64, 14, 128, 2)
    run(text, out, aligned(raw), matrix, shared=SHARED, shared_bytes=4096)
    for row in range(14):
        for piece in range(8):
            got = out.reshape(14, 8, 8)[row, piece ^ (row + 2) % 8]
            assert np.array_equal(got, matrix[row, 8 * piece : 8 * piece + 8])


def test_memory_of_a_kernel_ahead_is_read_after_the_wait():
    change = ("    mov.u32 %r10", "    griddepcontrol.wait;\n    mov.u32 %r10")
    late = ("READY:\n", "READY:\n    griddepcontrol.wait;\n")
    fetch(0, 0, 64, 16, 128, change, dependent=True, early=(1,))
    fetch(0, 0, 64, 16, 128, late, dependent=True, early=(1, 2))
    with pytest.raises(PtxError, match=r"ahead of griddepcontrol\.wait"):
        fetch(0, 0, 64, 16, 128, late, dependent=True, early=(1,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"address": 8}, "address 0x8"),
        ({"row_bytes": 136}, "136 bytes apart"),
        ({"columns": 72, "row_bytes": 128}, "rows overlap"),
        ({"rows": 0}, "0 rows"),
        ({"box_rows": 257}, "1 to 256"),
        ({"box_columns": 60}, "120 bytes, not a multiple"),
        ({"box_columns": 128}, "256 bytes are more than the swizzle of 128"),
        ({"swizzle": 16}, "a swizzle of 16"),
    ],
)
def test_what_the_driver_refuses(change, message):
    right = {"address": 1024, "columns": 64, "rows": 8, "row_bytes": 128, "box_columns": 64}
    right |= {"box_rows": 8, "swizzle": 128, "element_bytes": 2}
    assert len(tensor_map(**right)) == 128
    with pytest.raises(PtxError, match=message):
        tensor_map(**(right | change))
