"""The files of a checkpoint folder: safetensors shards and JSON, checked as they are read.

Every file is written beside its final name and renamed to it, so a kill at any moment leaves whole
files or none.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError

PARTIAL_SUFFIX = ".partial"
CHECKSUMS = "slab_crc32"  # key of a shard's __metadata__: the text of a JSON object, tensor -> CRC
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself
MAX_JSON = 1 << 26  # bytes; the config.json of 40,000 packed modules takes a quarter of it
MAX_DEPTH = 64  # of objects and lists inside each other, far more than any config has
MAX_DIMENSIONS = 64  # of a tensor in torch
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

Spec = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies and what it is.

    file: name of the shard. nbytes: size in bytes. start: first byte, counted from the beginning
    of the shard. checksum: None for tensors of files that other programs or older versions wrote.
    """

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    start: int
    checksum: str | None = None


def _corrupt(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is corrupt ({reason}); copy or download it again")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Name -> entry of one safetensors file.

    Sizes match dtypes and shapes, and the tensors cover the file once.

    Raises: CheckpointError naming the file and the defect.
    """
    header, begin, size = _json_header(path)
    try:
        checksums = _checksums(header.pop("__metadata__", None))
    except (ValueError, TypeError, RecursionError) as error:
        raise _corrupt(path, f"its metadata cannot be read: {error}") from error
    entries = {
        name: _entry(path, begin, name, info, checksums.get(name)) for name, info in header.items()
    }
    position = begin
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start != position:
            raise _corrupt(path, f"tensors overlap or leave a gap at byte {position - begin}")
        position += entry.nbytes
    if position != size:
        held = f"tensors take {position - begin} bytes and the file holds {size - begin}"
        raise _corrupt(path, held)
    return entries


def _json_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON object at the head of a shard, the byte at which data begin, and the file's size.

    Raises: CheckpointError.
    """
    try:
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise _corrupt(path, f"a header of {length} bytes in a file of {size}")
            # Given bytes, json would also take UTF-16 and byte order marks.
            text = f.read(length).decode("utf-8")
        header = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its header is not usable JSON: {error}") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not a JSON object")
    return header, 8 + length, size


def _entry(path: Path, begin: int, name: str, info: Any, checksum: str | None) -> TensorEntry:
    """The entry of one tensor from its JSON object; `begin` is where the shard's data begin.

    Raises: CheckpointError.
    """
    try:
        code, shape, (start, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        if type(code) is not str or len(shape) > MAX_DIMENSIONS:
            raise ValueError
        # type(n), because isinstance takes false for an int.
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, end)):
            raise ValueError
        name.encode()  # fails for half a surrogate pair, which is no name
    except (TypeError, KeyError, ValueError) as error:
        described = f"tensor {name!r} is described by {reprlib.repr(info)}"
        raise _corrupt(path, described) from error
    if code not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {reprlib.repr(code)}, "
            f"expected one of {', '.join(DTYPES)}"
        )
    dtype, nbytes = DTYPES[code], end - start
    if nbytes != math.prod(shape) * dtype.itemsize:
        raise _corrupt(path, f"tensor {name!r} of {code}{list(shape)} takes {nbytes} bytes")
    return TensorEntry(path.name, dtype, shape, nbytes, begin + start, checksum)


