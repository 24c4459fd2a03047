"""Which weight is read after which: an option, off until somebody links weights, and unmeasured.

A linear whose weight has a successor prefetches the first bytes of that into L2 once its own
weights are asked for, so that memory works on while other kernels (norms, attention) run. A link is
kept by addresses beside the prepared states, because the op that runs a linear takes tensors and
sizes alone; it goes when one of the two states goes. A CUDA graph keeps the link that it was
captured with, so whoever captures keeps both weights. Only weights on one GPU are linked: elsewhere
the address of one means nothing to the other's kernel.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

from .layout import CudaState


class Successor(NamedTuple):
    """What is read next: `next` and `next_bytes` of params.h."""

    address: int
    length: int  # bytes, a multiple of 16 as all blocks are


NONE = Successor(0, 0)
_successors: dict[int, Successor] = {}  # by the address of a weight's stream


def link(state: CudaState, following: CudaState, most_bytes: int) -> None:
    """From now on `state`'s linear prefetches the first `most_bytes` of `following`'s stream.

    A weight has one successor, the one that was linked last; most_bytes = 0 takes it away, and so
    does one on another device.
    """
    address, stream = state.stream.data_ptr(), following.stream
    here = stream.device == state.stream.device
    length = min(stream.nbytes, most_bytes) // 16 * 16 if here else 0
    if not length:
        _successors.pop(address, None)
        return
    successor = _successors[address] = Successor(stream.data_ptr(), length)
    for tensor in (state.stream, stream):
        weakref.finalize(tensor, _forget, address, successor).atexit = False


def successor_of(stream: int) -> Successor:
    """The successor of the weight whose stream begins at that address."""
    return _successors.get(stream, NONE)


def _forget(address: int, successor: Successor) -> None:
    if _successors.get(address) == successor:
        _successors.pop(address, None)
