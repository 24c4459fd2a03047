"""Input embeddings of int8 rows and packed output heads in vLLM, split by the vocabulary.

vLLM pads a vocabulary and gives each rank a range of it (`shard_indices`). A rank keeps its own
rows of every tensor; rows that only pad are zero.

vLLM builds the embedding of many models without asking the quantization, or without telling it the
embedding's name. So embeddings and heads are built dense, and `swap_vocabulary` gives them the
methods of this library by their names in the whole model, before its weights come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import is_pp_missing_parameter
from vllm.model_executor.utils import set_weight_attrs

from ..errors import ArchitectureError, CheckpointError, UnsupportedError
from ..format import TABLE_NAMES, Int8Table, check_table, table_tensors
from ..models.packed_config import reading
from ..nn.int8_linear import int8_linear, register
from .probe import ADVICE, DENSE, Probe
from .sharding import vocabulary_rows
from .vllm_linear import SlabHeadMethod, stand_in_weight, weight_without_rows

if TYPE_CHECKING:
    from .vllm import SlabVllmConfig


def keeps_dense_copy(device: torch.device) -> bool:
    """Whether a head that shares int8 rows multiplies with a dense copy of them."""
    return device.type == "cuda"


class TableMethod(QuantizeMethodBase):
    """A VocabParallelEmbedding from int8 rows.

    stored: its name in the checkpoint. is_head: an output head on this rank computes from the same
    rows. It then keeps a dense copy of this rank's rows on a GPU, 16 bits per weight.
    """

    def __init__(self, stored: str, is_head: bool):
        self.stored, self.is_head = stored, is_head
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
        """Give the layer a parameter for codes and one for scales, whose loader keeps its rows."""
        register()
        rows = sum(output_partition_sizes)
        layer.slab_dtype, layer.slab_dense, layer.slab_arrived = params_dtype, None, set()
        for name, (dtype, shape) in table_tensors(rows, input_size).items():
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, {"weight_loader": self._loader(layer, name)})
        stand_in_weight(layer, (rows, input_size), params_dtype, self._loader(layer, DENSE))

    def _loader(self, layer: Any, name: str) -> Callable[..., None]:
        """What vLLM calls with the whole tensor `name` of the checkpoint.

        vLLM keeps it for reloads, for as long as the process lives, so it must not keep the layer.
        A reload calls it again with the parameter that it knows by the name `param`.
        """
        expected = table_tensors(layer.org_vocab_size, layer.embedding_dim).get(name)
        shard, arrived = layer.shard_indices, layer.slab_arrived

        def load(param: nn.Parameter, tensor: torch.Tensor) -> None:
            if self.probe is not None:
                self.probe.arrive(self.stored, name, tensor)
                return
            if (tensor.dtype, tuple(tensor.shape)) != expected:
                raise CheckpointError(
                    f"{self.stored}: {name} is {tensor.dtype} {list(tensor.shape)}, expected "
                    f"{expected and expected[0]} {expected and list(expected[1])}"
                )
            first, count = vocabulary_rows(shard)
            param.data[:count].copy_(tensor[first : first + count])
            param.data[count:].fill_(int(name == "scales"))
            arrived.add(name)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what has come, and make the dense copy or fill that of before again.

        Raises: CheckpointError.
        """
        if missing := set(TABLE_NAMES) - layer.slab_arrived:
            raise CheckpointError(
                f"vLLM's model did not load '{self.stored}.{min(missing)}'; {ADVICE}"
            )
        layer.slab_arrived.clear()
        tensors = {name: getattr(layer, name).data for name in TABLE_NAMES}
        with reading(self.stored):
            table = check_table(tensors, *layer.codes.shape)
        weight_without_rows(layer, layer.slab_dtype, layer.codes.device)
        if self.is_head and keeps_dense_copy(layer.codes.device):
            rows = Int8Table(table.codes, table.scales).dense().to(layer.slab_dtype)
            if layer.slab_dense is None:
                layer.slab_dense = rows
            else:  # captured graphs read it
                layer.slab_dense.copy_(rows)

    def embedding(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        """Rows [..., embedding_dim] of the ids; what a model multiplies them with is its own."""
        rows = nn.functional.embedding(ids, layer.codes).float()
        return (rows * layer.scales[ids].float().unsqueeze(-1)).to(layer.slab_dtype)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of this rank's rows; those of padding are 0 but for the bias."""
        if layer.slab_dense is not None:
            return nn.functional.linear(x, layer.slab_dense, bias)
        return int8_linear(x, layer.codes.data, layer.scales.data, bias)


class SharedHeadMethod(QuantizeMethodBase):
    """A ParallelLMHead that computes from the int8 rows of the embedding `table`."""

    def __init__(self, table: Any):
        self.table = table

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
        """Nothing of its own comes; a loader may bring it the embedding's dense stand-in."""
        method: TableMethod = self.table.quant_method

        def load(param: nn.Parameter, tensor: torch.Tensor) -> None:
            assert method.probe is not None, "a shared head has a weight only for the probe"
            method.probe.arrive(method.stored, DENSE, tensor)

        layer.slab_dtype = params_dtype
        stand_in_weight(layer, (sum(output_partition_sizes), input_size), params_dtype, load)

    def process_weights_after_loading(self, layer: Any) -> None:
        weight_without_rows(layer, layer.slab_dtype, self.table.codes.device)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of this rank's rows; those of padding are 0 but for the bias."""
        return self.table.quant_method.apply(self.table, x, bias)


def swap_vocabulary(model: nn.Module, config: SlabVllmConfig) -> None:
    """Give a model that is built its embeddings of int8 rows, and heads that are packed or shared.

    Raises: ArchitectureError for a layer that vLLM runs as something else, or whose weight it
        shares with another; UnsupportedError for a shared head on another rank than its embedding.
    """
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    engine = f"vLLM's {type(model).__name__}"

    def here(name: str) -> bool:
        return not is_pp_missing_parameter(f"{name}.", model)

    for name, entry in config.tables.items():
        head = modules.get(entry.tied) if entry.tied is not None else None
        shared = head is not None and head is not modules.get(name) and here(str(entry.tied))
        if not here(name):
            if shared:
                raise UnsupportedError(
                    f"the output head {entry.tied} shares the rows of {name}, which lies on "
                    f"another rank of the pipeline; {ADVICE}, or without pipeline parallelism"
                )
            continue
        table = modules.get(name)
        plain = isinstance(table, VocabParallelEmbedding) and not isinstance(table, ParallelLMHead)
        if table is None or not plain or not _is_dense(table):
            raise ArchitectureError(
                f"{engine} has no embedding {name} that takes int8 rows; compress again with "
                f"embeddings='dense', or {ADVICE}"
            )
        if shared and not (isinstance(head, VocabParallelEmbedding) and _is_dense(head)):
            raise ArchitectureError(
                f"{engine} runs {entry.tied} as {type(head).__name__}, which cannot share the int8 "
                f"rows of {name}; compress again with embeddings='dense', or {ADVICE}"
            )
        for other, module in modules.items():
            if module in (table, head) or other in config.layouts:
                continue
            if getattr(module, "_parameters", {}).get(DENSE) is table.weight:
                raise ArchitectureError(
                    f"{engine} shares the weight of {name} with {other}, which takes no int8 rows; "
                    f"compress again with embeddings='dense', or {ADVICE}"
                )
        _put(table, TableMethod(config.stored[name], entry.tied is not None and here(entry.tied)))
        if shared:
            _put(head, SharedHeadMethod(table))
    for name in config.layouts:
        head = modules.get(name)
        if isinstance(head, VocabParallelEmbedding) and here(name):
            if not _is_dense(head):
                raise ArchitectureError(
                    f"{engine} runs {name} by {type(head.quant_method).__name__}, which takes no "
                    f"packed weights; {ADVICE}"
                )
            _put(head, SlabHeadMethod(config, [name]))


def _is_dense(layer: Any) -> bool:
    return isinstance(layer.quant_method, UnquantizedEmbeddingMethod)


def _put(layer: Any, method: QuantizeMethodBase) -> None:
    """Let `method` run a layer that was built dense, and a reload know its new tensors.

    A loader of the model's own that the dense weight had stays on its stand-in, for the probe.
    """
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    dense = layer.weight
    del layer.weight
    layer.quant_method = method
    layer.use_fused_embedding = False  # vLLM's kernel reads the dense weight
    with dense.device:
        method.create_weights(
            layer,
            layer.embedding_dim,
            [layer.num_embeddings_per_partition],
            layer.embedding_dim,
            layer.num_embeddings_padded,
            params_dtype=dense.dtype,
        )
        record_metadata_for_reloading(layer)
    loader = getattr(dense, "weight_loader", None)
    if getattr(loader, "__func__", None) is not VocabParallelEmbedding.weight_loader:
        layer.weight.weight_loader = loader
