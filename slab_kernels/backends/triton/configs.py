"""Which tiles a linear runs with: rows of a table, chosen ahead of time. Nothing is tuned at run time.

The user's own rows (`slab-kernels tune` writes them) come first, then rows measured for this device and shipped as
`configs/<device>.json`, then the defaults below, each with its reason. A file is read once, on the first linear, and checked
whole: no row of it can make a result wrong, or depend on how many other tokens are decoded.
"""

from __future__ import annotations

import bisect
import functools
import json
import os
import re
import reprlib
import stat
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from ...errors import ConfigError

SHIPPED = Path(__file__).parent / "configs"
ENVIRONMENT = "SLAB_KERNELS_CONFIGS"  # another folder for the user's rows
FORMAT = 1
KEYS = (
    "format",
    "device",
    "versions",
    "rows",
)  # of a file; device and versions say where the rows were measured
DECODE = 16  # tokens up to which K is split in one way: a token's result depends on no other
MOST_SPLITS = 16
Z_SPLITS = 16  # shares of K in z = x Q: few programs would otherwise walk all of K
BLOCKS = (16, 32, 64, 128, 256)  # a tile is 2^16 numbers at most; Triton takes 2^20
WARPS = (1, 2, 4, 8)
A_THREAD = 256  # numbers of a tile in one thread's registers (there are 255 of them): with more, compiling takes minutes
VALUES = ("fp16", "bf16", "int8", "int4")


