"""Tiles that were measured to be faster than the cost model's choice: the rows of `measured.json`.

`benchmarks/fit_plans.py rows` writes the file from the times of one GPU. It is packaged, read when
a plan is first asked for, and checked whole: no row of it can make a result wrong or depend on how
many tokens there are. A row only names a plan. `plan.choose` weighs it if it is among the plans
that fit the device, so a row of a loop or a tile that is gone has no effect.

A row speaks for the kernels of its own loop alone: it takes the place of what the model likes best
of them, and its time that of the model's prediction where it is compared with other kernels.
"""

from __future__ import annotations

import functools
import json
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, get_type_hints

from ...errors import ConfigError
from .gpus import Gpu, is_model
from .layout import INT4, INT8, W16
from .tiles import DECODE, FEW, LEAST_STAGES, LOOPS, MOST_STAGES, CudaSizes

FILE = Path(__file__).with_name("measured.json")
FORMAT = 2  # 1 had no rows of the kernels of prefill.py
VALUES = {"w16": W16, "int8": INT8, "int4": INT4}
# The kernels of prefill.py, as `loop` of a row names them.
PREFILL_LOOPS = ("prefill_one", "prefill_both", "prefill_rebuild")
MOST_US = 1e9
# Kernels are compiled for these numbers of stages, and take any other for the last of them.
LIMITS = {
    "rank": (0, (1 << 31) - 1),
    "above": (0, (1 << 31) - 1),
    "stages": (LEAST_STAGES, MOST_STAGES),
    "share": (0, (1 << 31) - 1),
}
_WAY_OUT = "correct it, or write it anew with benchmarks/fit_plans.py rows"


class MeasuredRow(NamedTuple):
    """The fastest tile of a weight's sizes on a GPU, for `above` < M <= `tokens`."""

    gpu: str  # a name of gpus.GPUS
    multiprocessors: int  # of the GPU that was measured: parts and other boards of it are others
    n: int  # out_features of all parts
    k: int
    values: str  # a name of VALUES
    group_steps: int
    rank: int
    planes: int
    above: int
    tokens: int
    loop: str  # the family of kernels: one of tiles.LOOPS
    warp_rows: int
    warp_tokens: int
    warp_inputs: int
    row_tiles: int  # of 16 rows that a warp holds
    warp_width: int  # tokens of a warp
    splits: int
    stages: int
    resident: int
    measured_us: float  # at M = tokens
    file: str  # of benchmarks/results

    @property
    def problem(self) -> tuple:
        """The GPU and the sizes that the row is for."""
        return self[: MeasuredRow._fields.index("above")]

    @property
    def split(self) -> tuple[int, int]:
        """The K groups of a CTA and the CTAs that share K."""
        return self.warp_inputs, self.splits

    def describe(self) -> str:
        """Why its plan was chosen, in words."""
        return _because(self)


class PrefillRow(NamedTuple):
    """The fastest kernel of prefill.py for a weight's sizes on a GPU, for `above` < M <= `tokens`.

    Rings and clusters follow from the sizes and the device.
    """

    gpu: str  # as in MeasuredRow, up to tokens
    multiprocessors: int
    n: int
    k: int
    values: str
    group_steps: int
    rank: int
    planes: int
    above: int
    tokens: int
    loop: str  # one of PREFILL_LOOPS
    cta_tokens: int
    share: int  # Prefill.share
    measured_us: float  # at M = tokens
    file: str  # of benchmarks/results

    @property
    def problem(self) -> tuple:
        """The GPU and the sizes that the row is for."""
        return self[: PrefillRow._fields.index("above")]

    @property
    def split(self) -> tuple[int, int]:
        """Prefill.split of the plan that it names."""
        return self.cta_tokens, self.share

    def describe(self) -> str:
        """Why its plan was chosen, in words."""
        return _because(self)


Row = MeasuredRow | PrefillRow


def _because(row: Row) -> str:
    return (
        f"chosen because it took {row.measured_us:.1f} us with {row.tokens} tokens on an "
        f"{row.gpu} ({row.file})"
    )


def rows_for(sizes: CudaSizes, gpu: Gpu, above: int, tokens: int) -> list[Row]:
    """The rows of a weight on a device for `above` < M <= `tokens`, those of a regime.

    A weight with an adapter has none, since its kernels do more than those that were measured.

    Raises: ConfigError for an unusable file.
    """
    if sizes.adapter_steps:
        return []
    wanted = (sizes.N, sizes.K, sizes.values, sizes.group_steps, sizes.rank, sizes.planes)
    return [
        row
        for row in rows(FILE)
        if above <= row.above < row.tokens <= tokens
        and wanted == (row.n, row.k, VALUES[row.values], row.group_steps, row.rank, row.planes)
        and row.multiprocessors == gpu.multiprocessors
        and is_model(gpu, row.gpu)
    ]


