"""Where a dense model comes from: a checkpoint folder (weights stay on disk) or a module in memory, seen alike."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .blocks import ArchitectureError
from .checkpoint import (
    WEIGHTS_KEY,
    Checkpoint,
    CheckpointError,
    config_dtype,
    read_json,
    write_json,
)
from .layout import MAX_FEATURES, FormatError
from .side_files import NOT_DOWNLOADED, copy_side_files, side_files
from .skeleton import blanked, build
from .stored_names import StoredNames
from .ties import holds, settle, tied_names, untie, untie_config

# Far above any model: building allocates rotary tables for real and a module object for each layer.
MAX_SIZES = {
    "hidden_size": MAX_FEATURES, "intermediate_size": MAX_FEATURES, "head_dim": MAX_FEATURES, "vocab_size": 1 << 31,
    "num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 24, "num_key_value_heads": 1 << 24,
    "max_position_embeddings": 1 << 31,
}  # fmt: skip
MAX_EMBEDDING = 1 << 40  # entries


def build_skeleton(config_folder: Path | None = None, config=None) -> nn.Module:
    """The causal language model of a config with parameters on meta and computed buffers (rotary tables) real.

    Raises: CheckpointError if the config cannot be read or no model can have its sizes, ArchitectureError if
    transformers has no causal model for it.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    where = "the given config" if config_folder is None else config_folder / "config.json"
    try:  # values that make no sense surface as anything from IndexError to an allocator's RuntimeError
        if config is None:
            content = read_json(where)
            if not isinstance(content.get("model_type"), str):
                raise CheckpointError(f"{where} names no model_type; it is no Hugging Face model config")
            if "auto_map" in content and content["model_type"] not in CONFIG_MAPPING:
                raise ArchitectureError(
                    f"{where} needs code of its own (auto_map), and slab_kernels runs no code from a "
                    "model folder; AutoModelForCausalLM.from_pretrained(folder, "
                    "trust_remote_code=True) opens it, dense or packed"
                )
            config = AutoConfig.from_pretrained(config_folder, trust_remote_code=False)
        _check_sizes(config, where)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ArchitectureError(f"transformers builds no causal language model for {config.model_type!r}")
        model = _build(config)
    except (CheckpointError, ArchitectureError, FormatError):
        raise
    except ImportError as error:
        raise ArchitectureError(
            f"transformers cannot build the model of {where} here: {_first_line(error)}"
        ) from error
    except Exception as error:
        raise CheckpointError(f"transformers cannot use {where}: {_first_line(error)}") from error
    return model.eval()


def _build(config) -> nn.Module:
    """The model without values; transformers would make its dtype the default of all threads."""
    from transformers import AutoModelForCausalLM

    dtype = config.get_text_config().dtype or config.dtype or torch.get_default_dtype()
    dtype = config_dtype({"dtype": str(dtype)})
    dtypes = [(part, part.dtype) for part in _configs(config)]
    for part, _ in dtypes:
        part.dtype = None
    try:
        make = AutoModelForCausalLM.from_config
        return build(lambda: make(config, trust_remote_code=False), dtype)
    finally:
        for part, own in dtypes:
            part.dtype = own


def _configs(config) -> list:
    """A config and those inside it (of a model of several modalities)."""
    from transformers import PretrainedConfig

    return [config, *(part for part in vars(config).values() if isinstance(part, PretrainedConfig))]


def _check_sizes(config, where: Path | str) -> None:
    """The sizes in a config and in those inside it. Raises: CheckpointError."""
    for part in _configs(config):
        for name, most in MAX_SIZES.items():
            sizes = _size(part, name)
            for size in sizes if isinstance(sizes, list | tuple) else [sizes]:  # some models list one for each layer
                if size is not None and (type(size) is not int or not 0 < size <= most):
                    raise CheckpointError(f"{where} has {name}={size!r}, expected an integer from 1 to {most}")
        width, vocabulary = _size(part, "hidden_size"), _size(part, "vocab_size")
        if type(width) is type(vocabulary) is int and width * vocabulary > MAX_EMBEDDING:
            raise CheckpointError(f"{where} asks for an embedding of {vocabulary}x{width} numbers, which no model has")


