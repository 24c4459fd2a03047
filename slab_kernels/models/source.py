"""Where a dense model comes from: a checkpoint folder or a module in memory, seen alike.

The weights of a folder stay on disk until one is asked for.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor, nn

from ..errors import ArchitectureError, CalibrationError, CheckpointError
from ..text.tokenizer import open_tokenizer
from .folder import hub_folder
from .hub import ON_MAIN, HubArguments
from .model_config import WEIGHTS_KEY, check_counts, config_dict, read_generation_config
from .quantised.checkpoint import Dequantised, dense_checkpoint, forget_format
from .rearranged import Rearranged
from .shards import Spec, tensor_bytes, write_json
from .side_files import copy_side_files, side_files
from .skeleton import blanked, folder_skeleton
from .stored_names import Form, Forms, StoredNames, stored_forms
from .ties import holds, settle, tied_names, untie, untie_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


class FolderSource(Rearranged):
    """A checkpoint folder, whose tensors are read from disk one by one.

    model: its skeleton; the weights are on meta. config: the content of its config.json, without
    quantization_config. name: for messages and records. origin: where on the hub it was found, for
    records (`HubArguments.origin`); empty for a folder. dequantised: the format in which its
    weights are stored, in words; empty for dense ones. ignored: stored tensors that the model does
    not have. Checkpoint names are matched to the model's exactly, with or without the base model's
    prefix, or as transformers renames them.

    Raises: CheckpointError for a tensor that is missing, has another shape, or is not floating
        point where the model has a weight; for a folder that is compressed already.
    """

    origin: Mapping[str, str | None] = MappingProxyType({})
    dequantised = ""

    def __init__(self, folder: Path, trust_remote_code: bool = False):
        self.checkpoint = dense_checkpoint(folder)
        self.trust_remote_code = trust_remote_code
        self.config = {k: v for k, v in self.checkpoint.config.items() if k != WEIGHTS_KEY}
        check_counts(self.config, self.checkpoint.entries, folder)
        self.model = folder_skeleton(Path(folder), trust_remote_code=trust_remote_code)
        if isinstance(self.checkpoint, Dequantised):
            self.dequantised = self.checkpoint.said
            forget_format(self.model.config)
        self.tokenizer_path = str(folder)
        self.name = Path(folder).resolve().name
        self._expected: dict[str, str] = {}
        self._match()
        # Stored name -> row that is read as zero: the model is what transformers makes of the file.
        self._blank: dict[str, int] = {}
        for name, row in blanked(self.model).items():
            if self.get(name)[row].any():
                self._blank[self.stored.origins[name].stored[0]] = row

    def _match(self) -> None:
        """Find every tensor of the model in the folder. Raises: CheckpointError."""
        expected = self.model.state_dict()
        self.stored = StoredNames(self.model, self.checkpoint.entries)
        self.ignored = self.stored.ignored
        if not settle(self.model, self.stored, self.checkpoint.get):
            untie_config(self.config)
        tied = tied_names(self.model)
        for name in expected.keys() - self.stored.origins.keys() - tied.keys():
            raise CheckpointError(
                f"{self.checkpoint.folder} lacks the tensor {name!r} that "
                f"{type(self.model).__name__} needs"
            )
        for name, origin in self.stored.origins.items():
            first, want = origin.stored[0], expected[name]
            if origin.shape != tuple(want.shape):
                raise CheckpointError(
                    f"tensor {first!r} has shape {list(origin.shape)}, "
                    f"the config asks for {list(want.shape)}"
                )
            usable = origin.dtype.is_floating_point and origin.dtype.itemsize >= 2
            if want.is_floating_point() and not usable:
                raise CheckpointError(
                    f"tensor {first!r} is {origin.dtype}; only fp16, bf16, fp32 and fp64 weights "
                    "can be compressed"
                )

    def _own_names(self) -> Iterable[str]:
        return self.stored.origins

    def _own_spec(self, name: str) -> Spec:
        origin = self.stored.origins[name]
        return origin.dtype, origin.shape

    def _own(self, name: str) -> Tensor:
        return self.stored.get(name, self._read)

    def _read(self, stored: str) -> Tensor:
        tensor = self.checkpoint.get(stored)
        if self._expected and self._expected.get(stored) != _sha256(tensor):
            raise CheckpointError(
                f"tensor {stored!r} of {self.checkpoint.folder} is not what it was when this run "
                "began; put the first model back, or compress this one into an empty folder"
            )
        if stored in self._blank:
            tensor[self._blank[stored]] = 0
        return tensor

    def stored_forms(self, names: list[str]) -> Forms:
        """What to write for tensors that stay as they are, but for the order of their channels."""
        same = [name for name in names if name not in self.moves]
        return self.stored.forms(same, self._read) | _moved_forms(self, names)

    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, by which a run that goes on knows the model again."""
        return self.checkpoint.fingerprint()

    def open_dense(self) -> PreTrainedModel:
        """The model itself, in memory; no tensor is missing, which transformers would invent."""
        from transformers import AutoModelForCausalLM

        self.checkpoint.verify()
        if isinstance(self.checkpoint, Dequantised):
            return self._open_dequantised(self.checkpoint)
        trust = self.trust_remote_code
        return AutoModelForCausalLM.from_pretrained(
            self.checkpoint.folder, dtype="auto", trust_remote_code=trust
        ).eval()

    def _open_dequantised(self, checkpoint: Dequantised) -> PreTrainedModel:
        """The same where transformers would keep weights quantised, or has no kernels for them."""
        origins = self.stored.origins.values()
        names = sorted({stored for origin in origins for stored in origin.stored})
        tensors = {name: checkpoint.get(name) for name in names}
        kind: Any = type(self.model)
        model = kind.from_pretrained(
            None, config=self.model.config, state_dict=tensors, dtype=checkpoint.dtype
        )
        model.config._name_or_path = str(checkpoint.folder)
        if (stored := read_generation_config(checkpoint.folder)) is not None:
            model.generation_config = stored
        return model.eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises: CheckpointError if the folder holds none that can be used."""
        return open_tokenizer(self.tokenizer_path, self.trust_remote_code)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every tensor that the model uses, by stored name; reads all of them once."""
        origins = self.stored.origins.values()
        names = sorted({stored for origin in origins for stored in origin.stored})
        return {name: _sha256(self.checkpoint.get(name)) for name in names}

    def expect(self, hashes: dict[str, str]) -> None:
        """From now on every tensor that is read must have its hash in `hashes`."""
        self._expected = hashes

    def left_out(self, out: Path | None) -> list[str]:
        """What a copy in the folder `out` (None: in memory) will lack or change, in sentences."""
        sentences = [
            f"row {row} of {name} (padding) is zero in the copy, as transformers sets it on opening"
            for name, row in self._blank.items()
        ]
        skipped = [] if out is None else side_files(self.checkpoint.folder, out)[1]
        tensors = f"tensors that {type(self.model).__name__} of config.json does not have"
        for what, names in ((tensors, self.ignored), ("files", skipped)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                sentences.append(f"{what} are left out: {', '.join(names[:3])}{more}")
        return sentences

    def write_side_files(self, out: Path, tokenizer: Any) -> None:
        copy_side_files(self.checkpoint.folder, out)


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


class ModuleSource(Rearranged):
    """A dense model in memory, with the same members as `FolderSource`; it is not changed.

    Hooks of the module are left out, those by which accelerate moves inputs between devices too:
    what is compressed is what a checkpoint would hold.

    Raises: ArchitectureError for a model without config, one that is compressed, or one whose
        weights are not in memory.
    """

    origin: Mapping[str, str | None] = MappingProxyType({})
    dequantised = ""

    def __init__(self, model: nn.Module, hub: HubArguments = ON_MAIN):
        from accelerate.hooks import remove_hook_from_module

        _check_dense(model)
        self.dense: PreTrainedModel = model
        self.hub = hub
        # What deepcopy takes instead of copying: parameters on meta, tables without hooks.
        memo: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False)
            for p in model.parameters()
        }
        tables = [getattr(m, name) for m in model.modules() for name in HOOKS]
        memo |= {id(table): OrderedDict() for table in tables}
        self.model = remove_hook_from_module(copy.deepcopy(model, memo), recurse=True).eval()
        self.config = config_dict(model)
        if not holds(model):
            untie(self.model)
        self.tokenizer_path = getattr(model.config, "_name_or_path", "") or ""
        self.name = Path(self.tokenizer_path).name or type(model).__name__
        self.ignored: list[str] = []

    def _own_names(self) -> Iterable[str]:
        tied = tied_names(self.model)
        return (name for name in self.dense.state_dict() if name not in tied)

    def _in_memory(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        return getattr(self.dense.get_submodule(path), leaf).detach()

    def _own_spec(self, name: str) -> Spec:
        t = self._in_memory(name)
        return t.dtype, tuple(t.shape)

    def _own(self, name: str) -> Tensor:
        t = self._in_memory(name)
        # Nothing may write into a tensor that was made under inference_mode.
        return t.clone() if t.is_inference() else t

    def stored_forms(self, names: list[str]) -> Forms:
        same = {name: self.get(name) for name in names if name not in self.moves}
        return stored_forms(self.dense, same) | _moved_forms(self, names)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self._own_names()):
            t = self._own(name)
            digest.update(name.encode() + str(t.dtype).encode())
            digest.update(tensor_bytes(t))
        return digest.hexdigest()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises: CalibrationError if the model knows no folder, else as `FolderSource`."""
        if not self.tokenizer_path:
            raise CalibrationError(
                "a model in memory needs tokenizer=..., or token ids [samples, window] as "
                "calibration="
            )
        trust = self.hub.trust_remote_code
        if (folder := Path(self.tokenizer_path)).exists():
            return open_tokenizer(self.hub.inside(folder, self.tokenizer_path), trust)
        try:
            return open_tokenizer(self.tokenizer_path, trust, **self.hub.places())
        except CheckpointError as error:
            if (message := self.hub.redacted(str(error))) == str(error):
                raise
            raise CheckpointError(message) from None

    def hashes(self) -> dict[str, str]:
        return {}  # `fingerprint` has seen every byte

    def expect(self, hashes: dict[str, str]) -> None:
        pass

    def left_out(self, out: Path | None) -> list[str]:
        return []

    def write_side_files(self, out: Path, tokenizer: Any) -> None:
        if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(out)
        generation = getattr(self.dense, "generation_config", None)
        if generation is not None:
            write_json(out / "generation_config.json", json.loads(generation.to_json_string()))


def _moved_forms(source: Source, names: list[str]) -> Forms:
    """What to write for those of `names` that are reordered: they get the model's names."""
    forms: Forms = {}
    for name in names:
        if name in source.moves:
            dtype, shape = source.spec(name)
            forms[name] = Form(dtype, shape, partial(source.get, name))
    return forms


