"""Checkpoint folders: the tensors of a folder found, checked and read one by one.

A folder loads only if its config.json is there, and config.json is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .shards import (
    TensorEntry,
    checksum,
    read_header,
    read_json,
    tensor_bytes,
    write_json,
)

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_KEY = "transformers_weights"  # of config.json: the file to read instead of those two
PROGRESS_NAME = (
    "slab_progress.json"  # finished blocks of a run under way; removed after config.json is written
)
RECORD_NAME = "slab_run.json"
VERIFY = "SLAB_KERNELS_VERIFY"  # environment variable; 0 = checksums are not compared
WEIGHT_DTYPES = {
    "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float32": torch.float32, "float64": torch.float64,
}  # fmt: skip
# Of config.json:
BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
MAX_LABELS = 1 << 20
FEW_BLOCKS = 64  # built in a second: by their names it turns out that some are not in the files


def config_dtype(config: dict) -> torch.dtype | None:
    """The dtype of weights that a config.json names; None if it names none.

    Raises: CheckpointError for a name that is none of WEIGHT_DTYPES.
    """
    name = config.get("dtype") or config.get("torch_dtype")
    if not name:
        return None
    dtype = WEIGHT_DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else None
    if dtype is None:
        raise CheckpointError(
            f"config.json names the dtype {reprlib.repr(name)}, and weights are one of "
            f"{', '.join(WEIGHT_DTYPES)}; write one of these there"
        )
    return dtype


class Checkpoint:
    """A folder of safetensors shards, every header read and checked on opening; tensors are read one by one.

    Of several sets of weights in a folder, transformers' choice is read: the file that config.json
    names as `transformers_weights`, else model.safetensors, else the shards that
    model.safetensors.index.json lists.

    Args:
        files: the shards that an engine has chosen instead; they must lie in `folder`.
        verify: compare what is read with its checksum (never if SLAB_KERNELS_VERIFY is 0).

    Raises: CheckpointError for a missing folder, config.json or shard, a corrupt shard, a tensor that is listed but
    absent, present but not listed, or present twice, and for PyTorch .bin files.
    """

    def __init__(
        self, folder: Path | str, files: Iterable[Path | str] | None = None, verify: bool = True
    ):
        self.folder = Path(folder)
        self.verifies = verify and os.environ.get(VERIFY) != "0"
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder} is not a folder; give the folder that holds config.json"
            )
        if not (self.folder / "config.json").is_file():
            unfinished = (self.folder / PROGRESS_NAME).is_file()
            raise CheckpointError(
                f"{self.folder} has no config.json"
                + (
                    "; its compression was interrupted: finish it with resume=True"
                    if unfinished
                    else ""
                )
            )
        self.config = read_json(self.folder / "config.json")
        self.entries: dict[str, TensorEntry] = {}
        shards, index, listed = self._chosen() if files is None else (self._given(files), "", None)
        self._stamps: dict[str, tuple[int, ...]] = {}
        for file in shards:
            if not os.path.isfile(self.folder / file):  # False for a name too long, too
                raise CheckpointError(
                    f"{self.folder} lacks the shard {file!r} that "
                    f"{index or 'the engine'} lists; copy it there"
                )
            self._stamps[file] = _stamp((self.folder / file).stat())
            for name, entry in read_header(self.folder / file).items():
                if name in self.entries:
                    raise CheckpointError(
                        f"tensor {name!r} lies in both {self.entries[name].file} and {file}"
                    )
                if listed is not None and listed.get(name) != file:
                    raise CheckpointError(
                        f"{file} holds tensor {name!r}, which {index} does not place there"
                    )
                self.entries[name] = entry
        for name in listed or ():
            if name not in self.entries:
                raise CheckpointError(
                    f"{index} places tensor {name!r} in {listed[name]}, which does not hold it"
                )

    def _chosen(self) -> tuple[list[str], str, dict[str, str] | None]:
        """The shards to read, the file that names them, and tensor -> shard if it is an index."""
        where, name = "config.json", self.config.get(WEIGHTS_KEY)
        if name is None:
            where = "the folder"
            name = WEIGHTS_NAME if (self.folder / WEIGHTS_NAME).is_file() else INDEX_NAME
            if name == INDEX_NAME and not (self.folder / INDEX_NAME).is_file():
                raise self._without_weights()
        elif not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{self.folder / 'config.json'} names the weights {reprlib.repr(name)}; expected a "
                "file in the same folder"
            )
        if name.endswith(".safetensors"):
            return [name], where, None
        listed = self._weight_map(self.folder / name)
        return sorted(set(listed.values())), name, listed

    def _given(self, files: Iterable[Path | str]) -> list[str]:
        """The names of the files that an engine will read.

        Raises: CheckpointError for one that lies in another folder.
        """
        paths = [Path(file) for file in files]
        for path in paths:
            if Path(os.path.abspath(path.parent)) != Path(os.path.abspath(self.folder)):
                raise CheckpointError(
                    f"the shard {str(path)!r} does not lie in {self.folder}; copy it there"
                )
        return [path.name for path in paths]

    def _weight_map(self, index: Path) -> dict[str, str]:
        listed = read_json(index).get("weight_map")
        if (
            not isinstance(listed, dict)
            or not listed
            or not all(isinstance(f, str) for f in listed.values())
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
        if files := sorted(p.name for p in self.folder.glob("*.safetensors")):
            return CheckpointError(
                f"{self.folder} holds {len(files)} safetensors files but no {WEIGHTS_NAME} "
                f"and no {INDEX_NAME}; rename {files[0]!r} if it is the whole model, or fetch the "
                "index"
            )
        if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt*")):
            return CheckpointError(
                f"{self.folder} holds PyTorch .bin weights, which can run code when read; convert them once with "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), which writes safetensors"
            )
        return CheckpointError(f"{self.folder} holds no {WEIGHTS_NAME} and no {INDEX_NAME}")

    def refuse_other_weights(self) -> None:
        """For engines that read every safetensors file, or that follow an index wherever there is
        one, or that read Mistral's `consolidated*.safetensors` wherever there are any.

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
        data = tensor_bytes(tensor)  # no copy: the tensor is contiguous and in host memory
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
        """SHA-256 of config.json, the tensor table, and the ends of every shard (1 MiB each): cheap, and no path in it."""
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


