"""Where a dense model comes from: a checkpoint folder (weights stay on disk) or a module in memory, seen alike."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ArchitectureError, CalibrationError, CheckpointError
from ..paths import expanded
from ..terminal import first_line
from ..text.source import open_tokenizer
from .architecture import build_skeleton
from .folder import WEIGHTS_KEY, Checkpoint, check_counts, config_dtype
from .shards import tensor_bytes, write_json
from .side_files import NOT_DOWNLOADED, copy_side_files, side_files
from .skeleton import blanked
from .stored_names import Forms, StoredNames, stored_forms
from .ties import holds, settle, tied_names, untie, untie_config

ADAPTER_CONFIG = "adapter_config.json"
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` where the model has the parameter or buffer `name`; parameters stop requiring gradients."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


class FolderSource:
    """A checkpoint folder: `model` is a skeleton on meta, `get` reads one tensor by its name in the model.

    Checkpoint names are matched to the model's exactly, with or without the base model's prefix, or as transformers
    renames them. Tensors that the model does not have are ignored and listed in `ignored`.

    Raises: CheckpointError for a tensor that is missing, has another shape, or is not floating point where the model
    has a weight; for a folder that is compressed already.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False):
        self.checkpoint = Checkpoint(folder)
        self.trust_remote_code = trust_remote_code
        self.config = {k: v for k, v in self.checkpoint.config.items() if k != WEIGHTS_KEY}
        quantised = self.config.get("quantization_config")
        if quantised:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise CheckpointError(
                f"{folder} is compressed already (quant_method {method!r}); start from the dense model"
            )
        check_counts(self.config, self.checkpoint.entries, folder)
        self.model = build_skeleton(Path(folder), trust_remote_code=trust_remote_code)
        self.tokenizer_path = str(folder)
        self.name = Path(folder).resolve().name
        self._expected: dict[str, str] = {}
        self._match()
        self._blank: dict[
            str, int
        ] = {}  # stored name -> row; the model is what transformers makes of it
        for name, row in blanked(self.model).items():
            if self.get(name)[row].any():
                self._blank[self.stored.origins[name].stored[0]] = row

    def _match(self) -> None:
        expected = self.model.state_dict()
        self.stored = StoredNames(self.model, self.checkpoint.entries)
        self.ignored = self.stored.ignored
        if not settle(self.model, self.stored, self.checkpoint.get):
            untie_config(self.config)
        tied = tied_names(self.model)
        for name in expected.keys() - self.stored.origins.keys() - tied.keys():
            raise CheckpointError(
                f"{self.checkpoint.folder} lacks the tensor {name!r} that {type(self.model).__name__} needs"
            )
        for name, origin in self.stored.origins.items():
            first, want = origin.stored[0], expected[name]
            if origin.shape != tuple(want.shape):
                raise CheckpointError(
                    f"tensor {first!r} has shape {list(origin.shape)}, the config asks for {list(want.shape)}"
                )
            if want.is_floating_point() and not (
                origin.dtype.is_floating_point and origin.dtype.itemsize >= 2
            ):
                raise CheckpointError(
                    f"tensor {first!r} is {origin.dtype}; only fp16, bf16, fp32 and fp64 weights can be compressed"
                )

    @property
    def names(self) -> list[str]:
        return sorted(self.stored.origins)

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        origin = self.stored.origins[name]
        return origin.dtype, origin.shape

    def get(self, name: str) -> Tensor:
        """Raises: CheckpointError if it is no longer what it was when the run began (`expect`)."""
        return self.stored.get(name, self._read)

    def _read(self, stored: str) -> Tensor:
        tensor = self.checkpoint.get(stored)
        if (
            self._expected
            and self._expected.get(stored) != hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        ):
            raise CheckpointError(
                f"tensor {stored!r} of {self.checkpoint.folder} is not what it was when this run began; "
                "put the first model back, or compress this one into an empty folder"
            )
        if stored in self._blank:
            tensor[self._blank[stored]] = 0
        return tensor

    def stored_forms(self, names: list[str]) -> Forms:
        """What to write for tensors that stay as they are."""
        return self.stored.forms(names, self._read)

    def fingerprint(self) -> str:
        return self.checkpoint.fingerprint()

    def open_dense(self) -> nn.Module:
        """The model itself, in memory; no tensor is missing, which transformers would invent."""
        from transformers import AutoModelForCausalLM

        self.checkpoint.verify()
        trust = self.trust_remote_code
        return AutoModelForCausalLM.from_pretrained(
            self.checkpoint.folder, dtype="auto", trust_remote_code=trust
        ).eval()

    def tokenizer(self):
        """Raises: CheckpointError if the folder holds none that can be used."""
        return open_tokenizer(self.tokenizer_path, self.trust_remote_code)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every tensor that the model uses, by stored name; reads all of them once."""
        names = sorted(
            {stored for origin in self.stored.origins.values() for stored in origin.stored}
        )
        return {
            name: hashlib.sha256(tensor_bytes(self.checkpoint.get(name))).hexdigest()
            for name in names
        }

    def expect(self, hashes: dict[str, str]) -> None:
        """From now on every tensor that is read must have its hash in `hashes`."""
        self._expected = hashes

    def left_out(self, out: Path | None) -> list[str]:
        """What a compressed copy in the folder `out` (None: in memory) will lack or change, a
        sentence for each kind."""
        skipped = [] if out is None else side_files(self.checkpoint.folder, out)[1]
        rows = [
            f"row {row} of {name} (padding) is zero in the copy, as transformers sets it on opening"
            for name, row in self._blank.items()
        ]
        tensors = f"tensors that {type(self.model).__name__} of config.json does not have"
        return rows + [
            f"{what} are left out: {', '.join(names[:3])}"
            + (f" and {len(names) - 3} more" if names[3:] else "")
            for what, names in ((tensors, self.ignored), ("files", skipped))
            if names
        ]

    def write_side_files(self, out: Path, tokenizer) -> None:
        copy_side_files(self.checkpoint.folder, out)


class ModuleSource:
    """A dense model in memory, seen as a source; `model` is its skeleton, and it is not changed.

    Hooks of the module are left out, those by which accelerate moves inputs between devices too.

    Raises: ArchitectureError for a model without config, one that is compressed, or one whose
        weights are not in memory.
    """

    def __init__(self, model: nn.Module, trust_remote_code: bool = False):
        from accelerate.hooks import remove_hook_from_module

        if not hasattr(model, "config") or not hasattr(model.config, "to_json_string"):
            raise ArchitectureError(
                f"{type(model).__name__} has no Hugging Face config; give a transformers causal language model"
            )
        if getattr(model.config, "quantization_config", None):
            raise ArchitectureError(
                f"{type(model).__name__} is quantised or compressed already; start from the dense model"
            )
        adapter = next((n for n, m in model.named_modules() if _is_adapter(m)), None)
        if adapter is not None:
            raise ArchitectureError(
                f"{adapter or 'the model'} is {type(model.get_submodule(adapter)).__name__}, an adapter of PEFT around dense weights; "
                "merge it first (model = model.merge_and_unload()) and compress the result"
            )
        away = next(
            (n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta), None
        )
        if away is not None:
            raise ArchitectureError(
                f"the weight {away} of {type(model).__name__} is not in memory (on a disk, on meta, or moved away by "
                "device_map); load the model without device_map, or give its folder, which is read block by block"
            )
        self.dense = model
        self.trust_remote_code = trust_remote_code
        memo = {
            id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False)
            for p in model.parameters()
        }
        hooks = [getattr(m, name) for m in model.modules() for name in HOOKS]
        memo |= {
            id(table): OrderedDict() for table in hooks
        }  # what is compressed is what a checkpoint would hold
        self.model = remove_hook_from_module(copy.deepcopy(model, memo), recurse=True).eval()
        self.config = config_dict(model)
        if not holds(model):
            untie(self.model)
        self.tokenizer_path = getattr(model.config, "_name_or_path", "") or ""
        self.name = Path(self.tokenizer_path).name or type(model).__name__
        self.ignored: list[str] = []

    @property
    def names(self) -> list[str]:
        tied = tied_names(self.model)
        return sorted(n for n in self.dense.state_dict() if n not in tied)

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        t = self.get(name)
        return t.dtype, tuple(t.shape)

    def get(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        t = getattr(self.dense.get_submodule(path), leaf).detach()
        return (
            t.clone() if t.is_inference() else t
        )  # made under inference_mode, where nothing may write to it

    def stored_forms(self, names: list[str]) -> Forms:
        """What to write for tensors that stay as they are: what transformers would save."""
        return stored_forms(self.dense, {name: self.get(name) for name in names})

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in self.names:
            t = self.get(name).cpu().contiguous()
            digest.update(name.encode() + str(t.dtype).encode())
            digest.update(memoryview(t.reshape(-1).view(torch.uint8).numpy()))
        return digest.hexdigest()

    def tokenizer(self):
        """Raises: CalibrationError if the model knows no folder, CheckpointError if that has none."""
        if not self.tokenizer_path:
            raise CalibrationError(
                "a model in memory needs tokenizer=..., or token ids [samples, window] as calibration="
            )
        return open_tokenizer(self.tokenizer_path, self.trust_remote_code)

    def hashes(self) -> dict[str, str]:
        return {}  # `fingerprint` has seen every byte

    def expect(self, hashes: dict[str, str]) -> None:
        pass

    def left_out(self, out: Path | None) -> list[str]:
        return []

    def write_side_files(self, out: Path, tokenizer) -> None:
        if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(out)
        generation = getattr(self.dense, "generation_config", None)
        if generation is not None:
            write_json(out / "generation_config.json", json.loads(generation.to_json_string()))


def _is_adapter(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's, which need not be installed, by where its classes are."""
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)


