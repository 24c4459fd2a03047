"""What a checkpoint's tensors are called in the model, as transformers reads them.

A tensor has the same name in both, or another, or is rebuilt from several of the checkpoint.
Mixtures keep a tensor for each expert and projection on disk and one for all of them in the model;
transformers converts them on loading. Here the same conversion is done tensor by tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..terminal import first_line
from .shards import Spec, TensorEntry

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter


class Form(NamedTuple):
    """How a tensor is written: dtype and shape, and what makes it when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def spec(self) -> Spec:
        return self.dtype, self.shape


Forms = dict[str, Form]  # by the name that the tensor is stored under


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the model comes from.

    stored: the names it has in the checkpoint, one unless transformers rebuilds it.
    renamed: whether transformers' own tables were needed, beyond adding or leaving out the base
        model's prefix.
    conversion: rebuilds the tensors of `stored`, or None where the tensor is taken as it is.
    alone: no other tensor of the model is made of the same ones.
    """

    stored: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    renamed: bool = False
    conversion: Callable[[list[Tensor]], dict[str, Tensor]] | None = None
    alone: bool = True


class _Found(NamedTuple):
    """What a stored tensor is in the model.

    name: its name there. pattern, converter: transformers' rule that rebuilds it, if there is one.
    renamed: see `Origin`.
    """

    name: str
    pattern: str | None = None
    converter: WeightConverter | None = None
    renamed: bool = False


@dataclass
class _Rebuilding:
    """Stored tensors from which transformers makes others of the model, and their patterns."""

    model: PreTrainedModel
    name: str
    converter: WeightConverter
    patterns: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)

    def convert(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        """The model's tensors from those of `stored`, in the same order."""
        converter = copy.deepcopy(self.converter)
        for pattern, stored, tensor in zip(self.patterns, self.stored, tensors, strict=True):
            converter.add_tensor(self.name, stored, pattern, tensor)
        made = converter.convert(self.name, model=self.model, config=self.model.config)
        made = made[0] if isinstance(made, tuple) else made  # 5.0 adds a list of errors
        return {key: t[0] if isinstance(t, list) else t for key, t in made.items()}


class StoredNames:
    """How the entries of a checkpoint make the tensors of `model`, which may be a skeleton on meta.

    origins: the model's name -> origin. ignored: stored tensors that the model has no place for.

    Raises: CheckpointError if two stored tensors are the same one of the model, or if transformers
        cannot rebuild some.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        entries: Mapping[str, TensorEntry],
        names: _Names | None = None,
    ):
        from transformers.core_model_loading import dot_natural_key

        names = names or _Names(model)
        self._entries = entries
        self.origins: dict[str, Origin] = {}
        self.ignored: list[str] = []
        rebuilt: dict[str, _Rebuilding] = {}
        for stored in sorted(entries, key=dot_natural_key):  # experts are stacked in this order
            found = names.find(stored)
            if found.converter is not None and found.pattern is not None:
                new = _Rebuilding(model, found.name, found.converter)
                group = rebuilt.setdefault(found.name, new)
                group.patterns.append(found.pattern)
                group.stored.append(stored)
            elif found.name not in names.expected:
                self.ignored.append(stored)
            else:
                entry = entries[stored]
                origin = Origin((stored,), entry.dtype, entry.shape, found.renamed)
                self._add(found.name, origin)
        for group in rebuilt.values():
            self._add_rebuilt(group, names.expected)

    def _add(self, name: str, origin: Origin) -> None:
        if name in self.origins:
            first = self.origins[name].stored[0]
            raise CheckpointError(
                f"tensors {first!r} and {origin.stored[0]!r} are both {name!r} of the model"
            )
        self.origins[name] = origin

    def _add_rebuilt(self, group: _Rebuilding, expected: Mapping[str, Tensor]) -> None:
        """Convert tensors on meta once, to learn what comes of them.

        expected: the tensors of the model.
        """
        stored, entries = tuple(group.stored), self._entries
        parts = [entries[s] for s in stored]
        try:
            made = group.convert(
                [torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts]
            )
        except Exception as error:  # torch's, where tensors are missing or of other sizes
            reason = first_line(error)
            more = f" and {len(stored) - 1} more" if len(stored) > 1 else ""
            raise CheckpointError(
                f"transformers cannot rebuild {group.name!r} from tensor {stored[0]!r}{more} "
                f"({reason}); copy or download the checkpoint again"
            ) from error
        known = {name: t for name, t in made.items() if name in expected}
        if not known:
            self.ignored += stored
        for name, t in known.items():
            alone = len(made) == 1
            self._add(name, Origin(stored, t.dtype, tuple(t.shape), True, group.convert, alone))

    def forms(self, names: Iterable[str], read: Callable[[str], Tensor]) -> Forms:
        """What to write for tensors of the model that stay as they are.

        Those that transformers renames or rebuilds keep the form of the checkpoint, which other
        engines read; the rest gets the model's names. read: as for `get`.
        """
        forms: Forms = {}
        for name in names:
            origin = self.origins[name]
            if origin.renamed and origin.alone:
                for stored in origin.stored:
                    entry = self._entries[stored]
                    forms[stored] = Form(entry.dtype, entry.shape, partial(read, stored))
            else:
                make = partial(self.get, name, read)
                forms[name] = Form(origin.dtype, origin.shape, make)
        return forms

    def get(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor `name` of the model; read: the tensor of a stored name."""
        origin = self.origins[name]
        tensors = [read(stored) for stored in origin.stored]
        if origin.conversion is None:
            return tensors[0]
        return origin.conversion(tensors)[name].contiguous()


