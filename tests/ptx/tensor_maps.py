"""Tensor maps and the layout of a tile in shared memory (PTX ISA 5.5 "Tensors"; CUDA driver API,
cuTensorMapEncodeTiled).

The 128 bytes of a map are opaque: only the driver's encoder writes real ones. The interpreter has
an encoding of its own, and refuses what the driver would refuse."""

import numpy as np

from .decode import PtxError

_MAP = np.dtype(
    [
        ("magic", "u8"),
        ("address", "u8"),
        ("columns", "u8"),
        ("rows", "u8"),
        ("row_bytes", "u8"),
        ("box_columns", "u4"),
        ("box_rows", "u4"),
        ("swizzle", "u4"),
        ("element_bytes", "u4"),
    ]
)
_MAGIC = 0x51AB0C0DE
_ATOMS = {0: 0, 32: 1, 64: 3, 128: 7}  # bits that are exchanged, by the bytes of the swizzle


def tensor_map(
    address, columns, rows, row_bytes, box_columns, box_rows, swizzle=128, element_bytes=2
):
    """The interpreter's 128 bytes for a matrix of `rows` rows, `row_bytes` apart, of `columns`
    elements of `element_bytes`, from which boxes of `box_rows` x `box_columns` are copied, with a
    swizzle of 0, 32, 64 or 128 bytes and zeros outside the matrix.
    """
    inner = box_columns * element_bytes
    for wrong, text in (
        (address % 16, f"address {address:#x} is not a multiple of 16"),
        (row_bytes % 16, f"rows are {row_bytes} bytes apart, not a multiple of 16"),
        (not 0 < row_bytes < 1 << 40, f"rows are {row_bytes} bytes apart"),
        (columns < 1 or rows < 1, f"{rows} rows of {columns} columns"),
        (columns * element_bytes > row_bytes, "rows overlap"),
        (not (0 < box_columns <= 256 and 0 < box_rows <= 256), "a box has 1 to 256 of each"),
        (inner % 16, f"a row of a box is {inner} bytes, not a multiple of 16"),
        (swizzle not in _ATOMS, f"a swizzle of {swizzle} bytes"),
        (swizzle and inner > swizzle, f"{inner} bytes are more than the swizzle of {swizzle}"),
    ):
        if wrong:
            raise PtxError(f"tensor map: {text}")
    raw = np.zeros(128, np.uint8)
    raw[: _MAP.itemsize].view(_MAP)[0] = (
        _MAGIC, address, columns, rows, row_bytes, box_columns, box_rows, swizzle, element_bytes,
    )  # fmt: skip
    return raw.tobytes()


def swizzled(at, swizzle):
    """Addresses of shared memory under a swizzle of so many bytes: bits 4, 5, 6 (fewer for 64 and
    32 bytes) are xored with bits 7, 8, 9.
    """
    return at ^ (at >> 7 & _ATOMS[swizzle]) << 4


class Tile:
    """One box of a map: where its 16-byte pieces come from and go."""

    def __init__(self, raw, column, row):
        t = np.frombuffer(bytes(raw[: _MAP.itemsize]), _MAP)[0]
        if t["magic"] != _MAGIC:
            raise PtxError("there is no tensor map")
        self.swizzle, element = int(t["swizzle"]), int(t["element_bytes"])
        rows, inner = int(t["box_rows"]), int(t["box_columns"]) * element
        self.size, self.inner = rows * inner, inner
        # bytes of each piece that are inside the matrix: from `low` to `high`
        start = column * element + np.arange(0, inner, 16)
        width = int(t["columns"]) * element
        self.low = np.clip(-start, 0, 16)
        self.high = np.clip(width - start, 0, 16)
        at_row = row + np.arange(rows)
        inside = (at_row >= 0) & (at_row < int(t["rows"]))
        filled = self.low < self.high
        self.some = inside[:, None] & filled[None]
        self.row_address = int(t["address"]) + at_row * int(t["row_bytes"])
        self.start = start

    def bytes_of(self, memory, lane):
        """Addresses that are read (of whole pieces, and of the bytes of ragged ones), and the tile,
        zeros outside."""
        data = np.zeros((*self.some.shape, 16), np.uint8)
        byte = np.arange(16)
        whole = self.some & (self.high - self.low == 16) & (self.start % 16 == 0)
        at = (self.row_address[:, None] + self.start)[whole]
        if at.size:
            words = memory.read(at, 16, np.full(at.size, lane))
            data[whole] = words.view(np.uint8).reshape(-1, 16)
        ragged = self.some & ~whole
        if ragged.any():
            take = (byte >= self.low[:, None]) & (byte < self.high[:, None])
            take = take & ragged[..., None]
            rest = (self.row_address[:, None, None] + self.start[:, None] + byte)[take]
            data[take] = memory.read(rest, 1, np.full(rest.size, lane))
            at = np.concatenate((at, rest))
        return at, data.reshape(-1, 16)

    def places(self, to):
        """Where the pieces go if the tile is written to address `to`."""
        if to % 128:
            raise PtxError(f"a tile at {to:#x} is not aligned to 128 bytes")
        row = np.arange(self.some.shape[0])[:, None] * self.inner
        return swizzled(to + row + np.arange(0, self.inner, 16), self.swizzle).reshape(-1)
