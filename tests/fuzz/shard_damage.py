"""Damage to safetensors files: their headers, the tensors in them, their bytes."""

from __future__ import annotations

import json
import math
import random

from fuzz.folders import INDEX, Folder
from fuzz.json_damage import change_text, change_tree

SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "U32": 4, "U64": 8, "C64": 8, "F4": 1, "x": 1, "": 1,
}  # fmt: skip


def split(content: bytes) -> tuple[dict, bytes] | None:
    """Header and data of a whole safetensors file, or None."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        sane = all([type(n) for n in info["data_offsets"]] == [int, int] for name, info in header.items() if name != "__metadata__")
    except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError):
        return None
    return (header, content[8 + length :]) if sane and len(header) > 1 else None


def join(header: dict | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def tensors_of(header: dict, data: bytes) -> dict[str, list]:
    """Name -> [dtype, shape, bytes]."""
    return {
        name: [info["dtype"], info["shape"], data[slice(*info["data_offsets"])]] for name, info in header.items() if name != "__metadata__"
    }


def whole(tensors: dict[str, list], metadata) -> bytes:
    """A sound file of these tensors."""
    header, parts, position = {} if metadata is None else {"__metadata__": metadata}, [], 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        parts.append(data)
        position += len(data)
    return join(header, b"".join(parts))


def damage_header(folder: Folder, rng: random.Random) -> str:
    """The header says something else than the data is."""
    file = rng.choice(folder.shards)
    found = split(folder.files[file])
    if found is None:
        return damage_bytes(folder, rng)
    header, data = found
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry, kind = header[name], rng.choice(("offsets", "dtype", "shape", "name", "metadata", "tree", "text", "length", "twice", "swap", "drop", "alias"))
    start, end = entry["data_offsets"]
    if kind == "offsets":
        entry["data_offsets"] = rng.choice(([start + 1, end + 1], [start, end + 8], [start - 8, end], [end, start], [start, 1 << 62], [-8, end], [float(start), end], [start], [start, end, end], [str(start), end], [False, end], None, [start, len(data)], [0, end - start], [10**30, 10**30 + end - start]))
    elif kind == "dtype":
        entry["dtype"] = rng.choice((*SIZES, None, 3, [], entry["dtype"].lower()))
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = rng.choice((shape[::-1], [math.prod(shape)], [1, *shape], [], [*shape, 1], [-n for n in shape], [0], [1 << 62, 4], [float(n) for n in shape], None, "x", [True, *shape], [[n] for n in shape], [1 << 33] * 3, [1] * 200 + shape))
    elif kind == "name":
        new = rng.choice((name + "x", "x", "", name.upper(), "__metadata__ ", "\x1b[31m" + name, name.rpartition(".")[0], name.rpartition(".")[0] + ".weight", "lm_head.weight", "model." + name, "\ud800", "x" * 10_000))
        header = {new if n == name else n: info for n, info in header.items()}
    elif kind == "metadata":
        header["__metadata__"] = rng.choice((None, {}, 3, [], {"format": "tf"}, {"format": 3}, {"format": None}, "pt", {"a": {"b": 1}}, {str(i): "x" * 100 for i in range(10_000)}))
        if header["__metadata__"] is None and rng.random() < 0.5:
            del header["__metadata__"]
    elif kind == "tree":
        change_tree(header, rng)
    elif kind == "text":
        text, said = change_text(json.dumps(header).encode(), rng, b"{}")
        folder.files[file] = join(text, data)
        return f"{file}: header {said}"
    elif kind == "length":
        length = rng.choice((0, 1, 7, (1 << 64) - 1, 1 << 40, len(data), len(folder.files[file]), len(folder.files[file]) - 8, 100_000_001, rng.randrange(5000)))
        folder.files[file] = length.to_bytes(8, "little") + folder.files[file][8:]
        return f"{file}: header length {length}"
    elif kind == "twice":
        text = json.dumps(header)
        folder.files[file] = join(("{" + json.dumps(name) + ": " + json.dumps(rng.choice((entry, {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}))) + ", " + text[1:]).encode(), data)
        return f"{file}: {name} stands twice in the header"
    elif kind == "swap":
        other = rng.choice([n for n in header if n != "__metadata__"])
        header[name], header[other] = header[other], header[name]
        name = f"{name} and {other}"
    elif kind == "alias":
        header[rng.choice((name + "x", "lm_head.weight", "x"))] = dict(entry)
    else:
        del header[name]
    folder.files[file] = join(header, data)
    return f"{file}: header: {kind} of {name}"


def damage_tensors(folder: Folder, rng: random.Random) -> str:
    """A sound file that holds other tensors: one less, one more, other shapes, types or numbers."""
    file = rng.choice(folder.shards)
    found = split(folder.files[file])
    if found is None:
        return damage_bytes(folder, rng)
    tensors, metadata = tensors_of(*found), found[0].get("__metadata__")
    name = rng.choice(list(tensors))
    dtype, shape, data = tensors[name]
    kind = rng.choice(("drop", "add", "rename", "rows", "columns", "reshape", "cast", "nan", "fill", "double", "swap", "move", "copy", "prefix", "fp8", "head", "empty"))
    if kind in ("drop", "move"):
        del tensors[name]
    if kind == "add":
        parent, _, leaf = name.rpartition(".")
        new = rng.choice((name + "x", parent + ".weight", parent + ".bias", parent + ".scales", parent + ".P", parent + ".U", "x", "lm_head.weight", "lm_head.values", "model.layers.9." + leaf, "model.norm.bias", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "model.layers.0.self_attn.masked_bias"))
        tensors[new] = list(tensors[name])
        name = f"{new!r} like {name}"
    elif kind == "rename":
        new = rng.choice((name + "x", name.replace("model.", "", 1), "model." + name, name.replace("layers.0", "layers.1"), name.rpartition(".")[0] + ".weight", name.upper()))
        tensors[new] = tensors.pop(name)
        name = f"{name} to {new!r}"
    elif kind == "rows" and shape:
        less = rng.random() < 0.5
        row = len(data) // max(1, shape[0])
        tensors[name] = [dtype, [shape[0] + (-1 if less else 1), *shape[1:]], data[:-row] if less else data + data[:row]]
    elif kind == "columns" and len(shape) == 2 and shape[1]:
        row = len(data) // max(1, shape[0])
        kept = row - SIZES[dtype]
        tensors[name] = [dtype, [shape[0], shape[1] - 1], b"".join(data[i * row : i * row + kept] for i in range(shape[0]))]
    elif kind == "reshape":
        tensors[name] = [dtype, rng.choice((shape[::-1], [math.prod(shape)], [1, *shape])), data]
    elif kind == "cast":
        tensors[name] = [rng.choice([d for d, size in SIZES.items() if size == SIZES[dtype] and d]), shape, data]
    elif kind == "fp8":
        tensors[name] = [rng.choice(("F8_E4M3", "BOOL", "I8", "U8")), shape, bytes(math.prod(shape))]
    elif kind in ("nan", "fill"):
        pattern = rng.choice((b"\xff", b"\x00", b"\x80", b"\x7f", b"\x00\x7c", b"\x80\x7f", b"\x01", b"\x11", b"\x44", b"\x00\x00\x80\x7f", b"\xff\x7f"))
        filled = (pattern * len(data))[: len(data)]
        start = rng.randrange(max(1, len(data))) // 8 * 8 if kind == "nan" else 0
        length = 8 if kind == "nan" else len(data)
        tensors[name] = [dtype, shape, data[:start] + filled[start : start + length] + data[start + length :]]
    elif kind == "double" and SIZES[dtype] in (2, 4) and dtype.startswith(("F", "B")):
        wide = {"F16": "F32", "BF16": "F32", "F32": "F64"}[dtype]
        tensors[name] = [wide, shape, bytes(len(data) * SIZES[wide] // SIZES[dtype])]
    elif kind == "swap":
        like = [n for n, (d, s, _) in tensors.items() if (d, s) == (dtype, shape) and n != name]
        other = rng.choice(like or list(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
        name = f"{name} and {other}"
    elif kind in ("move", "copy"):
        where = rng.choice(folder.shards)
        there = split(folder.files[where]) if where != file else None
        if there is not None:
            folder.files[where] = whole({**tensors_of(*there), name: [dtype, shape, data]}, there[0].get("__metadata__"))
            name = f"{name} to {where}"
            if rng.random() < 0.5 and isinstance(index := folder.json(INDEX), dict) and isinstance(index.get("weight_map"), dict):
                index["weight_map"][name.partition(" ")[0]] = where
                folder.put(INDEX, index)
    elif kind == "prefix":
        prefix = rng.choice(("model.", "transformer.", "module.", "base_model.model."))
        tensors = {prefix + n: entry for n, entry in tensors.items()}
        name = f"{prefix} before every name"
    elif kind == "head":
        source = tensors.get("model.embed_tokens.weight") or tensors[name]
        noise = rng.randbytes(len(source[2])) if rng.random() < 0.3 else b"\x00\x3c" * (len(source[2]) // 2)
        tensors["lm_head.weight"] = [source[0], source[1], rng.choice((source[2], noise))]
        name = "lm_head.weight"
    elif kind == "empty":
        tensors[name] = [dtype, [0] + shape[1:], b""]
    folder.files[file] = whole(tensors, metadata)
    return f"{file}: tensors: {kind} of {name}"


def damage_data(folder: Folder, rng: random.Random) -> str:
    """The header stays; bits of the data change."""
    file = rng.choice(folder.shards)
    content = folder.files[file]
    start = min(8 + int.from_bytes(content[:8], "little"), len(content))
    if start == len(content):
        return damage_bytes(folder, rng)
    position, kind = rng.randrange(start, len(content)), rng.choice(("bit", "bit", "bit", "bytes", "zeros", "ones"))
    if kind == "bit":
        changed = bytes([content[position] ^ 1 << rng.randrange(8)])
    else:
        length = min(rng.choice((4, 64, 4096)), len(content) - position)
        changed = {"bytes": rng.randbytes(length), "zeros": bytes(length), "ones": b"\xff" * length}[kind]
    folder.files[file] = content[:position] + changed + content[position + len(changed) :]
    return f"{file}: data: {kind} at {position}"


def damage_bytes(folder: Folder, rng: random.Random) -> str:
    """A file cut, lengthened, or not a safetensors file at all."""
    file = rng.choice(folder.shards)
    content, kind = folder.files[file], rng.choice(("cut", "cut", "tail", "head", "empty", "text", "random", "pickle", "zip"))
    position = rng.randrange(max(1, len(content)))
    folder.files[file] = {
        "cut": content[:position], "tail": content + rng.randbytes(rng.choice((1, 8, 4096))), "head": b"\0" + content, "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n", "random": rng.randbytes(3000), "pickle": b"\x80\x04K\x01.", "zip": b"PK\x03\x04" + bytes(60),
    }[kind]  # fmt: skip
    return f"{file}: {kind} at {position}"


