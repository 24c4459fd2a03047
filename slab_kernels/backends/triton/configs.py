"""Which tiles a linear runs with: the first row of a table that fits it, chosen ahead of time.

Nothing is tuned at run time. The user's own rows (`slab-kernels tune` writes them) come first, then
rows measured for this device and shipped as `configs/<device>.json`, then the defaults of rows.py.
A file is read once, on the first linear.
"""

from __future__ import annotations

import bisect
import functools
import os
from pathlib import Path

from ...format import ceil_div
from .row_files import file_name, read, user_folder
from .rows import DECODE, DEFAULTS, Row, TileConfig, TritonDevice, TritonSizes

SHIPPED = Path(__file__).parent / "configs"
MOST_SPLITS = 16
# Shares of K in z = x Q, so that not only a few programs walk all of K.
Z_SPLITS = 16


@functools.lru_cache(4096)  # Prefill meets many M; a hit takes 0.3 us.
def choose(
    sizes: TritonSizes, M: int, bits: int, device: TritonDevice, own: bool = True
) -> TileConfig:
    """The configuration for M tokens of `bits`-bit activations.

    own: False leaves out the user's rows.

    Raises: ConfigError for an unusable file of rows.
    """
    return next(
        row.config for row in rows(device.name, own) if row.fits(sizes, max(M, 1), bits, device)
    )


@functools.lru_cache(4096)
def splits(sizes: TritonSizes, M: int, config: TileConfig, device: TritonDevice) -> int:
    """Into how many shares K is split: those of the least estimated time.

    It is one number for all M of a regime: up to 16, up to 64, above. Memory is kept busy by `fill`
    programs per multiprocessor. The last round of programs leaves some multiprocessors idle. Every
    share writes and reads its sums (2 percent of the weight's bytes for 16 tokens and K = 4096),
    and a second launch adds them.
    """
    if not config.fill:
        return 1
    tiles = sum(ceil_div(part, config.block_n) for part in sizes.rows)
    processors = device.multiprocessors
    tokens = DECODE if M <= DECODE else max(64, M)

    def cost(shares: int) -> float:
        programs = tiles * shares
        starved = max(1.0, config.fill * processors / programs)
        uneven = ceil_div(programs, processors) * processors / programs
        sums = 0.02 * tokens / DECODE * 4096 / sizes.K * shares + 0.03 if shares > 1 else 0.0
        return starved * uneven + sums

    powers = [1 << i for i in range(MOST_SPLITS.bit_length())]
    # A share of several has two steps of K at least.
    possible = [n for n in powers if n == 1 or sizes.K >= 2 * n * config.block_k]
    return min(possible, key=cost)


def z_splits(sizes: TritonSizes) -> int:
    """Shares of K in z = x Q, of two steps of 64 inputs at least."""
    return max(1, min(Z_SPLITS, sizes.K // 128))


@functools.cache
def rows(device: str, own: bool = True) -> tuple[Row, ...]:
    """All rows for a device of that name, in the order of choice.

    own: False leaves out the user's rows.

    Raises: ConfigError for an unusable file.
    """
    found = []
    for folder in (user_folder(), SHIPPED) if own else (SHIPPED,):
        path = folder / file_name(device)
        # In a folder that is closed to this user, such as another user's home, nothing exists.
        if os.path.exists(path):
            found += read(path)
    return (*found, *DEFAULTS)


def forget() -> None:
    """Read the files again when next asked, since they have changed."""
    for cached in (rows, choose, splits):
        cached.cache_clear()


def regime(M: int, device: str) -> tuple[int, int | None]:
    """The token counts around M that the shipped rows do not tell apart.

    They are those above the first number, and up to the second (None: all).
    """
    ends = sorted(
        {end for row in rows(device, own=False) for end in (row.tokens, row.above) if end}
    )
    at = bisect.bisect_left(ends, M)
    return ends[at - 1] if at else 0, ends[at] if at < len(ends) else None
