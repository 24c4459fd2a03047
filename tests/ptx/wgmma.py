"""Matrix products of warpgroups (PTX ISA 9.7.15 "wgmma"): A in registers, dense or sparse, B in
shared memory, sums of f32.

Warp w of the group holds rows 16 w to 16 w + 15 of A, as it holds A of mma.m16n8k16 (compressed
m16n8k32 for .sp), and of D: register 4 j + 2 h + e of lane 4 g + t is row g + 8 h, column 8 j + 2 t
+ e. B is K-major with the 128-byte swizzle: element (n, k) lies 1024-byte aligned start + n / 8 *
stride + n % 8 * 128 + 2 k, before the swizzle of the address.

A product reads A and B from its issue until wgmma.wait_group waits for its group; its sums may not
be touched in between. Either all products are computed when they are issued, or, if the launch asks
for `late_products`, when they are waited for: the sums are poisoned meanwhile. In both cases A's
registers and B's bytes must be the same at the wait as at the issue. Products of a warpgroup read B
as one agent of the race detector, whose epochs are the groups committed."""

import re

import numpy as np

from . import matrix
from .decode import Imm, PtxError, array, opcode
from .tensor_maps import swizzled
from .warpgroups import by_warpgroups

_POISON = np.uint32(0xFFFFFFFF)  # NaN


