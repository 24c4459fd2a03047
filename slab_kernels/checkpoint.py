"""Checkpoint folders: shards read tensor by tensor and checked, shards written atomically.

A folder loads only if its config.json is there, and config.json is written last. Every file is written beside its
final name and renamed over it, so a kill at any moment leaves whole files or none.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
PROGRESS_NAME = "slab_progress.json"  # finished blocks of a run under way; removed after config.json is written
RECORD_NAME = "slab_run.json"
PARTIAL_SUFFIX = ".partial"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


class CheckpointError(OSError):
    """A folder cannot be read or written as a checkpoint."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: shard file name, dtype, shape, size in bytes."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Name -> entry of one safetensors file, checked: sizes match dtypes and shapes, and the data covers the file once.

    Raises: CheckpointError naming the file and the defect.
    """

    def corrupt(reason: str) -> CheckpointError:
        return CheckpointError(f"{path} is corrupt ({reason}); copy or download it again")

    try:
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise corrupt(f"a header of {length} bytes in a file of {size}")
            header = json.loads(f.read(length), object_pairs_hook=_without_duplicates)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise corrupt(f"its header is not usable JSON: {error}") from error
    if not isinstance(header, dict):
        raise corrupt("its header is not a JSON object")
    header.pop("__metadata__", None)
    entries, spans = {}, []
    for name, info in header.items():
        try:
            dtype, shape, (start, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
            if type(dtype) is not str or not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
                raise ValueError  # type(n), since isinstance takes false for an int
        except (TypeError, KeyError, ValueError) as error:
            raise corrupt(f"tensor {name!r} is described by {reprlib.repr(info)}") from error
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype}, expected one of {', '.join(DTYPES)}")
        if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise corrupt(f"tensor {name!r} of {dtype}{list(shape)} takes {end - start} bytes")
        entries[name] = TensorEntry(path.name, DTYPES[dtype], shape, end - start)
        spans.append((start, end))
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise corrupt(f"tensors overlap or leave a gap at byte {position}")
        position = end
    if position != size - 8 - length:
        raise corrupt(f"tensors take {position} bytes and the file holds {size - 8 - length}")
    return entries


def _without_duplicates(pairs: list[tuple]) -> dict:
    """For json.loads, which lets the last of two equal names win; other readers of the same file may take the first."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises: CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__} instead of a JSON object")
    return content


