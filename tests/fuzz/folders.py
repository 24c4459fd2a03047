"""Two packed folders in memory, and a damaged one on disk; only differences are written."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import tiny_models

INDEX = "model.safetensors.index.json"
SINGLE, SHARDED = "single", "sharded"


@dataclass(frozen=True)
class Odd:
    """No plain file: kind "link" to `target`, "directory", "pipe", or "sparse" of `size` bytes."""

    kind: str
    target: str = ""
    size: int = 0
    head: bytes = b""


@dataclass
class Folder:
    """Name -> bytes or `Odd`, and what was done to them, in words."""

    name: str
    files: dict[str, bytes | Odd]
    damage: list[str] = field(default_factory=list)

    def copy(self) -> Folder:
        return Folder(self.name, dict(self.files))

    def json(self, name: str):
        """The content of a JSON file that no damage has reached, or else None."""
        content = self.files.get(name)
        try:
            return json.loads(content) if isinstance(content, bytes) else None
        except (ValueError, RecursionError):
            return None

    def put(self, name: str, content) -> None:
        """Write a JSON file; a string is taken as its text."""
        self.files[name] = (
            content if isinstance(content, str) else json.dumps(content, indent=1)
        ).encode("utf-8", "surrogatepass")

    @property
    def shards(self) -> list[str]:
        """Names of the weight files that are still plain files."""
        return sorted(
            n
            for n, content in self.files.items()
            if n.endswith(".safetensors") and isinstance(content, bytes)
        )


def build(top: Path) -> None:
    """Write the two folders below `top`, and a text for `eval`.

    The first is what `save_pretrained` writes: a Llama in one file, int4 with two sign planes and
    int8 adapters, its head tied to the embedding. The second is what `compress` writes: a Qwen2
    with biases, in shards with an index, fp16 of rank 2.
    """
    from transformers import AutoModelForCausalLM

    import slab_kernels

    settings = {"calibration": tiny_models.tokens(), "progress": False, "rounds": 1}
    tiny_models.write(top / "llama", "llama", num_hidden_layers=1)
    slab_kernels.compress(
        top / "llama",
        top / "compressed",
        values="int4",
        group_size=32,
        planes=2,
        adapter_rank=2,
        **settings,
    )
    AutoModelForCausalLM.from_pretrained(top / "compressed").save_pretrained(top / SINGLE)
    for path in (top / "compressed").iterdir():
        if (
            path.suffix == ".json"
            and not (top / SINGLE / path.name).exists()
            and path.name != INDEX
        ):
            shutil.copy(path, top / SINGLE)
    tiny_models.write(top / "qwen2", "qwen2")
    exact = {"preset": "exact", "rank": 2}  # the other folder has integers
    slab_kernels.compress(top / "qwen2", top / SHARDED, **exact, **settings)
    for name in ("llama", "compressed", "qwen2"):
        shutil.rmtree(top / name)
    (top / "text.txt").write_text(tiny_models.text(40), encoding="utf-8")


def read(folder: Path) -> Folder:
    return Folder(folder.name, {path.name: path.read_bytes() for path in sorted(folder.iterdir())})


class Place:
    """A folder on disk that holds one `Folder` after another."""

    def __init__(self, path: Path):
        self.path = path
        self.written: dict[str, bytes | Odd] = {}
        path.mkdir(parents=True)

    def show(self, folder: Folder) -> Path:
        """Make the folder on disk hold exactly `folder`; returns its path."""
        for name in [
            n for n, content in self.written.items() if folder.files.get(n) is not content
        ]:
            remove(self.path / name)
            del self.written[name]
        for name, content in folder.files.items():
            if name not in self.written:
                write(self.path / name, content)
                self.written[name] = content
        return self.path


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write(path: Path, content: bytes | Odd) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content.kind == "link":
        path.symlink_to(content.target)
    elif content.kind == "directory":
        path.mkdir()
    elif content.kind == "pipe":
        os.mkfifo(path)
    else:
        with path.open("wb") as f:
            f.write(content.head)
            f.truncate(content.size)
