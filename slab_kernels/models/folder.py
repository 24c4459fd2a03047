"""Checkpoint folders: found by path or by name on the hub, checked, and read tensor by tensor.

A folder loads only if its config.json is there, and config.json is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError, CheckpointError
from ..paths import expanded
from .hub import ON_MAIN, HubArguments
from .model_config import WEIGHTS_KEY
from .shards import TensorEntry, checksum, read_header, read_json, tensor_bytes, write_json

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PROGRESS_NAME = "slab_progress.json"  # the state of an unfinished run, see output.py
RECORD_NAME = "slab_run.json"
VERIFY = "SLAB_KERNELS_VERIFY"  # environment variable; 0 = checksums are not compared

GGUF_ADVICE = (
    "dequantise them once with AutoModelForCausalLM.from_pretrained(folder, gguf_file=...)"
    ".save_pretrained(...), save the tokenizer there too, and take that folder"
)


def hub_folder(name: str | os.PathLike[str], hub: HubArguments = ON_MAIN) -> Path:
    """The folder `name`, or the local snapshot of the model of that name on the Hugging Face hub.

    hub: which revision and subfolder, and by which token.

    Raises: ArgumentError for what is no name or path, and for a revision of a folder here, which
        has none; CheckpointError if nothing is found.
    """
    path, name = expanded(name), str(name)
    if path.is_dir():
        if hub.revision is not None:
            raise ArgumentError(
                f"revision={hub.revision!r} is for a model of the hub, and {name} is a folder "
                "here; leave it out"
            )
        return hub.inside(path, name)
    if path.is_file():
        if path.suffix == ".gguf":
            raise CheckpointError(
                f"{name} holds GGUF weights, which are not read here; {GGUF_ADVICE}"
            )
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise CheckpointError(f"the model folder {name} does not exist")
    return hub.download(name)


class _Chosen(NamedTuple):
    """The weights to read of a folder.

    shards: names of files. named_by: who names them, for messages. listed: tensor -> shard, where
    that is an index.
    """

    shards: list[str]
    named_by: str
    listed: dict[str, str] | None = None


def _wanted() -> bool:
    """Whether the environment lets checksums be compared. Raises: ArgumentError."""
    told = os.environ.get(VERIFY) or "1"
    if told not in ("0", "1"):
        raise ArgumentError(
            f"{VERIFY}={told} is neither 0, which leaves checksums out, nor 1, which compares them"
        )
    return told == "1"


class Checkpoint:
    """A folder of safetensors shards, whose headers are read and checked on opening.

    Tensors are read one by one. Of several sets of weights in a folder, transformers' choice is
    read: the file that config.json names as `transformers_weights`, else model.safetensors, else
    the shards that model.safetensors.index.json lists.

    Args:
        files: the shards that an engine has chosen instead; they must lie in `folder`.
        verify: compare what is read with its checksum (never if SLAB_KERNELS_VERIFY is 0).

    Raises: CheckpointError for a missing folder, config.json or shard, a corrupt shard, a tensor
        that is listed but absent, present but not listed, or present twice, and for PyTorch .bin
        files; ArgumentError for another word than 0 or 1 in SLAB_KERNELS_VERIFY.
    """

    def __init__(
        self, folder: Path | str, files: Iterable[Path | str] | None = None, verify: bool = True
    ):
        self.folder = Path(folder)
        self.verifies = _wanted() and verify
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder} is not a folder; give the folder that holds config.json"
            )
        if not (self.folder / "config.json").is_file():
            advice = ""
            if any(self.folder.glob("*.gguf")):
                advice = f" but GGUF weights, which are not read here; {GGUF_ADVICE}"
            if (self.folder / PROGRESS_NAME).is_file():
                advice = "; its compression was interrupted: finish it with resume=True"
            raise CheckpointError(f"{self.folder} has no config.json{advice}")
        self.config = read_json(self.folder / "config.json")
        self.entries: dict[str, TensorEntry] = {}
        self._stamps: dict[str, tuple[int, ...]] = {}
        self._open(self._chosen() if files is None else self._given(files))

    def _open(self, chosen: _Chosen) -> None:
        """Read the header of every shard into `entries`, and compare them with the index."""
        listed = chosen.listed
        for file in chosen.shards:
            if not os.path.isfile(self.folder / file):  # False for a name too long, too
                raise CheckpointError(
                    f"{self.folder} lacks the shard {file!r} that {chosen.named_by} lists; "
                    "copy it there"
                )
            self._stamps[file] = _stamp((self.folder / file).stat())
            for name, entry in read_header(self.folder / file).items():
                if name in self.entries:
                    raise CheckpointError(
                        f"tensor {name!r} lies in both {self.entries[name].file} and {file}"
                    )
                if listed is not None and listed.get(name) != file:
                    raise CheckpointError(
                        f"{file} holds tensor {name!r}, which {chosen.named_by} does not place "
                        "there"
                    )
                self.entries[name] = entry
        for name, file in (listed or {}).items():
            if name not in self.entries:
                raise CheckpointError(
                    f"{chosen.named_by} places tensor {name!r} in {file}, which does not hold it"
                )

    def _chosen(self) -> _Chosen:
        """The weights that transformers would read."""
        named_by, name = "config.json", self.config.get(WEIGHTS_KEY)
        if name is None:
            named_by = "the folder"
            name = WEIGHTS_NAME if (self.folder / WEIGHTS_NAME).is_file() else INDEX_NAME
            if name == INDEX_NAME and not (self.folder / INDEX_NAME).is_file():
                raise self._without_weights()
        elif not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{self.folder / 'config.json'} names the weights {reprlib.repr(name)}; expected a "
                "file in the same folder"
            )
        if name.endswith(".safetensors"):
            return _Chosen([name], named_by)
        listed = self._weight_map(self.folder / name)
        return _Chosen(sorted(set(listed.values())), name, listed)

    def _given(self, files: Iterable[Path | str]) -> _Chosen:
        """The files that an engine will read.

        Raises: CheckpointError for one that lies in another folder.
        """
        paths = [Path(file) for file in files]
        for path in paths:
            if Path(os.path.abspath(path.parent)) != Path(os.path.abspath(self.folder)):
                raise CheckpointError(
                    f"the shard {str(path)!r} does not lie in {self.folder}; copy it there"
                )
        return _Chosen([path.name for path in paths], "the engine")

    def _weight_map(self, index: Path) -> dict[str, str]:
        listed = read_json(index).get("weight_map")
        if (
            not isinstance(listed, dict)
            or not listed
            or not all(isinstance(file, str) for file in listed.values())
        ):
            raise CheckpointError(f"{index} has no weight_map from tensor names to shard names")
        for file in listed.values():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index} names the shard {reprlib.repr(file)}; expected a .safetensors file "
                    "in the same folder"
                )
        return listed

    def _without_weights(self) -> CheckpointError:
        """The error for a folder that has neither of the usual files."""
        if files := sorted(p.name for p in self.folder.glob("*.safetensors")):
            return CheckpointError(
                f"{self.folder} holds {len(files)} safetensors files but no {WEIGHTS_NAME} "
                f"and no {INDEX_NAME}; rename {files[0]!r} if it is the whole model, or fetch the "
                "index"
            )
        if any(self.folder.glob("*.gguf")):
            return CheckpointError(
                f"{self.folder} holds GGUF weights, which are not read here; {GGUF_ADVICE}"
            )
        if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt*")):
            return CheckpointError(
                f"{self.folder} holds PyTorch .bin weights, which can run code when read; convert "
                "them once with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), "
                "which writes safetensors"
            )
        return CheckpointError(f"{self.folder} holds no {WEIGHTS_NAME} and no {INDEX_NAME}")

    def refuse_other_weights(self) -> None:
        """Refuse a folder of which another engine would read other weights than transformers does.

        Some read every safetensors file, some follow an index wherever there is one, some read
        Mistral's `consolidated*.safetensors` wherever there are any.

        Raises: CheckpointError if such an engine would read other files than these.
        """
        read = {p.name for p in self.folder.glob("*.safetensors")}
        if named := {name for name in read if name.startswith("consolidated")}:
            read = named
        elif (self.folder / INDEX_NAME).is_file():
            read = set(self._weight_map(self.folder / INDEX_NAME).values())
        if others := read ^ self._stamps.keys():
            raise CheckpointError(
                f"{self.folder} holds two sets of weights, and this engine reads other files than "
                f"transformers does ({min(others)!r}); remove one of the two"
            )

    def get(self, name: str) -> Tensor:
        """One tensor in memory of its own, which later changes of the shard do not reach.

        Raises: CheckpointError if it cannot be read, does not match its checksum, or the shard was
            changed since it was opened.
        """
        entry = self.entries[name]
        path = self.folder / entry.file
        tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        data = tensor_bytes(tensor)  # the tensor's own memory, not a copy
        try:
            with path.open("rb") as f:
                same = _stamp(os.fstat(f.fileno())) == self._stamps[entry.file]
                f.seek(entry.start)
                same = same and f.readinto(data) == entry.nbytes
        except OSError as error:
            raise CheckpointError(
                f"cannot read tensor {name!r} from {path}: {error.strerror or error}"
            ) from error
        if not same:
            raise CheckpointError(
                f"{path} was changed while it was being read; start again once it is whole"
            )
        if self.verifies and entry.checksum is not None and checksum(data) != entry.checksum:
            raise CheckpointError(
                f"tensor {name!r} in {path} is damaged: its checksum is {checksum(data)}, and "
                f"{reprlib.repr(entry.checksum)} was written; copy or download the file again"
            )
        return tensor

    def verify(self) -> None:
        """Compare every tensor that has a checksum, for engines that read shards by themselves.

        Raises: CheckpointError naming the first tensor that differs.
        """
        for name, entry in self.entries.items():
            if self.verifies and entry.checksum is not None:
                self.get(name)

    def fingerprint(self) -> str:
        """SHA-256 of config.json, the table of tensors, and 1 MiB at both ends of every shard.

        It is cheap, and no path enters it.
        """
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


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """What tells one version of a file from another."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def write_index(folder: Path, tables: Iterable[dict[str, TensorEntry]]) -> None:
    """Write model.safetensors.index.json from the tables of all shards.

    Raises: CheckpointError if it cannot be written.
    """
    entries = {name: entry for table in tables for name, entry in table.items()}
    total = sum(entry.nbytes for entry in entries.values())
    weight_map = {name: entries[name].file for name in sorted(entries)}
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
