"""Loads, stores and asynchronous copies (PTX ISA 9.7.9.8 "ld" to 9.7.9.25 "cp.async").

Cache operators, eviction hints and memory orders are accepted and ignored: all lanes of one
instruction act at once, and CTAs of one chunk advance together. Atomics do not exist here; bulk
copies are in bulk_copies.py."""

import numpy as np

from .bulk_copies import bulk_copy
from .clusters import PEER
from .decode import DTYPE, UNSIGNED, PtxError, address, destination, lanes_of, opcode, source
from .memory import RAW, count_global, count_shared

_SPACES = {"global": 0, "const": 0, "shared": 1, "shared::cluster": 1, "local": 2, "param": 3}
_OFFSET = np.int64((1 << 60) - 1)


def _space(i):
    return next((_SPACES[p] for p in i.parts[1:-1] if p in _SPACES), None)


def _by_space(m, at, lanes, space):
    """Split generic addresses: yields (space, addresses inside it, lanes, selector)."""
    if space is not None:
        yield space, at, lanes, slice(None)
        return
    spaces = at >> np.int64(60)
    first = int(spaces[0])
    if (spaces == first).all():
        yield first, (at & _OFFSET if first else at), lanes, slice(None)
        return
    for s in np.unique(spaces):
        pick = spaces == s
        yield int(s), at[pick] & _OFFSET, lanes[pick], pick


def shared_at(m, at, width, lanes, write, whole=False, data=None):
    """Flat offsets of checked shared accesses; counts wavefronts and looks for races."""
    ctas = m.cta[lanes]
    if m.clusters.size > 1 and (at >> PEER).any():
        ctas, at = m.clusters.locate(m, lanes, at)
    flat = m.shared.locate(ctas, at, width, lanes)
    count_shared(m.stats, flat, width, lanes)
    if m.races is not None:
        m.races.access(flat, width, lanes, write, whole, data)
    return flat


def _read(m, space, at, width, lanes, read_only=False):
    if space == 0:
        if m.dependence is not None:
            m.dependence.read(m, at, width, lanes, read_only)
        data = m.memory.read(at, width, lanes)
        count_global(m.stats, "read", at, lanes, width * at.size)
        return data
    if space == 1:
        return m.shared.read(shared_at(m, at, width, lanes, False), width)
    if space == 2:
        return m.local.read(m.local.locate(lanes, at, width, lanes), width)
    if int(at.min()) < 0 or int(at.max()) + width > len(m.params):
        raise PtxError(
            f"parameter access at {int(at.max())} is outside "
            f"the {len(m.params)} bytes of parameters",
            int(lanes[0]),
        )
    bytes_ = m.params[at[:, None] + np.arange(width)]
    return np.ascontiguousarray(bytes_).view(RAW[width])[:, 0]


def _write(m, space, at, width, lanes, data):
    if space == 0:
        if m.dependence is not None:
            m.dependence.write(lanes)
        m.memory.write(at, width, lanes, data)
        count_global(m.stats, "write", at, lanes, width * at.size)
    elif space == 1:
        m.shared.write(shared_at(m, at, width, lanes, True, data=data), width, data)
    elif space == 2:
        m.local.write(m.local.locate(lanes, at, width, lanes), width, data)
    else:
        raise PtxError("store to parameter space", int(lanes[0]))


def _shape(i, registers):
    item = DTYPE[i.type].itemsize
    width = item * len(registers)
    if width not in RAW:
        raise PtxError(f"{width}-byte access")
    i.width = width if _space(i) in (None, 1) else None
    return item, width