Source = FolderSource | ModuleSource  # a dense model to be compressed


def _check_dense(model: nn.Module) -> None:
    """Refuse what is no dense transformers model in memory. Raises: ArchitectureError."""
    kind = type(model).__name__
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        raise ArchitectureError(
            f"{kind} has no Hugging Face config; give a transformers causal language model"
        )
    if getattr(config, "quantization_config", None):
        raise ArchitectureError(
            f"{kind} is quantised or compressed already; start from the dense model, or from the "
            "folder of one that another library quantised, which is dequantised as it is read"
        )
    adapter = next((n for n, m in model.named_modules() if _is_adapter(m)), None)
    if adapter is not None:
        raise ArchitectureError(
            f"{adapter or 'the model'} is {type(model.get_submodule(adapter)).__name__}, an "
            "adapter of PEFT around dense weights; merge it first "
            "(model = model.merge_and_unload()) and compress the result"
        )
    tensors = (*model.named_parameters(), *model.named_buffers())
    away = next((name for name, t in tensors if t.is_meta), None)
    if away is not None:
        raise ArchitectureError(
            f"the weight {away} of {kind} is not in memory (on a disk, on meta, or moved away by "
            "device_map); load the model without device_map, or give its folder, which is read "
            "block by block"
        )


def _is_adapter(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's, which need not be installed, by where its classes are."""
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)


