"""What config.json and generation_config.json of a model say, and what no model can have."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError
from ..format.layout import MAX_FEATURES
from ..terminal import first_line
from .shards import read_json
from .ties import holds, untie_config

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

WEIGHTS_KEY = "transformers_weights"  # names the file of weights, instead of the usual ones
WEIGHT_DTYPES = {
    "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float32": torch.float32, "float64": torch.float64,
}  # fmt: skip
BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
# So many blocks are built in a second, and then their names show which ones the files lack.
FEW_BLOCKS = 64
MAX_LABELS = 1 << 20
# Far above any model: building one allocates rotary tables and a module object for each layer.
MAX_SIZES = {
    "hidden_size": MAX_FEATURES, "intermediate_size": MAX_FEATURES, "head_dim": MAX_FEATURES,
    "vocab_size": 1 << 31, "max_position_embeddings": 1 << 31, "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 24, "num_key_value_heads": 1 << 24,
}  # fmt: skip
MAX_EMBEDDING = 1 << 40  # entries
# Settings of a generation config that are numbers, beside ids of tokens, and those that are true or
# false. What is in neither list, now or in a later transformers, is left to transformers.
NUMBERS = frozenset(
    "assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight "
    "assistant_lookbehind diversity_penalty encoder_no_repeat_ngram_size "
    "encoder_repetition_penalty epsilon_cutoff eta_cutoff guidance_scale length_penalty "
    "max_cache_len max_length max_matching_ngram_size max_new_tokens max_time min_length "
    "min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens num_beam_groups num_beams "
    "num_return_sequences penalty_alpha prefill_chunk_size prompt_lookup_num_tokens "
    "repetition_penalty target_lookbehind temperature top_h top_k top_p typical_p".split()
)
SWITCHES = frozenset(
    "disable_compile do_sample is_assistant low_memory output_attentions output_hidden_states "
    "output_logits output_scores remove_invalid_values renormalize_logits "
    "return_dict_in_generate token_healing use_cache use_model_defaults".split()
)


def config_dtype(config: dict[str, Any]) -> torch.dtype | None:
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


def compute_dtype(config: dict[str, Any], device: torch.device) -> torch.dtype:
    """fp32 on a CPU (half precision is slower there and less exact), else the model's own.

    Raises: CheckpointError if the config names a dtype that weights do not have.
    """
    dtype = config_dtype(config)
    if device.type != "cpu" and dtype in (torch.float16, torch.bfloat16):
        return dtype
    return torch.float32


def config_dict(model: PreTrainedModel) -> dict[str, Any]:
    """config.json of a model in memory, without quantization_config; tied as its weights are."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    for key in ("quantization_config", "_name_or_path", WEIGHTS_KEY):
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    config["dtype"] = str(next(dtypes, torch.float32)).removeprefix("torch.")
    if not holds(model):
        untie_config(config)
    return config


def check_counts(
    config: dict[str, Any], names: Iterable[str], where: Path | str, few: int = FEW_BLOCKS
) -> None:
    """Refuse a config.json that asks for far more blocks than the files hold, before any is built.

    An encoder's number may stand there while the files hold the decoder alone, so only far more
    blocks are refused, and never up to `few`. Refused too are labels beyond MAX_LABELS, of which
    transformers makes a table.

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


def config_parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A config and those inside it (of a model of several modalities)."""
    from transformers import PreTrainedConfig

    return [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]


def check_sizes(config: PreTrainedConfig, where: Path | str) -> None:
    """Refuse sizes that no model has, in a config and in those inside it.

    where: the file, for messages.

    Raises: CheckpointError.
    """
    for part in config_parts(config):
        for name, most in MAX_SIZES.items():
            for size in _sizes(part, name):
                if size is not None and (type(size) is not int or not 0 < size <= most):
                    raise CheckpointError(
                        f"{where} has {name}={size!r}, expected an integer from 1 to {most}"
                    )
        for width in _sizes(part, "hidden_size"):
            for vocabulary in _sizes(part, "vocab_size"):
                both = type(width) is type(vocabulary) is int
                if both and width * vocabulary > MAX_EMBEDDING:
                    raise CheckpointError(
                        f"{where} asks for an embedding of {vocabulary}x{width} numbers, "
                        "which no model has"
                    )


def _sizes(config: PreTrainedConfig, name: str) -> Iterator[Any]:
    """The values of one size: some models list one for each layer."""
    try:
        size = getattr(config, name, None)
    except Exception:  # transformers raises a type of its own where the layers' sizes differ
        size = None
    yield from size if isinstance(size, list | tuple) else [size]


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """What generation_config.json of a folder says, None if it has none.

    Raises: CheckpointError if it cannot be used.
    """
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    content = read_json(path)
    kinds: tuple[type, ...]
    for name, value in content.items():
        if name in SWITCHES:
            kinds, expected = (bool,), "true or false"
        elif name in NUMBERS or name.endswith("_token_id"):
            kinds, expected = (int, float), "a number"
        else:
            continue
        numbers = value if name.endswith("token_id") and isinstance(value, list) else [value]
        if not all(n is None or (isinstance(n, kinds) and abs(n) < 1 << 63) for n in numbers):
            raise CheckpointError(
                f"{path} has {name}={reprlib.repr(value)}, expected {expected}; "
                "correct or delete the file"
            )
    try:
        return GenerationConfig.from_dict(content)
    except Exception as error:  # values of wrong types surface as anything
        raise CheckpointError(
            f"transformers cannot use {path}: {first_line(error)}; correct or delete the file"
        ) from error
