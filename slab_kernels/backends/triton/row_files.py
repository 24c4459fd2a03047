"""Files of rows, one for each device: their places, and reading what anybody may have written.

A file is a JSON object {"format": 1, "device": ..., "versions": ..., "rows": [...]}. It is checked
whole: no row of it can make a result wrong, or depend on how many other tokens are decoded.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from collections.abc import Collection
from dataclasses import asdict, fields
from pathlib import Path

from ...errors import ConfigError
from .rows import DECODE, VALUES, Row, TileConfig, check_integer

ENVIRONMENT = "SLAB_KERNELS_CONFIGS"  # names another folder for the user's rows
FORMAT = 1
# The keys of a file; device and versions say where the rows were measured.
KEYS = ("format", "device", "versions", "rows")
# With fewer tokens than DECODE in a row of their own, a token's result could depend on how many
# others there are.
LIMITS = {
    "tokens": (DECODE, 1 << 31), "above": (0, 1 << 31), "bits": (16, 32), "rank": (0, 1 << 10),
    "N": (1, 1 << 31), "K": (1, 1 << 31), "shared": (0, 1 << 31), "capability": (0, 1 << 10),
}  # fmt: skip


def user_folder() -> Path:
    """Where `slab-kernels tune` writes.

    It is the folder that SLAB_KERNELS_CONFIGS names, else slab_kernels in the user's configuration
    folder.

    Raises: ConfigError if the variable names something that is no folder.
    """
    if named := os.environ.get(ENVIRONMENT):
        folder = Path(os.path.expanduser(named))
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise ConfigError(f"{ENVIRONMENT}={named} is no folder; it has to name one")
        return folder
    configuration = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(configuration) / "slab_kernels"


def file_name(device: str) -> str:
    """A device's file: "NVIDIA A100-SXM4-80GB" -> "nvidia-a100-sxm4-80gb.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def read(path: Path) -> list[Row]:
    """The rows of a file.

    Raises: ConfigError, one sentence with the file, the defect and the way out.
    """
    try:
        with path.open("rb") as f:
            mode, text = os.fstat(f.fileno()).st_mode, f.read()
        if hasattr(os, "getuid") and mode & stat.S_IWOTH:  # On Windows every file has that mode.
            bits = f"{stat.S_IMODE(mode):04o}"
            raise ConfigError(f"everybody may write to it (mode {bits}; chmod o-w)")
        return _rows_of(text)
    except OSError as error:
        said = error.strerror or error
        raise ConfigError(f"cannot read {path}: {said}; make it readable, or delete it") from error
    except (ValueError, RecursionError) as error:
        defect = str(error) if isinstance(error, ConfigError) else f"it is not valid JSON ({error})"
        raise ConfigError(
            f"{path}: {defect}; correct it, or delete it and run slab-kernels tune again"
        ) from error


def _rows_of(text: bytes) -> list[Row]:
    """The rows of a file with this text. Raises: ConfigError, ValueError or RecursionError."""
    content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ConfigError(f'it must be an object {{"format": {FORMAT}, "rows": [...]}}')
    if (found := content.get("format")) != FORMAT or type(found) is not int:
        raise ConfigError(
            f"it has format {reprlib.repr(found)}, "
            f"this version of slab_kernels reads format {FORMAT}"
        )
    _check_keys(content, KEYS)
    parsed = []
    for position, entry in enumerate(content["rows"], 1):
        try:
            parsed.append(row_from(entry))
        except ConfigError as error:
            raise ConfigError(f"row {position}: {error}") from error
    return parsed


def row_from(entry: dict) -> Row:
    """The row of a JSON object that anybody may have written; the inverse of `row_to`.

    Raises: ConfigError with the key and its value.
    """
    if not isinstance(entry, dict):
        raise ConfigError(f"{reprlib.repr(entry)} must be an object")
    entry = {name: value for name, value in entry.items() if value is not None}
    own = {f.name: entry.pop(f.name) for f in fields(TileConfig) if f.name in entry}
    config = TileConfig(**own)
    _check_keys(entry, [f.name for f in fields(Row) if f.name != "config"])
    for name in entry.keys() - {"values"}:
        check_integer(name, entry[name], *LIMITS[name])
    if "values" in entry:
        entry["values"] = _value_types(entry["values"])
    if entry.get("bits") not in (None, 16, 32):
        raise ConfigError(f"bits={entry['bits']} must be 16 or 32")
    row = Row(config, **entry)
    _check_tokens(row)
    return row


def _value_types(values: object) -> tuple[str, ...]:
    if not isinstance(values, (list, tuple)) or not values or any(v not in VALUES for v in values):
        raise ConfigError(f"values={reprlib.repr(values)} must be a list of {', '.join(VALUES)}")
    return tuple(values)


def _check_tokens(row: Row) -> None:
    """Raises: ConfigError for a row that tells apart token counts of decoding, or fits none."""
    if 0 < row.above < DECODE or (row.config.rebuild and row.above < DECODE):
        what = "a row with rebuild=true needs above" if row.config.rebuild else "above"
        raise ConfigError(
            f"{what}={DECODE} or more, not {row.above}: "
            f"up to {DECODE} tokens no result may depend on their number"
        )
    if row.tokens is not None and row.tokens <= row.above:
        raise ConfigError(f"tokens={row.tokens} must be more than above={row.above}")


def _check_keys(entry: dict, known: Collection[str]) -> None:
    if strange := sorted(entry.keys() - set(known)):
        unknown = ", ".join(map(reprlib.repr, strange))
        raise ConfigError(f"unknown keys {unknown} (known: {', '.join(known)})")


def row_to(row: Row) -> dict:
    """Plain JSON form, without what is None."""
    entry = asdict(row)
    config = entry.pop("config")
    return {name: value for name, value in (entry | config).items() if value is not None}
