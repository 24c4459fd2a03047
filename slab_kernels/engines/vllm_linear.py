"""Linears of vLLM, and output heads, that run from packed weights.

A fused layer of vLLM (qkv_proj, gate_up_proj) holds several weights of the checkpoint, whose types
and ranks may differ. So a packed tensor's parameter holds nothing and only brings the loader:
slices of what comes go to a `LayerParts`, `process_weights_after_loading` checks them and makes the
backend's layout once, and those tensors are the layer's parameters from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.utils import replace_parameter, set_weight_attrs

from ..backends import dense_copy, dispatch
from ..backends.base import wait_until_written
from ..errors import ArchitectureError, ShapeError
from ..format import Slice
from .engine_options import prefill_word
from .probe import ADVICE, DENSE, Probe
from .sharding import LayerParts, column_parallel, row_parallel, vocabulary_parallel

if TYPE_CHECKING:
    from .vllm import SlabVllmConfig

PARTS = {"q": 0, "k": 1, "v": 2}  # what vLLM calls the parts of a qkv_proj; others have numbers


def stand_in_weight(
    layer: Any, shape: tuple[int, ...], dtype: torch.dtype, loader: Callable[..., None]
) -> None:
    """Give a layer the `weight` that it has until the probe.

    A model may ask it for its type or give it another loader. It is no parameter, so no reload
    waits for it.
    """
    layer.weight = torch.empty(shape, dtype=dtype, device="meta")
    loaders = {"weight_loader": loader, "slab_loader": loader}
    set_weight_attrs(layer.weight, {"input_dim": 1, "output_dim": 0, **loaders})


def weight_without_rows(layer: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Give an embedding or a head the `weight` that LoRA asks for its type and device."""
    layer.weight = torch.empty(0, layer.embedding_dim, dtype=dtype, device=device)