class Products:
    """Products on their way, the oldest first, and the sums that they add to."""

    def __init__(self, m, late):
        groups = len(m.warpgroups.lanes)
        self.late = late
        self.committed = np.zeros(groups, np.int64)
        self.pending = []
        self.fenced = [None] * groups  # the registers at the last wgmma.fence
        self.sums = {}  # of (group, registers), while products add to them: [sums, how many]
        self.poisoned = {}

    def commit(self, m, groups):
        self.committed[groups] += 1

    def fence(self, m, groups):
        for g in groups:
            self.fenced[g] = list(m.R)

    def wait(self, m, groups, newest):
        """Finish what these groups wait for."""
        left = []
        for p in self.pending:
            due = np.isin(p.groups, groups) & (p.number < self.committed[p.groups] - newest)
            if due.any():
                p.check(m, due)
                p.shape.finish(m, p.some(due))
                if due.all():
                    continue
                p = p.some(~due)
            left.append(p)
        self.pending = left
        if m.races is not None:
            done = np.maximum(self.committed[groups] - newest, 0)
            m.races.waited(m.warpgroups.lanes[groups, 0] // 32, done)

    def unfenced(self, m, groups, slots, sums):
        """Refuse registers that were written in another way since the last wgmma.fence."""
        for g in groups:
            then = self.fenced[g]
            lanes = m.warpgroups.lanes[g]
            if then is None:
                raise PtxError("wgmma ahead of the first wgmma.fence", int(lanes[0]))
            touched = slots if (g, sums) in self.sums else (*slots, *sums)
            for slot in touched:
                if m.R[slot] is then[slot]:
                    continue
                bad = m.R[slot][lanes] != then[slot][lanes]
                if bad.any():
                    text = "a register of wgmma was written after the last wgmma.fence"
                    raise PtxError(text, int(lanes[np.argmax(bad)]))

    def put(self, m, groups, slots, block):
        """Write sums (registers, groups, 128) or poison."""
        lanes = m.warpgroups.lanes[groups]
        for k, slot in enumerate(slots):
            array_ = m.R[slot].copy()
            array_[lanes] = block if block is _POISON else block[k]
            m.R[slot] = array_
            if block is _POISON:
                self.poisoned[slot] = array_
            for g in groups:
                self.fenced[g][slot] = array_

    def begin(self, m, groups, slots):
        """Take the sums of groups that have no product on its way to them."""
        fresh = np.array([g for g in groups if (g, slots) not in self.sums], np.intp)
        for g, other in self.sums:
            if g in groups and other != slots and not set(slots).isdisjoint(other):
                text = "wgmma writes part of the sums of another one on its way"
                raise PtxError(text, int(m.warpgroups.lanes[g, 0]))
        if fresh.size:
            block = gather(m, slots, fresh) if self.late else None
            for k, g in enumerate(fresh):
                self.sums[g, slots] = [block[:, k] if self.late else None, 0]
            if self.late:
                self.put(m, fresh, slots, _POISON)
        for g in groups:
            self.sums[g, slots][1] += 1

    def untouched(self, m, groups, slots):
        """Whether the sums on their way were left alone."""
        lanes = m.warpgroups.lanes[groups]
        for slot in slots:
            if m.R[slot] is self.poisoned.get(slot):
                continue
            bad = m.R[slot][lanes] != _POISON
            if bad.any():
                text = "sums of a wgmma were written before the wait for it"
                raise PtxError(text, int(lanes[bad][0]))

    def end(self, m, groups, slots):
        """Give back the sums of groups that have no other product on its way to them."""
        over = []
        for g in groups:
            self.sums[g, slots][1] -= 1
            if not self.sums[g, slots][1]:
                over.append(g)
        blocks = [self.sums.pop((g, slots))[0] for g in over]
        if over and self.late:
            self.put(m, np.array(over), slots, np.stack(blocks, 1).view(np.uint32))

    def ended(self):
        if self.pending:
            p = self.pending[0]
            raise PtxError("the kernel ends with a wgmma that nobody waited for", p.lane)


def gather(m, slots, groups):
    """Registers of groups: (registers, groups, 128) of 32-bit words."""
    lanes = m.warpgroups.lanes[groups]
    return np.stack([m.R[s][lanes] for s in slots])


class _Product:
    """One wgmma of several warpgroups."""

    def __init__(self, shape, groups, number, lane, a, b, pieces, scale):
        self.shape, self.groups, self.number, self.lane = shape, groups, number, lane
        self.a, self.b, self.pieces, self.scale = a, b, pieces, scale

    def some(self, mask):
        if mask.all():
            return self
        return _Product(
            self.shape, self.groups[mask], self.number[mask], self.lane,
            self.a[:, mask], self.b[mask], self.pieces[mask], self.scale[mask],
        )  # fmt: skip

    def check(self, m, due):
        groups = self.groups[due]
        first = m.warpgroups.lanes[groups, 0]
        changed = (gather(m, self.shape.inputs, groups) != self.a[:, due]).any((0, 2))
        if changed.any():
            text = "A of a wgmma was changed before the wait for it"
            raise PtxError(text, int(first[np.argmax(changed)]))
        now = m.shared.bytes.reshape(-1, 16)[self.pieces[due]]
        changed = (now != self.b[due]).any((1, 2, 3))
        if changed.any():
            text = "B of a wgmma was changed before the wait for it"
            raise PtxError(text, int(first[np.argmax(changed)]))


class _Shape:
    """A decoded wgmma.mma_async."""

    def __init__(self, i):
        name = ".".join(i.parts)
        found = re.fullmatch(
            r"wgmma\.mma_async(\.sp)?\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(b?f16)\.(b?f16)", name
        )
        sparse = bool(found and found[1])
        if not found or found[4] != found[5] or int(found[3]) != (32 if sparse else 16):
            raise PtxError(f"{name} is not implemented")
        self.n, self.k, self.type = int(found[2]), int(found[3]), found[4]
        if self.n % 8 or not 8 <= self.n <= 256:
            raise PtxError(f"wgmma of {self.n} columns")
        d, a, descriptor, *rest = i.operands
        if not isinstance(a, list) or len(a) != 4 or len(d) != self.n // 2:
            raise PtxError(f"wgmma.m64n{self.n} takes {self.n // 2} sums and A from 4 registers")
        self.sums = tuple(r.slot for r in d)
        self.inputs = tuple(r.slot for r in a)
        self.tables = None
        if sparse:
            metadata, selector, *rest = rest
            self.inputs += (metadata.slot,)
            if selector.bits not in (0, 1):
                raise PtxError(f"sparsity selector {selector.bits}")
            self.tables = matrix._metadata_table(2, selector.bits)
        if len(set(self.sums)) < len(self.sums) or set(self.sums) & set(self.inputs):
            raise PtxError("a register of wgmma is named twice")
        self.descriptor = array(descriptor, "u64")
        scale, sign_a, sign_b, transposed = rest
        signs = [o.bits & 0xFFFFFFFF for o in (sign_a, sign_b)]
        if any(s not in (1, 0xFFFFFFFF) for s in signs) or transposed.bits:
            raise PtxError("wgmma with a scale other than 1 and -1, or with B not K-major")
        self.sign = 1.0 if signs[0] == signs[1] else -1.0
        fixed = isinstance(scale, Imm)
        self.scale = array(Imm(int(scale.bits != 0)) if fixed else scale, "pred")

    def issue(self, m, groups):
        products = m.products
        lanes = m.warpgroups.lanes[groups]
        first = lanes[:, 0]
        products.unfenced(m, groups, self.inputs, self.sums)
        pieces = self._pieces(m, self._same(self.descriptor(m), lanes, "descriptor"), first)
        scale = self._same(self.scale(m), lanes, "scale-d")
        if m.races is not None:
            m.races.read_products(16 * pieces, first // 32, products.committed[groups] + 1)
        a = gather(m, self.inputs, groups)
        b = m.shared.bytes.reshape(-1, 16)[pieces]
        products.begin(m, groups, self.sums)
        number = products.committed[groups].copy()
        new = _Product(self, groups, number, int(first[0]), a, b, pieces, scale)
        products.pending.append(new)
        if not products.late:
            sums = gather(m, self.sums, groups).view(np.float32)
            products.put(m, groups, self.sums, self._compute(new, sums).view(np.uint32))

    def finish(self, m, product):
        """What is left to do at the wait."""
        products, groups = m.products, product.groups
        if products.late:
            products.untouched(m, groups, self.sums)
            kept = [products.sums[g, self.sums] for g in groups]
            result = self._compute(product, np.stack([s[0].view(np.float32) for s in kept], 1))
            for k, s in enumerate(kept):
                s[0] = result[:, k]
        products.end(m, groups, self.sums)

    @staticmethod
    def _same(value, lanes, what):
        value = value[lanes]
        other = (value != value[:, :1]).any(1)
        if other.any():
            raise PtxError(f"wgmma: {what} differs in a warpgroup", int(lanes[np.argmax(other), 0]))
        return value[:, 0]

    def _pieces(self, m, descriptors, first):
        """Which 16-byte pieces of the shared memory are B, (groups, n, pieces of a row), after
        checks of the descriptors (ISA 9.7.15.5.1.2 "Matrix descriptor").
        """
        d = descriptors.astype(np.uint64)

        def field(low, bits):
            return (d >> np.uint64(low) & np.uint64((1 << bits) - 1)).astype(np.int64)

        start, stride = field(0, 14) << 4, field(32, 14) << 4
        for wrong, text in (
            (field(62, 2) != 1, "another swizzle than that of 128 bytes"),
            (field(49, 3) != 0, "a base offset"),
            ((start >> 7 & 7) != 0, "a start that is not in the first 128 bytes of 1024"),
            (stride % 1024 != 0, "a stride between eight rows that is not a multiple of 1024"),
            ((start & 127) + 2 * self.k > 128, "rows that pass the 128 bytes of the swizzle"),
        ):
            if wrong.any():
                at = int(np.argmax(wrong))
                raise PtxError(f"wgmma descriptor {int(d[at]):#x} with {text}", int(first[at]))
        row = np.arange(self.n)[:, None]
        piece = np.arange(0, 2 * self.k, 16)
        at = start[:, None, None] + row // 8 * stride[:, None, None] + row % 8 * 128 + piece
        at = swizzled(at, 128)
        flat = m.shared.locate(
            np.repeat(m.cta[first], at[0].size),
            at.reshape(-1),
            16,
            np.repeat(first, at[0].size),
        )
        return flat.reshape(at.shape) // 16

    def _compute(self, product, sums):
        """The sums (registers, groups, 128) after the product."""
        count = len(product.groups)
        words = product.a.reshape(-1, count, 4, 32).transpose(1, 2, 0, 3).reshape(count * 4, -1, 32)
        a = matrix._elements(words[:, :4], self.type)[:, matrix._a_table(2)]
        if self.tables is not None:
            a = matrix._spread(a, words[:, 4].reshape(-1), self.type, self.tables, True)
        b = matrix._elements(product.b.reshape(count, -1).view(np.uint32), self.type)
        d = np.matmul(
            a.reshape(count, 64, self.k), b.reshape(count, self.n, self.k).transpose(0, 2, 1)
        )
        d = d.reshape(count, 4, 2, 8, self.n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
        d = d.reshape(self.n // 2, count, 128) * self.sign
        kept = np.where(product.scale[:, None], sums, np.float32(0))
        return (kept + d).astype(np.float32)


@opcode("wgmma")
def wgmma(i):
    what = i.parts[1]
    if i.parts[2:] == ["sync", "aligned"] and what in ("fence", "commit_group", "wait_group"):
        if what == "wait_group":
            newest = i.operands[0].bits
            return by_warpgroups(i, lambda m, groups: m.products.wait(m, groups, newest))
        if what == "fence":
            return by_warpgroups(i, lambda m, groups: m.products.fence(m, groups))
        return by_warpgroups(i, lambda m, groups: m.products.commit(m, groups))
    if what != "mma_async":
        raise PtxError(f"{'.'.join(i.parts)} is not implemented")
    return by_warpgroups(i, _Shape(i).issue)
