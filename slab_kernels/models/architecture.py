"""The model that a config.json describes, built on meta once its sizes and its code are checked."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..errors import ArchitectureError, CheckpointError, FormatError
from ..format.layout import MAX_FEATURES
from ..terminal import first_line
from .folder import config_dtype
from .shards import read_json
from .skeleton import build

# Far above any model: building allocates rotary tables for real and a module object for each layer.
MAX_SIZES = {
    "hidden_size": MAX_FEATURES, "intermediate_size": MAX_FEATURES, "head_dim": MAX_FEATURES, "vocab_size": 1 << 31,
    "num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 24, "num_key_value_heads": 1 << 24,
    "max_position_embeddings": 1 << 31,
}  # fmt: skip
MAX_EMBEDDING = 1 << 40  # entries


def build_skeleton(
    config_folder: Path | None = None, config=None, trust_remote_code: bool = False
) -> nn.Module:
    """The causal language model of a config with parameters on meta and computed buffers (rotary tables) real.

    trust_remote_code: run the Python code in the folder, where its config names some.

    Raises: CheckpointError if the config cannot be read or no model can have its sizes, ArchitectureError if
    transformers has no causal model for it, or it needs code of the folder's that may not run.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    where = "the given config" if config_folder is None else config_folder / "config.json"
    try:  # values that make no sense surface as anything from IndexError to an allocator's RuntimeError
        if config is None:
            described = read_json(where)
            if not isinstance(described.get("model_type"), str):
                raise CheckpointError(
                    f"{where} names no model_type; it is no Hugging Face model config"
                )
            if not trust_remote_code:
                _refuse_own_code(described, config_folder)
            config = AutoConfig.from_pretrained(config_folder, trust_remote_code=trust_remote_code)
        _check_sizes(config, where)
        own = trust_remote_code and "AutoModelForCausalLM" in (
            getattr(config, "auto_map", None) or {}
        )
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own:
            raise ArchitectureError(
                f"transformers builds no causal language model for {config.model_type!r}"
            )
        model = _build(config, trust_remote_code)
    except (CheckpointError, ArchitectureError, FormatError):
        raise
    except ImportError as error:
        raise ArchitectureError(
            f"transformers cannot build the model of {where} here: {first_line(error)}"
        ) from error
    except Exception as error:
        raise CheckpointError(f"transformers cannot use {where}: {first_line(error)}") from error
    return model.eval()


def _refuse_own_code(described: dict, folder: Path) -> None:
    """Raises: ArchitectureError for a type that transformers lacks and the folder's code defines."""
    from transformers import CONFIG_MAPPING

    if described.get("auto_map") and described["model_type"] not in CONFIG_MAPPING:
        raise ArchitectureError(
            f"{folder} holds a model of its own Python code (model_type {described['model_type']!r}), which was not run; "
            "read the .py files there, and if you trust them give trust_remote_code=True"
        )


def _build(config, trust_remote_code: bool) -> nn.Module:
    """Without its dtype, which transformers would make the default of the process meanwhile."""
    from transformers import AutoModelForCausalLM

    dtype = config.get_text_config().dtype or config.dtype or torch.get_default_dtype()
    dtype = config_dtype({"dtype": str(dtype)})
    dtypes = [(part, part.dtype) for part in _configs(config)]
    for part, _ in dtypes:
        part.dtype = None
    try:
        return build(
            lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code),
            dtype,
        )
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
            for size in (
                sizes if isinstance(sizes, list | tuple) else [sizes]
            ):  # some models list one for each layer
                if size is not None and (type(size) is not int or not 0 < size <= most):
                    raise CheckpointError(
                        f"{where} has {name}={size!r}, expected an integer from 1 to {most}"
                    )
        width, vocabulary = _size(part, "hidden_size"), _size(part, "vocab_size")
        if type(width) is type(vocabulary) is int and width * vocabulary > MAX_EMBEDDING:
            raise CheckpointError(
                f"{where} asks for an embedding of {vocabulary}x{width} numbers, which no model has"
            )


def _size(config, name: str):
    try:
        return getattr(config, name, None)
    except Exception:  # transformers' own type: layers that differ have no common size
        return None
