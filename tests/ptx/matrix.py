"""Warp-level matrix instructions (PTX ISA 9.7.14.5 "mma", "ldmatrix", "stmatrix"; 9.7.14.6
"mma.sp").

Fragments are index tables from the ISA's figures (g = lane / 4, t = lane % 4), so that one gather
turns the registers of all warps into matrices and one batched matmul multiplies them.
Floating-point products are summed in f64 with the accumulator and rounded to f32 once; hardware
aligns and truncates the addends instead, so exact tests use small integers. Integer products are
exact in f32 (64 * 2^14 = 2^20) and the accumulator wraps, or clamps with .satfinite. Of a tf32
operand the upper 19 bits count."""

import re
from functools import lru_cache

import numpy as np

from .decode import PtxError, address, array, destination, lanes_of, opcode, whole_warps
from .loads import shared_at

_LANE = np.arange(32)
_G, _T = _LANE // 4, _LANE % 4
_K = {
    ("f16", 16, False),
    ("bf16", 16, False),
    ("s8", 32, False),
    ("tf32", 8, False),
    ("f16", 32, True),
    ("bf16", 32, True),
    ("s8", 64, True),
}


@lru_cache
def _a_table(per):
    """Row-major 16 x (2*4*per) index into the flat (register, lane, element) order of A's four
    registers.
    """
    table = np.zeros((16, 8 * per), np.intp)
    for r in range(4):
        for e in range(per):
            table[_G + 8 * (r & 1), 4 * per * (r >> 1) + _T * per + e] = (r * 32 + _LANE) * per + e
    return table


@lru_cache
def _b_table(per, registers):
    table = np.zeros((4 * per * registers, 8), np.intp)
    for r in range(registers):
        for e in range(per):
            table[4 * per * r + _T * per + e, _G] = (r * 32 + _LANE) * per + e
    return table


def _c_table():
    table = np.zeros((16, 8), np.intp)
    for r in range(4):
        table[_G + 8 * (r >> 1), 2 * _T + (r & 1)] = r * 32 + _LANE
    return table


_C = _c_table()
_C_BACK = np.argsort(_C.reshape(-1)).reshape(
    4, 32
)  # (register, lane) -> flat position in the 16 x 8 tile


