"""The smallest things that nothing but hardware can refute, each alone on one CTA or a pair.

    python -m on_gpu.hardware FILE

products  wgmma and wgmma.sp of asymmetric small integers: where A, the metadata and D lie in
          registers, and where B lies in shared memory
boxes     the tensor map of the driver's own encoder: a box that reaches over two edges, with the
          128-byte swizzle, to one CTA, and in halves to both CTAs of a pair

The PTX interpreter of tests/ptx says the same of all of them, by the manual; the kernels for many
tokens rely on it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from on_gpu import machine, verdicts_many
from on_gpu.rows import RESULTS, Row, Rows
from on_gpu.unit import CAPABILITY, HardwareParams, Launch, loaded
from on_gpu.verdicts import Verdict
from slab_kernels.backends.cuda import driver
from slab_kernels.format.bits import LEGAL_NIBBLES

THREADS = 128  # of a warpgroup
TOKENS, INPUTS, ROWS = 64, 64, 64  # of a product
BOX_BYTES = TOKENS * 128
SHARED = BOX_BYTES + 2048  # what rounding up takes, and a barrier
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
MATRIX = (70, 100)  # tokens and inputs of what boxes are copied of
CORNER = (64, 32)  # column and row of the box
TensorMap = Callable[..., bytes]  # tensor_map.encode


class Stand(NamedTuple):
    """Where kernels run: the tensors' device, launches, and the encoder of tensor maps."""

    where: str
    launch: Launch
    tensor_map: TensorMap


class Lanes(NamedTuple):
    """Where the threads of a warpgroup have their elements of A."""

    row: Tensor  # [threads, 4 registers, 2 halves]
    column: Tensor  # of the 16 of a product, likewise


