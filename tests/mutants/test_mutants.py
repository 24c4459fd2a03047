"""Every planted fault still has its place: a text that was rewritten would no longer be planted
anywhere.
"""

from __future__ import annotations

import pytest

from mutants.fault import ROOT, Fault
from mutants.faults import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_has_one_place_and_tests_that_exist(fault: Fault):
    path, begin, end = fault.place()
    assert path.read_text(encoding="utf-8")[begin:end] == fault.old != fault.new
    for test in fault.tests:
        assert (ROOT / test.partition("::")[0]).exists(), test


def test_every_room_has_a_fault():
    rooms = ("csrc/cuda", "csrc/cpu", "triton", "format", "models", "engines", "nn", "methods")
    assert all(any(room in fault.files for fault in FAULTS) for room in rooms)
    assert len(FAULTS) >= 20 and len({fault.name for fault in FAULTS}) == len(FAULTS)