class Checkpoint:
    """A folder of safetensors shards, every header read and checked on opening; tensors are read one by one.

    Raises: CheckpointError for a missing folder, config.json or shard, a corrupt shard, a tensor that is listed but
    absent, present but not listed, or present twice, and for PyTorch .bin files.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder; give the folder that holds config.json")
        if not (self.folder / "config.json").is_file():
            unfinished = (self.folder / PROGRESS_NAME).is_file()
            raise CheckpointError(
                f"{self.folder} has no config.json"
                + ("; its compression was interrupted: finish it with resume=True" if unfinished else "")
            )
        self.config = read_json(self.folder / "config.json")
        self.entries: dict[str, TensorEntry] = {}
        index = self.folder / INDEX_NAME
        listed = self._weight_map(index) if index.is_file() else None
        for file in sorted(set(listed.values())) if listed is not None else [self._single_file()]:
            if not (self.folder / file).is_file():
                raise CheckpointError(f"{self.folder} lacks the shard {file} that {INDEX_NAME} lists; copy it there")
            for name, entry in read_header(self.folder / file).items():
                if name in self.entries:
                    raise CheckpointError(f"tensor {name!r} lies in both {self.entries[name].file} and {file}")
                if listed is not None and listed.get(name) != file:
                    raise CheckpointError(f"{file} holds tensor {name!r}, which {INDEX_NAME} does not place there")
                self.entries[name] = entry
        for name in listed or ():
            if name not in self.entries:
                raise CheckpointError(f"{INDEX_NAME} places tensor {name!r} in {listed[name]}, which does not hold it")

    def _weight_map(self, index: Path) -> dict[str, str]:
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(f, str) for f in listed.values()):
            raise CheckpointError(f"{index} has no weight_map from tensor names to shard names")
        for file in listed.values():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index} names the shard {file!r}; expected a .safetensors file in the same folder"
                )
        return listed

    def _single_file(self) -> str:
        files = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if "model.safetensors" in files:
            return "model.safetensors"
        if len(files) == 1:
            return files[0]
        if files:
            raise CheckpointError(f"{self.folder} holds {len(files)} safetensors files but no {INDEX_NAME}")
        if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt*")):
            raise CheckpointError(
                f"{self.folder} holds PyTorch .bin weights, which can run code when read; convert them once with "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), which writes safetensors"
            )
        raise CheckpointError(f"{self.folder} holds no model.safetensors and no {INDEX_NAME}")

    def get(self, name: str) -> Tensor:
        """One tensor, read from its shard. Raises: CheckpointError."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / self.entries[name].file
        try:
            with safe_open(path, framework="pt") as f:
                return f.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read tensor {name!r} from {path}: {error}") from error

    def fingerprint(self) -> str:
        """SHA-256 of config.json, the tensor table, and the ends of every shard (1 MiB each): cheap, and no path in it."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, entry in sorted(self.entries.items()):
            digest.update(f"{name}{entry.dtype}{entry.shape}".encode())
        for file in sorted({entry.file for entry in self.entries.values()}):
            with (self.folder / file).open("rb") as f:
                size = os.fstat(f.fileno()).st_size
                digest.update(f.read(1 << 20))
                f.seek(max(0, size - (1 << 20)))
                digest.update(f.read())
        return digest.hexdigest()


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with partial.open("wb") as f:
            for chunk in chunks:
                f.write(chunk)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException as error:
        try:
            partial.unlink(missing_ok=True)
        except OSError:
            pass
        if isinstance(error, OSError) and not isinstance(error, CheckpointError):
            raise CheckpointError(
                f"cannot write {path}: {error.strerror or error}{_free_space(path.parent)}; "
                "make room or rights there and run again with resume=True, or choose another folder"
            ) from error
        raise


def _free_space(folder: Path) -> str:
    try:
        return f" ({shutil.disk_usage(folder).free / 1e6:.1f} MB free)"
    except OSError:
        return ""


def write_json(path: Path, content: dict) -> None:
    """Atomically. Raises: CheckpointError if the disk is full or the folder not writable."""
    write_atomically(path, [(json.dumps(content, indent=2) + "\n").encode()])


def write_shard(
    path: Path, specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], get: Callable[[str], Tensor]
) -> dict[str, TensorEntry]:
    """Write one safetensors file atomically, tensors fetched one at a time by `get(name)`; returns its table.

    Same bytes for the same tensors. Written here rather than by safetensors.save_file so that a shard of embeddings
    never lies in memory whole and a full disk is an OSError with its cause.

    Raises: CheckpointError if the disk is full or the folder not writable.
    """
    names = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))  # largest dtype first keeps alignment
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        dtype, shape = specs[name]
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [position, position + size],
        }  # fmt: skip
        position += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    def chunks():
        yield len(encoded).to_bytes(8, "little")
        yield encoded
        for name in names:
            t = get(name).detach()
            assert (t.dtype, tuple(t.shape)) == (specs[name][0], tuple(specs[name][1])), name
            yield memoryview(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    write_atomically(path, chunks())
    return read_header(path)


def shard_name(number: int, total: int) -> str:
    """model-0000i-of-0000n.safetensors, i from 1."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def write_index(folder: Path, tables: Iterable[dict[str, TensorEntry]]) -> None:
    """model.safetensors.index.json from the tables of all shards."""
    entries = {name: entry for table in tables for name, entry in table.items()}
    total = sum(entry.nbytes for entry in entries.values())
    weight_map = {name: entries[name].file for name in sorted(entries)}
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