class _Names:
    """The names that `model` has, `expected`, and transformers' tables that lead to them."""

    def __init__(self, model: PreTrainedModel):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.expected: dict[str, Tensor] = model.state_dict()
        self.prefix = getattr(model, "base_model_prefix", "") or ""
        transforms = get_model_conversion_mapping(model) if hasattr(model, "config") else []
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.by_pattern = {p: c for c in self.converters for p in c.source_patterns}

    def find(self, stored: str) -> _Found:
        """What the tensor stored under this name is in the model."""
        from transformers.core_model_loading import rename_source_key

        expected, prefix = self.expected, self.prefix
        if stored in expected:
            return _Found(stored)
        name, pattern = rename_source_key(stored, self.renamings, self.converters, prefix, expected)
        if pattern is not None:
            return _Found(name, pattern, self.by_pattern[pattern], renamed=True)
        plain, _ = rename_source_key(stored, [], [], prefix, expected)
        return _Found(name, renamed=name != plain) if name in expected else _Found(plain)


def stored_forms(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> Forms:
    """The form in which transformers saves tensors of `model`.

    A tensor that would be stored together with others keeps the model's name.
    """
    from transformers.core_model_loading import revert_weight_conversion

    def make(name: str, stored: str) -> Tensor:
        """The stored tensor that the tensor `name` of the model becomes, or is a part of."""
        tensor = tensors[name]
        if stored == name:
            return tensor
        return revert_weight_conversion(model, {name: tensor})[stored]

    forms: Forms = {}
    empty = {name: tensor.to("meta") for name, tensor in tensors.items()}
    for name, parts in stored_parts(model, empty).items():
        for stored, t in parts.items():
            forms[stored] = Form(t.dtype, tuple(t.shape), partial(make, name, stored))
    return forms


def stored_parts(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], made_of_them: Container[str] = ()
) -> dict[str, dict[str, Tensor]]:
    """What transformers stores in place of each of `tensors`: by stored name, one or several.

    A tensor that would be stored together with others stays as it is, under the model's name.
    Tensors that `model` has no place for count as its own, with the shape that they have.

    made_of_them: tensors that `model` has in place of `tensors`.
    """
    from transformers.core_model_loading import revert_weight_conversion

    names = _Names(model)
    own = {name: t for name, t in names.expected.items() if name not in made_of_them}
    names.expected = {**tensors, **own}
    together = dict(tensors)
    if hasattr(model, "config"):
        together = revert_weight_conversion(model, together)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = {name: tensor}
        if together.get(name) is not tensor:  # one call takes milliseconds in a large model
            parts = revert_weight_conversion(model, parts)
        if set(parts) != {name} and not _makes(model, parts, name, names):
            parts = {name: tensor}
        found[name] = parts
    return found


def _makes(model: PreTrainedModel, parts: Mapping[str, Tensor], name: str, names: _Names) -> bool:
    """Whether transformers reads the tensor `name` of `model` from `parts`, and nothing else."""
    entries = {s: TensorEntry("", t.dtype, tuple(t.shape), 0, 0) for s, t in parts.items()}
    try:
        origins = StoredNames(model, entries, names).origins
    except CheckpointError:
        return False
    return origins.keys() == {name} and origins[name].shape == tuple(names.expected[name].shape)
