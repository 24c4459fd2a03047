"""Tensor maps: the driver's 128 opaque bytes by which Hopper's copy unit finds boxes of a matrix.

CUDA driver API, "Tensor Map Object Management", cuTensorMapEncodeTiled; the numbers are those of
cuda.h.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from ...errors import CudaError
from . import driver

BYTES, ALIGNMENT = 128, 64  # of a CUtensorMap
COLUMNS = 64  # of a box: 128 bytes, as wide as the swizzle
_TYPES = {torch.float16: 6, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_*
_NO_INTERLEAVE, _SWIZZLE_128B, _L2_256B, _ZEROS_OUTSIDE = 0, 3, 3, 0


@functools.lru_cache(maxsize=4096)
def encode(
    address: int, columns: int, rows: int, row_bytes: int, box_rows: int, dtype: torch.dtype
) -> bytes:
    """The map of a matrix [rows, columns], read in boxes of box_rows x 64 with the 128-byte swizzle
    and zeros outside.

    address: of the first element, a multiple of 16. row_bytes: from a row to the next, a multiple
    of 16. box_rows: at most 256. dtype: float16 or bfloat16.

    It is kept by its arguments, which are all that goes into it.

    Raises: CudaError if the driver refuses, or is too old to have the function.
    """
    encoder = getattr(driver.library(), "cuTensorMapEncodeTiled", None)
    if encoder is None:
        raise CudaError("the NVIDIA driver has no cuTensorMapEncodeTiled; it has to know CUDA 12")
    room = ctypes.create_string_buffer(BYTES + ALIGNMENT)
    at = -ctypes.addressof(room) % ALIGNMENT
    code = encoder(
        ctypes.c_void_p(ctypes.addressof(room) + at),
        ctypes.c_int(_TYPES[dtype]),
        ctypes.c_uint32(2),  # dimensions
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(row_bytes),
        (ctypes.c_uint32 * 2)(COLUMNS, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),  # elements from one that is copied to the next
        ctypes.c_int(_NO_INTERLEAVE),
        ctypes.c_int(_SWIZZLE_128B),
        ctypes.c_int(_L2_256B),
        ctypes.c_int(_ZEROS_OUTSIDE),
    )
    driver.check(
        code,
        f"a matrix of {rows} rows of {columns} {dtype} elements, {row_bytes} bytes apart at "
        f"{address:#x}, in boxes of {box_rows} rows has no tensor map",
    )
    return room.raw[at : at + BYTES]
