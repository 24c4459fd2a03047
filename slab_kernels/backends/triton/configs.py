"""Which tiles a linear runs with: rows of a table, chosen ahead of time. Nothing is tuned at run time.

The user's own rows (`slab-kernels tune` writes them) come first, then rows measured for this device and shipped as
`configs/<device>.json`, then the defaults below, each with its reason. A file is read once, on the first linear.
"""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

SHIPPED = Path(__file__).parent / "configs"
ENVIRONMENT = "SLAB_KERNELS_CONFIGS"  # another folder for the user's rows
FORMAT = 1
DECODE = 16  # tokens up to which K is split in one way: a token's result depends on no other
MOST_SPLITS = 16
Z_SPLITS = 16  # shares of K in z = x Q: few programs would otherwise walk all of K
BLOCKS = (16, 32, 64, 128, 256)
WARPS = (1, 2, 4, 8)


class ConfigError(ValueError):
    """A row or file of configurations is not usable; the message names it."""


class Sizes(NamedTuple):
    """A linear as its kernels see it."""

    K: int
    rows: tuple[int, ...]  # out_features of each fused part
    values: str
    group_size: int  # inputs a scale covers; 0 = a row, or no scales
    rank: int
    adapter_rank: int  # padded to 16

    @property
    def N(self) -> int:
        return sum(self.rows)


class Device(NamedTuple):
    """What a configuration depends on."""

    name: str
    multiprocessors: int
    shared_limit: int  # bytes a program may have
    capability: int  # 90 = compute capability 9.0


@dataclass(frozen=True)
class Config:
    """One way to run: tiles of `linear_kernel`, or with rebuild=True the weight made dense once for torch's matmul."""

    block_m: int = 16  # tokens
    block_n: int = 64  # out_features
    block_k: int = 128  # inputs a step
    warps: int = 4
    stages: int = 3  # tiles in flight
    fill: int = 0  # programs a multiprocessor should have: K is split until they are; 0 = never split
    rebuild: bool = False
    reason: str = ""

    def __post_init__(self):
        for name, allowed in (("block_m", BLOCKS), ("block_n", BLOCKS), ("block_k", BLOCKS[1:]), ("warps", WARPS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(str, allowed))}")
        for name, most in (("stages", 8), ("fill", 64)):
            value = getattr(self, name)
            if type(value) is not int or not (0 if name == "fill" else 1) <= value <= most:
                raise ConfigError(f"{name}={value!r} must be an integer up to {most}")
        if type(self.rebuild) is not bool or not isinstance(self.reason, str):
            raise ConfigError("rebuild must be true or false, and reason text")

    def describe(self) -> str:
        if self.rebuild:
            return f"the weight rebuilt dense, then torch's matmul ({self.reason})"
        return (
            f"{self.block_n} rows x {self.block_m} tokens x {self.block_k} inputs, {self.warps} warps, {self.stages} stages"
            f" ({self.reason})"
        )


@dataclass(frozen=True)
class Row:
    """A configuration and what it is for: the first row that fits a problem is taken. None fits anything."""

    config: Config
    tokens: int | None = None  # M up to here
    bits: int | None = None  # of an activation: 16 or 32
    values: tuple[str, ...] | None = None
    rank: int | None = None  # of the sign term, up to here
    N: int | None = None
    K: int | None = None
    shared: int = 0  # bytes of shared memory it takes at most
    capability: int = 0  # the oldest device it is for: 90 = compute capability 9.0

    def fits(self, sizes: Sizes, M: int, bits: int, device: Device) -> bool:
        return (
            (self.tokens is None or M <= self.tokens)
            and self.bits in (None, bits)
            and (self.values is None or sizes.values in self.values)
            and (self.rank is None or sizes.rank <= self.rank)
            and self.N in (None, sizes.N)
            and self.K in (None, sizes.K)
            and self.shared <= device.shared_limit
            and self.capability <= device.capability
        )


