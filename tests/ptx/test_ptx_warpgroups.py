"""The PTX interpreter: warpgroups that hand registers to each other, and a ring of tiles between a
producer and a warpgroup that multiplies them, with planted faults."""

import numpy as np
import pytest

from ptx import PtxError
from ptx.programs import run
from ptx.test_ptx_wgmma import (
    DESCRIPTOR,
    SHARED,
    bits,
    fragments,
    instruction,
    integers,
    map_of,
    unfragmented,
)

# Two groups of 128 threads have 256 registers' worth of 2 x 128: 168 at the launch of 384 threads.
LIMITS = ".maxntid 384, 1, 1\n.minnctapersm 1"
HAND_OVER = """
    setp.lt.u32 %p1, %r30, 256;
    @%p1 bra CONSUMER;
    setmaxnreg.dec.sync.aligned.u32 40;
    ret;
CONSUMER:
    setmaxnreg.inc.sync.aligned.u32 232;
    bar.sync 1, 256;
"""


def test_registers_are_handed_over():
    stats = run(HAND_OVER, block=384, directives=LIMITS, grid=2)
    assert stats["setmaxnreg.dec"] == 8


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("u32 232", "u32 240", "deadlock: setmaxnreg waits for registers"),
        ("    setmaxnreg.dec.sync.aligned.u32 40;\n", "", "deadlock: setmaxnreg waits"),
        ("u32 232", "u32 160", "setmaxnreg.inc from 168 registers to 160"),
        ("dec.sync.aligned.u32 40", "dec.sync.aligned.u32 176", "setmaxnreg.dec from 168"),
        ("u32 40", "u32 36", "setmaxnreg of 36 registers"),
        ("%r30, 256", "%r30, 288", "deadlock: "),
    ],
)
def test_faults_of_setmaxnreg(old, new, message):
    with pytest.raises(PtxError, match=message):
        run(HAND_OVER.replace(old, new), block=384, directives=LIMITS)
    if "waits" in message:  # without the directives nobody knows what there is
        run(HAND_OVER.replace(old, new), block=384)


