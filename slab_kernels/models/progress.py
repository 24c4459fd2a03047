"""What a run has finished, kept in its output folder: one run at a time in a folder, and a killed one goes on.

The folder is claimed with a lock that dies with its process; the state file is removed once config.json is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from ..errors import CheckpointError
from .folder import PROGRESS_NAME
from .shards import PARTIAL_SUFFIX, read_json, write_json

LOCK_NAME = ".slab_lock"  # locked while a run writes to the folder, then removed; after a kill it is there, unlocked


def _take_lock(path: Path):
    """The open lock file, which the kernel unlocks when it is closed or the process is killed; None where there are no
    locks (Windows, some network folders). Raises: CheckpointError if another run holds it, OSError."""
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
            pass  # as when the file is another one: its holder removed it after we opened it, so try again
        except OSError:
            file.close()
            path.unlink(missing_ok=True)
            return None
        file.close()


class Progress:
    """What a run has finished, kept in the output folder so that `resume=True` can go on after a kill.

    `blocks[i]` = {"file", "sha256", "layers", "match"} of finished block i, always a prefix 0 ..
    n-1; `inputs` what the model's tensors were when the run began, by their hashes; `search` what a
    search has measured before the first block. Opening it claims the folder until `close` or
    `abandon`; as a context manager it calls the one that fits. With `resume` None the writer cannot
    go on after a kill: nothing is noted, and on failure everything that it wrote is removed.

    Raises: CheckpointError if another run is at work in the folder, it holds something else, was begun with other
    settings (the difference is named), or cannot be written.
    """

    def __init__(self, out: Path, settings: dict, resume: bool | None):
        self.out, self.settings, self.blocks = out, settings, []
        self.inputs: dict[str, str] = {}
        self.search: dict[str, list[float]] = {}
        self.resumable = resume is not None
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"{out} is a file; give a folder to write to")
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(out / LOCK_NAME)
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"cannot create {out} or write to it: {error.strerror or error}; choose another folder"
            ) from error
        try:
            self._claim(resume)
        except BaseException:
            self.release()
            raise

    def _claim(self, resume: bool) -> None:
        out, found = self.out, sorted(p.name for p in self.out.iterdir() if p.name != LOCK_NAME)
        if found and not resume:
            begun = PROGRESS_NAME in found and self.resumable
            raise CheckpointError(
                f"{out} is not empty ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''}); choose an empty folder"
                + (
                    ", or pass resume=True to go on with the run that was interrupted there"
                    if begun
                    else ""
                )
            )
        if PROGRESS_NAME in found:
            self._restore(read_json(out / PROGRESS_NAME))
        elif found and found != [PROGRESS_NAME + PARTIAL_SUFFIX]:
            raise CheckpointError(
                f"{out} holds files ({found[0]}, ...) but no interrupted run to resume; use an empty folder"
            )
        for name in found:
            if name.endswith(PARTIAL_SUFFIX):
                (out / name).unlink(missing_ok=True)
        self._write()

    def _restore(self, state: dict) -> None:
        if not _is_state(state):
            raise CheckpointError(f"{self.out / PROGRESS_NAME} is damaged; use an empty folder")
        check_same_settings(self.out, state["settings"], self.settings)
        self.inputs, self.search = state["inputs"], state["search"]
        for block in state["blocks"]:
            if not is_whole(self.out / block["file"], block["sha256"]):
                break  # this block and those after it are done again
            self.blocks.append(block)

    def finish_block(self, file: str, layers: list[dict], match: dict | None = None) -> None:
        """Note that the next block is done and its shard written."""
        self.blocks.append(
            {"file": file, "sha256": file_sha256(self.out / file), "layers": layers, "match": match}
        )
        self._write()

    def note_inputs(self, inputs: dict[str, str]) -> None:
        """Note the hash of every tensor of the model."""
        self.inputs = inputs
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
        else:
            if not self.resumable:
                self._clear()
            self.close()
            with contextlib.suppress(OSError):  # not empty: somebody else's files
                self.out.rmdir()

    def _clear(self) -> None:
        """Remove what was written: the folder was empty when it was claimed."""
        with contextlib.suppress(OSError):  # what failed before is what is to be told
            for path in self.out.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK_NAME:
                    path.unlink()

    def release(self) -> None:
        """Let other runs into the folder; what is in it stays."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with contextlib.suppress(
                OSError
            ):  # before it is closed, else it may be another run's by then
                (self.out / LOCK_NAME).unlink()
            lock.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind, *_) -> None:
        self.close() if kind is None else self.abandon()


def _is_state(state: dict) -> bool:
    """Whether the state is as `Progress` wrote it, by its hash and by the kinds of its parts."""
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


def _digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hexadecimal. Raises: OSError."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def is_whole(path: Path, sha256: str) -> bool:
    """Whether the file is there and has this hash."""
    try:
        return file_sha256(path) == sha256
    except (OSError, ValueError):  # ValueError: no file can have this name
        return False


def check_same_settings(out: Path, before: dict, now: dict) -> None:
    """Raises: CheckpointError naming every setting in which an earlier run in `out` differs."""
    now = json.loads(json.dumps(now))
    different = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if different:
        what = "; ".join(
            f"{key} was {_short(before.get(key))} and is now {_short(now.get(key))}"
            for key in different
        )
        raise CheckpointError(
            f"cannot resume {out}: {what}; use the settings of the first run, or an empty folder"
        )


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:18] + "..." + text[-12:]
