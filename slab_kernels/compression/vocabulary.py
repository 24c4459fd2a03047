"""What a run does to the two matrices with a row for every token: input embedding, output head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..errors import ArchitectureError, ArgumentError, FormatError
from ..models.tables import TableEntry
from ..models.vocabulary import find_embedding, find_head, head_tied_to, multiplier_of
from .plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDINGS = ("dense", "int8")


@dataclass(frozen=True)
class Wanted:
    """What a run is to do beside the blocks.

    embeddings: "dense", or "int8" for rows of int8 codes with one scale each.
    head: whether the output head is packed.
    optional: which of the two, "embeddings" and "head", stays dense in a model that cannot have it,
        with a warning, because nobody named it; what is not listed is refused then.

    Raises on construction: ArgumentError.
    """

    embeddings: str = "dense"
    head: bool = False
    optional: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.embeddings not in EMBEDDINGS:
            raise ArgumentError(
                f"embeddings={self.embeddings!r} is unknown; choose one of {', '.join(EMBEDDINGS)}"
            )
        if not isinstance(self.head, bool):
            raise ArgumentError(f"head={self.head!r} must be True or False")

    def check_pattern(self, plan: Plan) -> None:
        """Refuse a pattern that no packed folder has. Raises: ArgumentError."""
        asked = {"head=True": self.head, "embeddings='int8'": self.embeddings == "int8"}
        asked = {what: on for what, on in asked.items() if what.split("=")[0] not in self.optional}
        named = [what for what, on in asked.items() if on]
        if named and not plan.usual.packed:
            raise ArgumentError(
                f"{named[0]} needs the packed format, which stores the pattern 2:4 alone and not "
                f"{plan.usual.pattern!r}; leave it out, or take 2:4"
            )


AS_IT_IS = Wanted()


def choose(
    model: PreTrainedModel, plan: Plan, wanted: Wanted
) -> tuple[dict[str, TableEntry], str | None, tuple[str, ...]]:
    """The embeddings that become int8 rows, the head that is packed, and what cannot be.

    Raises: ArchitectureError or a FormatError for what was named and the model cannot have.
    """
    notes: list[str] = []
    embedding = head = None
    if not plan.usual.packed:
        return {}, None, ()
    if wanted.head:
        try:
            head = find_head(model)
            _check_head(model, head, plan)
        except (ArchitectureError, FormatError) as error:
            head = None
            if "head" not in wanted.optional:
                raise
            notes.append(f"the output head stays dense: {error}")
    if wanted.embeddings == "int8":
        try:
            embedding = find_embedding(model)
        except ArchitectureError as error:
            if "embeddings" not in wanted.optional:
                raise
            notes.append(f"the embedding stays dense: {error}")
    tables: dict[str, TableEntry] = {}
    if embedding is not None:
        tied = head_tied_to(model, embedding)
        if tied is not None and tied != head:
            try:
                find_head(model)  # it computes from the same rows, so it must be a plain linear too
            except ArchitectureError as error:
                if "embeddings" not in wanted.optional:
                    raise
                notes.append(f"the embedding stays dense: {error}")
                return {}, head, tuple(notes)
        module = model.get_submodule(embedding)
        assert isinstance(module, nn.Embedding)
        tables[embedding] = TableEntry(None if tied == head else tied, multiplier_of(module))
    return tables, head, tuple(notes)


def _check_head(model: PreTrainedModel, head: str, plan: Plan) -> None:
    """Refuse a head that cannot have the settings. Raises: a FormatError that names it."""
    module = model.get_submodule(head)
    assert isinstance(module, nn.Linear)
    plan.check_shapes({head: (module.out_features, module.in_features)})
