"""Safetensors files taken apart and put together, and damage to their bytes."""

from __future__ import annotations

import json
import random

from fuzz.folders import Folder

# Bytes of each type: those of the format, some that the library does not know, and no types at all.
SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8, "F4": 1, "x": 1,
    "": 1,
}  # fmt: skip


def names_in(header: dict) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def split(content: bytes) -> tuple[dict, bytes] | None:
    """Header and data of a file that is whole enough to be damaged further, or None."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        offsets = [header[name]["data_offsets"] for name in names_in(header)]
        sane = all([type(n) for n in pair] == [int, int] for pair in offsets)
    except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError):
        return None
    return (header, content[8 + length :]) if sane and offsets else None


def join(header: dict | bytes, data: bytes) -> bytes:
    """A file of a header, or of a header's text, and data."""
    if isinstance(header, dict):
        header = json.dumps(header, separators=(",", ":")).encode("utf-8", "surrogatepass")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def tensors_of(header: dict, data: bytes) -> dict[str, list]:
    """Name -> [dtype, shape, bytes]."""
    found = {}
    for name in names_in(header):
        entry = header[name]
        found[name] = [entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]]
    return found


def whole(tensors: dict[str, list], metadata) -> bytes:
    """A sound file of these tensors."""
    header: dict = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        end = position + len(data)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    return join(header, b"".join(data for _, _, data in tensors.values()))


def damage_bytes(folder: Folder, rng: random.Random) -> str:
    """A file cut, lengthened, or not a safetensors file at all."""
    file = rng.choice(folder.shards)
    content = folder.files[file]
    kind = rng.choice(("cut", "cut", "tail", "head", "empty", "text", "random", "pickle", "zip"))
    position = rng.randrange(max(1, len(content)))
    folder.files[file] = {
        "cut": content[:position],
        "tail": content + rng.randbytes(rng.choice((1, 8, 4096))),
        "head": b"\0" + content,
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "random": rng.randbytes(3000),
        "pickle": b"\x80\x04K\x01.",
        "zip": b"PK\x03\x04" + bytes(60),
    }[kind]
    return f"{file}: {kind} at {position}"


def damage_data(folder: Folder, rng: random.Random) -> str:
    """The header stays; bits of the data change."""
    file = rng.choice(folder.shards)
    content = folder.files[file]
    start = min(8 + int.from_bytes(content[:8], "little"), len(content))
    if start == len(content):
        return damage_bytes(folder, rng)
    position = rng.randrange(start, len(content))
    kind = rng.choice(("bit", "bit", "bit", "bytes", "zeros", "ones"))
    if kind == "bit":
        changed = bytes([content[position] ^ 1 << rng.randrange(8)])
    else:
        length = min(rng.choice((4, 64, 4096)), len(content) - position)
        filled = {"bytes": rng.randbytes(length), "zeros": bytes(length), "ones": b"\xff" * length}
        changed = filled[kind]
    folder.files[file] = content[:position] + changed + content[position + len(changed) :]
    return f"{file}: data: {kind} at {position}"
