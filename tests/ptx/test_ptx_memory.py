"""The PTX interpreter: memory, barriers, planted faults, each found, and what nvcc makes."""

import shutil
import struct
import subprocess

import numpy as np
import pytest

from ptx import Memory, Module, PtxError, launch
from ptx.programs import bf16_exact, program, run

# ---- global memory ------------------------------------------------------------------------------


def test_global_faults_are_found():
    data, out = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    store = "mad.wide.u32 %d1, %r30, 4, %d10; {}"
    with pytest.raises(
        PtxError,
        match=r"out-of-bounds global write of 4 bytes .*\(0 bytes past the end.*"
        r"thread \(31, 0, 0\)",
    ):
        run(store.format("st.global.u32 [%d1+4], %r30;"), out)
    with pytest.raises(
        PtxError, match=r"out-of-bounds global read .*4 bytes before.*thread \(0, 0, 0\)"
    ):
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


# ---- shared memory: what one thread writes and another reads ------------------------------------

SHARED = ".extern .shared .align 16 .b8 smem[];"
# The addresses of a thread's 16 bytes.
AT = "mov.u32 %r10, smem; mad.lo.u32 %r11, %r30, 16, %r10; mad.wide.u32 %d1, %r30, 16, %d10;"
READ = "ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r12];"
NEIGHBOUR = "xor.b32 %r12, %r30, {}; mad.lo.u32 %r12, %r12, 16, %r10; " + READ.replace(
    "{", "{{"
).replace("}", "}}")
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
        "shl.b32 %r13, %r30, 2; min.u32 %r13, %r13, 16; "
        f"{code} cp.async.wait_all; {NEIGHBOUR.format(0)}"
    )
    expected = np.where(np.arange(4) < np.minimum(np.arange(64), 4)[:, None], data, 0)
    assert np.array_equal(out, expected)


COPY_FAULTS = {
    "not been waited for": COPY + "bar.sync 0;" + NEIGHBOUR.format(0),
    "not been waited": COPY + "cp.async.wait_group 1; bar.sync 0;" + NEIGHBOUR.format(0),
    "after a write by warp 1": COPY
    + "cp.async.wait_group 0; bar.warp.sync -1;"
    + NEIGHBOUR.format(32),
    "after a write by lane 1 of the same warp": COPY
    + "cp.async.wait_group 0;"
    + NEIGHBOUR.format(1),
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
            "setp.lt.u32 %p1, %r30, 32; "
            "@%p1 st.shared.u32 [smem], %r10; @!%p1 st.shared.u32 [smem], %r10;"
        )
    with pytest.raises(
        PtxError, match=r"two lanes of a warp write different bytes.*thread \(1, 0, 0\)"
    ):
        run_shared("st.shared.u32 [smem], %r30;", block=32)


def test_neighbouring_bytes_are_no_race():
    run_shared("add.u32 %r5, %r10, %r30; st.shared.u8 [%r5], %r30; ld.shared.u8 %r1, [%r5];")


def test_a_warp_needs_bar_warp_sync_between_its_lanes():
    store = "st.shared.v4.u32 [%r11], {%r30, %r30, %r30, %r30};"
    run_shared(store + "bar.warp.sync 0xffffffff;" + NEIGHBOUR.format(1))
    with pytest.raises(PtxError, match="after a write by lane 1 of the same warp"):
        run_shared(store + NEIGHBOUR.format(1))


GROUPS = (
    "shr.u32 %r20, %r30, 6; add.u32 %r20, %r20, 1;"  # warps 0, 1 are group 1, warps 2, 3 group 2
)


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
        PtxError,
        match=r"k: line \d+: .*bar.*deadlock: .* waits for threads that exited or wait elsewhere",
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
        PtxError,
        match=r"shared access of 16 bytes at 0x3f0 is beyond the 1008 bytes.*thread \(63, 0, 0\)",
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


# ---- what nvcc makes ----------------------------------------------------------------------------

CUDA = r"""
#include <cuda_bf16.h>
#include <stdint.h>
struct P { const float* x; __nv_bfloat16* y; int n; int row[5]; };
extern "C" __global__ void soft(const P p) {
  extern __shared__ float s[];
  __shared__ float total[8];
  float sum = 0;
  for (int i = threadIdx.x; i < p.n; i += blockDim.x)
    sum += s[i] = p.x[size_t(blockIdx.x) * p.n + i];
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if (threadIdx.x % 32 == 0) total[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < blockDim.x / 32; ++w) sum += total[w];
  for (int i = threadIdx.x; i < p.n; i += blockDim.x)
    p.y[size_t(blockIdx.x) * p.n + i] =
        __float2bfloat16(s[p.n - 1 - i] / sum + p.row[blockIdx.x % 5]);
}
"""


@pytest.mark.parametrize("arch", ["80", "90"])
def test_a_compiled_kernel(tmp_path, arch):
    assert shutil.which("nvcc"), (
        "nvcc is needed: the PTX that it emits is what the interpreter is for"
    )
    source = tmp_path / "k.cu"
    source.write_text(CUDA)
    subprocess.run(
        [
            "nvcc",
            "-std=c++17",
            "-O3",
            f"-arch=compute_{arch}",
            "-ptx",
            source,
            "-o",
            tmp_path / "k.ptx",
        ],
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
    expected = (
        x[:, ::-1] / x.sum(1, keepdims=True) + (np.arange(rows, dtype=np.float32) % 5)[:, None]
    )
    assert np.array_equal(
        y, [[bf16_exact(float(v)) for v in row] for row in expected.astype(np.float32)]
    )