def _size(config, name: str):
    try:
        return getattr(config, name, None)
    except Exception:  # transformers' own type: layers that differ have no common size
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def text_config(model: nn.Module):
    """The config of the language model itself, inside that of a model of several modalities."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


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

    def __init__(self, folder: Path):
        self.checkpoint = Checkpoint(folder)
        self.config = {k: v for k, v in self.checkpoint.config.items() if k != WEIGHTS_KEY}
        quantised = self.config.get("quantization_config")
        if quantised:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise CheckpointError(
                f"{folder} is compressed already (quant_method {method!r}); start from the dense model"
            )
        self.model = build_skeleton(Path(folder))
        self.tokenizer_path = str(folder)
        self.name = Path(folder).resolve().name
        self._match()
        rows, self.blank = blanked(self.model), {}  # the model is what transformers makes of it
        self.blank = {name: row for name, row in rows.items() if self.get(name)[row].any()}

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
            if want.is_floating_point() and not (origin.dtype.is_floating_point and origin.dtype.itemsize >= 2):
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
        tensor = self.stored.get(name, self.checkpoint.get)
        if name in self.blank:
            tensor[self.blank[name]] = 0
        return tensor

    def fingerprint(self) -> str:
        return self.checkpoint.fingerprint()

    def left_out(self, out: Path | None) -> list[str]:
        """What a compressed copy in the folder `out` (None: in memory) will lack or change, a
        sentence for each kind."""
        skipped = [] if out is None else side_files(self.checkpoint.folder, out)[1]
        rows = [
            f"row {row} of {name} (padding) is zero in the copy, as transformers sets it on opening"
            for name, row in self.blank.items()
        ]
        tensors = f"tensors that {type(self.model).__name__} of config.json does not have"
        return rows + [
            f"{what} are left out: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")
            for what, names in ((tensors, self.ignored), ("files", skipped))
            if names
        ]

    def write_side_files(self, out: Path, tokenizer) -> None:
        copy_side_files(self.checkpoint.folder, out)


class ModuleSource:
    """A dense model in memory, seen as a source; `model` is its skeleton, the module itself is not changed."""

    def __init__(self, model: nn.Module):
        if not hasattr(model, "config") or not hasattr(model.config, "to_json_string"):
            raise ArchitectureError(
                f"{type(model).__name__} has no Hugging Face config; give a transformers causal language model"
            )
        if getattr(model.config, "quantization_config", None):
            raise ArchitectureError(
                f"{type(model).__name__} is quantised or compressed already; start from the dense model"
            )
        self.dense = model
        memo = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
        self.model = copy.deepcopy(model, memo).eval()  # parameters on meta, so nothing large is copied
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
        return getattr(self.dense.get_submodule(path), leaf).detach()

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in self.names:
            t = self.get(name).cpu().contiguous()
            digest.update(name.encode() + str(t.dtype).encode())
            digest.update(memoryview(t.reshape(-1).view(torch.uint8).numpy()))
        return digest.hexdigest()

    def left_out(self, out: Path | None) -> list[str]:
        return []

    def write_side_files(self, out: Path, tokenizer) -> None:
        if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(out)
        generation = getattr(self.dense, "generation_config", None)
        if generation is not None:
            write_json(out / "generation_config.json", json.loads(generation.to_json_string()))


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


def open_source(model_or_path) -> FolderSource | ModuleSource:
    """A source from a module, a folder, or the name of a model on the Hugging Face hub (downloaded to its cache).

    Raises: CheckpointError, ArchitectureError.
    """
    if isinstance(model_or_path, nn.Module):
        return ModuleSource(model_or_path)
    path = Path(model_or_path).expanduser()
    return FolderSource(path if path.is_dir() else hub_folder(str(model_or_path)))


def hub_folder(name: str) -> Path:
    """The local snapshot of a hub model, or the folder if `name` is one."""
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise CheckpointError(f"the model folder {name} does not exist")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, ignore_patterns=NOT_DOWNLOADED))
    except Exception as error:  # the hub client raises many types: offline, unknown name, no rights
        raise CheckpointError(
            f"{name} is no folder here and cannot be fetched from the Hugging Face hub: {_first_line(error)}"
        ) from error


def compute_dtype(config: dict, device: torch.device) -> torch.dtype:
    """fp32 on a CPU (half precision is slower there and less exact), elsewhere what the model is stored in.

    Raises: CheckpointError if the config names a dtype that weights do not have.
    """
    dtype = config_dtype(config)
    return dtype if device.type != "cpu" and dtype in (torch.float16, torch.bfloat16) else torch.float32


@contextmanager
def outside_filled(source, path: str, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
    """The skeleton with real weights everywhere outside the blocks; back on meta afterwards. The output head, which no
    block needs, stays on meta unless it is tied to the embedding."""
    model, tied = source.model, tied_names(source.model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_names = {f"{name}." for name, module in model.named_modules() if module is head}
    names = [n for n in source.names if not n.startswith(path + ".") and not n.startswith(tuple(head_names))]
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
                owner, leaf = model.get_submodule(alias.rpartition(".")[0]), alias.rpartition(".")[2]
                place(model, alias, getattr(owner, leaf).to("meta"))