@opcode("ld", "ldu")
def load(i):
    registers = i.operands[0] if isinstance(i.operands[0], list) else [i.operands[0]]
    item, width = _shape(i, registers)
    space, at, raw = _space(i), address(i.operands[1]), UNSIGNED[item]
    puts = [destination(r, i.type) for r in registers]
    dtype, read_only = DTYPE[i.type], "nc" in i.parts
    if space == 3 and i.operands[1].base is not None and not hasattr(i.operands[1].base, "slot"):
        start = i.operands[1].base.address + i.operands[1].offset

        def parameter(m, act):
            if not 0 <= start <= len(m.params) - width:
                raise PtxError(
                    f"parameter offset {start} is outside the {len(m.params)} bytes of parameters"
                )
            for value, put in zip(m.params[start : start + width].view(dtype), puts, strict=True):
                put(m, act, value)

        return parameter

    def run(m, act):
        lanes, where = lanes_of(m, act), at(m)
        if act is not None:
            where = where[act]
        if space is not None:
            data = _read(m, space, where, width, lanes, read_only)
        else:
            data = np.empty(lanes.size, RAW[width])
            for s, part, some, pick in _by_space(m, where, lanes, space):
                data[pick] = _read(m, s, part, width, some, read_only)
        columns = data.view(raw).reshape(-1, len(puts))
        for k, put in enumerate(puts):
            value = np.ascontiguousarray(columns[:, k])
            if act is not None:
                full = np.zeros(m.n, raw)
                full[lanes] = value
                value = full
            put(m, act, value.view(dtype))

    return run


@opcode("st")
def store(i):
    registers = i.operands[1] if isinstance(i.operands[1], list) else [i.operands[1]]
    item, width = _shape(i, registers)
    space, at, raw = _space(i), address(i.operands[0]), UNSIGNED[item]
    gets = [source(r, f"b{8 * item}") for r in registers]

    def run(m, act):
        lanes, where = lanes_of(m, act), at(m)
        if act is not None:
            where = where[act]
        data = np.empty((m.n, len(gets)), raw)
        for k, get in enumerate(gets):
            data[:, k] = get(m)
        data = data.view(RAW[width])[:, 0]
        if act is not None:
            data = data[act]
        for s, part, some, pick in _by_space(m, where, lanes, space):
            _write(m, s, part, width, some, data[pick])

    return run


@opcode("prefetchu", "discard", "applypriority", "membar")
def nothing(i):
    return lambda m, act: None


@opcode("prefetch")
def prefetch(i):
    """prefetch.global.{L1, L2}{::evict_*} [a] (ISA 9.7.9.16): nothing changes, but the address has
    to be mapped, and L1 must not take what a kernel ahead may still write. Of prefetch.tensormap
    nothing is checked.
    """
    if "tensormap" in i.parts:
        return lambda m, act: None
    if i.parts[1] != "global":
        raise PtxError(f"{'.'.join(i.parts)} is not implemented")
    at = address(i.operands[0])

    def run(m, act):
        lanes, where = lanes_of(m, act), at(m)[slice(None) if act is None else act]
        m.memory.check(where, 1, lanes)
        m.stats["prefetches"] += lanes.size
        if i.parts[2] == "L1" and m.dependence is not None:
            m.dependence.read(m, where, 1, lanes, False)

    return run


def bulk_prefetch(i):
    """cp.async.bulk.prefetch.L2.global{.L2::cache_hint} [a], size (ISA 9.7.9.25.4.3)."""
    at, size_of = address(i.operands[0]), source(i.operands[1], "u32")

    def run(m, act):
        lanes = lanes_of(m, act)
        where, size = at(m)[lanes], np.broadcast_to(size_of(m), m.n)[lanes].astype(np.int64)
        odd = ((where | size) & 15 != 0) | (size == 0)
        if odd.any():
            k = int(np.argmax(odd))
            raise PtxError(f"prefetch of {size[k]} bytes at {where[k]:#x}", int(lanes[k]))
        m.memory.check(where, 16, lanes)
        m.memory.check(where + size - 16, 16, lanes)

    return run


@opcode("createpolicy")
def create_policy(i):
    put = destination(i.operands[0], "b64")
    return lambda m, act: put(m, act, np.uint64(0x10F0000000000000))


