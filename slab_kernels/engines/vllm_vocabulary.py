"""Input embeddings of int8 rows and packed output heads in vLLM, split by the vocabulary.

vLLM pads a vocabulary and gives each rank a range of it (`shard_indices`). A rank keeps its own
rows of every tensor; rows that only pad are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from ..errors import CheckpointError, UnsupportedError
from ..format import TABLE_NAMES, Int8Table, check_table, table_tensors
from ..models.packed_config import reading
from ..nn.int8_linear import int8_linear, register
from .sharding import vocabulary_rows


class TableMethod(QuantizeMethodBase):
    """A VocabParallelEmbedding from int8 rows.

    name: in the checkpoint. layers: where the layer is put under that name, for a shared head.
    """

    def __init__(self, name: str, layers: dict[str, nn.Module]):
        self.name, self.layers = name, layers

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
        rows = sum(output_partition_sizes)
        layer.slab_dtype, layer.slab_arrived = params_dtype, set()
        for name, (dtype, shape) in table_tensors(rows, input_size).items():
            filled = torch.full(shape, int(name == "scales"), dtype=dtype)
            parameter = nn.Parameter(filled, requires_grad=False)
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, {"weight_loader": self._loader(layer, name, input_size)})
        config = get_current_vllm_config_or_none()
        layer.slab_dummy = config is not None and config.load_config.load_format == "dummy"
        self.layers[self.name] = layer

    def _loader(self, layer: Any, name: str, columns: int) -> Callable[..., None]:
        """What vLLM calls with the whole tensor `name` of the checkpoint."""

        def load(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
            dtype, shape = table_tensors(layer.org_vocab_size, columns)[name]
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                raise CheckpointError(
                    f"{self.name}: {name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} "
                    f"{list(shape)}"
                )
            first, count = vocabulary_rows(layer.shard_indices)
            parameter.data[:count].copy_(tensor[first : first + count])
            layer.slab_arrived.add(name)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what has come. Raises: CheckpointError."""
        if layer.slab_dummy:
            layer.scales.data.fill_(1)
            layer.codes.data.zero_()
            return
        if missing := set(TABLE_NAMES) - layer.slab_arrived:
            raise CheckpointError(
                f"vLLM's model did not load '{self.name}.{min(missing)}'; serve the dense folder "
                "that `slab-kernels decompress` writes"
            )
        tensors = {name: getattr(layer, name).data for name in TABLE_NAMES}
        with reading(self.name):
            check_table(tensors, *layer.codes.shape)

    def embedding(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        """Rows [..., embedding_dim] of the ids; what a model multiplies them with is its own."""
        rows = nn.functional.embedding(ids, layer.codes).float()
        return (rows * layer.scales[ids].float().unsqueeze(-1)).to(layer.slab_dtype)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of this rank's rows, for a model that uses its embedding as the head."""
        register()
        return int8_linear(x, layer.codes.data, layer.scales.data, bias)


class SharedHeadMethod(QuantizeMethodBase):
    """A ParallelLMHead that computes from the int8 rows of the embedding `name`.

    On a GPU it keeps a dense copy of this rank's rows, 16 bits per weight.
    """

    def __init__(self, name: str, layers: dict[str, nn.Module]):
        self.name, self.layers = name, layers

    def create_weights(self, layer: Any, *sizes: Any, **extra: Any) -> None:
        """Nothing of its own comes. Raises: UnsupportedError without the embedding on this rank."""
        if self.name not in self.layers:
            raise UnsupportedError(
                f"the output head shares the rows of {self.name}, which lies on another rank of "
                "the pipeline; serve the dense folder that `slab-kernels decompress` writes, or "
                "without pipeline parallelism"
            )
        register()
        layer.slab_dense = None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the dense copy, or fill that of before again, so captured graphs stay right."""
        table: Any = self.layers[self.name]
        if not table.codes.is_cuda:
            return
        rows = Int8Table(table.codes.data, table.scales.data).dense().to(table.slab_dtype)
        if layer.slab_dense is None:
            layer.slab_dense = rows
        else:
            layer.slab_dense.copy_(rows)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of this rank's rows, those of padding 0."""
        if layer.slab_dense is not None:
            return nn.functional.linear(x, layer.slab_dense, bias)
        table: Any = self.layers[self.name]
        return int8_linear(x, table.codes.data, table.scales.data, bias)
