"""The model outside its blocks as it will be: int8 rows looked up, weights that nobody finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import ArchitectureError
from ..models.skeleton import place
from ..models.streams import Stream
from ..models.tail import Tail
from ..models.vocabulary import find_head, hidden_weights
from .job import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE_EMBEDDING, DENSE_HEAD = "embeddings='dense'", "head=False (--no-head)"


def look_up_as_stored(model: PreTrainedModel, job: Job) -> None:
    """Put the numbers that int8 rows stand for into the embeddings of a filled model."""
    for name in job.tables:
        dense = job.table(name).dense()
        place(model, f"{name}.weight", dense.to(device=job.device, dtype=job.dtype))


def check_readers(model: PreTrainedModel, job: Job, stream: Stream, ids: Tensor) -> None:
    """Refuse a model whose code reads the weight of an embedding or head that will have none.

    Its forward runs once on a few tokens, with the blocks replaced and those weights hidden.

    Raises: ArchitectureError that names the module.
    """
    ways_out = dict.fromkeys(job.tables, DENSE_EMBEDDING)
    if job.head is not None:
        ways_out[job.head] = DENSE_HEAD
    for name, entry in job.tables.items():
        if entry.tied is not None:
            ways_out[entry.tied] = ways_out[name]
    if not ways_out:
        return
    if job.head is None and not any(entry.tied for entry in job.tables.values()):
        head = _any_head(model)
        if head is None:
            return
    else:
        head = job.head or next(entry.tied for entry in job.tables.values() if entry.tied)
    some = ids[:1, :8]
    hidden = stream.hidden[0][:1, : some.shape[1]].to(job.device)
    with hidden_weights(model, ways_out):
        Tail(model, job.blocks, stream.outputs, head).run_to_the_end(hidden, some)


def _any_head(model: PreTrainedModel) -> str | None:
    """The name of a plain output head, which stays as it is."""
    try:
        return find_head(model)
    except ArchitectureError:
        return None