def lanes() -> Lanes:
    """Register i = 2 c + h of lane 4 g + t of warp w: row 16 w + g + 8 h, columns 2 t + 8 c and the
    next one (PTX ISA, "Register Fragments for wgmma")."""
    thread, i = torch.arange(THREADS)[:, None, None], torch.arange(4)[None, :, None]
    half = torch.arange(2)[None, None, :]
    g, t = thread % 32 // 4, thread % 4
    row = (16 * (thread // 32) + g + 8 * (i % 2)).expand(-1, -1, 2)
    return Lanes(row, 2 * t + 8 * (i // 2) + half)


def product(stand: Stand, name: str, sparse: bool, dtype: torch.dtype) -> list[str]:
    """What is wrong with a kernel's 64 x 64 sums over 64 inputs. The integers have no symmetry: any
    exchange of rows, columns, positions or tokens shows."""
    generator = torch.Generator().manual_seed(len(name))
    at, B = lanes(), torch.randint(-4, 5, (TOKENS, INPUTS), generator=generator)
    stored = torch.randint(-4, 5, (ROWS, INPUTS // 2 if sparse else INPUTS), generator=generator)
    A, metadata = stored, torch.zeros(THREADS, dtype=torch.int32)
    if sparse:
        legal = torch.tensor(sorted(LEGAL_NIBBLES))
        chosen = legal[torch.randint(len(legal), (ROWS, INPUTS // 4), generator=generator)]
        A, metadata = placed(stored, chosen), metadata_words(chosen)
    steps = stored.to(dtype).unflatten(1, (-1, 16))[at.row, :, at.column]
    a = steps.permute(3, 0, 1, 2).contiguous()  # [steps, threads, registers, halves]
    x = B.to(dtype)
    held = [t.to(stand.where) for t in (a, metadata, x)]
    sums = torch.full((THREADS, TOKENS // 2), float("nan"), device=stand.where)
    params = HardwareParams()
    params.a, params.metadata, params.source = (t.data_ptr() for t in held)
    params.sums = sums.data_ptr()
    stand.launch(name, 1, THREADS, SHARED, params)
    return differences(sums.cpu().double(), in_lanes(A.double() @ B.double().T))


def placed(stored: Tensor, nibbles: Tensor) -> Tensor:
    """Kept pairs [rows, 32] at their positions in groups of four: [rows, 64].

    nibbles: [rows, 16], the position of the first in bits 0 and 1, of the second in 2 and 3.
    """
    positions = torch.stack([nibbles & 3, nibbles >> 2], -1)
    groups = torch.zeros(*nibbles.shape, 4, dtype=stored.dtype)
    return groups.scatter(-1, positions, stored.unflatten(1, (-1, 2))).flatten(1)


def metadata_words(nibbles: Tensor) -> Tensor:
    """[rows, 16 groups] -> the threads' words [threads] int32 of both halves of 32 inputs.

    Lanes t = 0, 1 hold the first half, whose selector is 0, lanes t = 2, 3 the second; of these the
    even lane has inputs 0 to 15, the odd one 16 to 31; the low half of a word is of row g, the high
    half of row g + 8.
    """
    words = (nibbles.unflatten(1, (4, 4)) << 4 * torch.arange(4)).sum(-1)  # [rows, t]
    warps = words.view(4, 2, 8, 4)  # warp h g t
    both = warps[:, 0] | warps[:, 1] << 16
    return (both - (both >> 31 << 32)).flatten().to(torch.int32)


def in_lanes(D: Tensor) -> Tensor:
    """D [rows, tokens] as [threads, 32]: c[4 j + i] is row g + 8 (i / 2), token 8 j + 2 t + i % 2
    of the warp."""
    axes = D.view(4, 2, 8, TOKENS // 8, 4, 2)  # warp h g j t half
    return axes.permute(0, 2, 4, 3, 1, 5).reshape(THREADS, -1)


def differences(found: Tensor, expected: Tensor) -> list[str]:
    """What is wrong with an array, told by its first entry."""
    bad = (found != expected).nonzero()
    if not len(bad):
        return []
    at = tuple(int(i) for i in bad[0])
    first = f"the first at {at}: {found[at].item():g} instead of {expected[at].item():g}"
    return [f"{len(bad)} of {found.numel()} entries, {first}"]


def swizzled(box: Tensor) -> Tensor:
    """The bytes [64 tokens, 128] as they lie in shared memory: bits 4 to 6 of an address are XORed
    with bits 7 to 9."""
    pieces = box.view(TOKENS, 8, 16)
    token, piece = torch.arange(TOKENS)[:, None], torch.arange(8)
    return pieces[token, piece ^ token % 8].flatten()


def box(stand: Stand, ctas: int) -> list[str]:
    """What is wrong with the bytes of a box that a CTA, or a pair in halves, has copied."""
    tokens, inputs = MATRIX
    generator = torch.Generator().manual_seed(ctas)
    whole = torch.randint(1, 32000, (tokens, -(-inputs // 8) * 8), generator=generator).short()
    there = whole.to(stand.where)
    column, row = CORNER
    bytes_ = torch.full((ctas, BOX_BYTES), 0xA5, dtype=torch.uint8, device=stand.where)
    params = HardwareParams()
    apart = there.stride(0) * 2
    map_ = stand.tensor_map(there.data_ptr(), inputs, tokens, apart, TOKENS // ctas, torch.float16)
    params.map[:] = map_
    params.bytes, params.column, params.row = bytes_.data_ptr(), column, row
    stand.launch("box_copy" if ctas == 1 else "box_copy_of_pair", ctas, THREADS, SHARED, params)
    expected = torch.zeros(TOKENS, 64, dtype=torch.int16)
    inside = whole[row : row + TOKENS, column:inputs]
    expected[: inside.shape[0], : inside.shape[1]] = inside
    return differences(bytes_.cpu(), swizzled(expected.view(torch.uint8)).expand(ctas, -1))


def outcomes(stand: Stand) -> list[Row]:
    """A row for each check, whatever became of those before it."""
    checks: dict[str, Callable[[], list[str]]] = {}
    for (kind, sparse), (dtype_name, dtype) in itertools.product(
        (("dense", False), ("sparse", True)), DTYPES.items()
    ):
        name = f"{kind}_product_{dtype_name}"
        checks[name] = lambda name=name, sparse=sparse, dtype=dtype: product(
            stand, name, sparse, dtype
        )
    checks["box of a CTA"] = lambda: box(stand, 1)
    checks["box of a pair"] = lambda: box(stand, 2)
    rows = []
    for name, check in checks.items():
        try:
            wrong = check()
        except Exception as error:
            wrong = [f"{type(error).__name__}: {' '.join(str(error).split())}"]
        rows.append({"case": name, "wrong": wrong})
    return rows


def stand_here() -> Stand:
    """This machine's. Raises: as `unit.loaded`."""
    where, device = machine.here()
    return Stand(where, loaded(where), device.tensor_map)


def main(file: str) -> int:
    if driver.capability(torch.cuda.current_device()) != CAPABILITY:
        Verdict("no Hopper GPU, nothing was checked", True).say()
        return 0
    rows = Rows(Path(file), machine.head(), (RESULTS,))
    rows.add(*outcomes(stand_here()))
    verdict = verdicts_many.hardware([row for row in rows.rows if "wrong" in row])
    verdict.say()
    return 0 if verdict.good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
