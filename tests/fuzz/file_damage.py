"""Damage to the folder: files missing, strange, swapped, too many. And the choice of the damage."""

from __future__ import annotations

import random
from collections.abc import Callable

from fuzz.folders import INDEX, SHARDED, SINGLE, Folder, Odd
from fuzz.header_damage import damage_header
from fuzz.json_damage import damage_config, damage_index, damage_json
from fuzz.odd_values import NEW_FILES
from fuzz.shards import damage_bytes, damage_data
from fuzz.tensor_damage import damage_tensors

SIDE_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "slab_run.json")


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
            Odd("link", "nowhere"), Odd("link", name), Odd("link", "/etc/passwd"), Odd("link", "."),
                Odd("link", "/dev/zero"), Odd("link", "/dev/null"),
            Odd("link", "config.json"), Odd("directory"), Odd("pipe"), Odd("sparse", size=8 << 30,
                head=head), Odd("sparse", size=len(head) + 1000, head=head),
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
        new = rng.choice(
            (
                "x.safetensors",
                "model.safetensors",
                "model-00001-of-00002.safetensors",
                "model.SAFETENSORS",
                "pytorch_model.bin",
            )
        )
        folder.files[new] = folder.files.pop(old)
        return f"{old} renamed to {new}"
    source = rng.choice(shards)
    new = rng.choice(
        (
            "x.safetensors",
            "model.safetensors",
            "model.safetensors",
            "consolidated.safetensors",
            "adapter_model.safetensors",
            "model.fp16.safetensors",
        )
    )
    if folder.name == SINGLE and rng.random() < 0.5:
        new = INDEX
        folder.put(INDEX, {"metadata": {}, "weight_map": {"model.norm.weight": source}})
    elif new not in folder.files:
        folder.files[new] = rng.choice(
            (
                folder.files[source],
                next(c for n, c in other.files.items() if n.endswith(".safetensors")),
            )
        )
    return f"{new} beside {source}"


# kind -> how often, and what damages. "two" is any two of the others, one after the other.
KINDS: dict[str, tuple[int, Callable[[Folder, random.Random], str] | None]] = {
    "config": (30, damage_config), "index": (8, damage_index), "header": (13, damage_header),
        "tensors": (14, damage_tensors),
    "data": (8, damage_data), "bytes": (5, damage_bytes), "side": (9, damage_side_file),
        "files": (9, None), "two": (4, None),
}  # fmt: skip


def damaged(
    number: int, seed: int, folders: dict[str, Folder]
) -> tuple[str, Folder, random.Random]:
    """Case `number`: kind of damage, damaged folder, and the generator for further choices."""
    rng = random.Random(f"{seed}/{number}")
    name = rng.choice((SINGLE, SHARDED))
    folder, other = folders[name].copy(), folders[SHARDED if name == SINGLE else SINGLE]
    kind = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
    others = [k for k in KINDS if k != "two"]
    kinds = [rng.choice(others) for _ in range(2)] if kind == "two" else [kind]
    for each in kinds:
        try:
            change = KINDS[each][1]
            said = change(folder, rng) if change else damage_files(folder, rng, other)
        except (IndexError, KeyError, RecursionError):
            # The second of two damages finds nothing to choose from, or what is nested too deep.
            said = f"nothing left for {each}"
        folder.damage.append(said)
    return kind, folder, rng
