"""`Int8Embedding`, an embedding of int8 rows, and `Int8Head`, the output head on the same rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ShapeError, WeightlessError
from ..format import Int8Table, cast, check_table, int8_table, table_tensors
from .call import autocast
from .int8_linear import int8_linear, register
from .prepared import Snapshot

NO_WEIGHT = (
    "this layer holds int8 codes and scales and no weight, so it cannot be resized, trained or "
    "tied again; take model.dequantize(), or the folder that `slab-kernels decompress` writes"
)


class _Weightless(nn.Module):
    """A layer that says in words why it has no `weight`."""

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise WeightlessError(NO_WEIGHT)
        return super().__getattr__(name)


class Int8Embedding(_Weightless):
    """Rows of a table of int8 codes, each row with one scale, in place of an nn.Embedding.

    ids [...] of an integer dtype, rows [..., embedding_dim] of `dtype`: code * scale, rounded once.
    `codes` int8 [num_embeddings, embedding_dim] and `scales` bf16 [num_embeddings] are buffers that
    keep their types; casting the module (`.half()`, `.to(dtype)`) changes the dtype of what it
    returns. It is frozen.

    dtype: of the rows that are returned; default: torch's. padding_idx: as nn.Embedding has it; the
        row is what the table holds. multiplier: what rows are multiplied with once they are of
        `dtype`, as some models do (Gemma's scaled embeddings); a head on the same table is not.
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        multiplier: float | None = None,
    ):
        """A table of zeros."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.multiplier = padding_idx, multiplier
        self.dtype = dtype or torch.get_default_dtype()
        for name, (kind, shape) in table_tensors(num_embeddings, embedding_dim).items():
            filled = torch.full(shape, int(name == "scales"), dtype=kind, device=device)
            self.register_buffer(name, filled)

    @classmethod
    def from_table(
        cls,
        table: Int8Table,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        multiplier: float | None = None,
    ) -> Int8Embedding:
        """A module around an existing table (not copied)."""
        V, D = table.codes.shape
        module = cls(V, D, padding_idx, "meta", dtype, multiplier)
        module._buffers["codes"], module._buffers["scales"] = table
        return module

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> Int8Embedding:
        """The int8 rows of a dense embedding. Raises: RangeError."""
        weight = embedding.weight
        return cls.from_table(int8_table(weight), embedding.padding_idx, weight.dtype)

    def table(self) -> Int8Table:
        """The table that this module holds (not copied). Raises: a FormatError if it is none."""
        tensors = {"codes": self.codes, "scales": self.scales}
        return check_table(tensors, self.num_embeddings, self.embedding_dim)

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The dense nn.Embedding with the same rows, frozen."""
        weight = cast(self.table().dense(), dtype or self.dtype, "the embedding")
        sizes = self.num_embeddings, self.embedding_dim, self.padding_idx
        if self.multiplier is None:
            return nn.Embedding(*sizes, _weight=weight, _freeze=True)
        return ScaledEmbedding(self.multiplier, *sizes, _weight=weight, _freeze=True)

    def forward(self, ids: Tensor) -> Tensor:
        codes = nn.functional.embedding(ids, self.codes)
        scales = self.scales[ids].unsqueeze(-1)
        kind = torch.promote_types(torch.float32, self.dtype)
        rows = (codes.to(kind) * scales.to(kind)).to(self.dtype)
        return rows if self.multiplier is None else scaled(rows, self.multiplier)

    def _apply(self, fn, recurse: bool = True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        for name in ("codes", "scales"):
            tensor: Tensor = getattr(self, name)
            # The function may cast floats, so it sees an empty tensor of another type.
            probe = fn(tensor.new_empty(0, dtype=torch.uint8))
            if probe.device != tensor.device:
                like = torch.empty_like(tensor, device=probe.device) if tensor.is_meta else tensor
                self._buffers[name] = like.to(probe.device)
            elif probe.is_shared() and tensor.device.type == "cpu":
                tensor.share_memory_()  # the function is that of share_memory()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, (dtype, _) in table_tensors(0, 0).items():
            found = state_dict.get(prefix + name)
            if isinstance(found, Tensor) and found.dtype != dtype:  # torch would cast
                args[-1].append(f"{prefix}{name} is {found.dtype}, a table has {dtype} there")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        padding += "" if self.multiplier is None else f", multiplier={self.multiplier:g}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, dtype={self.dtype}, "
            f"{8 + 16 / self.embedding_dim:.2f} bits per weight"
        )