class SlabLinearMethod(LinearMethodBase):
    """One linear layer of vLLM from one or several packed weights."""

    def __init__(self, config: SlabVllmConfig, names: list[str]):
        self.config, self.names = config, names
        self.layouts = [config.layouts[name] for name in names]
        self.stored = [config.stored[name] for name in names]
        self.probe: Probe | None = None  # there while stand-ins come

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Give the layer a parameter for every packed tensor, whose loader keeps what comes.

        Raises: ShapeError if the packed weights do not fit the layer or its ranks.
        """
        for name, layout in zip(self.names, self.layouts, strict=True):
            if layout.in_features != input_size:
                raise ShapeError(
                    f"{name} has in_features={layout.in_features}, vLLM's layer {input_size}"
                )
        slices = self._slices(layer, output_partition_sizes, output_size)
        self.config.copies += dense_copy.size_of([piece.layout for piece in slices])
        device = torch.empty(0).device  # vLLM builds models under its target device
        names = self.names if len(self.names) == len(slices) else self.names * len(slices)
        layer.slab_parts = LayerParts(names, slices, lambda tensor: tensor.to(device))
        for name in layer.slab_parts.tensor_names:
            self._add_parameter(layer, name, device)
        layer.slab_dtype = params_dtype
        shape = (sum(output_partition_sizes), input_size_per_partition)
        stand_in_weight(layer, shape, params_dtype, self._loader(layer.slab_parts, DENSE))
        config = get_current_vllm_config_or_none()
        layer.slab_dummy = config is not None and config.load_config.load_format == "dummy"
        layer.slab_prefill = prefill_word(getattr(config, "additional_config", None))
        layer.slab_probed = False
        # vLLM asks for it to know where an adapter (LoRA) belongs.
        layer.qweight = torch.empty(0, device=device)

    def _slices(self, layer: Any, rows: list[int], output_size: int) -> list[Slice]:
        """What this rank keeps of every part. rows: its outputs of each. Raises: ShapeError."""
        # A replicated layer is whole on every rank, though it knows how many there are.
        rank, world = 0, 1
        if not isinstance(layer, ReplicatedLinear):
            rank, world = layer.tp_rank, layer.tp_size
        if not isinstance(layer, RowParallelLinear):
            replicas = getattr(layer, "num_kv_head_replicas", 1)
            return column_parallel(self.layouts, rows, rank, world, replicas)
        if self.layouts[0].out_features != output_size:
            raise ShapeError(
                f"{self.names[0]} has out_features={self.layouts[0].out_features}, vLLM's layer "
                f"{output_size}"
            )
        return [row_parallel(self.layouts[0], rank, world)]

    def _add_parameter(self, layer: Any, name: str, device: torch.device) -> None:
        """Register the parameter that brings the loader of the packed tensor `name`.

        It has as many elements as tensors will come: a reload prepares the layer once that many
        have been copied into its parameters.
        """
        slices = layer.slab_parts.slices
        tables = [piece.whole.tensors() for piece in slices]
        dtypes = [table[name][0] for table in tables if name in table]
        count = len(dtypes) if len(self.names) == len(slices) else 1
        empty = torch.zeros(count, dtype=dtypes[0], device=device)
        param = nn.Parameter(empty, requires_grad=False)
        set_weight_attrs(param, {"weight_loader": self._loader(layer.slab_parts, name)})
        layer.register_parameter(name, param)

    def _loader(self, parts: LayerParts, name: str) -> Callable[..., None]:
        """What vLLM calls with every tensor called `name`, and the part that it belongs to."""

        def load(
            param: nn.Parameter, tensor: torch.Tensor, part: str | int | tuple | None = None
        ) -> None:
            if isinstance(part, tuple):
                raise ArchitectureError(
                    f"vLLM loads several parts of {self.names[0]} from one tensor, "
                    f"which packed layers do not support; {ADVICE}"
                )
            if part is None and len(self.names) > 1:
                raise ArchitectureError(
                    f"vLLM gives {name} to a layer of {', '.join(self.names)} without saying to "
                    f"which part; {ADVICE}"
                )
            at = PARTS[part] if isinstance(part, str) else part
            if len(self.names) == 1:
                at = None
            if self.probe is not None:
                self.probe.arrive(self.stored[at or 0], name, tensor)
                return
            parts.load(name, tensor, at)
            param.data[:1].copy_(torch.zeros(1, dtype=param.dtype))

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what has come, choose the backend and make its layout.

        After a reload the same storage is filled again, so captured graphs stay right.

        Raises: ArchitectureError for weights that came past the probe, and what `LayerParts.packed`
            raises.
        """
        parts: LayerParts = layer.slab_parts
        if layer.slab_dummy:
            parts.fill()
        elif not layer.slab_probed:
            raise ArchitectureError(
                f"{self.names[0]}: vLLM does not load it by its model's load_weights; "
                "packed layers need load_format='auto'"
            )
        told, config = layer.slab_prefill, self.config
        if told == "auto" and config.room is None:  # once, so that a reload makes the same tensors
            config.room = dense_copy.fits(config.copies, layer.qweight.device)
        layer.slab_backend, state = dispatch.prepare_fused(
            parts.packed(), layer.slab_dtype, prefill=told, room=config.room
        )
        parts.tensors = [{} for _ in parts.tensors]
        leaves, structure = tree_flatten(state)
        before, same = tree_flatten(getattr(layer, "slab_state", None))
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                name = f"slab_prepared_{i}"
                # A reload of vLLM has taken the old tensors off the layer by now, while captured
                # graphs still use them.
                kept = before[i] if same == structure else nn.Parameter(leaf, requires_grad=False)
                layer.register_parameter(name, kept)
                replace_parameter(layer, name, leaf, prefer_copy=True)
                leaves[i] = getattr(layer, name)
        # Kernels may read a prepared weight before they wait for what is queued ahead of them, so
        # the copies must have ended. They begin only after the kernels queued before them.
        wait_until_written(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        layer.slab_state = tree_unflatten(leaves, structure)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return layer.slab_backend.linear_fused(x, layer.slab_state, bias)


class SlabHeadMethod(SlabLinearMethod):
    """A ParallelLMHead from a packed weight; each rank has the rows of its range of tokens."""

    def _slices(self, layer: Any, rows: list[int], output_size: int) -> list[Slice]:
        if self.layouts[0].out_features != layer.org_vocab_size:
            raise ShapeError(
                f"{self.names[0]} has out_features={self.layouts[0].out_features}, vLLM's "
                f"vocabulary {layer.org_vocab_size}"
            )
        return [vocabulary_parallel(self.layouts[0], layer.shard_indices)]

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        weight_without_rows(layer, layer.slab_dtype, layer.qweight.device)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of this rank's rows; those of padding are 0 but for the bias."""
        y = super().apply(layer, x)
        y = nn.functional.pad(y, (0, layer.num_embeddings_per_partition - y.shape[-1]))
        return y if bias is None else y + bias
