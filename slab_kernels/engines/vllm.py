"""The quantization plugin by which vLLM serves packed folders: what vLLM asks about a folder.

vLLM finds it through the entry point `vllm.general_plugins`. The layers themselves are in
`vllm_linear` and `vllm_vocabulary`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from ..errors import CheckpointError, UnsupportedError
from ..format import PackedLayout
from ..models.folder import Checkpoint
from ..models.packed import check_tensors_fit, packed_skeleton
from ..models.packed_config import QUANT_METHOD, parse_layouts, read_layouts
from ..models.tables import TableEntry, parse_tables
from .probe import DENSE, refuse_experts
from .vllm_linear import SlabLinearMethod
from .vllm_probe import probe_before_loading

FUSED = {  # what a fused layer holds, where the model itself does not list it
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Around what vLLM asks while pydantic builds its settings.

    Of a ValueError pydantic would print all settings, of a CheckpointError it prints the sentence.
    """
    try:
        yield
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _restore_config_class(model_type: str | None) -> None:
    """Let transformers read configs of this type by its own class again.

    vLLM puts classes of its own in the place of some, whenever it reads a config, and transformers
    has no models for those.
    """
    if own := getattr(transformers, CONFIG_MAPPING_NAMES.get(model_type, ""), None):
        AutoConfig.register(model_type, own, exist_ok=True)


@register_quantization_config(QUANT_METHOD)
class SlabVllmConfig(QuantizationConfig):
    """quantization_config of a packed folder.

    layouts: of every packed module, by vLLM's name for it. stored: vLLM's name -> the checkpoint's.
    copies: the bytes of dense copies of all layers that this rank has made. room: whether there is
    memory for them, where "auto" asks; None before the first layer is prepared.
    tables: the embeddings of int8 rows, by vLLM's names.
    """

    def __init__(
        self, layouts: dict[str, PackedLayout], tables: dict[str, TableEntry] | None = None
    ):
        super().__init__()
        self.layouts = layouts
        self.tables = dict(tables or {})
        self.stored = {name: name for name in (*layouts, *self.tables)}
        self.copies = 0
        self.room: bool | None = None

    def __repr__(self) -> str:
        return f"SlabVllmConfig({len(self.layouts)} packed modules)"

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SlabVllmConfig:
        with _one_sentence():
            where = "this model"
            layouts = parse_layouts(config, where)
            refuse_experts(layouts)
            return cls(layouts, parse_tables(config, where))

    def maybe_update_config(self, model_name: str, *args: Any, **kwargs: Any) -> None:
        """Compare every tensor of a local folder with the model of its config.json.

        vLLM itself does not compare the tensors of a quantized folder.

        Raises: CheckpointError.
        """
        if Path(model_name).is_dir():
            with _one_sentence():
                checkpoint = Checkpoint(model_name)
                checkpoint.refuse_other_weights()
                _restore_config_class(checkpoint.config.get("model_type"))
                check_tensors_fit(checkpoint, packed_skeleton(checkpoint, read_layouts(checkpoint)))
                checkpoint.verify()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        def renamed(name: str) -> str:
            # The rules are for tensors: "lm_head." or ".embed_tokens.weight".
            (found,) = hf_to_vllm_mapper.apply_list([f"{name}.{DENSE}"]) or [name]
            return found.removesuffix(f".{DENSE}")

        self.layouts = {renamed(name): layout for name, layout in self.layouts.items()}
        self.stored = {renamed(name): stored for name, stored in self.stored.items()}
        self.tables = {
            renamed(name): replace(entry, tied=entry.tied and renamed(entry.tied))
            for name, entry in self.tables.items()
        }

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of the layer that vLLM calls `prefix`.

        Raises: UnsupportedError for a packed layer that vLLM runs as something else (experts), or
            that it fuses with dense ones.
        """
        probe_before_loading()
        if isinstance(layer, VocabParallelEmbedding):
            return None  # swap_vocabulary gives it its method once the model is built
        if not isinstance(layer, LinearBase):
            inside = [
                name for name in self.layouts if name == prefix or name.startswith(f"{prefix}.")
            ]
            if inside:
                raise UnsupportedError(
                    f"{inside[0]} is packed, and vLLM runs it in {prefix} as "
                    f"{type(layer).__name__}: packed experts are not supported "
                    "there; decompress the folder to a dense one, or compress again with skip"
                )
            return None
        if prefix in self.layouts:
            return SlabLinearMethod(self, [prefix])
        head, _, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last) or FUSED.get(last, ())
        names = [f"{head}.{part}" if head else part for part in parts]
        packed = [name for name in names if name in self.layouts]
        if not packed:
            return UnquantizedLinearMethod()
        if packed != names:
            dense = next(name for name in names if name not in packed)
            raise UnsupportedError(
                f"vLLM runs {', '.join(names)} as one layer, of which {packed[0]} is packed and "
                f"{dense} is not; compress all of them or none (skip)"
            )
        return SlabLinearMethod(self, names)
