"""The PTX interpreter: mbarriers and plain bulk copies."""

import numpy as np
import pytest

from ptx import PtxError
from ptx.programs import run

SHARED = ".extern .shared .align 128 .b8 smem[];"
INIT = """
    mov.u32 %r10, smem;
    setp.eq.u32 %p9, %r30, 0;
    @%p9 mbarrier.init.shared::cta.b64 [%r10], {count};
    @%p9 fence.mbarrier_init.release.cluster;
    bar.sync 0;
"""
WAIT = """
AGAIN{name}:
    mbarrier.try_wait.parity.shared::cta.b64 %p8, [%r10], {parity};
    @!%p8 bra AGAIN{name};
"""


def wait(parity, name=""):
    return WAIT.format(parity=parity, name=name)


def execute(body, *arrays, count=1, **options):
    options = {"shared": SHARED, "shared_bytes": 1024, "block": 64} | options
    return run(INIT.format(count=count) + body, *arrays, **options)


# Warp 1 writes, warp 0 reads what it wrote; twice, with a phase each.
EXCHANGE = f"""
    and.b32 %r1, %r30, 31;
    mad.lo.u32 %r2, %r1, 4, %r10;
    mul.wide.u32 %d1, %r1, 4;
    add.u64 %d1, %d1, %d10;
    setp.ge.u32 %p1, %r30, 32;
    @%p1 bra WRITER;
{wait(0)}
    ld.shared.u32 %r3, [%r2+128];
    st.global.u32 [%d1], %r3;
{wait(1, "2")}
    ld.shared.u32 %r3, [%r2+256];
    st.global.u32 [%d1+128], %r3;
    bra END;
WRITER:
    st.shared.u32 [%r2+128], %r30;
    mbarrier.arrive.shared::cta.b64 _, [%r10];
    add.u32 %r4, %r30, 100;
    st.shared.u32 [%r2+256], %r4;
    mbarrier.arrive.release.cta.shared::cta.b64 %d2, [%r10], 1;
END:
"""


def test_a_wait_is_for_the_writes_before_all_arrivals():
    out = np.zeros(64, np.uint32)
    execute(EXCHANGE, out, count=32)
    assert out.tolist() == [*range(32, 64), *range(132, 164)]


def test_the_phase_before_the_first_is_over():
    execute(wait(1) + "mbarrier.test_wait.parity.shared.b64 %p1, [%r10], 1;")


def test_states_of_arrivals():
    body = """
        mbarrier.arrive.shared::cta.b64 %d1, [%r10];
    AGAIN:
        mbarrier.try_wait.shared::cta.b64 %p8, [%r10], %d1;
        @!%p8 bra AGAIN;
        mbarrier.inval.shared::cta.b64 [%r10];
        mbarrier.init.shared::cta.b64 [%r10], 1;
        st.shared.u32 [%r10+128], %r30;
    """
    execute(body, count=1, block=1)