def _refuse_constant(name: str) -> None:
    """Refuses NaN and Infinity, which json.loads takes although JSON has no such numbers."""
    raise ValueError(f"{name} is no JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses two equal names in an object: json.loads takes the last, other readers the first."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands in it twice")
    for text in (*found, *(value for value in found.values() if isinstance(value, str))):
        text.encode()  # fails for half a surrogate pair, which only Python's JSON takes
    return found


def _checksums(metadata: Any) -> dict[str, str]:
    """Tensor -> checksum, from the __metadata__ of a shard; empty where other programs wrote it.

    Raises: ValueError, TypeError.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("it is no JSON object of strings")  # safetensors takes nothing else
    if not isinstance(table := json.loads(metadata.get(CHECKSUMS, "{}")), dict):
        raise ValueError(f"{CHECKSUMS} is no JSON object")
    return table


def checksum(data: bytes | memoryview) -> str:
    """CRC-32 (the polynomial of zlib and PNG) as 8 lower-case hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as a shard holds them: contiguous, in host memory.

    No copy is made of a tensor that is both already.
    """
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises: CheckpointError, also for a file above MAX_JSON or nested deeper than MAX_DEPTH.
    """
    try:
        with path.open("rb") as f:
            text = f.read(MAX_JSON + 1) if os.fstat(f.fileno()).st_size <= MAX_JSON else None
        if text is None or len(text) > MAX_JSON:
            raise CheckpointError(
                f"{path} is larger than {MAX_JSON >> 20} MiB, which no such file is; "
                "copy or download it again"
            )
        content = json.loads(text.decode("utf-8"))
        _check_depth(content)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); copy or download it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__} instead of a JSON object")
    return content


def _check_depth(content: Any) -> None:
    """Raises: ValueError for more than MAX_DEPTH objects and lists inside each other."""
    depth, level = 0, [content]
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it nests more than {MAX_DEPTH} levels deep")
        inside = (
            c.values() if isinstance(c, dict) else c for c in level if isinstance(c, dict | list)
        )
        level = [value for values in inside for value in values if isinstance(value, dict | list)]


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which gets its name once it is whole and on the disk.

    On failure nothing of it stays.

    Raises: CheckpointError if the disk is full or the folder not writable.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with partial.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, CheckpointError):
            raise CheckpointError(
                f"cannot write {path}: {error.strerror or error}{_free_space(path.parent)}; "
                "make room or rights there and run again, or choose another folder"
            ) from error
        raise


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write `chunks` one behind the other.

    Raises: CheckpointError if the disk is full or the folder not writable.
    """
    with atomic_file(path) as f:
        for chunk in chunks:
            f.write(chunk)


def _free_space(folder: Path) -> str:
    try:
        return f" ({shutil.disk_usage(folder).free / 1e6:.1f} MB free)"
    except OSError:
        return ""


def write_json(path: Path, content: dict) -> None:
    """Write a JSON object atomically.

    Raises: CheckpointError if the disk is full or the folder not writable.
    """
    write_atomically(path, [(json.dumps(content, indent=2) + "\n").encode()])


def write_shard(
    path: Path, specs: Mapping[str, Spec], get: Callable[[str], Tensor]
) -> dict[str, TensorEntry]:
    """Write one safetensors file atomically; returns its table.

    Tensors are fetched one at a time by `get(name)`; the same ones give the same bytes. Written
    here rather than by safetensors.save_file so that a shard of embeddings never lies in memory
    whole, and a full disk is an OSError with its cause.

    Raises: CheckpointError if the disk is full or the folder not writable.
    """
    # The largest dtype comes first, which keeps tensors aligned.
    names = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))
    header: dict[str, dict[str, Any]] = {}
    position = 0
    for name in names:
        dtype, shape = specs[name]
        end = position + math.prod(shape) * dtype.itemsize
        code, offsets = DTYPE_CODES[dtype], [position, end]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": offsets}
        position = end
    checksums = dict.fromkeys(names, checksum(b""))
    with atomic_file(path) as f:
        f.write(_encoded(header, checksums))
        for name in names:
            t = get(name)
            assert (t.dtype, tuple(t.shape)) == (specs[name][0], tuple(specs[name][1])), name
            data = tensor_bytes(t)
            checksums[name] = checksum(data)
            f.write(data)
        f.seek(0)
        f.write(_encoded(header, checksums))  # as long as before: a checksum has 8 digits
    return read_header(path)


def _encoded(header: dict[str, dict[str, Any]], checksums: dict[str, str]) -> bytes:
    """The head of a shard: the length of its JSON in 8 bytes, and the JSON padded to 8 bytes."""
    metadata = {"format": "pt", CHECKSUMS: json.dumps(checksums, separators=(",", ":"))}
    text = json.dumps({"__metadata__": metadata} | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_name(number: int, total: int) -> str:
    """model-0000i-of-0000n.safetensors, i from 1."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"
