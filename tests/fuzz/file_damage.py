"""Damage to the folder itself: files that are missing, strange, swapped or too many. And the choice of a case's damage."""

from __future__ import annotations

import random
from collections.abc import Callable

from fuzz.folders import INDEX, SHARDED, SINGLE, Folder, Odd
from fuzz.json_damage import damage_config, damage_index, damage_json
from fuzz.shard_damage import damage_bytes, damage_data, damage_header, damage_tensors

SIDE_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "slab_run.json")
NEW_FILES = {
    "slab_progress.json": (b"{}", b"[]", b"x"), "adapter_config.json": (b"{}", b"x", b'{"peft_type": "LORA", "base_model_name_or_path": "x"}'),
    "special_tokens_map.json": (b"{}", b"[]", b'{"bos_token": "nothing"}', b'{"bos_token": 3}'), "added_tokens.json": (b'{"x": 5000}', b'{"x": "y"}', b"[]"),
    "pytorch_model.bin": (b"", b"\x80\x04K\x01."), "pytorch_model.bin.index.json": (b"{}", b'{"weight_map": {}}'), "model.safetensors.partial": (b"x",),
    "chat_template.jinja": (b"{{ x", b"\xff\xfe", b"{% for x in y %}"), "preprocessor_config.json": (b"{}", b"x"), "processor_config.json": (b"x", b'{"processor_class": "X"}'),
    "modeling_x.py": (b"raise SystemExit(9)\n",), "config.json.partial": (b"{",), "vocab.json": (b"{}",), "merges.txt": (b"\xff",), "tokenizer.model": (b"x",),
    "generation_config.json": (b"{}", b'{"max_new_tokens": -1}', b'{"cache_implementation": "x"}', b'{"do_sample": false, "temperature": 0.1}', b'{"eos_token_id": "x"}'),
}  # fmt: skip


def damage_side_file(folder: Folder, rng: random.Random) -> str:
    """A file beside the weights: its JSON, or one more that some reader looks for."""
    known = [n for n in SIDE_FILES if isinstance(folder.files.get(n), bytes)]
    if known and rng.random() < 0.75:
        return damage_json(folder, rng.choice(known), rng)
    name = rng.choice(list(NEW_FILES))
    folder.files[name] = rng.choice(NEW_FILES[name])
    return f"{name} = {folder.files[name]!r}"


def damage_files(folder: Folder, rng: random.Random, other: Folder) -> str:
    """Files missing, replaced by what is no file, swapped, or from another folder."""
    name = rng.choice(sorted(folder.files))
    kind = rng.choice(("drop", "drop", "odd", "odd", "odd", "swap", "other", "more", "rename"))
    if kind == "drop":
        del folder.files[name]
        return f"{name} is missing"
    if kind == "odd":
        content = folder.files[name]
        head = content[: rng.choice((0, 8, 1 << 20))] if isinstance(content, bytes) else b""
        odd = rng.choice((
            Odd("link", "nowhere"), Odd("link", name), Odd("link", "/etc/passwd"), Odd("link", "."), Odd("link", "/dev/zero"), Odd("link", "/dev/null"),
            Odd("link", "config.json"), Odd("directory"), Odd("pipe"), Odd("sparse", size=8 << 30, head=head), Odd("sparse", size=len(head) + 1000, head=head),
        ))  # fmt: skip
        folder.files[name] = odd
        return f"{name} is a {odd.kind} {odd.target or odd.size or ''}".strip()
    if kind == "swap":
        second = rng.choice(sorted(n for n in folder.files if n.endswith(name[-5:])))
        folder.files[name], folder.files[second] = folder.files[second], folder.files[name]
        return f"{name} and {second} swapped"
    if kind == "other":
        files = {n: c for n, c in other.files.items() if n.endswith(name[-5:])}
        source = name if name in files else rng.choice(sorted(files))
        folder.files[name] = files[source]
        return f"{name} is {source} of the other folder"
    shards = folder.shards or [name]
    if kind == "rename":
        old = rng.choice(shards)
        new = rng.choice(("x.safetensors", "model.safetensors", "model-00001-of-00002.safetensors", "model.SAFETENSORS", "pytorch_model.bin"))
        folder.files[new] = folder.files.pop(old)
        return f"{old} renamed to {new}"
    source = rng.choice(shards)
    new = rng.choice(("x.safetensors", "model.safetensors", "model.safetensors", "consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors"))
    if folder.name == SINGLE and rng.random() < 0.5:
        new = INDEX
        folder.put(INDEX, {"metadata": {}, "weight_map": {"model.norm.weight": source}})
    elif new not in folder.files:
        folder.files[new] = rng.choice((folder.files[source], next(c for n, c in other.files.items() if n.endswith(".safetensors"))))
    return f"{new} beside {source}"


# kind -> how often, and what damages. "two" is any two of the others, one after the other.
KINDS: dict[str, tuple[int, Callable[[Folder, random.Random], str] | None]] = {
    "config": (30, damage_config), "index": (8, damage_index), "header": (13, damage_header), "tensors": (14, damage_tensors),
    "data": (8, damage_data), "bytes": (5, damage_bytes), "side": (9, damage_side_file), "files": (9, None), "two": (4, None),
}  # fmt: skip


def damaged(number: int, seed: int, folders: dict[str, Folder]) -> tuple[str, Folder, random.Random]:
    """Case `number`: the kind of damage, the damaged folder, and the generator for what else the case chooses."""
    rng = random.Random(f"{seed}/{number}")
    name = rng.choice((SINGLE, SHARDED))
    folder, other = folders[name].copy(), folders[SHARDED if name == SINGLE else SINGLE]
    kind = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
    kinds = [kind] if kind != "two" else [rng.choice([k for k in KINDS if k != "two"]) for _ in range(2)]
    for each in kinds:
        try:
            folder.damage.append(damage_files(folder, rng, other) if each == "files" else KINDS[each][1](folder, rng))
        except (IndexError, KeyError, RecursionError):  # the second of two damages finds nothing to choose from, or what is nested too deep
            folder.damage.append(f"nothing left for {each}")
    return kind, folder, rng
