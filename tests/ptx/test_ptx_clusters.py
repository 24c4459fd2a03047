"""The PTX interpreter: clusters of CTAs, their barrier, and what their CTAs do to each other."""

import numpy as np
import pytest

from ptx import PtxError, tensor_map
from ptx.programs import run
from ptx.test_ptx_tensor_maps import aligned

SHARED = ".extern .shared .align 1024 .b8 smem[];"
PAIR = ".explicitcluster\n.reqnctapercluster 2, 1, 1"
MEET = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"


def execute(body, *arrays, **options):
    options = {
        "grid": 4, "block": 64, "shared": SHARED, "shared_bytes": 4096, "directives": PAIR,
    } | options  # fmt: skip
    return run("mov.u32 %r10, smem;" + body, *arrays, **options)


def test_special_registers():
    names = [
        "cluster_ctarank", "cluster_nctarank", "clusterid.x", "clusterid.y", "nclusterid.x",
        "nclusterid.y", "cluster_ctaid.x", "cluster_ctaid.y", "cluster_nctaid.y",
    ]  # fmt: skip
    out = np.zeros((12, 9), np.uint32)
    body = "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mad.lo.u32 %r1, %r2, 6, %r1;"
    body += "mul.wide.u32 %d1, %r1, 36; add.u64 %d1, %d1, %d10;"
    for k, name in enumerate(names):
        body += f"mov.u32 %r3, %{name}; st.global.u32 [%d1+{4 * k}], %r3;"
    execute(body, out, grid=(6, 2), block=1, directives=".reqnctapercluster 3, 2, 1", chunk=1)
    for y in range(2):
        for x in range(6):
            row = [x % 3 + 3 * y, 6, x // 3, 0, 2, 1, x % 3, y, 2]
            assert out[6 * y + x].tolist() == row
    with pytest.raises(PtxError, match="in clusters of"):
        execute("", grid=(5,))


# Each CTA stores at the other one's, and reads what the other one stored here.
EXCHANGE = f"""
    mov.u32 %r1, %cluster_ctarank;
    xor.b32 %r2, %r1, 1;
    mapa.shared::cluster.u32 %r3, %r10, %r2;
    mad.lo.u32 %r3, %r30, 4, %r3;
    mov.u32 %r4, %ctaid.x;
    mad.lo.u32 %r4, %r4, 1000, %r30;
    barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;  // begun
    st.shared::cluster.u32 [%r3], %r4;
    {MEET}
    xor.b32 %r5, %r30, 33;
    mad.lo.u32 %r6, %r5, 4, %r10;
    ld.shared.u32 %r7, [%r6];
    mov.u32 %r8, %ctaid.x;
    mad.lo.u32 %r8, %r8, 64, %r5;
    mul.wide.u32 %d1, %r8, 4;
    add.u64 %d1, %d1, %d10;
    st.global.u32 [%d1], %r7;
"""


def test_shared_memory_of_another_cta():
    out = np.zeros((4, 64), np.uint32)
    execute(EXCHANGE, out)
    thread = np.arange(64)
    assert np.array_equal(out, [1000 * (cta ^ 1) + thread for cta in range(4)])


EXCHANGE_FAULTS = {
    "race: read by warp . of CTA . of the cluster after a write by warp": (MEET, ""),
    "race: read by warp . of CTA 0 of the cluster": (MEET, MEET.replace("release", "relaxed")),
    "wait without an arrive": (MEET, MEET.partition(";")[2]),
    "arrive twice": (MEET, MEET.partition(";")[0] + ";" + MEET),
    "barrier.cluster executed by a partial warp": (
        MEET, "setp.eq.u32 %p1, %r30, 3; @%p1 bra OVER;" + MEET + "OVER:"),
    "deadlock: barrier 1 waits for threads": (
        MEET,
        f"setp.lt.u32 %p1, %r30, 32; @%p1 bra OTHER; {MEET} bra END; OTHER: bar.sync 1, 64; END:",
    ),
    "mapa to CTA 2 of a cluster of 2": ("xor.b32 %r2, %r1, 1", "add.u32 %r2, %r1, 1"),
}  # fmt: skip


@pytest.mark.parametrize("message", EXCHANGE_FAULTS)
def test_a_fault_of_an_exchange_is_found(message):
    old, new = EXCHANGE_FAULTS[message]
    assert EXCHANGE.count(old) >= 1
    head, _, tail = EXCHANGE.rpartition(old)
    with pytest.raises(PtxError, match=message):
        execute(head + new + tail, np.zeros((4, 64), np.uint32))


def test_threads_that_have_exited_do_not_count():
    body = f"setp.lt.u32 %p1, %r30, 32; @%p1 exit; {MEET} st.global.u32 [%d10], %r30;"
    out = np.zeros(1, np.uint32)
    execute(body, out, block=33, grid=2)
    assert out[0] == 32


def test_a_relaxed_arrival_after_a_fence_makes_mbarriers_known():
    body = """
    setp.ne.u32 %p1, %r30, 0;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%r10], 128;
    fence.mbarrier_init.release.cluster;
READY:
    barrier.cluster.arrive.relaxed.aligned;
    barrier.cluster.wait.acquire.aligned;
    mapa.shared::cluster.u32 %r3, %r10, 0;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r3];
    """
    execute(body + MEET)
    with pytest.raises(PtxError, match="may not be initialised yet"):
        execute(body.replace("fence.mbarrier_init.release.cluster;", "") + MEET)


# Two stages of two halves of a tile: each CTA fetches its half for both. Two threads of each warp
# give the stages back to both CTAs; the first one is fetched anew, for the second one nobody waits.
MULTICAST = """
    mov.u32 %r1, %cluster_ctarank;
    setp.ne.u32 %p1, %r30, 0;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%r10], 1;
    mbarrier.init.shared::cta.b64 [%r10+8], 1;
    mbarrier.init.shared::cta.b64 [%r10+16], 4;
    mbarrier.init.shared::cta.b64 [%r10+24], 4;
    fence.mbarrier_init.release.cluster;
READY:
    barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; // begun
    shl.b32 %r2, %r1, 3;
    mad.lo.u32 %r3, %r1, 1024, %r10;
    mov.b16 %h1, 3;
    mov.u32 %r4, 0;
    @%p1 bra CONSUME;
    FETCH0
    FETCH1
EMPTY:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10+16], 0;
    @!%p2 bra EMPTY;
    FETCH2
    bra CONSUMED;
CONSUME:
    setp.lt.u32 %p3, %r30, 32;
    @%p3 bra CONSUMED;
FULL0:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10], 0;
    @!%p2 bra FULL0;
    mad.lo.u32 %r5, %r30, 32, %r10;
    ld.shared.u32 %r6, [%r5];
    bar.warp.sync -1;
    and.b32 %r7, %r30, 31;
    setp.lt.u32 %p4, %r7, 2;
    mapa.shared::cluster.u32 %r8, %r10, 0;
    mapa.shared::cluster.u32 %r9, %r10, 1;
    setp.eq.u32 %p5, %r7, 1;
    selp.b32 %r8, %r9, %r8, %p5;
    @%p4 mbarrier.arrive.shared::cluster.b64 _, [%r8+16];
FULL1:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10+8], 0;
    @!%p2 bra FULL1;
    ld.shared.u32 %r11, [%r5+2048];
    add.u32 %r6, %r6, %r11;
    bar.warp.sync -1;
    @%p4 mbarrier.arrive.shared::cluster.b64 _, [%r8+24];
FULL2:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10], 1;
    @!%p2 bra FULL2;
    ld.shared.u32 %r11, [%r5];
    add.u32 %r6, %r6, %r11;
    mad.lo.u32 %r12, %r1, 64, %r30;
    mul.wide.u32 %d1, %r12, 4;
    add.u64 %d1, %d1, %d10;
    st.global.u32 [%d1+-128], %r6;
CONSUMED:
    bar.warp.sync -1;
    barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; // ended
"""
FETCH = """
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10+{bar}], 2048;
    mov.u32 %r4, {column};
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster
        [%r3+{to}], [%d11, {{%r4, %r2}}], [%r10+{bar}], %h1;
"""


def multicast(old="", new="", **options):
    text = MULTICAST
    for k, (bar, to) in enumerate(((0, 1024), (8, 3072), (0, 1024))):
        text = text.replace(f"FETCH{k}", FETCH.format(bar=bar, to=to, column=64 * k))
    assert not old or text.count(old) >= 1
    text = text.replace(old, new)
    matrix = np.arange(16 * 192, dtype=np.uint16).reshape(16, 192)
    out = np.zeros((2, 64), np.uint32)
    raw = aligned(tensor_map(matrix.ctypes.data, 192, 16, 384, 64, 8, 128, 2))
    execute(text, out, raw, matrix, grid=2, block=96, shared_bytes=5120, **options)
    return matrix, out


def test_multicast():
    """Consumer t reads the first word of every second piece of the tile."""
    matrix, out = multicast()
    row, piece = np.divmod(np.arange(64), 4)
    column = 8 * (2 * piece ^ row % 8)
    low, high = (
        sum(matrix[row, column + 64 * k + h].astype(int) for k in range(3)) for h in (0, 1)
    )
    assert np.array_equal(out, np.stack([low + (high << 16)] * 2))


FAULTS = {
    "a bulk copy|may not be initialised|not initialised": (
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; // begun",
        "bar.sync 0;",
    ),
    "may end before|has exited": (
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; // ended",
        "",
    ),
    "deadlock: phase 0 of the mbarrier at 0x10 of CTA .0, 0, 0. lacks 1 of 5": (
        "[%r10+16], 4",
        "[%r10+16], 5",
    ),
    "race: write by warp 0": ("[%r10+16], 4", "[%r10+16], 3"),
    "0x10 of CTA .1, 0, 0. lacks 4 of 4 arrivals": (
        "setp.lt.u32 %p4, %r7, 2",
        "setp.lt.u32 %p4, %r7, 1",
    ),
    "more arrivals at the mbarrier at 0x0": ("    @!%p2 bra EMPTY;", ""),
    "bytes of a cp.async that": ("    @!%p2 bra FULL1;", ""),
    "read of bytes of a cp.async": ("2048;", "1024;"),
    "multicast mask 0x7 in a cluster of 2": ("mov.b16 %h1, 3;", "mov.b16 %h1, 7;"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_of_a_multicast_is_found(message):
    old, new = FAULTS[message]
    with pytest.raises(PtxError, match=message):
        multicast(old, new)