class ScaledEmbedding(nn.Embedding):
    """An nn.Embedding whose rows are multiplied with a number after they are looked up."""

    def __init__(self, multiplier: float, *sizes: Any, **settings: Any):
        super().__init__(*sizes, **settings)
        self.multiplier = multiplier

    def forward(self, input: Tensor) -> Tensor:
        return scaled(super().forward(input), self.multiplier)


def scaled(rows: Tensor, multiplier: float) -> Tensor:
    """rows * multiplier, both of the rows' dtype, as models compute it."""
    return rows * torch.tensor(multiplier, dtype=rows.dtype, device=rows.device)


class Int8Head(_Weightless):
    """y = (x codes^T) * scales + bias from the table of an `Int8Embedding`, which owns it.

    x [..., embedding_dim] of a floating dtype, y [..., num_embeddings] of the same. Nothing is
    stored twice: the state dict has the bias alone. On a CPU the codes are widened piece by piece
    while they are multiplied. On a GPU a dense copy of the table in x's type, 16 or 32 bits per
    weight of its memory, is made by `prepare` or the first call and kept.
    """

    bias: nn.Parameter | None

    def __init__(self, embedding: Int8Embedding, bias: nn.Parameter | None = None):
        super().__init__()
        register()
        self._shared = (embedding,)  # within a tuple it is no part of this module
        self.bias = bias
        self._copies: dict[torch.dtype, tuple[Snapshot, Tensor]] = {}

    @property
    def embedding(self) -> Int8Embedding:
        """The module that owns the table."""
        return self._shared[0]

    @property
    def in_features(self) -> int:
        return self.embedding.embedding_dim

    @property
    def out_features(self) -> int:
        return self.embedding.num_embeddings

    def prepare(self, dtype: torch.dtype = torch.float32) -> Int8Head:
        """Make the dense copy for activations of `dtype` now, if the table lies on a GPU."""
        if self.embedding.codes.is_cuda:
            self._dense(dtype)
        return self

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """The dense nn.Linear with the same function, frozen."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype
        )
        weight = cast(self.embedding.table().dense(), dtype, "the weight")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        table = self.embedding
        if not x.shape or x.shape[-1] != table.embedding_dim:
            raise ShapeError(
                f"x has shape {list(x.shape)}, but this head takes in_features="
                f"{table.embedding_dim} last"
            )
        x = autocast(x)
        if x.device != table.codes.device:  # parts of a model may lie on several GPUs
            x = x.to(table.codes.device)
        bias = None if self.bias is None else self.bias.to(device=x.device, dtype=x.dtype)
        if x.is_cuda and not torch.compiler.is_compiling():
            return nn.functional.linear(x, self._dense(x.dtype), bias)
        return int8_linear(x, table.codes, table.scales, bias)

    def _dense(self, dtype: torch.dtype) -> Tensor:
        """The table in `dtype`, kept until somebody changes the codes or scales."""
        tensors = (self.embedding.codes, self.embedding.scales)
        if kept := self._copies.get(dtype):
            source, copy = kept
            if source.is_still(tensors):
                return copy
        source = Snapshot.of(tensors)
        copy = Int8Table(*tensors).dense().to(dtype)
        self._copies = {dtype: (source, copy)}  # one type at a time: copies are large
        return copy

    def _apply(self, fn, recurse: bool = True):
        self._copies = {}
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return {**self.__dict__, "_copies": {}}

    def extra_repr(self) -> str:
        copies = sum(copy.nbytes for _, copy in self._copies.values())
        kept = f", dense copy of {copies / 1e6:.1f} MB" if copies else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, int8 rows of the embedding{kept}"
        )