@lru_cache
def _metadata_table(per, selector):
    """For each row and group of 4 columns: the lane that holds its nibble, and the nibble's bit
    position.
    """
    row, group = np.arange(16)[:, None], np.arange(4 * per)[None, :]
    # 16-bit types, k = 32: 8 groups; lanes 0,1 (selector 0) or 2,3 (selector 1) of each quad supply
    if per == 2:
        lane = row % 8 * 4 + 2 * selector + group // 4
        return np.broadcast_arrays(lane, 4 * (group % 4) + 16 * (row // 8))
    lane = row % 8 * 4 + row // 8 + 2 * (group // 8)  # 8-bit types, k = 64: 16 groups
    return np.broadcast_arrays(lane, 4 * (group % 8) + 0 * row)


def _registers(m, gets):
    """(warps, registers, 32) of 32-bit words."""
    return np.stack([g(m).reshape(-1, 32) for g in gets], 1)


def _elements(words, ty):
    """Flat elements (warps, registers * 32 * per) as floats."""
    flat = np.ascontiguousarray(words).reshape(len(words), -1)
    if ty == "tf32":
        return (flat & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if ty == "bf16":
        return (
            (flat.view(np.uint16).astype(np.uint32) << np.uint32(16))
            .view(np.float32)
            .astype(np.float64)
        )
    return (
        flat.view(np.float16).astype(np.float64)
        if ty == "f16"
        else flat.view(np.int8).astype(np.float32)
    )


class Fragments:
    """The last matrices made from registers.

    Arrays are never changed in place, so the same arrays hold the same matrix.
    """

    def __init__(self):
        self.made = {}

    def get(self, key, words, make):
        known = self.made.get(key)
        if known is not None and all(a is b for a, b in zip(known[0], words, strict=True)):
            return known[1]
        matrix = make()
        self.made[key] = (words, matrix)
        return matrix


def _spread(a, words, ty, tables, ordered):
    """Compressed A to dense: the two kept values of each group of four columns go where the
    metadata says.
    """
    lane, bit = tables
    nibble = words.reshape(-1, 32)[:, lane] >> bit.astype(np.uint32) & np.uint32(15)
    first, second = (nibble & 3).astype(np.intp), (nibble >> 2).astype(np.intp)
    bad = first >= second if ordered else first == second
    if bad.any():
        warp, row, group = (int(v[0]) for v in np.nonzero(bad))
        raise PtxError(
            f"illegal metadata nibble {int(nibble[warp, row, group]):#x} "
            f"for row {row}, group {group}",
            warp * 32 + int(lane[row, group]),
        )
    groups = np.arange(lane.shape[1])
    dense = np.zeros((*a.shape[:2], lane.shape[1], 4), a.dtype)
    w, r = np.arange(len(a))[:, None, None], np.arange(16)[:, None]
    dense[w, r, groups, first] = a[:, :, 0::2]
    dense[w, r, groups, second] = a[:, :, 1::2]
    return dense.reshape(len(a), 16, -1)


@opcode("mma")
def mma(i):
    sparse = i.parts[1].startswith("sp")
    ordered = i.parts[1] == "sp::ordered_metadata"
    shape = next(p for p in i.parts if p.startswith("m16n8k"))
    d_type, ty, b_type, c_type = i.parts[-4:]
    k = int(shape[6:])
    accumulator, clamp = ("s32", "satfinite" in i.parts) if ty == "s8" else ("f32", False)
    modifiers = {"sp::ordered_metadata", "sp", "sync", "aligned", shape, "row", "col"}
    modifiers |= {"satfinite"} if ty == "s8" else set()
    if (
        (ty, k, sparse) not in _K
        or b_type != ty
        or {d_type, c_type} != {accumulator}
        or set(i.parts[1:-4]) - modifiers
    ):
        raise PtxError(f"{'.'.join(i.parts)} is not implemented")
    per = {"s8": 4, "tf32": 1}.get(ty, 2)
    sizes = (4, 4, 4 if sparse else 2, 4)
    if tuple(len(o) for o in i.operands[:4]) != sizes:
        raise PtxError(f"operands of {shape} have {sizes} registers")
    puts = [destination(o, "b32") for o in i.operands[0]]
    a_get, b_get, c_get = ([array(o, "b32") for o in i.operands[n]] for n in (1, 2, 3))
    a_table, b_table = _a_table(per), _b_table(per, sizes[2])
    meta = tables = None
    selector = 0
    if sparse:
        meta, selector = array(i.operands[4], "b32"), i.operands[5].bits
        if selector not in ((0, 1) if per == 2 else (0,)):
            raise PtxError(f"sparsity selector {selector}")
        tables = _metadata_table(per, selector)

    def make_a(m):
        a = _elements(_registers(m, a_get), ty)[:, a_table]
        return _spread(a, meta(m), ty, tables, ordered) if sparse else a

    def keys(operands):
        return tuple(getattr(o, "slot", o) for o in operands)

    a_key = ("a", ty, selector, ordered, keys(i.operands[1]), keys(i.operands[4:5]))
    b_key = ("b", ty, keys(i.operands[2]))
    out = np.float32 if accumulator == "f32" else np.int32

    def run(m, act):
        machine = m
        if whole_warps(m, act, "mma") is not None:
            m = _Subset(m, act)
        a_words = [m.R[o.slot] for o in i.operands[1]] + ([meta(m)] if sparse else [])
        b_words = [m.R[o.slot] for o in i.operands[2]]
        a = m.fragments.get(a_key, a_words, lambda: make_a(m))
        b = m.fragments.get(b_key, b_words, lambda: _elements(_registers(m, b_get), ty)[:, b_table])
        c = _registers(m, c_get).reshape(len(a), -1).view(out)[:, _C]
        product = np.matmul(a, b)
        if clamp:
            result = np.clip(c + product.astype(np.int64), -(2**31), 2**31 - 1).astype(np.int32)
        else:
            result = (
                (c + product).astype(np.float32)
                if out is np.float32
                else c + product.astype(np.int32)
            )
        back = result.reshape(len(a), -1)[:, _C_BACK.reshape(-1)].reshape(len(a), 4, 32)
        for r, put in enumerate(puts):
            value = back[:, r].reshape(-1)
            if act is not None:
                some, value = value, np.zeros(machine.n, value.dtype)
                value[act] = some
            put(machine, act, value)

    return run


class _Subset:
    """The machine as seen by an mma that only some warps execute: registers of those warps."""

    def __init__(self, m, act):
        self.R = _Rows(m.R, act)
        self.n = int(act.sum())
        self.fragments = Fragments()


class _Rows:
    def __init__(self, registers, act):
        self._registers, self._act, self._rows = registers, act, {}

    def __getitem__(self, slot):
        if slot not in self._rows:
            self._rows[slot] = self._registers[slot][self._act]
        return self._rows[slot]


@opcode("ldmatrix")
def ldmatrix(i):
    """Each of 1, 2 or 4 8x8 matrices of b16: lane j of the j-th eight lanes gives a row's address
    (ISA 9.7.14.5.15).
    """
    count = {"x1": 1, "x2": 2, "x4": 4}[i.parts[4]]
    transposed = "trans" in i.parts
    if i.parts[3] != "m8n8" or i.type != "b16":
        raise PtxError(f"{'.'.join(i.parts)} is not implemented")
    registers = i.operands[0] if isinstance(i.operands[0], list) else [i.operands[0]]
    if len(registers) != count:
        raise PtxError(f"ldmatrix.x{count} writes {count} registers")
    i.width = 16
    puts, at = [destination(o, "b32") for o in registers], address(i.operands[1])

    def run(m, act):
        whole_warps(m, act, "ldmatrix")
        select = _LANE < 8 * count
        if act is None:
            select = np.tile(select, m.n // 32)
        else:
            select = act & np.tile(select, m.n // 32)
        lanes = np.flatnonzero(select)
        flat = shared_at(m, at(m)[lanes], 16, lanes, False, whole=True)
        # (warps, matrices, 8 rows, 8 columns) of b16
        data = m.shared.read(flat, 16).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            data = data.swapaxes(2, 3)
        # row g, columns 2t, 2t+1 -> lane 4g+t
        words = np.ascontiguousarray(data).view(np.uint32).reshape(-1, count, 32)
        for k, put in enumerate(puts):
            value = words[:, k].reshape(-1)
            if act is not None:
                full = np.zeros(m.n, np.uint32)
                full[act] = value
                value = full
            put(m, act, value)

    return run


@opcode("stmatrix")
def stmatrix(i):
    """Stores 1, 2 or 4 8x8 matrices of b16, the inverse of ldmatrix (ISA 9.7.14.5.16)."""
    shape = re.fullmatch(
        r"stmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", ".".join(i.parts)
    )
    if not shape:
        raise PtxError(f"{'.'.join(i.parts)} is not implemented")
    count, transposed = int(shape[1]), bool(shape[2])
    registers = i.operands[1] if isinstance(i.operands[1], list) else [i.operands[1]]
    if len(registers) != count:
        raise PtxError(f"stmatrix.x{count} stores {count} registers")
    i.width = 16
    gets, at = [array(o, "b32") for o in registers], address(i.operands[0])

    def run(m, act):
        whole_warps(m, act, "stmatrix")
        lanes = lanes_of(m, act)
        # (warps, matrices, 8 rows, 8 columns) of b16
        words = np.stack([g(m)[lanes].reshape(-1, 32) for g in gets], 1)
        data = words.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            data = data.swapaxes(2, 3)
        data = np.ascontiguousarray(data).reshape(-1, 8).view(np.complex128)[:, 0]
        rows = lanes.reshape(-1, 32)[:, : 8 * count].reshape(-1)
        flat = shared_at(m, at(m)[rows], 16, rows, True, whole=True, data=data)
        m.shared.write(flat, 16, data)

    return run
