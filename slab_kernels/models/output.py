"""The folder that a run writes: one run at a time, and a killed one can go on where it stopped.

The folder is claimed with a lock that dies with its process. What is finished stands in a state
file, which is removed once config.json is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError
from .folder import PROGRESS_NAME
from .shards import PARTIAL_SUFFIX, read_json, write_json

LOCK_NAME = ".slab_lock"  # locked while a run writes to the folder; after a kill it is unlocked


def _take_lock(path: Path) -> BinaryIO | None:
    """The open lock file, unlocked by the kernel when it is closed or the process is killed.

    None where there are no locks (Windows, some network folders).

    Raises: CheckpointError if another run holds it, OSError.
    """
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError as error:
            file.close()
            raise CheckpointError(
                f"{path.parent} is in use by another run; wait for it or use another folder"
            ) from error
        except FileNotFoundError:
            pass
        except OSError:
            file.close()
            path.unlink(missing_ok=True)
            return None
        # The holder removed the file after it was opened here: try again with the one there now.
        file.close()


class OutputFolder:
    """A folder under writing: claimed, and with a note of what is finished.

    As a context manager it calls `close` after success and `abandon` after a failure; until then
    no other run can claim it.

    Args:
        out: the folder; made if it is not there.
        settings: of the run; a run that goes on must have the same ones.
        resume: whether to go on with what is there. None: the writer cannot go on after a kill, so
            nothing is noted, and on failure everything that it wrote is removed.

    Attributes:
        blocks: {"file", "sha256", "layers", "match"} of every finished block, always a prefix
            0 .. n-1 of the model's.
        inputs: the hashes of the model's tensors when the run began, by name.
        orders: the hash of the orders of the model's channels, empty where none were sought yet.
        search: what a search has measured before the first block, by module.

    Raises: CheckpointError if another run is at work in the folder, it holds something else, was
        begun with other settings (the difference is named), or cannot be written.
    """

    def __init__(self, out: Path, settings: dict[str, Any], resume: bool | None):
        self.out, self.settings = out, settings
        self.blocks: list[dict[str, Any]] = []
        self.inputs: dict[str, str] = {}
        self.orders = ""
        self.search: dict[str, list[float]] = {}
        self.resumable = resume is not None
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"{out} is a file; give a folder to write to")
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(out / LOCK_NAME)
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(
                f"cannot create {out} or write to it: {error.strerror or error}; "
                "choose another folder"
            ) from error
        try:
            self._claim(resume=bool(resume))
        except BaseException:
            self.release()
            raise

    def _claim(self, resume: bool) -> None:
        """Restore what an interrupted run has noted, or begin in an empty folder."""
        out, found = self.out, sorted(p.name for p in self.out.iterdir() if p.name != LOCK_NAME)
        if found and not resume:
            more = ", ..." if len(found) > 3 else ""
            advice = "choose an empty folder"
            if PROGRESS_NAME in found and self.resumable:
                advice += ", or pass resume=True to go on with the run that was interrupted there"
            raise CheckpointError(f"{out} is not empty ({', '.join(found[:3])}{more}); {advice}")
        if PROGRESS_NAME in found:
            self._restore(read_json(out / PROGRESS_NAME))
        elif found and found != [PROGRESS_NAME + PARTIAL_SUFFIX]:
            raise CheckpointError(
                f"{out} holds files ({found[0]}, ...) but no interrupted run to resume; "
                "use an empty folder"
            )
        for name in found:
            if name.endswith(PARTIAL_SUFFIX):
                (out / name).unlink(missing_ok=True)
        self._write()

    def _restore(self, state: dict[str, Any]) -> None:
        if not _is_state(state):
            raise CheckpointError(f"{self.out / PROGRESS_NAME} is damaged; use an empty folder")
        check_same_settings(self.out, state["settings"], self.settings)
        self.inputs, self.search = state["inputs"], state["search"]
        self.orders = str(state.get("orders", ""))
        for block in state["blocks"]:
            if not is_whole(self.out / block["file"], block["sha256"]):
                break  # this block and those after it are done again
            self.blocks.append(block)

    def finish_block(
        self,
        file: str,
        layers: list[dict[str, Any]],
        match: dict[str, Any] | None = None,
        experts: list[dict[str, Any]] | None = None,
    ) -> None:
        """Note that the next block is done and its shard written.

        file: name of the shard. layers, match, experts: the block's records, as plain JSON.
        """
        done = {"file": file, "sha256": file_sha256(self.out / file), "layers": layers}
        self.blocks.append({**done, "match": match, "experts": experts or []})
        self._write()

    def note_inputs(self, inputs: dict[str, str]) -> None:
        """Note the hash of every tensor of the model."""
        self.inputs = inputs
        self._write()

    def note_orders(self, orders: str) -> None:
        """Note the hash of the orders of the model's channels, which all blocks have in common.

        Raises: CheckpointError for other orders than those that finished blocks have.
        """
        if self.blocks and orders != self.orders:
            raise CheckpointError(
                f"cannot resume {self.out}: the orders of channels that permute=True finds now are "
                "not those of its finished blocks, since another number of threads or another "
                "machine rounds otherwise; go on where the run began, or use an empty folder"
            )
        self.orders = orders
        self._write()

    def note_search(self, name: str, found: list[float]) -> None:
        """Note what a search has measured of the module `name`."""
        self.search[name] = found
        self._write()

    def _write(self) -> None:
        if not self.resumable:
            return
        parts = {
            "settings": self.settings,
            "inputs": self.inputs,
            "orders": self.orders,
            "search": self.search,
            "blocks": self.blocks,
        }
        state = json.loads(json.dumps(parts))
        write_json(self.out / PROGRESS_NAME, {**state, "sha256": _digest(state)})

    def close(self) -> None:
        """The folder is complete: remove the state file."""
        try:
            (self.out / PROGRESS_NAME).unlink(missing_ok=True)
        finally:
            self.release()

    def abandon(self) -> None:
        """Let go of the folder after a failure, and give it back where nothing is kept."""
        if self.blocks or self.search:
            self.release()
            return
        if not self.resumable:
            self._clear()
        self.close()
        with contextlib.suppress(OSError):  # not empty: somebody else's files
            self.out.rmdir()

    def _clear(self) -> None:
        """Remove what was written: the folder was empty when it was claimed."""
        with contextlib.suppress(OSError):  # the failure before this one is the one to be told
            for path in self.out.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK_NAME:
                    path.unlink()

    def release(self) -> None:
        """Let other runs into the folder; what is in it stays."""
        lock, self._lock = self._lock, None
        if lock is not None:
            # Removed before it is closed, for after that it may be another run's.
            with contextlib.suppress(OSError):
                (self.out / LOCK_NAME).unlink()
            lock.close()

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _is_state(state: dict[str, Any]) -> bool:
    """Whether a state file is as `OutputFolder` wrote it, by its hash and its parts' kinds."""
    rest = {key: value for key, value in state.items() if key != "sha256"}
    kinds = {"settings": dict, "inputs": dict, "search": dict, "blocks": list}
    of_block = {"file": str, "sha256": str, "layers": list}
    return (
        state.get("sha256") == _digest(rest)
        and all(type(rest.get(key)) is kind for key, kind in kinds.items())
        and all(type(block) is dict for block in rest["blocks"])
        and all(
            type(block.get(key)) is kind
            for block in rest["blocks"]
            for key, kind in of_block.items()
        )
    )


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal. Raises: OSError."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def is_whole(path: Path, sha256: str) -> bool:
    """Whether the file is there and has this hash."""
    try:
        return file_sha256(path) == sha256
    except (OSError, ValueError):  # ValueError: no file can have this name
        return False


