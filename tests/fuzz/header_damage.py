"""Damage to the header of a safetensors file: it says something else than the data is."""

from __future__ import annotations

import json
import math
import random

from fuzz.folders import Folder
from fuzz.json_damage import change_text, change_tree
from fuzz.shards import SIZES, damage_bytes, join, names_in, split


def offsets(entry: dict, rng: random.Random, size: int) -> None:
    """size: bytes of data in the file."""
    start, end = entry["data_offsets"]
    entry["data_offsets"] = rng.choice((
        [start + 1, end + 1], [start, end + 8], [start - 8, end], [end, start], [start, 1 << 62],
        [-8, end], [float(start), end], [start], [start, end, end], [str(start), end],
        [False, end], None, [start, size], [0, end - start], [10**30, 10**30 + end - start],
    ))  # fmt: skip


def dtype(entry: dict, rng: random.Random) -> None:
    entry["dtype"] = rng.choice((*SIZES, None, 3, [], entry["dtype"].lower()))


def shape(entry: dict, rng: random.Random) -> None:
    old = entry["shape"]
    entry["shape"] = rng.choice((
        old[::-1], [math.prod(old)], [1, *old], [], [*old, 1], [-n for n in old], [0], [1 << 62, 4],
        [float(n) for n in old], None, "x", [True, *old], [[n] for n in old], [1 << 33] * 3,
        [1] * 200 + old,
    ))  # fmt: skip


def rename(header: dict, name: str, rng: random.Random) -> dict:
    owner = name.rpartition(".")[0]
    new = rng.choice((
        name + "x", "x", "", name.upper(), "__metadata__ ", "\x1b[31m" + name, owner,
        owner + ".weight", "lm_head.weight", "model." + name, "\ud800", "x" * 10_000,
    ))  # fmt: skip
    return {new if n == name else n: entry for n, entry in header.items()}


def metadata(header: dict, rng: random.Random) -> None:
    header["__metadata__"] = rng.choice((
        None, {}, 3, [], {"format": "tf"}, {"format": 3}, {"format": None}, "pt", {"a": {"b": 1}},
        {str(i): "x" * 100 for i in range(10_000)},
    ))  # fmt: skip
    if header["__metadata__"] is None and rng.random() < 0.5:
        del header["__metadata__"]


def length(content: bytes, data: bytes, rng: random.Random) -> bytes:
    """The first eight bytes, which give the header's length, changed."""
    given = rng.choice((
        0, 1, 7, (1 << 64) - 1, 1 << 40, len(data), len(content), len(content) - 8, 100_000_001,
        rng.randrange(5000),
    ))  # fmt: skip
    return given.to_bytes(8, "little") + content[8:]


def twice(header: dict, name: str, rng: random.Random) -> bytes:
    """The header's text with one name standing in it twice."""
    text = json.dumps(header)
    other = rng.choice((header[name], {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}))
    return ("{" + json.dumps(name) + ": " + json.dumps(other) + ", " + text[1:]).encode()


KINDS = (
    "offsets", "dtype", "shape", "name", "metadata", "tree", "text", "length", "twice", "swap",
    "drop", "alias",
)  # fmt: skip


def damage_header(folder: Folder, rng: random.Random) -> str:
    """One damage to the header of one shard; says which."""
    file = rng.choice(folder.shards)
    found = split(folder.files[file])
    if found is None:
        return damage_bytes(folder, rng)
    header, data = found
    name, kind = rng.choice(names_in(header)), rng.choice(KINDS)
    changed: dict | bytes = header
    if kind == "offsets":
        offsets(header[name], rng, len(data))
    elif kind == "dtype":
        dtype(header[name], rng)
    elif kind == "shape":
        shape(header[name], rng)
    elif kind == "name":
        changed = rename(header, name, rng)
    elif kind == "metadata":
        metadata(header, rng)
    elif kind == "tree":
        change_tree(header, rng)
    elif kind == "text":
        changed, _ = change_text(json.dumps(header).encode(), rng, b"{}")
    elif kind == "twice":
        changed = twice(header, name, rng)
    elif kind == "swap":
        other = rng.choice(names_in(header))
        header[name], header[other] = header[other], header[name]
    elif kind == "alias":
        header[rng.choice((name + "x", "lm_head.weight", "x"))] = dict(header[name])
    elif kind == "drop":
        del header[name]
    whole = length(folder.files[file], data, rng) if kind == "length" else join(changed, data)
    folder.files[file] = whole
    return f"{file}: header: {kind} of {name}"
