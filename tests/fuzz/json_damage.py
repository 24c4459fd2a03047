"""Damage to config.json, the index and the side files: wrong values, keys and texts."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator

from fuzz.folders import INDEX, Folder
from fuzz.odd_values import CONFIG_KEYS, MODULE_KEYS, MODULE_NAMES, ODD_VALUES, QUANTISED_KEYS


def places(tree, path: tuple = ()) -> Iterator[tuple]:
    """Paths of every value below the top of a JSON tree."""
    for key, value in (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    ):
        yield (*path, key)
        yield from places(value, (*path, key))


def some_place(tree, rng: random.Random) -> tuple:
    """A path into a JSON tree: any of all paths, or mostly one found by going down from the top."""
    if rng.random() < 0.3:
        found = list(places(tree))
        return rng.choice(found) if found else ()
    path: tuple = ()
    while isinstance(tree, (dict, list)) and tree and (not path or rng.random() < 0.6):
        key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        path, tree = (*path, key), tree[key]
    return path


def at(tree, path: tuple):
    for key in path:
        tree = tree[key]
    return tree


def other_value(value, tree, rng: random.Random):
    """What might stand there instead: of another type, near it, or from elsewhere in the file."""
    near = {
        bool: lambda: not value, int: lambda: rng.choice((value + 1, value - 1, value * 2,
            value // 2, -value, float(value), str(value), value + 0.5, [value])),
        float: lambda: rng.choice((-value, value * 1e30, int(value), str(value))),
            str: lambda: rng.choice((value + "x", value[:-1], value.upper(), [value], "x" + value)),
        list: lambda: rng.choice((value[:-1], value * 2, value[::-1], {"a": value}, *value[:3])),
            dict: lambda: rng.choice((list(value), {"a": value}, {**value, "x": 1},
            *list(value.values())[:3])),
    }  # fmt: skip
    choice = rng.random()
    if choice < 0.35 and type(value) in near:
        return near[type(value)]()
    if choice < 0.45:
        return json.loads(json.dumps(at(tree, some_place(tree, rng))))
    return copy.deepcopy(rng.choice(ODD_VALUES))


def shown(value) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def change_tree(tree, rng: random.Random) -> str:
    """One change in place at some place of a JSON tree; says which."""
    path = some_place(tree, rng)
    if not path:
        return "nothing to change"
    owner, key, where = at(tree, path[:-1]), path[-1], ".".join(map(str, path))
    kind = rng.choice(("value", "value", "value", "drop", "rename", "add", "deep"))
    if kind == "value":
        owner[key] = other_value(owner[key], tree, rng)
        return f"{where} = {shown(owner[key])}"
    if kind == "drop":
        del owner[key]
        return f"{where} dropped"
    if kind == "rename" and isinstance(owner, dict):
        name = rng.choice(
            (
                f"{key}x",
                f"{key}".upper(),
                f"{key}"[:-1],
                "",
                f"{key}\n",
                *(str(k) for k in list(owner)[:4]),
            )
        )
        owner[name] = owner.pop(key)
        return f"{where} renamed to {name!r}"
    if kind == "add" and isinstance(owner, dict):
        name = rng.choice(
            (
                "x",
                "",
                "__class__",
                "self",
                "__init__",
                "keys",
                "items",
                "\ud800",
                "to_dict",
                "name",
                "kwargs",
                "\x1b[2J",
            )
        )
        owner[name] = copy.deepcopy(rng.choice(ODD_VALUES))
        return f"{name!r} = {shown(owner[name])} added beside {where}"
    nested: object = 1
    for _ in range(depth := rng.choice((50, 400, 900))):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    owner[key] = nested
    return f"{where} nested {depth} deep"


def change_text(text: bytes, rng: random.Random, other: bytes) -> tuple[bytes, str]:
    """The bytes of a text file, damaged as bytes."""
    kind = rng.choice(
        (
            "cut",
            "byte",
            "empty",
            "bom",
            "utf16",
            "nul",
            "twice",
            "tail",
            "deep",
            "list",
            "other",
            "digits",
            "null",
            "latin",
            "spaces",
            "comment",
        )
    )
    position = rng.randrange(max(1, len(text)))
    if kind == "cut":
        return text[:position], f"cut after {position} bytes"
    if kind == "byte":
        byte = rng.randrange(256)
        return text[:position] + bytes([byte]) + text[
            position + 1 :
        ], f"byte {position} = {byte:#x}"
    changed = {
        "empty": b"", "bom": b"\xef\xbb\xbf" + text, "nul": text + b"\0" * 9, "twice": text * 2,
        "tail": text + b"x", "list": b"[" + text + b"]",
        "other": other, "deep": b"[" * (count := rng.choice((100, 100_000))) + b"]" * count,
            "digits": b'{"a": ' + b"9" * 5000 + b"}",
        "null": b"null", "latin": text[:position] + b"\xe9" + text[position:],
            "spaces": b" " * 3_000_000 + text, "comment": b"// x\n" + text,
    }  # fmt: skip
    if kind == "utf16":
        return text.decode("utf-8", "replace").encode("utf-16"), "as UTF-16"
    return changed[kind], f"text: {kind}"


def same_key_twice(text: str, rng: random.Random) -> str:
    """The JSON object with one of its top keys standing twice, with two values."""
    tree = json.loads(text)
    key = rng.choice(list(tree))
    return (
        "{"
        + json.dumps(key)
        + ": "
        + json.dumps(copy.deepcopy(rng.choice(ODD_VALUES)))
        + ", "
        + text.lstrip()[1:]
    )


def damage_json(folder: Folder, name: str, rng: random.Random) -> str:
    """One damage to any JSON file."""
    content, tree = folder.files[name], folder.json(name)
    if not isinstance(content, bytes):
        raise KeyError(name)
    choice = rng.random()
    if not isinstance(tree, (dict, list)) or choice < 0.2:
        others = sorted(
            n
            for n, c in folder.files.items()
            if n != name and isinstance(c, bytes) and len(c) < 200_000
        )
        folder.files[name], said = change_text(content, rng, folder.files[rng.choice(others)])
        return f"{name}: {said}"
    if choice < 0.24 and isinstance(tree, dict) and tree:
        folder.put(name, same_key_twice(content.decode("utf-8", "replace"), rng))
        return f"{name}: a key stands twice"
    said = [change_tree(tree, rng) for _ in range(rng.choice((1, 1, 1, 2)))]
    folder.put(name, tree)
    return f"{name}: {', '.join(said)}"


def damage_config(folder: Folder, rng: random.Random) -> str:
    """config.json: half of the damage is to what this library reads of it."""
    config = folder.json("config.json")
    if not isinstance(config, dict) or rng.random() < 0.35:
        return damage_json(folder, "config.json", rng)
    modules = (config.get("quantization_config") or {}).get("modules")
    kind = rng.choice(
        ("key", "key", "quantised", "module", "module", "modules", "modules", "drop", "tree")
    )
    if kind == "quantised" and isinstance(config.get("quantization_config"), dict):
        key = rng.choice(list(QUANTISED_KEYS))
        config["quantization_config"][key] = rng.choice(QUANTISED_KEYS[key])
        said = f"quantization_config.{key} = {shown(config['quantization_config'][key])}"
    elif kind == "module" and isinstance(modules, dict) and modules:
        key, names = rng.choice(list(MODULE_KEYS)), [rng.choice(list(modules))]
        if rng.random() < 0.3:
            names = list(modules)
        value = rng.choice(MODULE_KEYS[key])
        for module in names:
            modules[module][key] = value
        said = f"{key} of {len(names)} modules, {names[0]} first, = {shown(value)}"
    elif kind == "modules" and isinstance(modules, dict) and modules:
        said = change_modules(modules, rng)
    elif kind == "drop":
        key = rng.choice(list(config))
        del config[key]
        said = f"{key} dropped"
    elif kind == "tree" and isinstance(config.get("quantization_config"), dict):
        said = "quantization_config: " + change_tree(config["quantization_config"], rng)
    else:
        key = rng.choice(list(CONFIG_KEYS))
        config[key] = rng.choice(CONFIG_KEYS[key])
        said = f"{key} = {shown(config[key])}"
    folder.put("config.json", config)
    return f"config.json: {said}"


def change_modules(modules: dict, rng: random.Random) -> str:
    """The packed modules: one too many, too few, under another name, or two that changed places."""
    kind, name = (
        rng.choice(("drop", "drop", "most", "add", "add", "rename", "swap")),
        rng.choice(list(modules)),
    )
    if kind == "drop":
        del modules[name]
        return f"module {name} dropped"
    if kind == "most":
        for other in list(modules):
            if other != name:
                del modules[other]
        return f"every module but {name} dropped"
    if kind == "swap":
        other = rng.choice(list(modules))
        modules[name], modules[other] = modules[other], modules[name]
        return f"modules {name} and {other} swapped"
    new = rng.choice(
        (
            *MODULE_NAMES,
            name + ".x",
            name.replace("model.", ""),
            "model." + name,
            name.upper(),
            name + "\x1b[31m",
        )
    )
    modules[new] = dict(modules[name])
    if kind == "rename" and new != name:
        del modules[name]
    return f"module {name} {'renamed to' if kind == 'rename' else 'also as'} {new!r}"


def damage_index(folder: Folder, rng: random.Random) -> str:
    """The index: entries that lead elsewhere, missing, too many; or an index where none was."""
    index = folder.json(INDEX)
    if index is None and isinstance(folder.files.get(INDEX), bytes):
        return damage_json(folder, INDEX, rng)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        shard = (folder.shards or ["model.safetensors"])[0]
        folder.put(
            INDEX,
            {
                "metadata": {},
                "weight_map": rng.choice(
                    (
                        {},
                        {"model.norm.weight": shard},
                        {"x": shard},
                        {"model.norm.weight": "other.safetensors"},
                    )
                ),
            },
        )
        return f"{INDEX} where there was none"
    if rng.random() < 0.25:
        return damage_json(folder, INDEX, rng)
    listed, shards = index["weight_map"], folder.shards
    name, kind = (
        rng.choice(list(listed)),
        rng.choice(("file", "file", "shard", "drop", "add", "rename", "whole", "missing", "all")),
    )
    if kind in ("file", "all"):
        file = rng.choice(
            (
                "../x",
                "../single/model.safetensors",
                "/etc/passwd",
                "/etc/hostname",
                "config.json",
                "",
                ".",
                "..",
                None,
                3,
                [],
                {},
                "model.safetensors",
                "x.safetensors",
                listed[name] + "/",
                "./" + listed[name],
                "\x1b[31m.safetensors",
                "a\0b.safetensors",
                "x" * 5000,
                "\ud800.safetensors",
                "model.bin",
            )
        )
        for each in listed if kind == "all" else [name]:
            listed[each] = file
        said = f"{'every tensor' if kind == 'all' else name} in {shown(file)}"
    elif kind == "shard":
        listed[name] = rng.choice(shards) if shards else "x"
        said = f"{name} in {listed[name]}"
    elif kind == "drop":
        del listed[name]
        said = f"{name} dropped"
    elif kind == "add":
        new = rng.choice(
            (
                "x",
                "lm_head.weight",
                "model.norm.bias",
                "",
                name + "x",
                "model.layers.9.mlp.up_proj.values",
            )
        )
        listed[new] = listed[name]
        said = f"{new!r} added"
    elif kind == "rename":
        listed[name + "x"] = listed.pop(name)
        said = f"{name} renamed"
    elif kind == "whole":
        index["weight_map"] = rng.choice((None, {}, [], "x", [name], {name: listed[name]}))
        said = f"weight_map = {shown(index['weight_map'])}"
    else:
        del index[rng.choice(list(index))]
        said = "a key dropped"
    folder.put(INDEX, index)
    return f"{INDEX}: {said}"