INTEGERS = ("int8", "int4")
# Chosen from the machine code (`python tests/triton_code.py`): instructions a weight in the loop, registers, shared memory.
# Nothing here was timed; `slab-kernels tune` does that.
DEFAULTS = (
    Row(Config(16, 64, 128, 4, 4, 2, reason="fewest instructions a weight; a stage more, since codes are fewer bytes"),
        16, 16, INTEGERS, shared=51200),
    Row(Config(16, 64, 128, 4, 3, 2, reason="fewest instructions a weight, three programs a multiprocessor"), 16, 16, shared=53248),
    Row(Config(32, 64, 128, 4, 3, 2, reason="as for decoding, a tile of 32 tokens"), 32, 16, rank=1, shared=61440),
    Row(Config(64, 64, 128, 4, 3, 2, reason="as for decoding, a tile of 64 tokens"), 64, 16, rank=1, shared=86016),
    Row(Config(64, 64, 64, 4, 3, 2, reason="half the inputs a step: U V^T of a higher rank takes registers"), 64, 16, shared=49152),
    Row(Config(64, 64, 128, 4, 3, reason="small tiles: more programs, for few tokens"), 256, 16, rank=1, shared=86016),
    Row(Config(64, 64, 64, 4, 3, reason="the same with half the inputs a step, for a higher rank's registers"), 256, 16, shared=49152),
    Row(Config(128, 128, 64, 8, 3, reason="fewer tokens would have every tile rebuilt more often"), 512, 16, rank=1, shared=79872),
    Row(Config(256, 128, 64, 8, 3, reason="a product by wgmma takes half the time: more tokens a tile, to hide rebuilding it"),
        2047, 16, ("fp16", "bf16"), rank=1, shared=131072, capability=90),
    Row(Config(128, 128, 64, 8, 3, reason="products outweigh rebuilding the tile, and no register is spilled"),
        2047, 16, ("fp16", "bf16"), rank=1, shared=79872),
    Row(Config(rebuild=True, reason="2 bytes a weight written and read cost less than rebuilding every tile"), bits=16),
    Row(Config(16, 64, 64, 4, 3, 2, reason="three TF32 products: the widest tile without a register spilled"), 16, 32, shared=65536),
    Row(Config(64, 64, 32, 4, 3, reason="three TF32 products of more tokens: half the inputs a step"), shared=57344),
    Row(Config(64, 64, 32, 4, 2, reason="the least shared memory")),
)


def choose(sizes: Sizes, M: int, bits: int, device: Device) -> Config:
    """The configuration for M tokens of `bits`-bit activations. Raises: ConfigError for an unreadable file of rows."""
    return next(row.config for row in _rows(device.name) if row.fits(sizes, max(M, 1), bits, device))


def splits(sizes: Sizes, M: int, config: Config, device: Device) -> int:
    """Into how many shares K is split: the least estimated time, one number for all M of a regime (up to 16, up to 64, above).

    Memory is kept busy by `fill` programs a multiprocessor; the last round of programs leaves some idle; every share writes
    and reads its sums (2 percent of the weight's bytes for 16 tokens and K = 4096) and a second launch adds them.
    """
    if not config.fill:
        return 1
    tiles, processors = sum(-(-part // config.block_n) for part in sizes.rows), device.multiprocessors
    tokens = DECODE if M <= DECODE else max(64, M)

    def cost(shares: int) -> float:
        programs = tiles * shares
        starved = max(1.0, config.fill * processors / programs)
        uneven = -(-programs // processors) * processors / programs
        sums = 0.02 * tokens / DECODE * 4096 / sizes.K * shares + 0.03 if shares > 1 else 0.0
        return starved * uneven + sums

    possible = [1 << i for i in range(MOST_SPLITS.bit_length()) if i == 0 or sizes.K >= (2 << i) * config.block_k]
    return min(possible, key=cost)


def z_splits(sizes: Sizes) -> int:
    """Shares of K in z = x Q, of two steps of 64 inputs at least."""
    return max(1, min(Z_SPLITS, sizes.K // 128))


@functools.cache
def _rows(device: str) -> tuple[Row, ...]:
    found = []
    for folder in (user_folder(), SHIPPED):
        path = folder / file_name(device)
        if path.exists():
            found += read(path)
    return (*found, *DEFAULTS)


def user_folder() -> Path:
    """Where `slab-kernels tune` writes: $SLAB_KERNELS_CONFIGS, or slab_kernels in the user's configuration folder."""
    if named := os.environ.get(ENVIRONMENT):
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "slab_kernels"


def file_name(device: str) -> str:
    """A device's file: "NVIDIA A100-SXM4-80GB" -> "nvidia-a100-sxm4-80gb.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def read(path: Path) -> list[Row]:
    """The rows of a file. Raises: ConfigError with the file and the defect."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ConfigError(f"format {content['format']!r}, this version reads {FORMAT}")
        return [row_from(entry) for entry in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: {error or type(error).__name__}; delete the file, or write it anew with slab-kernels tune") from error


def row_from(entry: dict) -> Row:
    """Inverse of `row_to`. Raises: ConfigError for unknown keys or values."""
    entry = dict(entry)
    config = Config(**{f.name: entry.pop(f.name) for f in fields(Config) if f.name in entry})
    if strange := entry.keys() - {f.name for f in fields(Row)}:
        raise ConfigError(f"unknown keys {', '.join(sorted(strange))}")
    for name in ("tokens", "bits", "N", "K", "shared"):
        if entry.get(name) is not None and (type(entry[name]) is not int or entry[name] < 0):
            raise ConfigError(f"{name}={entry[name]!r} must be a positive integer")
    values = entry.pop("values", None)
    return Row(config, values=None if values is None else tuple(values), **entry)


def row_to(row: Row) -> dict:
    """Plain JSON form, without what is None."""
    entry = asdict(row)
    return {name: value for name, value in {**entry, **entry.pop("config")}.items() if value is not None}