class Copies:
    """cp.async operations on their way.

    Groups are counted per thread: a copy belongs to the group its thread commits next, and
    wait_group n waits for all but the thread's n newest committed groups.
    """

    def __init__(self, lanes):
        self.group = np.zeros(lanes, np.int64)  # groups committed by each thread
        self.pending = []

    def wait(self, m, act, newest):
        """Land what the executing threads wait for."""
        left = []
        for group, lanes, at, source_, size, width in self.pending:
            done = group < self.group[lanes] - newest
            if act is not None:
                done &= act[lanes]
            if done.any():
                self._land(m, lanes[done], at[done], source_[done], size[done], width)
                if done.all():
                    continue
                keep = ~done
                group, lanes, at, source_, size = (
                    group[keep],
                    lanes[keep],
                    at[keep],
                    source_[keep],
                    size[keep],
                )
            left.append((group, lanes, at, source_, size, width))
        self.pending = left

    @staticmethod
    def _land(m, lanes, at, source_, size, width):
        data = np.zeros(at.size, RAW[width])
        full = size == width
        if full.any():
            data[full] = m.memory.read(source_[full], width, lanes[full])
        rest = np.flatnonzero((size > 0) & ~full)  # the bytes after src-size are zero
        for k in rest:
            bytes_ = m.memory.read(source_[k] + np.arange(size[k]), 1, np.full(size[k], lanes[k]))
            data.view(np.uint8).reshape(-1, width)[k, : size[k]] = bytes_
        m.shared.write(at, width, data)
        if m.races is not None:
            m.races.arrive(at, width, lanes)


@opcode("cp")
def copy(i):
    if i.parts[1:6] == ["async", "bulk", "prefetch", "L2", "global"]:
        return bulk_prefetch(i)
    if i.parts[1:3] == ["async", "bulk"]:
        return bulk_copy(i)
    if i.parts[1] != "async" or "mbarrier" in i.parts:
        raise PtxError(f"{'.'.join(i.parts[:4])} is not implemented")
    if "commit_group" in i.parts:

        def commit(m, act):
            m.copies.group += 1 if act is None else act

        return commit
    if "wait_group" in i.parts:
        newest = i.operands[0].bits
        return lambda m, act: m.copies.wait(m, act, newest)
    if "wait_all" in i.parts:

        def wait_all(m, act):
            m.copies.group += 1 if act is None else act
            m.copies.wait(m, act, 0)

        return wait_all
    to, of, width = address(i.operands[0]), address(i.operands[1]), i.operands[2].bits
    if width not in (4, 8, 16) or ("cg" in i.parts and width != 16):
        raise PtxError(f"cp.async of {width} bytes")
    i.width = width
    hint = "L2::cache_hint" in i.parts
    extra = i.operands[3 : len(i.operands) - hint]
    poison = np.full(16, 0xFF, np.uint8)[:width].view(RAW[width])[0]
    size_of = source(extra[0], "u32") if extra else None
    ignore = bool(extra) and getattr(extra[0], "width", 4) == 0  # "ignore-src": a predicate

    def run(m, act):
        lanes, at, where = lanes_of(m, act), to(m), of(m)
        size = np.full(m.n, width, np.int64)
        if ignore:
            size = np.where(m.R[extra[0].slot] ^ extra[0].negated, 0, width)
        elif size_of:
            size = np.broadcast_to(size_of(m), m.n).astype(np.int64)
        if act is not None:
            at, where, size = at[act], where[act], size[act]
        if (size > width).any():
            raise PtxError(
                f"cp.async src-size {int(size.max())} is above {width}", int(lanes[size > width][0])
            )
        odd = where & (width - 1)
        if odd.any():
            raise PtxError(
                f"misaligned {width}-byte cp.async source at {int(where[odd > 0][0]):#x}",
                int(lanes[odd > 0][0]),
            )
        some = size > 0
        if some.any():
            if (size == width)[some].all():
                m.memory.check(where[some], width, lanes[some])
            else:
                m.memory.check(where[some], 1, lanes[some])
                m.memory.check((where + size - 1)[some], 1, lanes[some])
            if m.dependence is not None:
                m.dependence.read(m, where[some], 1, lanes[some], False)
            count_global(m.stats, "read", where[some], lanes[some], int(size.sum()))
        flat = m.shared.locate(m.cta[lanes], at, width, lanes)
        count_shared(m.stats, flat, width, lanes)
        if m.races is not None:
            m.races.issue(flat, width, lanes)
        m.shared.write(flat, width, poison)
        m.copies.pending.append((m.copies.group[lanes], lanes, flat, where, size, width))

    return run
