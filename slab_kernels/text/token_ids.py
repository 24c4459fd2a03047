"""Token ids as people hold them: tensors, arrays, lists, or the batch that a tokenizer returns."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CalibrationError, CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def text_config(model: PreTrainedModel) -> Any:
    """The config of the language model itself, inside that of a model of several modalities."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def token_ids(source: Any, name: str = "calibration") -> Tensor | None:
    """`source` as ids [samples, window] int64 on the CPU, or None where it is or names a text.

    Taken are integer tensors and arrays [samples, window], lists of rows of equal length, and
    mappings with "input_ids" (a tokenizer's BatchEncoding) or lists of those. name: for messages.

    Raises: CalibrationError for ids of another shape or type, negative ones, and batches whose
        attention_mask marks padding, which would be taken for text.
    """
    if not _holds_ids(source):
        return None
    ids = _matrix(source, name)
    if ids.dim() != 2 or not ids.numel():
        raise _misshapen(name, ids)
    if int(ids.min()) < 0:
        raise CalibrationError(
            f"{name} token ids go down to {int(ids.min())}, and none may be negative"
        )
    return ids


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


def _holds_ids(source: Any) -> bool:
    """Whether `source` is meant as ids, even if they turn out to be unusable."""
    if isinstance(source, Mapping):
        return "input_ids" in source
    if isinstance(source, list | tuple):
        return bool(source) and _holds_ids(source[0])
    return isinstance(source, Tensor | Integral) or (
        hasattr(source, "__array__") and not isinstance(source, str)
    )


def _matrix(source: Any, name: str) -> Tensor:
    """`source` as one tensor int64, of whatever shape it has. Raises: CalibrationError."""
    if isinstance(source, Mapping):
        return _batch(source, name)
    try:
        if isinstance(source, Tensor):
            ids = source.detach().cpu().to_dense()
        elif isinstance(source, list | tuple) and not isinstance(source[0], Integral):
            rows = [_matrix(entry, name) for entry in source]
            lengths = sorted({row.shape[-1] if row.dim() else 1 for row in rows})
            if len(lengths) > 1:
                raise CalibrationError(
                    f"the rows of the {name} token ids have {lengths[0]} to {lengths[-1]} tokens; "
                    "cut them to one length"
                )
            ids = torch.cat(rows) if rows[0].dim() == 2 else torch.stack(rows)
        else:
            ids = torch.as_tensor(source)
    except CalibrationError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, OverflowError) as error:
        raise CalibrationError(
            f"{name}={reprlib.repr(source)} cannot be read as token ids: {error}"
        ) from error
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise _misshapen(name, ids)
    return ids.long()


def _batch(source: Mapping, name: str) -> Tensor:
    """The ids of a tokenizer's batch. Raises: CalibrationError, also for padding in it."""
    if "input_ids" not in source:
        raise CalibrationError(f"an entry of the {name} token ids has no input_ids")
    ids, mask = _matrix(source["input_ids"], name), source.get("attention_mask")
    try:
        padding = 0 if mask is None else int((torch.as_tensor(mask) == 0).sum())
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(
            f"the attention_mask of the {name} token ids cannot be read: {error}"
        ) from error
    if padding:
        raise CalibrationError(
            f"the attention_mask of the {name} token ids marks {padding} of {ids.numel()} as "
            "padding, which would be taken for text; give rows of equal length"
        )
    return ids


def _misshapen(name: str, ids: Tensor) -> CalibrationError:
    return CalibrationError(
        f"{name} token ids must be a non-empty integer tensor [samples, window], "
        f"got {ids.dtype} {list(ids.shape)}"
    )
