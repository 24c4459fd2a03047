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
DECODE = 16  # tokens up to which K may be split, in one way for all of them: a token's result depends on no other
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
    N: int | None = None
    K: int | None = None
    shared: int = 0  # bytes of shared memory it takes at most

    def fits(self, sizes: Sizes, M: int, bits: int, shared_limit: int) -> bool:
        return (
            (self.tokens is None or M <= self.tokens)
            and self.bits in (None, bits)
            and (self.values is None or sizes.values in self.values)
            and self.N in (None, sizes.N)
            and self.K in (None, sizes.K)
            and self.shared <= shared_limit
        )


DEFAULTS = (
    Row(Config(16, 64, 128, 4, 3, 3, reason="placeholder"), 16, 16),
    Row(Config(32, 64, 128, 4, 3, 0, reason="placeholder"), 32, 16),
    Row(Config(64, 64, 64, 4, 3, 0, reason="placeholder"), 64, 16),
    Row(Config(128, 128, 64, 8, 3, 0, reason="placeholder"), 2047, 16),
    Row(Config(rebuild=True, reason="placeholder"), None, 16),
    Row(Config(16, 32, 64, 4, 2, 3, reason="placeholder"), 16, 32),
    Row(Config(64, 64, 32, 4, 2, 0, reason="placeholder"), None, 32),
)


def choose(sizes: Sizes, M: int, bits: int, device: Device) -> Config:
    """The configuration for M tokens of `bits`-bit activations. Raises: ConfigError for an unreadable file of rows."""
    return next(row.config for row in _rows(device.name) if row.fits(sizes, max(M, 1), bits, device.shared_limit))


def splits(sizes: Sizes, M: int, config: Config, device: Device) -> int:
    """Into how many shares K is split: one number for all M up to DECODE, 1 above; each share has two steps at least."""
    if M > DECODE or not config.fill:
        return 1
    tiles = sum(-(-part // config.block_n) for part in sizes.rows)
    shares = 1
    while shares < MOST_SPLITS and tiles * shares < config.fill * device.multiprocessors and sizes.K >= 4 * shares * config.block_k:
        shares *= 2
    return shares


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
