"""What a model folder holds beside weights and config.json: tokenizers, templates, licences, code.

All of it is carried along, sub-folders too, but nothing that lies outside the folder.
"""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError
from .shards import write_atomically

WEIGHT_FILES = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ggml",
    "*.onnx", "*.onnx_data", "*.ot", "*.npz", "*.tflite", "*.mlmodel", "*.partial",
)  # fmt: skip
WRITTEN_ANEW = ("config.json", "*.index.json", "slab_*.json")
WEIGHTS_BELOW = "*/*.safetensors"  # of other models in one repository
NOT_DOWNLOADED = [
    *(pattern for pattern in WEIGHT_FILES if pattern != "*.safetensors"),
    WEIGHTS_BELOW,
    ".*",
    "*/.*",
]
CHUNK = 1 << 20  # bytes copied at a time
MAX_SIDE_FILE = 1 << 30  # bytes; a larger file holds data of another kind, or is damaged


def side_files(folder: Path, out: Path | None = None) -> tuple[list[Path], list[str]]:
    """The files to carry along, and what else is left behind.

    Weights, hidden files and what compression writes anew are no side files. A link is followed
    only to a file inside the folder, or to the blobs of the Hugging Face cache that the folder is a
    snapshot in. A sub-folder with a config.json and weights of its own is another model. `out` is
    the folder being written, which may lie inside.

    Returns: paths relative to `folder`, and what is skipped beside weights, each "name (reason)";
        both sorted.
    Raises: CheckpointError for a folder that cannot be listed.
    """
    carried: list[Path] = []
    skipped: list[str] = []

    def refuse(error: OSError) -> None:
        raise CheckpointError(
            f"cannot read {error.filename}: {error.strerror}; make it readable"
        ) from error

    for place, folders, files in os.walk(folder, onerror=refuse):
        here = Path(place).relative_to(folder)
        for name in sorted(folders):
            path = folder / here / name
            reason = None
            if path.is_symlink():
                reason = "a link to a folder"
            elif _is_model(path):
                reason = "another model"
            if reason:
                skipped.append(f"{here / name} ({reason})")
            written = out is not None and path.resolve() == out.resolve()
            if reason or written or name.startswith("."):
                folders.remove(name)
        for name in files:
            if _is_side_file(name, top=not here.parts):
                reason = _unfit(folder, here / name)
                if reason is None:
                    carried.append(here / name)
                else:
                    skipped.append(f"{here / name} ({reason})")
    return sorted(carried), sorted(skipped)


def _is_side_file(name: str, top: bool) -> bool:
    if name.startswith(".") or any(fnmatch.fnmatchcase(name, p) for p in WEIGHT_FILES):
        return False
    return not (top and any(fnmatch.fnmatchcase(name, p) for p in WRITTEN_ANEW))


def _is_model(folder: Path) -> bool:
    names = os.listdir(folder) if os.access(folder, os.R_OK) else []
    weights = any(fnmatch.fnmatchcase(n, p) for n in names for p in WEIGHT_FILES)
    return weights and "config.json" in names


def snapshot(folder: Path) -> Path | None:
    """The snapshot of the Hugging Face cache that a resolved folder is, or lies in."""
    around = (place for place in (folder, *folder.parents) if place.parent.name == "snapshots")
    return next(around, None)


def _unfit(folder: Path, name: Path) -> str | None:
    """Why the file `name` of `folder` is not carried along; None if it is."""
    path = folder / name
    if path.is_file() and path.stat().st_size > MAX_SIDE_FILE:
        return f"larger than {MAX_SIDE_FILE >> 30} GiB"
    if not path.is_symlink():
        return None if stat.S_ISREG(path.lstat().st_mode) else "no regular file"
    if not path.is_file():  # also a loop of links, at which Path.resolve fails before Python 3.13
        return "a link to no file"
    target, root = path.resolve(), folder.resolve()
    cached = snapshot(root)
    if cached is not None and target.parent == cached.parent.parent / "blobs":
        return None
    if not target.is_relative_to(root):
        return "a link out of the folder"
    inside = target.relative_to(root)
    hidden = any(part.startswith(".") for part in inside.parts)
    if hidden or not _is_side_file(target.name, top=len(inside.parts) == 1):
        return "a link to no side file"
    return None


def copy_side_files(folder: Path, out: Path) -> list[str]:
    """Copy the side files of `folder` into `out`; returns what is skipped, each "name (reason)".

    Raises: CheckpointError if one cannot be read or written.
    """
    carried, skipped = side_files(folder, out)
    for name in carried:
        target = out / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot create {target.parent}: {error.strerror}") from error
        write_atomically(target, _chunks(folder / name))
    return skipped


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as f:
            while chunk := f.read(CHUNK):
                yield chunk
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; make it readable") from error