def config_dict(model: nn.Module) -> dict:
    """config.json of a model in memory, without quantization_config; tied as its weights are."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    config.pop(WEIGHTS_KEY, None)
    config["architectures"] = [type(model).__name__]
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    config["dtype"] = str(next(dtypes, torch.float32)).removeprefix("torch.")
    if not holds(model):
        untie_config(config)
    return config


def open_source(model_or_path, trust_remote_code: bool = False) -> FolderSource | ModuleSource:
    """A source from a module, a folder, or the name of a model on the Hugging Face hub (downloaded to its cache).

    trust_remote_code: run the Python code in the folder, where its config names some.

    Raises: CheckpointError, ArchitectureError.
    """
    if isinstance(model_or_path, nn.Module):
        return ModuleSource(model_or_path, trust_remote_code)
    folder = hub_folder(model_or_path)
    if (folder / ADAPTER_CONFIG).is_file():
        raise ArchitectureError(
            f"{folder} holds an adapter of PEFT ({ADAPTER_CONFIG}), which would be left out; load it with PEFT, merge it into its "
            "base model (model.merge_and_unload()), save that and compress the copy"
        )
    return FolderSource(folder, trust_remote_code)


def hub_folder(name: str | os.PathLike) -> Path:
    """The local snapshot of a hub model, or the folder if `name` is one.

    Raises: ValueError for what is no name or path, CheckpointError if nothing is found.
    """
    path, name = expanded(name), str(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise CheckpointError(f"the model folder {name} does not exist")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, ignore_patterns=NOT_DOWNLOADED))
    except Exception as error:  # the hub client raises many types: offline, unknown name, no rights
        raise CheckpointError(
            f"{name} is no folder here and cannot be fetched from the Hugging Face hub: {first_line(error)}"
        ) from error


def compute_dtype(config: dict, device: torch.device) -> torch.dtype:
    """fp32 on a CPU (half precision is slower there and less exact), else the model's own.

    Raises: CheckpointError if the config names a dtype that weights do not have.
    """
    dtype = config_dtype(config)
    return (
        dtype
        if device.type != "cpu" and dtype in (torch.float16, torch.bfloat16)
        else torch.float32
    )


@contextmanager
def outside_filled(
    source, path: str, device: torch.device, dtype: torch.dtype
) -> Iterator[nn.Module]:
    """The skeleton with real weights everywhere outside the blocks; back on meta afterwards. The output head, which no
    block needs, stays on meta unless it is tied to the embedding."""
    model, tied = source.model, tied_names(source.model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_names = {f"{name}." for name, module in model.named_modules() if module is head}
    names = [
        n
        for n in source.names
        if not n.startswith(path + ".") and not n.startswith(tuple(head_names))
    ]
    for name in names:
        t = source.get(name)
        t = t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype)
        for alias in (name, *(n for n, other in tied.items() if other == name)):
            place(model, alias, t)
    for prefix, module in model.named_modules():
        if f"{prefix}.".startswith(path + "."):
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
    try:
        yield model
    finally:
        for name in names:
            for alias in (name, *(n for n, other in tied.items() if other == name)):
                owner, leaf = (
                    model.get_submodule(alias.rpartition(".")[0]),
                    alias.rpartition(".")[2],
                )
                place(model, alias, getattr(owner, leaf).to("meta"))
