"""Token ids as people hold them: tensors, arrays, lists, or batches with masks of padding.

Padding is left out as soon as it is read, so that nothing behind this file can meet it. A row is
what its mask leaves of it. Run alone it is what a model makes of it under that mask with the
positions that transformers' `generate` gives it, which count real tokens only; and it is that also
where a layer knows no mask, as an expert or a state-space layer does.
"""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CalibrationError, CheckpointError
from ..terminal import first_line
from .windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IDS, MASK = "input_ids", "attention_mask"  # as tokenizers call them
DEEPEST = 3  # lists in lists: batches of rows of ids


def text_config(model: PreTrainedModel) -> Any:
    """The config of the language model itself, inside that of a model of several modalities."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def holds_ids(source: Any) -> bool:
    """Whether `source` is meant as ids, even if they turn out to be unusable."""
    if isinstance(source, Mapping):
        return IDS in source
    if isinstance(source, list | tuple):
        return bool(source) and holds_ids(source[0])
    return isinstance(source, Tensor | Integral) or (
        hasattr(source, "__array__") and not isinstance(source, str)
    )


def token_ids(source: Any, name: str = "calibration") -> Windows:
    """`source`, for which `holds_ids` is true, as windows of ids.

    Taken are integer tensors and arrays [samples, window], lists of rows of ids, which may differ
    in length, mappings with "input_ids" (a tokenizer's BatchEncoding), and lists of all these. Of a
    mapping the positions go that its "attention_mask" marks with 0. name: for messages.

    Raises: CalibrationError for ids of another shape or type, negative ones, an empty row, and a
        mask of another shape, of other numbers than 0 and 1, or without a 1.
    """
    if isinstance(source, list | tuple) and isinstance(source[0], Integral):
        raise _misshapen(name, _tensor(source, name))
    if not isinstance(source, Mapping | list | tuple) and _tensor(source, name).dim() != 2:
        raise _misshapen(name, _tensor(source, name))
    rows = tuple(_rows(source, name))
    if not rows:
        raise CalibrationError(f"the {name} token ids are empty; give at least one row of ids")
    for number, row in enumerate(rows, 1):
        if not len(row):
            raise CalibrationError(f"row {number} of the {name} token ids is empty; leave it out")
        if int(row.min()) < 0:
            raise CalibrationError(
                f"{name} token ids go down to {int(row.min())}, and none may be negative"
            )
    return Windows(rows)


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest text in tokens that a model takes; None if its config does not say."""
    return getattr(text_config(model), "max_position_embeddings", None)


def check_fits(
    ids: Tensor,
    model: PreTrainedModel,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Refuse ids [..., tokens] for which a model has no embedding or no position.

    name: whose tokens they are, for messages. tokenizer: what made them, if known.

    Raises: CalibrationError, or CheckpointError for an id that the tokenizer of the model's own
        folder has made.
    """
    limit = max_positions(model)
    if limit is not None and ids.dim() > 1 and ids.shape[-1] > limit:
        raise CalibrationError(
            f"the {name} token ids have windows of {ids.shape[-1]}, longer than the model's "
            f"{limit} positions; cut them, or give text"
        )
    rows = vocabulary_rows(model)
    if ids.numel() and int(ids.max()) >= rows:
        folder = getattr(tokenizer, "name_or_path", None)
        if folder and str(folder) == str(getattr(model.config, "_name_or_path", None)):
            raise CheckpointError(
                f"the tokenizer in {folder} makes ids up to {int(ids.max())}, but the model's "
                f"vocabulary has {rows}; put the model's own tokenizer there"
            )
        raise CalibrationError(
            f"the {name} tokens go up to {int(ids.max())}, but the model's vocabulary has {rows}; "
            "give the model's own tokenizer"
        )


def vocabulary_rows(model: Any) -> int:
    """The rows of a model's input embedding, dense or int8."""
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    return embedding.weight.shape[0] if rows is None else rows


def ids_device(model: Any) -> torch.device:
    """Where a model takes token ids: the place of its input embedding, dense or int8."""
    embedding = model.get_input_embeddings()
    return next(itertools.chain(embedding.parameters(), embedding.buffers())).device


def check_windows(
    windows: Windows,
    model: PreTrainedModel,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """`check_fits` for all of `windows`. Raises: as that."""
    longest = max(windows.rows, key=len)
    check_fits(longest[None], model, name, tokenizer)
    check_fits(torch.cat(windows.rows), model, name, tokenizer)


def _rows(source: Any, name: str, deep: int = 0) -> list[Tensor]:
    """`source` as rows of ids [tokens] int64. Raises: CalibrationError."""
    if isinstance(source, Mapping):
        return _batch(source, name)
    if isinstance(source, list | tuple) and not (source and isinstance(source[0], Integral)):
        if deep == DEEPEST:
            raise _unreadable(source, name, "lists are nested too deep")
        if deep and len(source) > 1 and all(getattr(part, "ndim", 0) for part in source):
            raise CalibrationError(
                f"a batch of the {name} token ids has {len(source)} tensors without names; give "
                f"{{'{IDS}': ..., '{MASK}': ...}}"
            )
        return [row for entry in source for row in _entry(entry, name, deep + 1)]
    ids = _tensor(source, name)
    if ids.dim() not in (1, 2):
        raise _misshapen(name, ids)
    return [ids] if ids.dim() == 1 else list(ids)


def _entry(entry: Any, name: str, deep: int) -> list[Tensor]:
    """The rows of one entry of a list. An empty list is an empty row."""
    if isinstance(entry, list | tuple) and not entry:
        return [torch.empty(0, dtype=torch.long)]
    if isinstance(entry, Integral):
        raise _unreadable(entry, name, "numbers and rows of numbers stand side by side")
    return _rows(entry, name, deep)


def _batch(source: Mapping, name: str) -> list[Tensor]:
    """The rows of a tokenizer's batch without its padding. Raises: CalibrationError."""
    if IDS not in source:
        raise CalibrationError(f"an entry of the {name} token ids has no {IDS}")
    rows = _rows(source[IDS], name)
    if source.get(MASK) is None:
        return rows
    try:
        masks = _rows(_as_numbers(source[MASK]), name)
    except CalibrationError as error:
        raise CalibrationError(
            f"the {MASK} of the {name} token ids cannot be read: {error}"
        ) from error
    shapes = [list(map(len, part)) for part in (masks, rows)]
    if shapes[0] != shapes[1]:
        given, wanted = (_described(lengths) for lengths in shapes)
        raise CalibrationError(
            f"the {MASK} of the {name} token ids has {given}, and {IDS} has {wanted}; "
            "give one number of the mask for each id"
        )
    kept = []
    for number, (row, mask) in enumerate(zip(rows, masks, strict=True), 1):
        strange = mask[(mask != 0) & (mask != 1)]
        if len(strange):
            raise CalibrationError(
                f"the {MASK} of the {name} token ids holds {int(strange[0])}; it may hold 1 for a "
                "token and 0 for padding"
            )
        if not bool(mask.any()):
            others = any(bool(other.any()) for other in masks)
            which = f"all of row {number}" if others else "everything"
            raise CalibrationError(
                f"the {MASK} of the {name} token ids marks {which} as padding; leave out rows "
                "without a token"
            )
        kept.append(row[mask.bool()])
    return kept


def _described(lengths: list[int]) -> str:
    """Rows by their lengths, for messages."""
    spread = f"{min(lengths)} to {max(lengths)}" if len(set(lengths)) > 1 else f"{max(lengths)}"
    return f"{len(lengths)} rows of {spread}"


def _as_numbers(mask: Any) -> Any:
    """A mask of True and False, or of whole floats, as one of integers; others as they are."""
    if isinstance(mask, list | tuple):
        return [_as_numbers(entry) for entry in mask]
    if isinstance(mask, Tensor) or hasattr(mask, "__array__"):
        found = torch.as_tensor(mask)
        whole = found.is_floating_point() and bool((found == found.round()).all())
        return found.long() if found.dtype == torch.bool or whole else found
    return int(mask) if isinstance(mask, bool) else mask


def _tensor(source: Any, name: str) -> Tensor:
    """Numbers as one tensor int64, of whatever shape it has. Raises: CalibrationError."""
    try:
        if isinstance(source, Tensor):
            ids = source.detach().cpu().to_dense()
        else:
            ids = torch.as_tensor(source)
    except (TypeError, ValueError, RuntimeError, IndexError, OverflowError) as error:
        raise _unreadable(source, name, first_line(error)) from error
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise _misshapen(name, ids)
    return ids.long()


def _unreadable(source: Any, name: str, why: str) -> CalibrationError:
    return CalibrationError(f"{name}={reprlib.repr(source)} cannot be read as token ids: {why}")


def _misshapen(name: str, ids: Tensor) -> CalibrationError:
    return CalibrationError(
        f"{name} token ids must be a non-empty integer tensor [samples, window], "
        f"got {ids.dtype} {list(ids.shape)}"
    )
