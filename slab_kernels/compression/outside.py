"""The model outside its blocks as it will be: int8 rows looked up, weights that nobody finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import ArchitectureError
from ..models.blocks import outside_filled
from ..models.endings import Ending
from ..models.skeleton import place
from ..models.streams import Stream, catch_stream
from ..models.vocabulary import hidden_weights
from ..text.windows import Windows
from .job import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 8  # on which a model's code is tried
DENSE_EMBEDDING, DENSE_HEAD = "embeddings='dense'", "head=False (--no-head)"


def look_up_as_stored(model: PreTrainedModel, job: Job) -> None:
    """Put the numbers that int8 rows stand for into the embeddings of a filled model."""
    for name in job.tables:
        dense = job.table(name).dense()
        place(model, f"{name}.weight", dense.to(device=job.device, dtype=job.dtype))


def readable(job: Job, windows: Windows) -> Job:
    """The job, if the model's code reads no weight of an embedding or head that will have none.

    Its forward runs once on a few tokens of the first window, with the blocks replaced and
    those weights hidden. What nobody named stays dense where they are read.

    Raises: ArchitectureError that names the module, and as `catch_stream`.
    """
    if not job.tables and job.head is None:
        return job
    some = windows.rows[0][None, :TOKENS]
    with outside_filled(job.source, job.path, job.device, job.dtype) as model:
        stream = catch_stream(model, job.blocks, some, job.load_block, job.device)
        try:
            _check_readers(model, job, stream, some)
        except ArchitectureError as error:
            named = getattr(error, "module", None)  # what it is about, where that is known
            parts = {None: ("embeddings", "head"), job.head: ("head",)}.get(named, ("embeddings",))
            left = job.without(tuple(set(parts) & set(job.wanted.optional)), str(error))
            if (left.tables, left.head) == (job.tables, job.head):
                raise
            return readable(left, windows)
    return job


def _check_readers(model: PreTrainedModel, job: Job, stream: Stream, ids: Tensor) -> None:
    """Raises: ArchitectureError that names the module whose weight is read."""
    ways_out = dict.fromkeys(job.tables, DENSE_EMBEDDING)
    if job.head is not None:
        ways_out[job.head] = DENSE_HEAD
    for name, entry in job.tables.items():
        if entry.tied is not None:
            ways_out[entry.tied] = ways_out[name]
    if not ways_out:
        return
    hidden = stream.hidden[0].to(job.device)
    with hidden_weights(model, ways_out):
        Ending(model, job.blocks, stream.returned).try_out(ids.to(job.device), hidden)
