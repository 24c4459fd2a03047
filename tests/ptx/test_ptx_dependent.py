"""The PTX interpreter: what a kernel may do before it has waited for the kernel ahead of it."""

import numpy as np
import pytest

from ptx import Module, PtxError, launch
from ptx.programs import program, run

WAIT = "griddepcontrol.wait;"
# Weights are array 0 and early; activations are array 1, the result is array 2.
AT = "mul.wide.u32 %d5, %r30, 16;" + "".join(f"add.u64 %d{k}, %d5, %d1{k};" for k in range(3))
WEIGHTS = "ld.global.nc.v4.u32 {%r1, %r2, %r3, %r4}, [%d0];"
ACTIVATIONS = "ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%d1];"
STORE = "st.global.u32 [%d2], %r1;"
COPY = "mov.u32 %r10, smem; mad.lo.u32 %r11, %r30, 16, %r10; cp.async.cg.shared.global [%r11], "
LAND = "cp.async.wait_all;"
EARLY_ONLY = "setp.lt.u32 %p1, %r30, {};"  # those threads wait


def dependent(body, block=64, dependent=True, **options):
    data = [np.zeros((2 * block, 4), np.uint32) for _ in range(3)]
    shared = ".extern .shared .align 16 .b8 smem[];"
    options |= {"block": block, "grid": 2, "shared": shared, "shared_bytes": 16 * block}
    return run(AT + body, *data, early=(0,), dependent=dependent, **options)


@pytest.mark.parametrize(
    "body",
    [
        WEIGHTS + WAIT + ACTIVATIONS + STORE,
        COPY + "[%d0], 16;" + WAIT + LAND + COPY + "[%d1], 16;" + LAND + STORE,
        "prefetch.global.L1 [%d0]; prefetch.global.L2 [%d1];" + WAIT + STORE,
        "cp.async.bulk.prefetch.L2.global [%d1], 32;" + WAIT,
        "mov.u32 %r20, %ctaid.x; setp.eq.u32 %p1, %r20, 1; @%p1 exit;" + WAIT + STORE,
        # The other threads of the CTA touch early memory alone.
        EARLY_ONLY.format(32) + "@%p1 griddepcontrol.wait; @%p1 bra LATE; exit; LATE:" + STORE,
    ],
)
def test_weights_may_be_read_ahead(body):
    stats = dependent("griddepcontrol.launch_dependents;" + body, chunk=1)
    assert stats["griddepcontrol.launch_dependents"] == 4 and stats["griddepcontrol.wait"]


FAULTS = {
    "read of memory .* ahead of": ACTIVATIONS + WAIT,
    "read of memory .* may still write, ahead of": COPY + "[%d1], 16;" + WAIT + LAND,
    "read of memory that": COPY + "[%d1], 16, 4;" + WAIT + LAND,
    "read of memory that the kernel before may still write": "prefetch.global.L1 [%d1];" + WAIT,
    "global write ahead of": WEIGHTS + STORE + WAIT,
    "global write ahead of .*thread .40, 0, 0.": EARLY_ONLY.format(40)
    + "@%p1 griddepcontrol.wait;"
    + STORE,
    r"through the read-only cache \(.nc\)": WAIT + ACTIVATIONS.replace("global", "global.nc"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_is_done_too_early_is_found(message):
    with pytest.raises(PtxError, match=rf"k: line \d+: .*{message}"):
        dependent(FAULTS[message])
    dependent(FAULTS[message], dependent=False)  # An ordinary launch begins after the one before.


def test_a_launch_that_never_waits_is_found():
    with pytest.raises(PtxError, match=r"k: a dependent launch without griddepcontrol\.wait"):
        dependent(WEIGHTS)


def test_only_code_for_hopper_is_launched_so():
    text = program(WAIT, "").replace("sm_90", "sm_80")
    with pytest.raises(PtxError, match="a dependent launch of code for sm_80"):
        launch(Module(text)["k"], (1,), (32,), b"", dependent=True)


def test_prefetches_are_checked():
    with pytest.raises(PtxError, match="out-of-bounds"):
        dependent(WAIT + "prefetch.global.L2 [%d1+2048];")
    with pytest.raises(PtxError, match="out-of-bounds"):
        dependent(WAIT + "cp.async.bulk.prefetch.L2.global [%d1], 2048;")
    with pytest.raises(PtxError, match="prefetch of 8 bytes"):
        dependent(WAIT + "cp.async.bulk.prefetch.L2.global [%d1], 8;")
