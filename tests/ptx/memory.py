"""State spaces (PTX ISA 5.1): global memory as mapped ranges, shared and local memory as one flat
array, and access counts.
"""

import numpy as np

from .decode import PtxError

# One element per access, so that a gather moves whole accesses.  complex128 is numpy's only 16-byte
# scalar; indexing it only copies.
RAW = {
    1: np.dtype("u1"),
    2: np.dtype("u2"),
    4: np.dtype("u4"),
    8: np.dtype("u8"),
    16: np.dtype("c16"),
}


class _Range:
    def __init__(self, address, array, writable, early):
        self.start, self.end = address, address + array.size
        self.writable, self.early = writable, early
        self._array, self._views = array, {}

    def view(self, width):
        """(address of element 0, elements of `width` bytes at the aligned addresses)."""
        if width not in self._views:
            skip = -self.start % width
            count = max(self._array.size - skip, 0) // width
            self._views[width] = (
                self.start + skip,
                self._array[skip : skip + count * width].view(RAW[width]),
            )
        return self._views[width]


class Memory:
    """Global memory: nothing outside the mapped ranges may be touched.  Addresses are the process's
    own.
    """

    def __init__(self):
        self._ranges = []

    def map(self, address, array, writable=True, early=False):
        """`early`: no kernel ahead may still write it, so that a dependent launch (dependent.py)
        may read it at once.
        """
        if array.dtype != np.uint8 or not array.flags.c_contiguous:
            raise PtxError("Memory.map takes a contiguous uint8 array")
        if array.size:
            # ndarray.view keeps the memory shared; a read-only torch tensor may come as a read-only
            # array.
            self._ranges.append(
                _Range(address, array.reshape(-1), writable and array.flags.writeable, early)
            )

    def with_data(self, variables):
        """This memory and a module's variables: pairs of (bytes, writable)."""
        both = Memory()
        both._ranges = self._ranges + [
            _Range(d.ctypes.data, d, writable, not writable) for d, writable in variables
        ]
        return both

    def _pieces(self, address, width, lanes, write):
        """(range, selector) pairs that cover all accesses."""
        odd = address & (width - 1)
        if odd.any():
            k = int(np.flatnonzero(odd)[0])
            raise PtxError(
                f"misaligned {width}-byte global access at {int(address[k]):#x}", int(lanes[k])
            )
        low, high = int(address.min()), int(address.max()) + width
        for r in self._ranges:
            if r.start <= low and high <= r.end and (r.writable or not write):
                return [(r, slice(None))]
        pieces, left = [], np.ones(address.size, bool)
        for r in self._ranges:
            if r.writable or not write:
                fit = left & (address >= r.start) & (address + width <= r.end)
                if fit.any():
                    pieces.append((r, fit))
                    left &= ~fit
        if left.any():
            self._fail(int(address[left][0]), width, int(lanes[left][0]), write)
        return pieces

    def _fail(self, address, width, lane, write):
        for r in self._ranges:
            if r.start <= address and address + width <= r.end:
                raise PtxError(f"write to read-only memory at {address:#x}", lane)
        text = (
            f"out-of-bounds global {'write' if write else 'read'} of {width} bytes at {address:#x}"
        )
        if self._ranges:
            r = min(self._ranges, key=lambda r: min(abs(address - r.start), abs(address - r.end)))
            side = (
                f"{address - r.end} bytes past the end"
                if address >= r.start
                else f"{r.start - address} bytes before the start"
            )
            text += f" ({side} of the nearest range, {r.end - r.start} bytes at {r.start:#x})"
        raise PtxError(text, lane)

    def check(self, address, width, lanes):
        self._pieces(address, width, lanes, False)

    def late(self, address, width, lanes):
        """Which of these accesses are to memory that was not mapped as early: a mask."""
        some = np.zeros(address.size, bool)
        for r, select in self._pieces(address, width, lanes, False):
            some[select] = not r.early
        return some

    def read(self, address, width, lanes):
        """The raw `width`-byte words at these addresses."""
        pieces = self._pieces(address, width, lanes, False)
        if len(pieces) == 1:
            base, view = pieces[0][0].view(width)
            return view[(address - base) // width]
        out = np.empty(address.size, RAW[width])
        for r, select in pieces:
            base, view = r.view(width)
            out[select] = view[(address[select] - base) // width]
        return out

    def write(self, address, width, lanes, data):
        for r, select in self._pieces(address, width, lanes, True):
            base, view = r.view(width)
            view[(address[select] - base) // width] = data[select]


class Flat:
    """Memory of equal windows, one per CTA (shared) or per thread (local), filled with 0xFF:

    NaN as f16 and f32.
    """

    def __init__(self, windows, size, what):
        self.size, self.what = size, what
        self.stride = -(-size // 16) * 16
        self.bytes = np.full(windows * self.stride, 0xFF, np.uint8)
        self._views = {w: self.bytes.view(RAW[w]) for w in RAW}

    def locate(self, window, address, width, lanes):
        """Flat byte offsets of checked accesses."""
        if address.size and (int(address.min()) < 0 or int(address.max()) + width > self.size):
            k = int(np.flatnonzero((address < 0) | (address + width > self.size))[0])
            text = f"{self.what} access of {width} bytes at {int(address[k]):#x}"
            raise PtxError(f"{text} is beyond the {self.size} bytes there are", int(lanes[k]))
        odd = address & (width - 1)
        if odd.any():
            k = int(np.flatnonzero(odd)[0])
            raise PtxError(
                f"misaligned {width}-byte {self.what} access at {int(address[k]):#x}", int(lanes[k])
            )
        return window * self.stride + address

    def read(self, at, width):
        return self._views[width][at // width]

    def write(self, at, width, data):
        self._views[width][at // width] = data


def count_shared(stats, at, width, lanes):
    """Wavefronts of one shared access: lanes are served in groups that move 128 bytes; a group
    takes as many wavefronts as its busiest bank (of 32, four bytes wide) has distinct words.
    """
    group = 32 // max(1, width // 4)
    if at.size % group == 0 and lanes[0] % group == 0 and lanes[-1] - lanes[0] == at.size - 1:
        chunk = (at // max(width, 4)).reshape(-1, group)
        bit = np.left_shift(np.uint32(1), (chunk & (group - 1)).astype(np.uint32))
        # each its own banks
        if width >= 4 and (np.bitwise_or.reduce(bit, 1) == np.uint32((1 << group) - 1)).all():
            stats["shared_wavefronts"] += len(chunk)
            stats["shared_ideal"] += len(chunk)
            return
    phase = lanes // group
    words = (at[:, None] // 4 + np.arange(max(width // 4, 1))).reshape(-1)
    key = np.sort(np.repeat(phase, max(width // 4, 1)) << 40 | words)
    key = key[np.concatenate(([True], key[1:] != key[:-1]))]
    phase = key >> 40
    per_bank = np.bincount((phase - phase[0]) * 32 + (key & 31)).astype(np.int64)
    per_bank.resize(-(-per_bank.size // 32) * 32, refcheck=False)
    busiest = per_bank.reshape(-1, 32).max(1)
    stats["shared_wavefronts"] += int(busiest.sum())
    stats["shared_ideal"] += int((busiest > 0).sum())


def count_global(stats, kind, address, lanes, size):
    """Bytes (`size`) and distinct 32-byte sectors per warp of one global access."""
    key = (lanes >> 5) << 48 | address >> 5
    stats[f"global_{kind}_bytes"] += size
    if (key[1:] < key[:-1]).any():
        key = np.sort(key)
    stats[f"global_{kind}_sectors"] += 1 + int((key[1:] != key[:-1]).sum())