N, TILES, STAGES = 16, 7, 3
BYTES = 128 * N
# The 129th thread fetches tiles of 64 columns of B, the first 128 multiply them with A.
RING = f"""
    .reg .b32 %a<16>; .reg .f32 %c<{N // 2}>;
    mov.u32 %r10, smem;
    setp.ne.u32 %p1, %r30, 0;
    @%p1 bra READY;
    INIT
    fence.mbarrier_init.release.cluster;
READY:
    bar.sync 0;
    mov.u32 %r1, 0;                                     // the tile
    mov.u32 %r2, 0;                                     // its stage
    mov.u32 %r3, 0;                                     // the parity of the round
    setp.ge.u32 %p2, %r30, 128;
    @%p2 bra PRODUCER;
    ZERO
    mul.wide.u32 %d1, %r30, 16;
    add.u64 %d1, %d1, %d11;
    and.b32 %r4, %r30, 31;
    setp.eq.u32 %p3, %r4, 0;
NEXT:
    LOAD
    add.u64 %d1, %d1, {4 * 2048};
    mad.lo.u32 %r5, %r2, 8, %r10;
    mad.lo.u32 %r6, %r2, {BYTES}, %r10;
    add.u32 %r6, %r6, 1024;
    {DESCRIPTOR}
FULL:
    mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r5], %r3;
    @!%p4 bra FULL;
    wgmma.fence.sync.aligned;
    MULTIPLY
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    @%p3 mbarrier.arrive.shared::cta.b64 _, [%r5+{8 * STAGES}];
    add.u32 %r2, %r2, 1;
    setp.eq.u32 %p5, %r2, {STAGES};
    selp.b32 %r2, 0, %r2, %p5;
    @%p5 xor.b32 %r3, %r3, 1;
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p6, %r1, {TILES};
    @%p6 bra NEXT;
    mul.wide.u32 %d2, %r30, {2 * N};
    add.u64 %d2, %d2, %d10;
    STORE
    bra END;
PRODUCER:
    setp.ne.u32 %p3, %r30, 128;
    @%p3 bra END;
    mov.u32 %r3, 1;
    mov.u32 %r11, 0;
FILL:
    mad.lo.u32 %r5, %r2, 8, %r10;
EMPTY:
    mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r5+{8 * STAGES}], %r3;
    @!%p4 bra EMPTY;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], {BYTES};
    mad.lo.u32 %r6, %r2, {BYTES}, %r10;
    shl.b32 %r12, %r1, 6;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
        [%r6+1024], [%d12, {{%r12, %r11}}], [%r5];
    add.u32 %r2, %r2, 1;
    setp.eq.u32 %p5, %r2, {STAGES};
    selp.b32 %r2, 0, %r2, %p5;
    @%p5 xor.b32 %r3, %r3, 1;
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p6, %r1, {TILES};
    @%p6 bra FILL;
END:
"""
INIT = "".join(
    f"mbarrier.init.shared::cta.b64 [%r10+{8 * k}], {1 if k < STAGES else 4};\n"
    for k in range(2 * STAGES)
)
ZERO = "".join(f"mov.f32 %c{k}, 0f00000000;\n" for k in range(N // 2))
LOAD = "".join(
    f"ld.global.v4.b32 {{%a{4 * k}, %a{4 * k + 1}, %a{4 * k + 2}, %a{4 * k + 3}}}, "
    f"[%d1+{2048 * k}];\n"
    for k in range(4)
)
MULTIPLY = "".join(f"{instruction(N, step=k)}\nadd.u64 %d9, %d9, 2;\n" for k in range(4))
STORE = "".join(f"st.global.f32 [%d2+{4 * k}], %c{k};\n" for k in range(N // 2))
PARTS = {"INIT": INIT, "ZERO": ZERO, "LOAD": LOAD, "MULTIPLY": MULTIPLY, "STORE": STORE}


def ring(old="", new="", **options):
    assert not old or RING.count(old) == 1
    text = RING.replace(old, new)
    for name, part in PARTS.items():
        text = text.replace(f"    {name}\n", part)
    a, b = integers(1, 64, 64 * TILES), integers(2, N, 64 * TILES)
    words, matrix = fragments(a, "f16"), bits(b, "f16")
    out = np.full((128, N // 2), np.nan, np.float32)
    run(
        text, out, words, map_of(matrix, N), matrix, block=160, shared=SHARED,
        shared_bytes=1024 + STAGES * BYTES, **options,
    )  # fmt: skip
    return unfragmented(out), a @ b.T


@pytest.mark.parametrize("late_products", [True, False])
@pytest.mark.parametrize("check_races", [True, False])
def test_a_ring_is_exact_and_no_race(late_products, check_races):
    got, expected = ring(late_products=late_products, check_races=check_races)
    assert np.array_equal(got, expected)


ARRIVE = f"    @%p3 mbarrier.arrive.shared::cta.b64 _, [%r5+{8 * STAGES}];\n"
FENCE = "    fence.mbarrier_init.release.cluster;\n"
LAST = "    wgmma.wait_group.sync.aligned 0;\n" + ARRIVE
FAULTS = {
    "a wgmma reads bytes that nobody has written": ("    @!%p4 bra FULL;\n", ""),
    "a wgmma reads bytes of a copy that has not been waited for": (
        "bra FULL;\n", f"bra FULL;\n    add.u64 %d9, %d9, {BYTES // 16};\n",
    ),
    "more arrivals at the mbarrier at 0x0 than it counts": ("    @!%p4 bra EMPTY;\n", ""),
    "write by warp 4 after a read by a wgmma of warpgroup 0": (
        LAST, ARRIVE + "    wgmma.wait_group.sync.aligned 0;\n",
    ),
    "write by warp 4 after a read by a wgmma": (
        "wait_group.sync.aligned 0;", "wait_group.sync.aligned 1;"),
    # Only three of the four warps are waited for.
    "write by warp 4 after a read by a wgmma of": ("    INIT\n", "    INIT\n".replace("INIT",
    INIT.replace("], 4;", "], 3;"))),
    "of the mbarrier at 0x18 lacks 1 of 5": ("    INIT\n", INIT.replace("], 4;", "], 5;")),
    "of the mbarrier at 0x18 lacks 4 of 4": (ARRIVE, ""),
    "lacks 0 of 1 arrivals and -64 bytes": (f"[%r5], {BYTES};", f"[%r5], {BYTES - 64};"),
    "lacks 0 of 1 arrivals and 64 bytes": (f"[%r5], {BYTES};", f"[%r5], {BYTES + 64};"),
    "may not be initialised yet": ("READY:\n    bar.sync 0;\n", "READY:\n"),
    "with no fence.mbarrier_init or fence.proxy.async": (FENCE, ""),
    "ahead of the first wgmma.fence": ("    wgmma.fence.sync.aligned;\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("late_products", [True, False])
@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_of_a_ring_is_found(message, late_products):
    with pytest.raises(PtxError, match=message):
        ring(*FAULTS[message], late_products=late_products)


def test_a_wrong_parity_is_found():
    with pytest.raises(PtxError, match="deadlock"):
        ring("    mov.u32 %r3, 1;\n", "    mov.u32 %r3, 0;\n")
