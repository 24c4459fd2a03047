"""A folder of quantised weights, which shows the dense ones that they stand for."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..folder import Checkpoint
from ..model_config import config_dtype
from ..packed_config import QUANT_METHOD, refuse_lost_entry
from ..shards import TensorEntry
from . import awq, compressed_tensors, fp8, gptq, mxfp4
from .stored import Found, Weight

# quant_method of a config.json -> what finds the weights of such a folder.
FORMATS: dict[str, Callable[[Mapping[str, Any], Checkpoint], Found]] = {
    "gptq": gptq.find,
    "awq": awq.find,
    "fp8": fp8.find,
    "compressed-tensors": compressed_tensors.find,
    "mxfp4": mxfp4.find,
}
CONFIG_KEYS = ("quantization_config", "compression_config")  # the second is of older folders
INSIDE = "text_config"  # where a model of several modalities may describe its language model


class Dequantised(Checkpoint):
    """A checkpoint in one of FORMATS as a folder of dense tensors, made when they are asked for.

    method: the key of FORMATS. said: the format in words. config: the content of config.json
    without the entry of the format. entries: the dense tensors by the names that they would have;
    their bytes are those of the tensors in which they are stored. quantised: names of the weights
    that are made. A weight is computed in fp32 and rounded once, to the dtype that config.json
    names, bf16 where it names none (`dtype`).

    Raises: CheckpointError for a folder whose tensors do not fit its format, or each other.
    """

    def __init__(self, stored: Checkpoint, method: str, entry: Mapping[str, Any]):
        vars(self).update(vars(stored))  # It is open, and its headers are checked.
        self._stored, self.method = stored, method
        self.config = without_format(stored.config)
        found = FORMATS[method](entry, stored)
        if not found.weights:
            raise CheckpointError(
                f"{self.folder}/config.json says that weights are stored as {method}, and the "
                "files hold none; copy or download the checkpoint again"
            )
        inside = self.config.get(INSIDE)
        named = config_dtype(self.config)
        if named is None and isinstance(inside, dict):
            named = config_dtype(inside)
        self.dtype = named or torch.bfloat16
        self._weights, self.said = found.weights, found.said
        used = {name for weight in found.weights.values() for name in weight.parts}
        rest = [name for name in stored.entries if name not in used | found.unused]
        if both := sorted(found.weights.keys() & rest):
            raise CheckpointError(f"{self.folder} holds {both[0]!r} both dense and quantised")
        self.entries = {name: stored.entries[name] for name in rest}
        self.entries |= {name: self._entry(weight) for name, weight in found.weights.items()}

    @property
    def quantised(self) -> set[str]:
        return set(self._weights)

    def _entry(self, weight: Weight) -> TensorEntry:
        parts = [self._stored.entries[name] for name in weight.parts]
        nbytes = sum(part.nbytes for part in parts)
        return TensorEntry(parts[0].file, self.dtype, weight.shape, nbytes, parts[0].start)

    def get(self, name: str) -> Tensor:
        """One dense tensor. Raises: CheckpointError as `Checkpoint.get`, or for numbers that no
        weight has."""
        weight = self._weights.get(name)
        if weight is None:
            return self._stored.get(name)
        dense = weight.make(*(self._stored.get(part) for part in weight.parts))
        assert tuple(dense.shape) == weight.shape, name
        return dense.to(self.dtype).contiguous()

    def verify(self) -> None:
        """See `Checkpoint.verify`."""
        self._stored.verify()

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`."""
        return self._stored.fingerprint()


def without_format(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json without what it says of the format of weights."""
    dense = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    if isinstance(inside := dense.get(INSIDE), dict):
        dense[INSIDE] = {key: value for key, value in inside.items() if key not in CONFIG_KEYS}
    return dense


def forget_format(config: Any) -> None:
    """Do the same to a config of transformers."""
    for part in (config, getattr(config, INSIDE, None)):
        for key in CONFIG_KEYS:
            if key in getattr(part, "__dict__", {}):
                delattr(part, key)


def dense_checkpoint(folder: Path) -> Checkpoint:
    """A folder whose weights are dense, or read as if they were.

    Raises: CheckpointError as `open_checkpoint`, and for a folder that this library has compressed.
    """
    found = open_checkpoint(folder)
    if _method(_entry(found.config)) == QUANT_METHOD:
        raise CheckpointError(
            f"{folder} is compressed already (quant_method {QUANT_METHOD!r}); start from the dense "
            "model"
        )
    return found


def open_checkpoint(folder: Path) -> Checkpoint:
    """A folder with whatever weights: packed by this library, dense, or read as if they were.

    Raises: CheckpointError for a folder that is no checkpoint, or holds weights in a format that is
        not in FORMATS, by its name, or packed layers that config.json does not mention.
    """
    stored = Checkpoint(folder)
    entry = _entry(stored.config)
    method = _method(entry)
    if entry is None:
        refuse_lost_entry(stored)
    if entry is None or method == QUANT_METHOD:
        return stored
    if not isinstance(entry, dict) or not isinstance(method, str) or method not in FORMATS:
        raise CheckpointError(
            f"{folder} holds weights in the format {_named(entry)}, which is not read here (read "
            f"are {', '.join(FORMATS)}); open it with transformers and the packages of that "
            "format, call dequantize() on the model, save it with save_pretrained, and take that "
            "folder"
        )
    return Dequantised(stored, method, entry)


def _entry(config: Mapping[str, Any]) -> Any:
    """What config.json says of the format of its weights; None if they are dense."""
    for part in (config, config.get(INSIDE)):
        if isinstance(part, dict):
            for key in CONFIG_KEYS:
                if part.get(key):
                    return part[key]
    return None


def _method(entry: Any) -> Any:
    return entry.get("quant_method") if isinstance(entry, dict) else entry


def _named(entry: Any) -> str:
    """A format that is not read, as its users call it."""
    if not isinstance(entry, dict):
        return reprlib.repr(entry)
    method = entry.get("quant_method")
    for bits in (4, 8):
        if entry.get(f"load_in_{bits}bit") is True:
            kind = entry.get("bnb_4bit_quant_type", "fp4") if bits == 4 else "int8"
            return f"bitsandbytes ({kind if isinstance(kind, str) else reprlib.repr(kind)})"
    return method if isinstance(method, str) and method.isprintable() else reprlib.repr(method)
