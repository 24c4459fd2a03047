"""Embeddings of int8 rows in a packed folder: their entry of config.json, and their modules.

`quantization_config["embeddings"]` names each such module, how its values are stored, and the
output head that computes from the same rows, or null.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..format import TABLE_NAMES, Int8Table, check_table
from ..nn import Int8Embedding, Int8Head
from .packed_config import TABLES_KEY, TABLES_VERSION, reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INT8 = "int8"
MOST_MULTIPLIER = 1e6  # models multiply with the root of the width


@dataclass(frozen=True)
class TableEntry:
    """An embedding of int8 rows.

    tied: the module of the output head that computes from the same rows, None if it has its own.
    multiplier: of the rows once they are looked up; None in most models.
    """

    tied: str | None = None
    multiplier: float | None = None

    def to_dict(self) -> dict[str, Any]:
        more = {} if self.multiplier is None else {"multiplier": self.multiplier}
        return {"values": INT8, "tied": self.tied, **more}


Tables = Mapping[str, TableEntry]  # by the name of the embedding


def parse_tables(entry: Mapping[str, Any], where: str) -> dict[str, TableEntry]:
    """Module name -> entry of every embedding of int8 rows; empty where there are none.

    entry: a quantization_config whose version is known to be readable. where: for messages.

    Raises: CheckpointError.
    """
    named = entry.get(TABLES_KEY)
    if named is None:
        return {}
    if not isinstance(named, dict) or not all(isinstance(one, dict) for one in named.values()):
        raise CheckpointError(
            f"{where}: quantization_config has {TABLES_KEY}={reprlib.repr(named)}, expected an "
            "object of objects"
        )
    version, modules = entry.get("format_version"), entry.get("modules")
    if named and (type(version) is not int or version < TABLES_VERSION):
        raise CheckpointError(
            f"{where}: quantization_config lists {TABLES_KEY} in format_version "
            f"{reprlib.repr(version)}, which has none; expected {TABLES_VERSION}"
        )
    tables: dict[str, TableEntry] = {}
    packed = set(modules) if isinstance(modules, dict) else set()
    for name, one in named.items():
        short, tied = reprlib.repr(name), one.get("tied")
        if one.get("values") != INT8:
            raise CheckpointError(
                f"{where}: the embedding {short} has values={reprlib.repr(one.get('values'))}, "
                f"this library reads {INT8!r}; update slab_kernels"
            )
        if not (tied is None or isinstance(tied, str)):
            raise CheckpointError(
                f"{where}: the embedding {short} has tied={reprlib.repr(tied)}, expected the name "
                "of a module or null"
            )
        multiplier = one.get("multiplier")
        if multiplier is not None and not _is_factor(multiplier):
            raise CheckpointError(
                f"{where}: the embedding {short} has multiplier={reprlib.repr(multiplier)}, "
                "expected a finite number other than 0"
            )
        twice = {name, tied} & packed or {tied} & set(named)
        if twice or tied in [other.tied for other in tables.values() if other.tied]:
            raise CheckpointError(
                f"{where}: quantization_config describes {reprlib.repr(tied or name)} twice"
            )
        tables[name] = TableEntry(tied, None if multiplier is None else float(multiplier))
    return tables


def _is_factor(number: Any) -> bool:
    return type(number) in (int, float) and 0 < abs(number) <= MOST_MULTIPLIER


def swap_tables(model: PreTrainedModel, tables: Tables) -> None:
    """Put empty modules on meta in place of the embeddings that `tables` names, and of tied heads.

    Raises: CheckpointError where they do not fit the model; nothing is changed then.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    kind = type(model).__name__
    for name, entry in tables.items():
        embedding = modules.get(name)
        fits = type(embedding) is nn.Embedding
        if entry.multiplier is not None:
            fits = isinstance(embedding, nn.Embedding) and not fits
        if not isinstance(embedding, nn.Embedding) or not fits:
            raise CheckpointError(
                f"config.json lists the embedding {name[:200]!r}, which {kind} has not as such an "
                "nn.Embedding; packed folders open as the whole model, by AutoModelForCausalLM or "
                "slab_kernels.load"
            )
        head = None if entry.tied is None else modules.get(entry.tied)
        if entry.tied is not None and type(head) is not nn.Linear:
            raise CheckpointError(
                f"config.json ties {entry.tied[:200]!r} to the embedding {name}, and {kind} has no "
                "such nn.Linear"
            )
        if isinstance(head, nn.Linear) and head.weight.shape != embedding.weight.shape:
            raise CheckpointError(
                f"config.json ties {entry.tied} {list(head.weight.shape)} to the embedding {name} "
                f"{list(embedding.weight.shape)}, and their sizes differ"
            )
    for name, entry in tables.items():
        embedding = modules[name]
        assert isinstance(embedding, nn.Embedding)
        sizes = embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx
        table = Int8Embedding(*sizes, "meta", embedding.weight.dtype, entry.multiplier)
        put_table(model, name, entry, table)


def put_table(model: nn.Module, name: str, entry: TableEntry, table: Int8Embedding) -> None:
    """Put `table` in place of the embedding `name`, and an Int8Head in place of a tied head."""
    table.train(model.training)
    model.set_submodule(name, table)
    if entry.tied is not None:
        bias = model.get_submodule(entry.tied).bias
        head = Int8Head(table, bias)  # type: ignore[arg-type]  # of an nn.Linear
        model.set_submodule(entry.tied, head.train(model.training))


def table_modules(model: nn.Module) -> dict[str, Int8Embedding]:
    """Name -> module of every embedding of int8 rows."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, Int8Embedding)}


def tables_of(model: nn.Module) -> dict[str, TableEntry]:
    """What config.json has to say of the embeddings of int8 rows in a model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    heads = {m.embedding: name for name, m in modules.items() if isinstance(m, Int8Head)}
    return {
        name: TableEntry(heads.get(module), module.multiplier)
        for name, module in table_modules(model).items()
    }


def table_names(model: nn.Module) -> set[str]:
    """The names of all tensors of tables."""
    return {f"{name}.{part}" for name in table_modules(model) for part in TABLE_NAMES}


def read_table(get: Callable[[str], Tensor], name: str, module: Int8Embedding) -> Int8Table:
    """The table of the module `name`, checked.

    get: reads one tensor by its name.

    Raises: a FormatError that is a CheckpointError too; its message starts with the module's name.
    """
    tensors = {part: get(f"{name}.{part}") for part in TABLE_NAMES}
    with reading(name):
        return check_table(tensors, module.num_embeddings, module.embedding_dim)


def set_row_types(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every embedding of int8 rows return rows of `dtype`."""
    for module in table_modules(model).values():
        module.dtype = dtype


def undo_tables(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Put dense embeddings and heads back in their place, one tensor where they were one.

    Returns: whether there is such a tensor.
    """
    shared = False
    for name, entry in tables_of(model).items():
        embedding = model.get_submodule(name)
        assert isinstance(embedding, Int8Embedding)
        dense = embedding.to_embedding(dtype)
        if entry.tied is not None:
            head = model.get_submodule(entry.tied)
            assert isinstance(head, Int8Head)
            V, D = dense.weight.shape
            linear = nn.Linear(D, V, head.bias is not None, device="meta", dtype=dtype)
            linear.weight = dense.weight
            if head.bias is not None:
                linear.bias = head.bias
            model.set_submodule(entry.tied, linear)
            shared = True
        model.set_submodule(name, dense)
    return shared
