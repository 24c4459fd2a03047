"""The PTX interpreter: rings of a warp's own, in which lanes meet by bar.warp.sync alone, between
two barriers of the CTA."""

import numpy as np
import pytest

from ptx import PtxError
from ptx.programs import run

WARPS, ROUNDS, STAGES = 3, 6, 3
# Every warp copies ROUNDS pieces of 512 bytes through a ring of STAGES, 16 bytes a lane, and adds
# up what the lane beside it copied, plus what warp 0 has written for all before the loop.
RING = f"""
    mov.u32 %r10, smem;
    and.b32 %r1, %r30, 31;
    shr.u32 %r2, %r30, 5;
    setp.ne.u32 %p1, %r2, 0;
    @%p1 bra COMMON;
    shl.b32 %r3, %r1, 2;
    add.u32 %r3, %r3, %r10;
    st.shared.u32 [%r3], %r1;
COMMON:
    mad.lo.u32 %r4, %r2, {512 * STAGES}, %r10;
    add.u32 %r4, %r4, 128;                         // the ring
    mad.wide.u32 %d1, %r2, {512 * ROUNDS}, %d10;
    mad.wide.u32 %d1, %r1, 16, %d1;                // what to copy
    mov.u32 %r5, 0;                                // the piece to copy
    mov.u32 %r6, 0;                                // the piece to add
    mov.u32 %r7, 0;                                // the sum
AHEAD:
    COPY
    setp.lt.u32 %p2, %r5, {STAGES - 1};
    @%p2 bra AHEAD;
    bar.sync 0;
LOOP:
    cp.async.wait_group {STAGES - 2};
    bar.warp.sync 0xffffffff;
    COPY
    rem.u32 %r8, %r6, {STAGES};
    xor.b32 %r9, %r1, 1;
    shl.b32 %r9, %r9, 4;
    mad.lo.u32 %r9, %r8, 512, %r9;
    add.u32 %r9, %r9, %r4;
    ld.shared.u32 %r11, [%r9];
    add.u32 %r7, %r7, %r11;
    mad.lo.u32 %r12, %r1, 4, %r10;
    ld.shared.u32 %r13, [%r12];
    add.u32 %r7, %r7, %r13;
    add.u32 %r6, %r6, 1;
    setp.lt.u32 %p3, %r6, {ROUNDS};
    @%p3 bra LOOP;
    bar.sync 0;
    shl.b32 %r9, %r30, 2;
    add.u32 %r9, %r9, %r10;
    st.shared.u32 [%r9], %r7;                      // over the rings
    bar.sync 0;
    xor.b32 %r9, %r30, 32;
    setp.ge.u32 %p4, %r9, {32 * WARPS};
    selp.b32 %r9, %r30, %r9, %p4;
    shl.b32 %r9, %r9, 2;
    add.u32 %r9, %r9, %r10;
    ld.shared.u32 %r7, [%r9];
    mul.wide.u32 %d2, %r30, 4;
    add.u64 %d2, %d2, %d11;
    st.global.u32 [%d2], %r7;
"""
COPY = f"""
    setp.lt.u32 %p5, %r5, {ROUNDS};
    rem.u32 %r8, %r5, {STAGES};
    mad.lo.u32 %r9, %r8, 512, %r4;
    mad.lo.u32 %r9, %r1, 16, %r9;
    mad.wide.u32 %d3, %r5, 512, %d1;
    @%p5 cp.async.cg.shared.global [%r9], [%d3], 16;
    cp.async.commit_group;
    add.u32 %r5, %r5, 1;
"""


def ring(change=lambda text: text):
    data = np.arange(WARPS * ROUNDS * 32 * 4, dtype=np.uint32)
    out = np.zeros(32 * WARPS, np.uint32)
    body = change(RING).replace("COPY\n", COPY)
    run(
        body, data, out, block=32 * WARPS, shared=".extern .shared .align 16 .b8 smem[];",
        shared_bytes=128 + 512 * STAGES * WARPS,
    )  # fmt: skip
    return data, out


def test_a_ring_of_a_warp_is_exact_and_no_race():
    data, out = ring()
    lane = np.arange(32)
    sums = data.reshape(WARPS, ROUNDS, 32, 4)[..., 0].sum(1)[:, lane ^ 1] + ROUNDS * lane
    thread = np.arange(32 * WARPS)
    beside = np.where(thread ^ 32 < 32 * WARPS, thread ^ 32, thread)
    assert np.array_equal(out, sums.reshape(-1)[beside])


FAULTS = {
    "read by warp 0 after a write by lane 1 of the same warp": ("bar.warp.sync 0xffffffff;", ""),
    # The copy overwrites the stage that the other lanes read last.
    "write by warp 0 after a read by lane": (
        "bar.warp.sync 0xffffffff;\n    COPY\n", "COPY\n    bar.warp.sync 0xffffffff;\n",
    ),
    "not been waited for": (f"wait_group {STAGES - 2}", f"wait_group {STAGES - 1}"),
    "after a write by lane 1": (
        f"cp.async.wait_group {STAGES - 2};\n    bar.warp.sync 0xffffffff;",
        f"bar.warp.sync 0xffffffff;\n    cp.async.wait_group {STAGES - 2};",
    ),
    "read by warp 1 after a write by warp 0": ("bar.sync 0;\nLOOP:", "LOOP:"),
    "write by warp 1 after a write by warp 0": ("bra LOOP;\n    bar.sync 0;", "bra LOOP;"),
    "read by warp 0 after a write by warp 1": ("st.shared.u32 [%r9], %r7;                      "
    "// over the rings\n    bar.sync 0;", "st.shared.u32 [%r9], %r7;"),
}  # fmt: skip


@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_of_a_ring_is_found(message):
    old, new = FAULTS[message]
    assert RING.count(old) == 1
    with pytest.raises(PtxError, match=f"race: .*{message}"):
        ring(lambda text: text.replace(old, new))