@overload
def open_source(model_or_path: str | os.PathLike[str], hub: HubArguments = ...) -> FolderSource: ...
@overload
def open_source(
    model_or_path: nn.Module | str | os.PathLike[str], hub: HubArguments = ...
) -> Source: ...
def open_source(
    model_or_path: nn.Module | str | os.PathLike[str], hub: HubArguments = ON_MAIN
) -> Source:
    """A source from a module, a folder, or the name of a model on the Hugging Face hub.

    A model of the hub is downloaded to its cache.

    hub: where it is found there, and whether Python code in its folder may run. Of a module it says
    where its tokenizer is.

    Raises: CheckpointError, ArchitectureError, ArgumentError.
    """
    if isinstance(model_or_path, nn.Module):
        return ModuleSource(model_or_path, hub)
    folder = hub_folder(model_or_path, hub)
    if (folder / ADAPTER_CONFIG).is_file():
        raise ArchitectureError(
            f"{folder} holds an adapter of PEFT ({ADAPTER_CONFIG}), which would be left out; load "
            "it with PEFT, merge it into its base model (model.merge_and_unload()), save that and "
            "compress the copy"
        )
    source = FolderSource(folder, hub.trust_remote_code)
    source.origin = hub.origin(model_or_path, folder)
    if source.origin:  # the folder of a snapshot is called by its commit
        source.name = str(model_or_path).rpartition("/")[2]
    return source
