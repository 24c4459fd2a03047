"""The quantization plugin by which vLLM serves packed folders.

vLLM finds it through the entry point `vllm.general_plugins`.

A fused layer of vLLM (qkv_proj, gate_up_proj) holds several weights of the checkpoint, whose types
and ranks may differ. So a packed tensor's parameter holds nothing and only brings the loader:
slices of what comes go to a `LayerParts`, `process_weights_after_loading` checks them and makes the
backend's layout once, and those tensors are the layer's parameters from then on.

Every model of vLLM has a loader of its own. Before the first weights come, stand-ins go through it
(`Probe`): a model whose loader reorders, splits or leaves out a packed layer is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import is_pp_missing_parameter
from vllm.model_executor.utils import replace_parameter, set_weight_attrs

from ..backends import dense_copy, dispatch
from ..backends.base import wait_until_written
from ..errors import ArchitectureError, CheckpointError, ShapeError, UnsupportedError
from ..format import PackedLayout, Slice
from ..models.folder import Checkpoint
from ..models.packed import check_tensors_fit, packed_skeleton
from ..models.packed_config import QUANT_METHOD, parse_layouts, read_layouts
from ..models.tables import TableEntry, parse_tables
from .engine_options import prefill_word
from .probe import ADVICE, DENSE, Probe
from .sharding import LayerParts, column_parallel, row_parallel, vocabulary_parallel
from .vllm_vocabulary import SharedHeadMethod, TableMethod

PARTS = {"q": 0, "k": 1, "v": 2}  # what vLLM calls the parts of a qkv_proj; others have numbers
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
    tables: the embeddings of int8 rows, by vLLM's names. embeddings: their layers, once built.
    """

    def __init__(
        self, layouts: dict[str, PackedLayout], tables: dict[str, TableEntry] | None = None
    ):
        super().__init__()
        self.layouts = layouts
        self.stored = {name: name for name in layouts}
        self.tables = dict(tables or {})
        self.embeddings: dict[str, nn.Module] = {}
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
            return cls(parse_layouts(config, where), parse_tables(config, where))

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
        self.layouts = hf_to_vllm_mapper.apply_dict(self.layouts)
        self.stored = hf_to_vllm_mapper.apply_dict(self.stored)
        tables = hf_to_vllm_mapper.apply_dict(self.tables)
        for name, entry in tables.items():
            if entry.tied is not None:
                (tied,) = hf_to_vllm_mapper.apply_dict({entry.tied: None})
                tables[name] = replace(entry, tied=tied)
        self.tables = tables

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of the layer that vLLM calls `prefix`.

        Raises: UnsupportedError for a packed layer that vLLM runs as something else (experts), or
            that it fuses with dense ones.
        """
        _probe_before_loading()
        if not isinstance(layer, LinearBase):
            if method := self._of_vocabulary(layer, prefix):
                return method
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

    def _of_vocabulary(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of an embedding of int8 rows, or of a head that is packed or shared."""
        if prefix in self.tables:
            return TableMethod(prefix, self.embeddings)
        if not isinstance(layer, ParallelLMHead):
            return None
        shared = next((name for name, entry in self.tables.items() if entry.tied == prefix), None)
        if shared is not None:
            return SharedHeadMethod(shared, self.embeddings)
        return SlabHeadMethod(self, [prefix]) if prefix in self.layouts else None


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
        # Until the probe a model may ask the dense weight for its type or give it another loader.
        # It is no parameter, so no reload waits for it.
        shape = (sum(output_partition_sizes), input_size_per_partition)
        layer.weight = torch.empty(shape, dtype=params_dtype, device="meta")
        loader = self._loader(layer.slab_parts, DENSE)
        loaders = {"weight_loader": loader, "slab_loader": loader}
        set_weight_attrs(layer.weight, {"input_dim": 1, "output_dim": 0, **loaders})
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

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of this rank's rows; rows that only pad the vocabulary have 0."""
        y = super().apply(layer, x)
        y = nn.functional.pad(y, (0, layer.num_embeddings_per_partition - y.shape[-1]))
        return y if bias is None else y + bias


def _probe_before_loading() -> None:
    """Let the model that vLLM is building probe its loader before its weights come first."""
    building = get_current_vllm_config_or_none()
    if building is None or building.model_config is None:
        return
    from vllm.model_executor.model_loader import get_model_cls  # imports every loader

    model_class = get_model_cls(building.model_config)
    load = model_class.load_weights
    if hasattr(load, "slab_probes"):
        return

    @functools.wraps(load)
    def load_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "slab_probed"):
            self.slab_probed = True
            _probe(self, functools.partial(load, self))
        return load(self, *args, **kwargs)

    load_weights.slab_probes = True  # type: ignore[attr-defined]  # a mark on the function
    model_class.load_weights = load_weights


def _probe(model: nn.Module, load: Callable[[Iterable[tuple[str, torch.Tensor]]], Any]) -> None:
    """Send stand-ins for every packed layer through `load`, the model's.

    Raises: ArchitectureError if a weight would not arrive as it is stored.
    """
    configs = (getattr(module, "quant_config", None) for module in model.modules())
    config = next((config for config in configs if isinstance(config, SlabVllmConfig)), None)
    if config is None:
        return
    names = {stored: name for name, stored in config.stored.items()}
    layouts = {stored: config.layouts[name] for stored, name in names.items()}
    probe = Probe(layouts, f"vLLM's {type(model).__name__}")
    methods = [(module, getattr(module, "quant_method", None)) for module in model.modules()]
    layers: list[Any] = [m for m, method in methods if isinstance(method, SlabLinearMethod)]
    for layer in layers:
        weight = layer.weight
        del layer.weight
        stand_in = nn.Parameter(weight.to(torch.int32), requires_grad=False)  # the type that comes
        layer.register_parameter(DENSE, stand_in)
        set_weight_attrs(layer.weight, vars(weight))
        if weight.weight_loader is not weight.slab_loader:
            layer.weight.weight_loader = _landing(weight.weight_loader, weight.slab_loader)
        layer.quant_method.probe = probe
    try:
        load(probe.stand_ins())
    except ArchitectureError:
        raise
    except Exception as error:  # whatever a loader does with an unknown name or shape
        raise probe.refuse(probe.layer) from error
    for layer in layers:
        del layer.weight
        layer.quant_method.probe = None
        layer.slab_probed = True
    for stored in probe.missing():
        if not is_pp_missing_parameter(f"{names[stored]}.", model):
            raise probe.refuse(stored)


def _landing(foreign: Callable, then: Callable) -> Callable:
    """A loader that runs a model's own loader of a weight, and gives what that wrote to `then`."""

    def load(param: nn.Parameter, tensor: torch.Tensor, *part: Any) -> None:
        landed = nn.Parameter(torch.full(param.shape, -1, dtype=torch.int32), requires_grad=False)
        foreign(landed, tensor, *part)
        then(param, landed.data, *part)

    return load
