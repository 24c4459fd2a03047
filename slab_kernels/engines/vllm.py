"""The quantization plugin by which vLLM serves packed folders; vLLM finds it through the entry point `vllm.general_plugins`.

A fused layer of vLLM (qkv_proj, gate_up_proj) holds several weights of the checkpoint, whose types and ranks may differ. So a packed
tensor's parameter holds nothing and only brings the loader: slices of what comes go to a `Shards`, `process_weights_after_loading` checks them
and makes the backend's layout once, and those tensors are the layer's parameters from then on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import replace_parameter

from .. import dispatch
from ..checkpoint import Checkpoint
from ..format import PackedLayout, ShapeError
from ..packed_checkpoint import check_tensors_fit, packed_skeleton
from ..packed_config import QUANT_METHOD, parse_layouts, read_layouts
from .sharding import Shards, column_parallel, row_parallel

PARTS = {"q": 0, "k": 1, "v": 2}  # what vLLM calls the parts of a qkv_proj; others have numbers


@register_quantization_config(QUANT_METHOD)
class SlabVllmConfig(QuantizationConfig):
    """quantization_config of a packed folder: the layout of every packed module, by vLLM's name for it."""

    def __init__(self, layouts: dict[str, PackedLayout]):
        super().__init__()
        self.layouts = layouts

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
        return cls(parse_layouts(config, "this model"))

    def maybe_update_config(self, model_name: str, *args, **kwargs) -> None:
        """Every tensor of a local folder against the model of its config.json: with a quantization vLLM itself checks none.

        Raises: CheckpointError.
        """
        if Path(model_name).is_dir():
            checkpoint = Checkpoint(model_name)
            checkpoint.refuse_other_weights()
            check_tensors_fit(checkpoint, packed_skeleton(checkpoint, read_layouts(checkpoint)))
            checkpoint.verify()

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        self.layouts = hf_to_vllm_mapper.apply_dict(self.layouts)

    def get_quant_method(self, layer: nn.Module, prefix: str):
        """Raises: NotImplementedError for a packed layer that is no linear (experts, embeddings), or of which vLLM fuses a part only."""
        if not isinstance(layer, LinearBase):
            inside = [name for name in self.layouts if name == prefix or name.startswith(f"{prefix}.")]
            if inside:
                raise NotImplementedError(
                    f"{inside[0]} is packed, and vLLM runs it in {prefix} as {type(layer).__name__}: packed experts and embeddings are not supported "
                    "there; decompress the folder to a dense one, or compress again with skip"
                )
            return None
        if prefix in self.layouts:
            return SlabLinearMethod([prefix], [self.layouts[prefix]])
        head, _, last = prefix.rpartition(".")
        names = [f"{head}.{part}" if head else part for part in self.packed_modules_mapping.get(last, ())]
        packed = [name for name in names if name in self.layouts]
        if not packed:
            return UnquantizedLinearMethod()
        if packed != names:
            dense = next(name for name in names if name not in packed)
            raise NotImplementedError(
                f"vLLM runs {', '.join(names)} as one layer, of which {packed[0]} is packed and {dense} is not; compress all of them or none (skip)"
            )
        return SlabLinearMethod(names, [self.layouts[name] for name in names])


class SlabLinearMethod(LinearMethodBase):
    """One linear layer of vLLM from one or several packed weights."""

    def __init__(self, names: list[str], layouts: list[PackedLayout]):
        self.names, self.layouts = names, layouts

    def create_weights(self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra):
        # A replicated layer is whole on every rank, though it knows how many there are.
        rank, world = (0, 1) if isinstance(layer, ReplicatedLinear) else (layer.tp_rank, layer.tp_size)
        for name, layout in zip(self.names, self.layouts, strict=True):
            if layout.in_features != input_size:
                raise ShapeError(f"{name} has in_features={layout.in_features}, vLLM's layer {input_size}")
        if isinstance(layer, RowParallelLinear):
            if self.layouts[0].out_features != output_size:
                raise ShapeError(f"{self.names[0]} has out_features={self.layouts[0].out_features}, vLLM's layer {output_size}")
            slices = [row_parallel(self.layouts[0], rank, world)]
        else:
            replicas = getattr(layer, "num_kv_head_replicas", 1)
            slices = column_parallel(self.layouts, output_partition_sizes, rank, world, replicas)
        device = torch.empty(0).device  # vLLM builds models under its target device
        names = self.names if len(self.names) == len(slices) else self.names * len(slices)
        layer.slab_shards = Shards(names, slices, lambda tensor: tensor.to(device))
        for name in layer.slab_shards.tensor_names:
            # As many elements as tensors will come: a reload prepares the layer once that many have been copied into its parameters.
            coming = sum(name in piece.whole.tensors() for piece in slices) if len(self.names) == len(slices) else 1
            param = nn.Parameter(torch.zeros(coming, dtype=torch.uint8, device=device), requires_grad=False)
            param.weight_loader = self._loader(layer.slab_shards, name)
            layer.register_parameter(name, param)
        layer.slab_dtype = params_dtype

    def _loader(self, shards: Shards, name: str):
        def load(param, tensor: torch.Tensor, part: str | int | None = None) -> None:
            if isinstance(part, tuple):
                raise NotImplementedError(f"{self.names[0]}: vLLM loads several parts of this layer from one tensor, which packed layers do not support")
            if part is None and len(self.names) > 1:
                raise NotImplementedError(f"{self.names[0]}: vLLM gives {name} to a fused layer without saying to which part")
            shards.load(name, tensor, None if len(self.names) == 1 else PARTS.get(part, part))
            param.data[:1].copy_(torch.zeros(1, dtype=torch.uint8))

        return load

    def process_weights_after_loading(self, layer) -> None:
        """Check, choose the backend, prepare. After a reload the same storage is filled again, so captured graphs stay right."""
        shards: Shards = layer.slab_shards
        layer.slab_backend, state = dispatch.prepare_fused(shards.packed(), layer.slab_dtype)
        shards.tensors = [{} for _ in shards.tensors]
        leaves, structure = tree_flatten(state)
        before, same = tree_flatten(getattr(layer, "slab_state", None))
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                name = f"slab_prepared_{i}"
                # A reload of vLLM has taken them off the layer by now; the graphs have not forgotten them.
                layer.register_parameter(name, before[i] if same == structure else nn.Parameter(leaf, requires_grad=False))
                replace_parameter(layer, name, leaf, prefer_copy=True)
                leaves[i] = getattr(layer, name)
        layer.slab_state = tree_unflatten(leaves, structure)

    def apply(self, layer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return layer.slab_backend.linear_fused(x, layer.slab_state, bias)