FAULTS = {
    "write by warp 1 after a read by warp 0": (wait(1, "2"), ""),
    r"deadlock: phase 1 of the mbarrier at 0x0 lacks 1 of 32 arrivals and 0 bytes \(32 of 64": (
        "    mbarrier.arrive.release", "setp.eq.u32 %p2, %r30, 40;\n @!%p2 mbarrier.arrive.release",
    ),
    "deadlock: phase 2 of the mbarrier at 0x0 lacks 32 of 32": (
        wait(1, "2"), wait(1, "2") + wait(0, "3"),
    ),
    "the mbarrier at 0x8 is not initialised": (wait(0), wait(0).replace("[%r10]", "[%r10+8]")),
    "read of bytes of an mbarrier": ("ld.shared.u32 %r3, [%r2+128]", "ld.shared.u32 %r3, [%r2]"),
    "write to bytes of an mbarrier": ("st.shared.u32 [%r2+128]", "st.shared.u32 [%r2]"),
    # The second value is written where the first one may still be read.
    "write by warp 1 after a read by warp 0, with no barrier": (
        "st.shared.u32 [%r2+256]", "st.shared.u32 [%r2+128]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_is_found(message):
    old, new = FAULTS[message]
    assert EXCHANGE.count(old) == 1
    with pytest.raises(PtxError, match=message):
        execute(EXCHANGE.replace(old, new), np.zeros(64, np.uint32), count=32)


def test_an_arrival_of_one_lane_does_not_speak_for_the_others():
    """Lane 0 arrives for its warp: the others' stores need a bar.warp.sync before."""
    one = EXCHANGE.replace("mbarrier.arrive", "setp.eq.u32 %p2, %r30, 32;\n@%p2 mbarrier.arrive")
    with pytest.raises(PtxError, match="read by warp 0 after a write by warp 1"):
        execute(one, np.zeros(64, np.uint32), count=1)
    synced = one.replace("setp.eq.u32 %p2", "bar.warp.sync -1;\nsetp.eq.u32 %p2")
    out = np.zeros(64, np.uint32)
    execute(synced, out, count=1)
    assert out.tolist() == [*range(32, 64), *range(132, 164)]


def test_counts():
    two = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 16;"
    with pytest.raises(PtxError, match="more arrivals at the mbarrier at 0x0 than it counts"):
        execute(two + two, block=1)
    with pytest.raises(PtxError, match="more arrivals at the mbarrier at 0x0 than it counts"):
        execute("mbarrier.arrive.shared::cta.b64 _, [%r10], 5;", block=1, count=4)
    with pytest.raises(PtxError, match="an mbarrier of 0 arrivals"):
        execute("", count=0)
    with pytest.raises(PtxError, match="initialised already"):
        execute("mbarrier.init.shared::cta.b64 [%r10], 1;", block=1)
    with pytest.raises(PtxError, match="may not be initialised yet"):
        run(
            INIT.format(count=64).replace("bar.sync 0;", "")
            + "mbarrier.arrive.shared::cta.b64 _, [%r10];",
            shared=SHARED,
            shared_bytes=128,
            block=64,
        )


def test_of_more_arrivals_than_are_missing_the_first_end_the_phase():
    """Of three warps that arrive at once where two are counted, the last one is not waited for."""
    body = f"""
        setp.ge.u32 %p1, %r30, 32;
        @%p1 bra WRITER;
        {wait(0)}
        ld.shared.u32 %r3, [%r10+{{}}];
        bra END;
    WRITER:
        mad.lo.u32 %r2, %r30, 4, %r10;
        st.shared.u32 [%r2], %r30;
        bar.warp.sync -1;
        and.b32 %r1, %r30, 31;
        setp.eq.u32 %p2, %r1, 0;
        @%p2 mbarrier.arrive.shared::cta.b64 _, [%r10];
    END:
    """
    execute(body.format(256), block=128, count=2)
    execute(body.format(384), block=128, count=3)
    with pytest.raises(PtxError, match="read by warp 0 after a write by warp 3"):
        execute(body.format(384), block=128, count=2)


# Thread 0 fetches 256 bytes in two pieces, all threads wait for them.
COPY = f"""
    mbarrier.init.shared::cta.b64 [%r10+8], 1;
    fence.proxy.async.shared::cta;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 256;
    add.u32 %r1, %r10, 128;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d11], 128, [%r10];
    add.u32 %r2, %r1, 128;
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [%d11+128], 128, [%r10];
OVER:
{wait(0)}
    mad.lo.u32 %r2, %r30, 4, %r10;
    ld.shared.u32 %r3, [%r2+128];
    mul.wide.u32 %d1, %r30, 4;
    add.u64 %d1, %d1, %d10;
    st.global.u32 [%d1], %r3;
"""


def copy(old="", new="", dependent=False, early=()):
    assert not old or COPY.count(old) == 1
    data, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    body = "setp.ne.u32 %p1, %r30, 0;\n@%p1 bra OVER;" + COPY.replace(old, new)
    stats = execute(body, out, data, dependent=dependent, early=early)
    return data, out, stats


def test_a_bulk_copy_is_exact():
    data, out, stats = copy()
    assert np.array_equal(data, out)
    assert stats["cp.async.bulk"] == 2 and stats["global_read_bytes"] == 256


EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 256;"
COPY_FAULTS = {
    "race: read of bytes of a cp.async": (wait(0), ""),
    "deadlock: .*lacks 0 of 1 arrivals and -16 bytes": ("_, [%r10], 256", "_, [%r10], 240"),
    "deadlock: .*lacks 0 of 1 arrivals and 16 bytes": ("_, [%r10], 256", "_, [%r10], 272"),
    "race: read of bytes of a cp.async that": ("_, [%r10], 256", "_, [%r10], 128"),
    "deadlock: .*lacks 1 of 1 arrivals and -256": (EXPECT, ""),
    "all must be multiples of 16": ("[%d11+128], 128", "[%d11+128], 120"),
    "from 0x.*8 to": ("[%d11+128], 128", "[%d11+120], 128"),
    "to 0x108: all must be": ("[%r2], [", "[%r2+8], ["),
    "out-of-bounds global read": ("[%d11+128], 128", "[%d11+144], 128"),
    "beyond the 1024 bytes": ("[%r2], [", "[%r2+656], ["),
    "write to bytes of a cp.async": ("[%r2], [", "[%r2+-16], ["),
    "write to bytes of an mbarrier": ("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx"
    "::bytes [%r1]", "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r10]"),
    # The second one arrives at another mbarrier, which nobody waits for.
    "deadlock: .*lacks 0 of 1 arrivals and 128 bytes": ("[%r10];\nOVER", "[%r10+8];\nOVER"),
    "a bulk copy with the mbarrier at 0x8, with no fence": (
        "    fence.proxy.async.shared::cta;\n",
        "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r10+128], [%d11], 16, "
        "[%r10+8];\n",
    ),
    "a bulk copy over stores with no fence.proxy.async": (
        "    add.u32 %r1, %r10, 128;\n",
        "add.u32 %r1, %r10, 128; st.shared.u32 [%r1], %r30;\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", COPY_FAULTS)
def test_a_fault_of_a_bulk_copy_is_found(message):
    with pytest.raises(PtxError, match=message):
        copy(*COPY_FAULTS[message])


def test_a_fence_orders_stores_and_a_bulk_copy():
    store = "add.u32 %r1, %r10, 128; st.shared.u32 [%r1], %r30; fence.proxy.async.shared::cta;\n"
    data, out, _ = copy("    add.u32 %r1, %r10, 128;\n", store)
    assert np.array_equal(data, out)


def test_a_wait_for_one_mbarrier_does_not_cover_the_copies_of_another():
    """The first copy goes to an mbarrier of its own, and has landed when the second is waited for;
    still nobody may read it."""
    old = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 256;"
    new = old.replace("256", "128") + old.replace("256", "128").replace("[%r10]", "[%r10+8]")
    body = COPY.replace(old, new).replace("[%d11], 128, [%r10]", "[%d11], 128, [%r10+8]")
    body = "setp.ne.u32 %p1, %r30, 0;\n@%p1 bra OVER;" + body
    data, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    with pytest.raises(PtxError, match="after a write by a bulk copy"):
        execute(body, out, data)


def test_a_copy_that_nobody_waits_for_is_found():
    text = "may end before it has waited for a bulk copy|which has exited"
    with pytest.raises(PtxError, match=text):
        copy("OVER:\n" + wait(0), "OVER: ret;")


def test_the_source_of_a_dependent_launch():
    with pytest.raises(PtxError, match=r"read of memory .* ahead of griddepcontrol.wait"):
        copy("OVER:\n", "OVER: griddepcontrol.wait;\n", dependent=True)
    data, out, _ = copy("OVER:\n", "OVER: griddepcontrol.wait;\n", dependent=True, early=(1,))
    assert np.array_equal(data, out)
    copy("    mbarrier.init.shared", "griddepcontrol.wait;\nmbarrier.init.shared", early=(1,))