def check_counts(
    config: dict, names: Iterable[str], where: Path | str, few: int = FEW_BLOCKS
) -> None:
    """The blocks that config.json asks for against those that the files hold, before any is built,
    and the labels of a classifier, of which transformers makes a table.

    An encoder's number may stand there while the files hold the decoder alone, so only far more
    blocks are refused, and never up to `few`.

    Args:
        config: the content of config.json.
        names: of tensors or modules in the files.
        where: the folder, for messages.

    Raises: CheckpointError.
    """
    numbers: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if first is not None:
            numbers.setdefault(".".join(parts[:first]), set()).add(parts[first])
    stored = max(map(len, numbers.values()), default=0)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in BLOCK_COUNTS:
            asked = part.get(key)
            if type(asked) is int and asked > max(few, 2 * stored):
                raise CheckpointError(
                    f"{where}/config.json has {key}={reprlib.repr(asked)}, "
                    f"and the files hold {stored} blocks; it does not belong to them"
                )
        labels = part.get("num_labels")
        if type(labels) is int and labels > MAX_LABELS:
            raise CheckpointError(
                f"{where}/config.json has num_labels={reprlib.repr(labels)}, which no model has"
            )


def write_index(folder: Path, tables: Iterable[dict[str, TensorEntry]]) -> None:
    """model.safetensors.index.json from the tables of all shards."""
    entries = {name: entry for table in tables for name, entry in table.items()}
    total = sum(entry.nbytes for entry in entries.values())
    weight_map = {name: entries[name].file for name in sorted(entries)}
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
