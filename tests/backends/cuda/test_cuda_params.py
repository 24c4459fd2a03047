"""The structs that kernels take, field by field: ctypes beside the text of csrc/cuda."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from slab_kernels.backends.base import MAX_PARTS
from slab_kernels.backends.cuda.launch import LinearParams
from slab_kernels.backends.cuda.prefill_launch import PrefillParams

CSRC = Path(__file__).resolve().parents[3] / "csrc" / "cuda"
STRUCTS = [
    ("params.h", "LinearParams", LinearParams),
    ("prefill.h", "PrefillParams", PrefillParams),
]
TYPES = {
    "int": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "TensorMap": ctypes.c_uint8 * 128,
}  # any pointer is a uint64


def declared(header: str, struct: str) -> list[tuple[str, type]]:
    """Names and types of a struct's members, in order."""
    text = re.sub(r"//.*", "", (CSRC / header).read_text(encoding="utf-8"))
    found = re.search(rf"struct {struct} {{(.*?)}};", text, re.DOTALL)
    assert found is not None
    members: list[tuple[str, type]] = []
    for statement in filter(None, map(str.strip, found[1].split(";"))):
        kind, names = re.fullmatch(r"((?:const )?\w+[ *]+)(.*)", statement, re.DOTALL).groups()
        of_kind = ctypes.c_uint64 if "*" in kind else TYPES[kind.strip()]
        for name in map(str.strip, names.split(",")):
            if name.endswith("[kMaxParts + 1]"):
                members.append((name.split("[")[0], of_kind * (MAX_PARTS + 1)))
            else:
                members.append((name, of_kind))
    return members


def fields(struct: type[ctypes.Structure]) -> list[tuple[str, type]]:
    """Names and types of a ctypes struct's fields, those that it inherits first."""
    found: list[tuple[str, type]] = []
    for each in reversed(struct.__mro__):
        found += [field for field in each.__dict__.get("_fields_", ()) if field[0] != "padding"]
    return found


@pytest.mark.parametrize(("header", "name", "struct"), STRUCTS)
def test_a_struct_mirrors_its_header(header, name, struct):
    assert fields(struct) == declared(header, name)


def test_tensor_maps_lie_where_the_hardware_reads_them():
    """Each at a multiple of 64 bytes of the parameters, whose size is one as well."""
    assert (PrefillParams.x_map.offset, PrefillParams.z_map.offset) == (0, 128)
    assert ctypes.sizeof(PrefillParams) % 64 == 0
    last = max(getattr(PrefillParams, name).offset for name, _ in fields(PrefillParams))
    assert ctypes.sizeof(PrefillParams) - last - 4 * (MAX_PARTS + 1) < 64
