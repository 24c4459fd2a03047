"""What a checkpoint's tensors are called in the model, as transformers reads them.

A tensor has the same name in both, or another, or is rebuilt from several of the checkpoint.
Mixtures keep a tensor for each expert and projection on disk and one for all of them in the model;
transformers converts them on loading. Here the same conversion is done tensor by tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..terminal import first_line
from .shards import TensorEntry

# Stored name -> dtype, shape, and what makes the tensor.
Forms = dict[str, tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]]


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


class StoredNames:
    """How the entries of a checkpoint make the tensors of `model`, which may be a skeleton on meta.

    origins: the model's name -> origin. ignored: stored tensors that the model has no place for.

    Raises: CheckpointError if two stored tensors are the same one of the model, or if transformers
        cannot rebuild some.
    """

    def __init__(
        self, model: nn.Module, entries: Mapping[str, TensorEntry], names: _Names | None = None
    ):
        names = names or _Names(model)
        self._entries = entries
        self.origins: dict[str, Origin] = {}
        self.ignored: list[str] = []
        from transformers.core_model_loading import dot_natural_key

        expected, groups = names.expected, {}
        for stored in sorted(entries, key=dot_natural_key):  # experts are stacked in this order
            name, pattern, converter, renamed = names.find(stored)
            if converter is not None:
                groups.setdefault(name, (converter, []))[1].append((pattern, stored))
            elif name not in expected:
                self.ignored.append(stored)
            else:
                entry = entries[stored]
                self._add(name, Origin((stored,), entry.dtype, entry.shape, renamed))
        for name, (converter, parts) in groups.items():
            self._rebuilt(model, entries, expected, name, converter, parts)

    def _add(self, name: str, origin: Origin) -> None:
        if name in self.origins:
            first = self.origins[name].stored[0]
            raise CheckpointError(
                f"tensors {first!r} and {origin.stored[0]!r} are both {name!r} of the model"
            )
        self.origins[name] = origin

    def _rebuilt(
        self, model, entries, expected, name: str, converter, parts: list[tuple[str, str]]
    ) -> None:
        """The conversion is done on meta once, to learn what it makes."""
        stored = tuple(s for _, s in parts)

        def convert(tensors: list[Tensor]) -> dict[str, Tensor]:
            own = copy.deepcopy(converter)
            for (pattern, source), tensor in zip(parts, tensors, strict=True):
                own.add_tensor(name, source, pattern, tensor)
            made = own.convert(name, model=model, config=model.config)
            made = made[0] if isinstance(made, tuple) else made  # beside 5.0's list of errors
            return {key: t[0] if isinstance(t, list) else t for key, t in made.items()}

        try:
            empty = [
                torch.empty(entries[s].shape, dtype=entries[s].dtype, device="meta") for s in stored
            ]
            made = convert(empty)
        except Exception as error:  # torch's, where tensors are missing or of other sizes
            reason = first_line(error)
            more = f" and {len(stored) - 1} more" if len(stored) > 1 else ""
            raise CheckpointError(
                f"transformers cannot rebuild {name!r} from tensor {stored[0]!r}{more} ({reason}); "
                "copy or download the checkpoint again"
            ) from error
        known = {key: t for key, t in made.items() if key in expected}
        if not known:
            self.ignored += stored
        for key, t in known.items():
            self._add(key, Origin(stored, t.dtype, tuple(t.shape), True, convert, len(made) == 1))

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
                    forms[stored] = (entry.dtype, entry.shape, partial(read, stored))
            else:
                forms[name] = (origin.dtype, origin.shape, partial(self.get, name, read))
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

    def __init__(self, model: nn.Module):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.expected = model.state_dict()
        self.prefix = getattr(model, "base_model_prefix", "") or ""
        transforms = get_model_conversion_mapping(model) if hasattr(model, "config") else []
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.by_pattern = {p: c for c in self.converters for p in c.source_patterns}

    def find(self, stored: str) -> tuple[str, str | None, Any, bool]:
        """The model's name of a stored tensor, pattern and converter if any, `Origin.renamed`."""
        from transformers.core_model_loading import rename_source_key

        expected, prefix = self.expected, self.prefix
        if stored in expected:
            return stored, None, None, False
        name, pattern = rename_source_key(stored, self.renamings, self.converters, prefix, expected)
        if pattern is not None:
            return name, pattern, self.by_pattern[pattern], True
        plain, _ = rename_source_key(stored, [], [], prefix, expected)
        return (name, None, None, name != plain) if name in expected else (plain, None, None, False)


def stored_forms(model: nn.Module, tensors: Mapping[str, Tensor]) -> Forms:
    """The form in which transformers saves tensors of `model`.

    A tensor that would be stored together with others keeps the model's name.
    """
    from transformers.core_model_loading import revert_weight_conversion

    forms: Forms = {}
    names, empty = _Names(model), {name: tensor.to("meta") for name, tensor in tensors.items()}
    together = revert_weight_conversion(model, empty) if hasattr(model, "config") else empty
    for name, tensor in tensors.items():
        parts = {name: empty[name]}
        if together.get(name) is not empty[name]:  # one call takes milliseconds in a large model
            parts = revert_weight_conversion(model, parts)
        if set(parts) != {name} and not _makes(model, parts, name, names):
            parts = {name: tensor}

        def make(stored: str, name: str = name, tensor: Tensor = tensor) -> Tensor:
            if stored == name:
                return tensor
            return revert_weight_conversion(model, {name: tensor})[stored]

        forms |= {s: (t.dtype, tuple(t.shape), partial(make, s)) for s, t in parts.items()}
    return forms


def _makes(model: nn.Module, parts: Mapping[str, Tensor], name: str, names: _Names) -> bool:
    """Whether transformers reads the tensor `name` of `model` from `parts`, and nothing else."""
    entries = {s: TensorEntry("", t.dtype, tuple(t.shape), 0, 0) for s, t in parts.items()}
    try:
        origins = StoredNames(model, entries, names).origins
    except CheckpointError:
        return False
    return origins.keys() == {name} and origins[name].shape == tuple(names.expected[name].shape)