@functools.cache
def rows(file: Path) -> tuple[Row, ...]:
    """All rows of a file.

    Raises: ConfigError, one sentence with the file, the defect and the way out.
    """
    try:
        return _rows_of(file.read_bytes())
    except OSError as error:
        said = error.strerror or error
        raise ConfigError(
            f"cannot read {file}: {said}; install slab_kernels again, it belongs to the package"
        ) from error
    except (ValueError, RecursionError) as error:
        defect = str(error) if isinstance(error, ConfigError) else f"it is not valid JSON ({error})"
        raise ConfigError(f"{file}: {defect}; {_WAY_OUT}") from error


def _rows_of(text: bytes) -> tuple[Row, ...]:
    """The rows of a file with this text. Raises: ConfigError, ValueError or RecursionError."""
    content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ConfigError(f'it must be an object {{"format": {FORMAT}, "rows": [...]}}')
    if (found := content.get("format")) != FORMAT or type(found) is not int:
        raise ConfigError(
            f"it has format {reprlib.repr(found)}, "
            f"this version of slab_kernels reads format {FORMAT}"
        )
    parsed = []
    for position, entry in enumerate(content["rows"], 1):
        try:
            parsed.append(_row_from(entry))
        except ConfigError as error:
            raise ConfigError(f"row {position}: {error}") from error
    _check_regimes(parsed)
    return tuple(parsed)


def _row_from(entry: object) -> Row:
    """Raises: ConfigError with the key and its value."""
    if not isinstance(entry, dict):
        raise ConfigError(f"{reprlib.repr(entry)} must be an object")
    row_type = PrefillRow if entry.get("loop") in PREFILL_LOOPS else MeasuredRow
    if entry.keys() != set(row_type._fields):
        raise ConfigError(f"its keys must be {', '.join(row_type._fields)}")
    for name, kind in get_type_hints(row_type).items():
        value = entry[name]
        # A bool is an int to Python. A time of whole microseconds may be written as an integer.
        if type(value) is not kind and (kind is not float or type(value) is not int):
            raise ConfigError(f"{name}={reprlib.repr(value)} must be of type {kind.__name__}")
        least, most = LIMITS.get(name, (1, (1 << 31) - 1))
        if kind is int and not least <= value <= most:
            raise ConfigError(f"{name}={value} must be an integer from {least} to {most}")
    row = row_type(**entry)
    for name, known in (("values", VALUES), ("loop", (*LOOPS, *PREFILL_LOOPS))):
        if entry[name] not in known:
            raise ConfigError(
                f"{name}={reprlib.repr(entry[name])} must be one of {', '.join(known)}"
            )
    if not 0 < row.measured_us < MOST_US:  # NaN is not, either.
        raise ConfigError(f"measured_us={row.measured_us} must be above 0 and below {MOST_US:g}")
    if row.tokens <= row.above or any(row.above < end < row.tokens for end in (DECODE, FEW)):
        raise ConfigError(
            f"above={row.above} and tokens={row.tokens} must lie within one regime: up to {DECODE} "
            f"tokens, up to {FEW}, or more"
        )
    if isinstance(row, MeasuredRow) and row.tokens > FEW and row.warp_inputs != 1:
        raise ConfigError(
            f"above {FEW} tokens a CTA has one K group, but this row has {row.warp_inputs}"
        )
    return row


def _check_regimes(parsed: Iterable[Row]) -> None:
    """Raises: ConfigError if two rows of a family of kernels split K in two ways within a regime of
    up to 64 tokens, or speak of the same M."""
    seen: dict[tuple, list[Row]] = {}
    for row in parsed:
        regime = (row.above >= DECODE) + (row.above >= FEW)
        family = row.loop if row.above >= DECODE else "any"  # Narrow and wide are one.
        others = seen.setdefault((row.problem, regime, family), [])
        for other in others:
            if row.above < FEW and row.split != other.split:
                raise ConfigError(
                    f"{row.n}x{row.k} {row.values} on {row.gpu} splits K in two ways, "
                    f"{other.split} and {row.split}, so a token's result would depend on others"
                )
            if row.above < other.tokens and other.above < row.tokens:
                raise ConfigError(
                    f"{row.n}x{row.k} {row.values} on {row.gpu} has two rows for M={row.tokens}"
                )
        others.append(row)