def check_same_settings(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse settings that are not those of an earlier run in `out`.

    Raises: CheckpointError naming every one that differs.
    """
    now = json.loads(json.dumps(now))
    different = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if different:
        what = "; ".join(_changed(key, before.get(key), now.get(key)) for key in different)
        raise CheckpointError(
            f"cannot resume {out}: {what}; use the settings of the first run, or an empty folder"
        )


def _changed(key: str, before: Any, now: Any) -> str:
    tell = _by_pattern if any(map(_is_by_pattern, (before, now))) else _short
    return f"{key} was {tell(before)} and is now {tell(now)}"


def _short(value: Any) -> str:
    """A setting in few characters, with the end that tells two long ones apart."""
    text = repr(value)
    return text if len(text) <= 40 else text[:18] + "..." + text[-12:]


def _is_by_pattern(value: Any) -> bool:
    """Whether a setting is pairs of a pattern and the settings of the layers that it matches."""
    pairs = value if isinstance(value, list) else []
    return bool(pairs) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], dict) for pair in pairs
    )


def _by_pattern(value: Any) -> str:
    """Such settings in words: values=int8 and planes=1 for 'down_proj'."""
    if not _is_by_pattern(value):
        return "none" if value in (None, []) else _short(value)
    return ", ".join(
        f"{' and '.join(f'{name}={setting}' for name, setting in settings.items())} for {pattern!r}"
        for pattern, settings in value
    )