def _integer(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(
            f"{name}={reprlib.repr(value)} must be a whole number from {least} to {most}"
        )


class Sizes(NamedTuple):
    """A linear as its kernels see it, but for its sign planes.

    Two planes are half a bit and 0.6 instructions a weight more than one, three a bit and 1.6: one plane's best tiles are taken
    for all, and every tile of the defaults has registers and shared memory for three (tests/backends/triton/test_triton_code.py).
    """

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
    fill: int = (
        0  # programs a multiprocessor should have: K is split until they are; 0 = never split
    )
    rebuild: bool = False
    reason: str = ""

    def __post_init__(self):
        for name, allowed in (
            ("block_m", BLOCKS),
            ("block_n", BLOCKS),
            ("block_k", BLOCKS[1:]),
            ("warps", WARPS),
        ):
            value = getattr(self, name)
            if (
                type(value) is not int or value not in allowed
            ):  # type(), since true and 16.0 would pass
                raise ConfigError(
                    f"{name}={reprlib.repr(value)} must be one of {', '.join(map(str, allowed))}"
                )
        for name, least, most in (("stages", 1, 8), ("fill", 0, 64)):
            _integer(name, getattr(self, name), least, most)
        if type(self.rebuild) is not bool or not isinstance(self.reason, str):
            raise ConfigError(
                f"rebuild={reprlib.repr(self.rebuild)} must be true or false, and reason={reprlib.repr(self.reason)} text"
            )
        numbers = self.block_n * max(self.block_m, self.block_k) // (32 * self.warps)
        if numbers > A_THREAD:
            raise ConfigError(
                f"block_m={self.block_m}, block_n={self.block_n}, block_k={self.block_k} with warps={self.warps} gives a thread"
                f" {numbers} numbers of a tile, at most {A_THREAD} work: use more warps or smaller blocks"
            )

    def describe(self) -> str:
        """The tiles in words, and the reason where there is one."""
        tiles = f"{self.block_n} rows x {self.block_m} tokens x {self.block_k} inputs, {self.warps} warps, {self.stages} stages"
        words = "the weight rebuilt dense, then torch's matmul" if self.rebuild else tiles
        return f"{words} ({self.reason})" if self.reason else words


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
    above: int = 0  # M above here

    def fits(self, sizes: Sizes, M: int, bits: int, device: Device) -> bool:
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


INTEGERS = ("int8", "int4")
# Chosen from the machine code (`python tests/backends/triton/triton_code.py`): instructions a weight in the loop, registers, shared memory.
# Nothing here was timed; `slab-kernels tune` does that.
DEFAULTS = (
    Row(
        Config(
            16,
            64,
            128,
            4,
            4,
            2,
            reason="fewest instructions a weight; a stage more, since codes are fewer bytes",
        ),
        16,
        16,
        INTEGERS,
        shared=51200,
    ),
    Row(
        Config(
            16,
            64,
            128,
            4,
            3,
            2,
            reason="fewest instructions a weight, three programs a multiprocessor",
        ),
        16,
        16,
        shared=53248,
    ),
    Row(
        Config(32, 64, 128, 4, 3, 2, reason="as for decoding, a tile of 32 tokens"),
        32,
        16,
        rank=1,
        shared=61440,
    ),
    Row(
        Config(64, 64, 128, 4, 3, 2, reason="as for decoding, a tile of 64 tokens"),
        64,
        16,
        rank=1,
        shared=86016,
    ),
    Row(
        Config(
            64,
            64,
            64,
            4,
            3,
            2,
            reason="half the inputs a step: U V^T of a higher rank takes registers",
        ),
        64,
        16,
        shared=49152,
    ),
    Row(
        Config(64, 64, 128, 4, 3, reason="small tiles: more programs, for few tokens"),
        256,
        16,
        rank=1,
        shared=86016,
    ),
    Row(
        Config(
            64,
            64,
            64,
            4,
            3,
            reason="the same with half the inputs a step, for a higher rank's registers",
        ),
        256,
        16,
        shared=49152,
    ),
    Row(
        Config(128, 128, 64, 8, 3, reason="fewer tokens would have every tile rebuilt more often"),
        512,
        16,
        rank=1,
        shared=79872,
    ),
    Row(
        Config(
            128,
            128,
            64,
            8,
            3,
            reason="products outweigh rebuilding the tile, and no register is spilled",
        ),
        1023,
        16,
        ("fp16", "bf16"),
        rank=1,
        shared=79872,
    ),
    Row(
        Config(
            rebuild=True,
            reason="2 bytes a weight written and read cost less than rebuilding every tile",
        ),
        bits=16,
        above=DECODE,
    ),
    Row(
        Config(
            16,
            64,
            64,
            4,
            3,
            2,
            reason="three TF32 products: the widest tile without a register spilled",
        ),
        16,
        32,
        shared=65536,
    ),
    Row(
        Config(
            64, 64, 32, 4, 3, reason="three TF32 products of more tokens: half the inputs a step"
        ),
        shared=57344,
    ),
    Row(Config(64, 64, 32, 4, 2, reason="the least shared memory")),
)


@functools.lru_cache(4096)  # prefill meets many M; a hit takes 0.3 us
def choose(sizes: Sizes, M: int, bits: int, device: Device, own: bool = True) -> Config:
    """The configuration for M tokens of `bits`-bit activations; own=False leaves out the user's rows.

    Raises: ConfigError for an unusable file of rows.
    """
    return next(
        row.config for row in rows(device.name, own) if row.fits(sizes, max(M, 1), bits, device)
    )


@functools.lru_cache(4096)
def splits(sizes: Sizes, M: int, config: Config, device: Device) -> int:
    """Into how many shares K is split: the least estimated time, one number for all M of a regime (up to 16, up to 64, above).

    Memory is kept busy by `fill` programs a multiprocessor; the last round of programs leaves some idle; every share writes
    and reads its sums (2 percent of the weight's bytes for 16 tokens and K = 4096) and a second launch adds them.
    """
    if not config.fill:
        return 1
    tiles, processors = (
        sum(-(-part // config.block_n) for part in sizes.rows),
        device.multiprocessors,
    )
    tokens = DECODE if M <= DECODE else max(64, M)

    def cost(shares: int) -> float:
        programs = tiles * shares
        starved = max(1.0, config.fill * processors / programs)
        uneven = -(-programs // processors) * processors / programs
        sums = 0.02 * tokens / DECODE * 4096 / sizes.K * shares + 0.03 if shares > 1 else 0.0
        return starved * uneven + sums

    possible = [
        1 << i
        for i in range(MOST_SPLITS.bit_length())
        if i == 0 or sizes.K >= (2 << i) * config.block_k
    ]
    return min(possible, key=cost)


def z_splits(sizes: Sizes) -> int:
    """Shares of K in z = x Q, of two steps of 64 inputs at least."""
    return max(1, min(Z_SPLITS, sizes.K // 128))


@functools.cache
def rows(device: str, own: bool = True) -> tuple[Row, ...]:
    """All rows for a device of that name, in the order of choice; own=False leaves out the user's. Raises: ConfigError."""
    found = []
    for folder in (user_folder(), SHIPPED) if own else (SHIPPED,):
        path = folder / file_name(device)
        if os.path.exists(path):  # False in a folder that is closed to us: another user's home
            found += read(path)
    return (*found, *DEFAULTS)


def forget() -> None:
    """Read the files again when next asked; they have changed."""
    for cached in (rows, choose, splits):
        cached.cache_clear()


def regime(M: int, device: str) -> tuple[int, int | None]:
    """The token counts around M that the shipped rows tell apart from others: above the first, up to the second (None: all)."""
    ends = sorted(
        {end for row in rows(device, own=False) for end in (row.tokens, row.above) if end}
    )
    at = bisect.bisect_left(ends, M)
    return ends[at - 1] if at else 0, ends[at] if at < len(ends) else None


def user_folder() -> Path:
    """Where `slab-kernels tune` writes: the folder that SLAB_KERNELS_CONFIGS names, else
    slab_kernels in the user's configuration folder.

    Raises: ConfigError if the variable names something that is no folder.
    """
    if named := os.environ.get(ENVIRONMENT):
        folder = Path(os.path.expanduser(named))
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise ConfigError(f"{ENVIRONMENT}={named} is no folder; it has to name one")
        return folder
    return (
        Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")) / "slab_kernels"
    )


def file_name(device: str) -> str:
    """A device's file: "NVIDIA A100-SXM4-80GB" -> "nvidia-a100-sxm4-80gb.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def read(path: Path) -> list[Row]:
    """The rows of a file. Raises: ConfigError, one sentence with the file, the defect and the way out."""
    try:
        with path.open("rb") as f:
            mode, text = os.fstat(f.fileno()).st_mode, f.read()
        if hasattr(os, "getuid") and mode & stat.S_IWOTH:  # Windows calls every file so
            bits = f"{stat.S_IMODE(mode):04o}"
            raise ConfigError(f"everybody may write to it (mode {bits}; chmod o-w)")
        return _rows_of(text)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror or error}; make it readable, or delete it"
        ) from error
    except (ValueError, RecursionError) as error:
        defect = str(error) if isinstance(error, ConfigError) else f"it is not valid JSON ({error})"
        raise ConfigError(
            f"{path}: {defect}; correct it, or delete it and run slab-kernels tune again"
        ) from error


def _rows_of(text: bytes) -> list[Row]:
    content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ConfigError('it must be an object {"format": ' + str(FORMAT) + ', "rows": [...]}')
    if (found := content.get("format")) != FORMAT or type(found) is not int:
        raise ConfigError(
            f"it has format {reprlib.repr(found)}, this version of slab_kernels reads format {FORMAT}"
        )
    _only(content, KEYS)
    parsed = []
    for position, entry in enumerate(content["rows"], 1):
        try:
            parsed.append(row_from(entry))
        except ConfigError as error:
            raise ConfigError(f"row {position}: {error}") from error
    return parsed


def row_from(entry: dict) -> Row:
    """Inverse of `row_to`, for rows that anybody may have written. Raises: ConfigError with the key and its value."""
    if not isinstance(entry, dict):
        raise ConfigError(f"{reprlib.repr(entry)} must be an object")
    entry = {name: value for name, value in entry.items() if value is not None}
    config = Config(**{f.name: entry.pop(f.name) for f in fields(Config) if f.name in entry})
    _only(entry, [f.name for f in fields(Row) if f.name != "config"])
    for name in entry.keys() - {"values"}:
        _integer(name, entry[name], *LEAST_AND_MOST[name])
    values = entry.pop("values", None)
    if values is not None and not (
        isinstance(values, (list, tuple)) and values and all(v in VALUES for v in values)
    ):
        raise ConfigError(f"values={reprlib.repr(values)} must be a list of {', '.join(VALUES)}")
    if entry.get("bits") not in (None, 16, 32):
        raise ConfigError(f"bits={entry['bits']} must be 16 or 32")
    row = Row(config, values=None if values is None else tuple(values), **entry)
    if 0 < row.above < DECODE or (config.rebuild and row.above < DECODE):
        what = "a row with rebuild=true needs above" if config.rebuild else "above"
        raise ConfigError(
            f"{what}={DECODE} or more, not {row.above}: up to {DECODE} tokens no result may depend on their number"
        )
    if row.tokens is not None and row.tokens <= row.above:
        raise ConfigError(f"tokens={row.tokens} must be more than above={row.above}")
    return row


# Fewer tokens than DECODE in a row of their own would let a token's result depend on how many others there are.
LEAST_AND_MOST = {
    "tokens": (DECODE, 1 << 31), "above": (0, 1 << 31), "bits": (16, 32), "rank": (0, 1 << 10), "N": (1, 1 << 31),
    "K": (1, 1 << 31), "shared": (0, 1 << 31), "capability": (0, 1 << 10),
}  # fmt: skip


def _only(entry: dict, known) -> None:
    if strange := sorted(entry.keys() - set(known)):
        raise ConfigError(
            f"unknown keys {', '.join(map(reprlib.repr, strange))} (known: {', '.join(known)})"
        )


def row_to(row: Row) -> dict:
    """Plain JSON form, without what is None."""
    entry = asdict(row)
    config = entry.pop("config")
    return {name: value for name, value in (entry | config).items() if value is not None}
