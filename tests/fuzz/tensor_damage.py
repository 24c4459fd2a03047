"""Sound safetensors files of other tensors: one less, one more, other shapes, types, numbers."""

from __future__ import annotations

import math
import random

from fuzz.folders import INDEX, Folder
from fuzz.shards import SIZES, damage_bytes, split, tensors_of, whole

Tensors = dict[str, list]  # name -> [dtype, shape, bytes]


def add(tensors: Tensors, name: str, rng: random.Random) -> str:
    owner, _, leaf = name.rpartition(".")
    new = rng.choice((
        name + "x", owner + ".weight", owner + ".bias", owner + ".scales", owner + ".P",
        owner + ".U", "x", "lm_head.weight", "lm_head.values", "model.layers.9." + leaf,
        "model.norm.bias", "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq", "model.layers.0.self_attn.masked_bias",
    ))  # fmt: skip
    tensors[new] = list(tensors[name])
    return f"{new!r} like {name}"


def rename(tensors: Tensors, name: str, rng: random.Random) -> str:
    new = rng.choice((
        name + "x", name.replace("model.", "", 1), "model." + name,
        name.replace("layers.0", "layers.1"), name.rpartition(".")[0] + ".weight", name.upper(),
    ))  # fmt: skip
    tensors[new] = tensors.pop(name)
    return f"{name} to {new!r}"


def rows(tensors: Tensors, name: str, rng: random.Random) -> str:
    """One row less or more."""
    dtype, shape, data = tensors[name]
    if shape:
        less, row = rng.random() < 0.5, len(data) // max(1, shape[0])
        count = shape[0] + (-1 if less else 1)
        tensors[name] = [dtype, [count, *shape[1:]], data[:-row] if less else data + data[:row]]
    return name


def columns(tensors: Tensors, name: str, rng: random.Random) -> str:
    """One column less."""
    dtype, shape, data = tensors[name]
    if len(shape) == 2 and shape[1]:
        row = len(data) // max(1, shape[0])
        kept = row - SIZES[dtype]
        pieces = [data[i * row : i * row + kept] for i in range(shape[0])]
        tensors[name] = [dtype, [shape[0], shape[1] - 1], b"".join(pieces)]
    return name


def reshape(tensors: Tensors, name: str, rng: random.Random) -> str:
    dtype, shape, data = tensors[name]
    tensors[name] = [dtype, rng.choice((shape[::-1], [math.prod(shape)], [1, *shape])), data]
    return name


def cast(tensors: Tensors, name: str, rng: random.Random) -> str:
    """The same bytes under another type of their size."""
    dtype, shape, data = tensors[name]
    like = [d for d, size in SIZES.items() if size == SIZES[dtype] and d]
    tensors[name] = [rng.choice(like), shape, data]
    return name


def byte_type(tensors: Tensors, name: str, rng: random.Random) -> str:
    shape = tensors[name][1]
    types = ("F8_E4M3", "BOOL", "I8", "U8")
    tensors[name] = [rng.choice(types), shape, bytes(math.prod(shape))]
    return name


PATTERNS = (
    b"\xff", b"\x00", b"\x80", b"\x7f", b"\x00\x7c", b"\x80\x7f", b"\x01", b"\x11", b"\x44",
    b"\x00\x00\x80\x7f", b"\xff\x7f",
)  # fmt: skip


def fill(tensors: Tensors, name: str, rng: random.Random) -> str:
    """Every byte from one pattern: zeros, infinities, NaN, illegal nibbles."""
    dtype, shape, data = tensors[name]
    pattern = rng.choice(PATTERNS)
    tensors[name] = [dtype, shape, (pattern * len(data))[: len(data)]]
    return name


def poke(tensors: Tensors, name: str, rng: random.Random) -> str:
    """Eight bytes from one pattern."""
    dtype, shape, data = tensors[name]
    filled = (rng.choice(PATTERNS) * len(data))[: len(data)]
    at = rng.randrange(max(1, len(data))) // 8 * 8
    tensors[name] = [dtype, shape, data[:at] + filled[at : at + 8] + data[at + 8 :]]
    return name


def widen(tensors: Tensors, name: str, rng: random.Random) -> str:
    """Zeros of the next larger floating type."""
    dtype, shape, data = tensors[name]
    wide = {"F16": "F32", "BF16": "F32", "F32": "F64"}.get(dtype)
    if wide:
        tensors[name] = [wide, shape, bytes(len(data) * SIZES[wide] // SIZES[dtype])]
    return name


def swap(tensors: Tensors, name: str, rng: random.Random) -> str:
    """Two tensors change places, of the same shape and type where there are such."""
    like = [n for n, entry in tensors.items() if entry[:2] == tensors[name][:2] and n != name]
    other = rng.choice(like or list(tensors))
    tensors[name], tensors[other] = tensors[other], tensors[name]
    return f"{name} and {other}"


def head(tensors: Tensors, name: str, rng: random.Random) -> str:
    """An output head, beside a config that may say tied."""
    dtype, shape, data = tensors.get("model.embed_tokens.weight") or tensors[name]
    noise = rng.randbytes(len(data)) if rng.random() < 0.3 else b"\x00\x3c" * (len(data) // 2)
    tensors["lm_head.weight"] = [dtype, shape, rng.choice((data, noise))]
    return "lm_head.weight"


def empty(tensors: Tensors, name: str, rng: random.Random) -> str:
    dtype, shape, _ = tensors[name]
    tensors[name] = [dtype, [0, *shape[1:]], b""]
    return name


def drop(tensors: Tensors, name: str, rng: random.Random) -> str:
    del tensors[name]
    return name


def prefix(tensors: Tensors, name: str, rng: random.Random) -> str:
    before = rng.choice(("model.", "transformer.", "module.", "base_model.model."))
    for old in list(tensors):
        tensors[before + old] = tensors.pop(old)
    return f"{before} before every name"


CHANGES = {
    change.__name__: change
    for change in (
        drop, add, rename, rows, columns, reshape, cast, poke, fill, widen, swap, prefix, byte_type,
        head, empty,
    )
}  # fmt: skip


def damage_tensors(folder: Folder, rng: random.Random) -> str:
    """One change to the tensors of one shard, or one that goes to another shard; says which."""
    file = rng.choice(folder.shards)
    found = split(folder.files[file])
    if found is None:
        return damage_bytes(folder, rng)
    tensors, metadata = tensors_of(*found), found[0].get("__metadata__")
    name, kind = rng.choice(list(tensors)), rng.choice((*CHANGES, "move", "copy"))
    if kind in CHANGES:
        said = CHANGES[kind](tensors, name, rng)
    else:
        said = carry(folder, tensors, name, rng.choice(folder.shards), rng)
        if kind == "move":
            del tensors[name]
    folder.files[file] = whole(tensors, metadata)
    return f"{file}: tensors: {kind} of {said}"


def carry(folder: Folder, tensors: Tensors, name: str, where: str, rng: random.Random) -> str:
    """A copy of one tensor in another shard; the index follows in half of the cases."""
    there = split(folder.files[where])
    if there is None or name in there[0]:
        return name
    others = {**tensors_of(*there), name: tensors[name]}
    folder.files[where] = whole(others, there[0].get("__metadata__"))
    index = folder.json(INDEX)
    if rng.random() < 0.5 and isinstance(index, dict) and isinstance(index.get("weight_map"), dict):
        index["weight_map"][name] = where
        folder.put(INDEX, index)
    return f"{name} to {where}"
