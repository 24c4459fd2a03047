"""Tile configurations of the Triton kernels, and the rows that say which linears each is for.

DEFAULTS is the table under all others, each row with its reason.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import NamedTuple

from ...errors import ConfigError

# Up to so many tokens K is split in one way, so that a token's result depends on no other.
DECODE = 16
BLOCKS = (16, 32, 64, 128, 256)  # A tile is 2^16 numbers at most; Triton takes 2^20.
WARPS = (1, 2, 4, 8)
ALLOWED = {"block_m": BLOCKS, "block_n": BLOCKS, "block_k": BLOCKS[1:], "warps": WARPS}
# Numbers of a tile in the 255 registers of one thread: with more, compiling takes minutes.
MOST_PER_THREAD = 256
INTEGERS = ("int8", "int4")
SIXTEEN_BITS = ("fp16", "bf16")
VALUES = (*SIXTEEN_BITS, *INTEGERS)


class TritonSizes(NamedTuple):
    """A linear as its kernels see it, but for its sign planes.

    Two planes take half a bit and 0.6 instructions per weight more than one, three take a bit and
    1.6. The best tiles for one plane are taken for all: every tile of DEFAULTS has registers and
    shared memory for three (tests/backends/triton/test_triton_code.py).
    """

    K: int
    rows: tuple[int, ...]  # out_features of each fused part
    values: str
    group_size: int  # inputs that a scale covers; 0 = a row, or no scales
    rank: int
    adapter_rank: int  # padded to 16

    @property
    def N(self) -> int:
        """out_features of all parts."""
        return sum(self.rows)


class TritonDevice(NamedTuple):
    """What the choice of a configuration depends on."""

    name: str
    multiprocessors: int
    shared_limit: int  # bytes of shared memory that a program may have
    capability: int  # 90 = compute capability 9.0


@dataclass(frozen=True)
class TileConfig:
    """One way to run: the tiles of `linear_kernel`, or a weight rebuilt for torch's matmul.

    Of a weight that is prepared as a stream only `rebuild` counts: without it sparse tensor cores
    multiply, which have no tiles to choose (stream.py).

    Raises: ConfigError for numbers that the kernels cannot run with.
    """

    block_m: int = 16  # tokens
    block_n: int = 64  # out_features
    block_k: int = 128  # inputs per step
    warps: int = 4
    stages: int = 3  # tiles in flight
    # K is split until a multiprocessor has so many programs; 0 = K is never split.
    fill: int = 0
    rebuild: bool = False
    reason: str = ""

    def __post_init__(self):
        for name, allowed in ALLOWED.items():
            value = getattr(self, name)
            if type(value) is not int or value not in allowed:  # True and 16.0 are in there too.
                known = ", ".join(map(str, allowed))
                raise ConfigError(f"{name}={reprlib.repr(value)} must be one of {known}")
        check_integer("stages", self.stages, 1, 8)
        check_integer("fill", self.fill, 0, 64)
        if type(self.rebuild) is not bool or not isinstance(self.reason, str):
            rebuild, reason = reprlib.repr(self.rebuild), reprlib.repr(self.reason)
            raise ConfigError(f"rebuild={rebuild} must be true or false, and reason={reason} text")
        numbers = self.block_n * max(self.block_m, self.block_k) // (32 * self.warps)
        if numbers > MOST_PER_THREAD:
            raise ConfigError(
                f"block_m={self.block_m}, block_n={self.block_n}, block_k={self.block_k} with "
                f"warps={self.warps} gives a thread {numbers} numbers of a tile, at most "
                f"{MOST_PER_THREAD} work: use more warps or smaller blocks"
            )

    def describe(self) -> str:
        """The tiles in words, and the reason where there is one."""
        if self.rebuild:
            words = "the weight rebuilt dense, then torch's matmul"
        else:
            words = (
                f"{self.block_n} rows x {self.block_m} tokens x {self.block_k} inputs, "
                f"{self.warps} warps, {self.stages} stages"
            )
        return f"{words} ({self.reason})" if self.reason else words


def check_integer(name: str, value: object, least: int, most: int) -> None:
    """Raises: ConfigError if the value is no integer, or not within the limits."""
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(
            f"{name}={reprlib.repr(value)} must be a whole number from {least} to {most}"
        )


@dataclass(frozen=True)
class Row:
    """A configuration and what it is for; None fits anything.

    The first row that fits a problem is taken.
    """

    config: TileConfig
    tokens: int | None = None  # M up to here
    bits: int | None = None  # of an activation: 16 or 32
    values: tuple[str, ...] | None = None
    rank: int | None = None  # of the sign term, up to here
    N: int | None = None
    K: int | None = None
    shared: int = 0  # bytes of shared memory that it takes at most
    capability: int = 0  # the oldest device that it is for: 90 = compute capability 9.0
    above: int = 0  # M above here

    def fits(self, sizes: TritonSizes, M: int, bits: int, device: TritonDevice) -> bool:
        """Whether the row is for M tokens of `bits`-bit activations on the device."""
        return (
            M > self.above
            and (self.tokens is None or M <= self.tokens)
            and self.bits in (None, bits)
            and (self.values is None or sizes.values in self.values)
            and (self.rank is None or sizes.rank <= self.rank)
            and self.N in (None, sizes.N)
            and self.K in (None, sizes.K)
            and self.shared <= device.shared_limit
            and self.capability <= device.capability
        )


REBUILD = "2 bytes a weight written and read cost less than decoding it for every tile of tokens"
# The tiles were chosen from the machine code (`python tests/backends/triton/triton_code.py`): by
# instructions per weight in the main loop, registers and shared memory. Nothing here was timed;
# `slab-kernels tune` does that.
# fmt: off
DEFAULTS = (
    Row(TileConfig(16, 64, 128, 4, 4, 2,
                   reason="fewest instructions a weight; a stage more, since codes are fewer bytes"
                   ), tokens=16, bits=16, values=INTEGERS, shared=51200),
    Row(TileConfig(16, 64, 128, 4, 3, 2,
                   reason="fewest instructions a weight, three programs a multiprocessor"),
        tokens=16, bits=16, shared=53248),
    Row(TileConfig(32, 64, 128, 4, 3, 2, reason="as for decoding, a tile of 32 tokens"),
        tokens=32, bits=16, rank=1, shared=61440),
    Row(TileConfig(64, 64, 128, 4, 3, 2, reason="as for decoding, a tile of 64 tokens"),
        tokens=64, bits=16, rank=1, shared=86016),
    Row(TileConfig(64, 64, 64, 4, 3, 2,
                   reason="half the inputs a step: U V^T of a higher rank takes registers"),
        tokens=64, bits=16, shared=49152),
    Row(TileConfig(64, 64, 128, 4, 3,
                   reason="twice the tiles of 64 tokens cost no more than rebuilding the weight"),
        tokens=128, bits=16, values=SIXTEEN_BITS, rank=1, shared=86016),
    Row(TileConfig(64, 64, 64, 4, 3,
                   reason="the same with half the inputs a step, for a higher rank's registers"),
        tokens=128, bits=16, values=SIXTEEN_BITS, shared=49152),
    Row(TileConfig(rebuild=True, reason=REBUILD), bits=16, above=DECODE),
    Row(TileConfig(16, 64, 64, 4, 3, 2,
                   reason="three TF32 products: the widest tile without a register spilled"),
        tokens=16, bits=32, shared=65536),
    Row(TileConfig(64, 64, 32, 4, 3,
                   reason="three TF32 products of more tokens: half the inputs a step"),
        shared=57344),
    Row(TileConfig(64, 64, 32, 4, 2, reason="the least shared memory")),
)
# fmt: on
