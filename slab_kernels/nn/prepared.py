"""What a backend made of packed tensors, kept with them, so that a call sees whether they are
there.

A module's tensors change in three ways: others take their place for good (an assignment), others
take their place for one call (`torch.func.functional_call`), or somebody writes into them.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import dense_copy
from ..backends.base import Backend
from ..format import TENSOR_NAMES, PackedLayout, PackedWeight

_version = operator.attrgetter("_version")


class Snapshot(NamedTuple):
    """A module's tensors as they were before a backend read them, so that a write meanwhile shows.

    counting: those of them that count how often they were written into.
    writes: the sum of these counts.
    """

    tensors: tuple[Tensor | None, ...]
    counting: tuple[Tensor, ...]
    writes: int

    @classmethod
    def of(cls, tensors: Iterable[Tensor | None]) -> Snapshot:
        """These tensors as they are now."""
        tensors = tuple(tensors)
        counting = tuple(t for t in tensors if t is not None and not t.is_inference())
        return cls(tensors, counting, sum(map(_version, counting)))

    def is_still(self, tensors: Iterable[Tensor | None], traced: bool = False) -> bool:
        """Whether these are the same tensors, and nothing was written into them since.

        A traced call cannot see writes. Those through `.data`, or into an inference tensor, count
        nowhere in torch.
        """
        same = all(map(operator.is_, self.tensors, tensors))  # a call of `same` would cost more
        return same and (traced or sum(map(_version, self.counting)) == self.writes)

    def same(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether these are the same tensors, whatever was written into them."""
        return all(map(operator.is_, self.tensors, tensors))


class Prepared(NamedTuple):
    """`state` is what `backend` made of `source`."""

    backend: Backend
    state: Any
    source: Snapshot


def packed_from(layout: PackedLayout, buffers: Mapping[str, Tensor | None]) -> PackedWeight:
    """The packed weight of a module's buffers (not copied)."""
    present = {name: t for name in TENSOR_NAMES if (t := buffers[name]) is not None}
    return PackedWeight(layout, **present)


def usable_by(backend: Backend, dtype: torch.dtype, made: Prepared) -> Any:
    """The state in `made` if `backend` runs activations of `dtype` with it as it is, else None."""
    if made.backend is not backend:
        return backend.adopt(made.state, dtype)
    return None if backend.one_dtype else made.state


def copied_bytes(kept: Iterable[Prepared]) -> int:
    """The bytes of the dense copies in what is kept."""
    return sum(made.backend.dense_bytes(made.state) for made in kept)


def copies(linears: dict[torch.dtype, tuple[Prepared, ...]], weights: int) -> list[str]:
    """What is to be said of the dense copies of a layer of so many weights; nothing without one."""
    size = copied_bytes(itertools.chain(*linears.copy().values()))
    return [dense_copy.described(size, weights)] if size else []


def accuracy(linears: dict[torch.dtype, tuple[Prepared, ...]]) -> list[str]:
    """What is to be said of the activations of a layer; nothing where they are exact."""
    every = itertools.chain(*linears.copy().values())
    words = {made.backend.activations(made.state) for made in every} - {"exact"}
    return [f"activations={word}" for word in sorted(words)]


def keep_only(linears: dict[torch.dtype, tuple[Prepared, ...]], dtype: torch.dtype) -> None:
    """Forget what was prepared for other dtypes, which their next calls prepare anew."""
    for other in linears.copy():
        if other != dtype:
            linears.pop(other, None)


def keep(
    kept: dict[torch.dtype, tuple[Prepared, ...]], dtype: torch.dtype, made: Prepared
) -> Prepared:
    """Put `made` into `kept`, beside the first one of other tensors; returns `made`.

    Neither a module's own tensors nor others that are lent to it call after call are then prepared
    twice, and addresses that a CUDA graph holds stay valid.
    """
    others = [other for other in kept.get(dtype, ()) if not other.source.same(made.source.tensors)]
    kept[dtype] = (*others[:1], made)
    return made
