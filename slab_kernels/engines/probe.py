"""What an engine's loader does to a weight, found out with numbered stand-ins before weights come.

Plain torch, no engine. A loader may reorder the rows of a weight (heads of a fused q, k, v),
split it or leave it out. It knows dense weights only: what it does to a packed tensor is another
thing, or nothing, and either way the bytes fit and the numbers are wrong. So each packed layer is
sent through the loader first, its packed tensors and the `weight` that a dense folder has, and
all must arrive as they were sent.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArchitectureError, UnsupportedError
from ..format import PackedLayout, table_tensors

DENSE = "weight"
ADVICE = "serve the dense folder that `slab-kernels decompress` writes"


def refuse_experts(layouts: Iterable[str]) -> None:
    """Refuse the experts of a mixture for an engine that runs all of them by kernels of its own.

    layouts: the names of packed modules.

    Raises: UnsupportedError.
    """
    found = next((name for name in layouts if re.search(r"\.experts\.\d+\.", name)), None)
    if found is not None:
        raise UnsupportedError(
            f"{found} is packed, and vLLM runs the experts of a mixture by kernels of its own that "
            f"read dense weights; {ADVICE}, or compress again with skip='*.experts'"
        )


@dataclass(frozen=True)
class TableLayout:
    """An embedding of int8 rows, as far as the probe asks."""

    out_features: int
    in_features: int

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return table_tensors(self.out_features, self.in_features)


class Probe:
    """The stand-ins of some packed layers, and which of them have arrived."""

    def __init__(
        self,
        layouts: Mapping[str, PackedLayout | TableLayout],
        engine: str,
        heads: Container[str] = (),
    ):
        """layouts: by names in the checkpoint; engine: its name and the model's, for messages.

        heads: which of the layers are output heads.
        """
        self.layouts, self.engine, self.heads = dict(layouts), engine, heads
        self.layer = ""  # the one that was sent last
        self._tensor, self._sent = "", torch.empty(0)
        self._arrived: dict[str, set[str]] = {name: set() for name in self.layouts}

    def stand_ins(self) -> Iterator[tuple[str, Tensor]]:
        """Name and stand-in of every tensor, as an engine takes them from a checkpoint.

        A stand-in is as large as the tensor and takes no memory. A matrix comes twice: with the
        numbers of its rows, then with those of its columns.
        """
        for layer, layout in self.layouts.items():
            dense = (torch.int32, (layout.out_features, layout.in_features))
            for name, (dtype, shape) in {DENSE: dense, **layout.tensors()}.items():
                for axis in range(len(shape)):
                    view = [-1 if i == axis else 1 for i in range(len(shape))]
                    numbers = torch.arange(shape[axis])
                    if name != DENSE:
                        numbers %= 127  # what every type holds exactly
                    self.layer, self._tensor = layer, name
                    self._sent = numbers.to(dtype).view(view).expand(shape)
                    yield f"{layer}.{name}", self._sent

    def arrive(self, layer: str, name: str, tensor: Tensor) -> None:
        """What the engine gave to the tensor `name` of `layer` while a stand-in was sent.

        Raises: ArchitectureError if that is another tensor, or a part of it, or not in its order.
        """
        if (layer, name) != (self.layer, self._tensor):
            raise ArchitectureError(
                f"{self.engine} loads {self.layer}.{self._tensor} as {layer}.{name}, "
                f"which packed layers do not support; {ADVICE}"
            )
        sent = self._sent
        place, expected = ((t.data_ptr(), t.shape, t.stride()) for t in (tensor, sent))
        if place != expected and not torch.equal(tensor.to(sent), sent):
            raise ArchitectureError(
                f"{self.engine} splits or reorders {layer}.{name} while it loads, "
                f"which packed layers do not support; {ADVICE}"
            )
        self._arrived[layer].add(name)

    def missing(self) -> list[str]:
        """Layers of which a tensor was sent and has arrived nowhere."""
        sent = {name: {DENSE, *layout.tensors()} for name, layout in self.layouts.items()}
        return [name for name, tensors in sent.items() if self._arrived[name] != tensors]

    def refuse(self, layer: str) -> ArchitectureError:
        """The error for a layer that the engine has not, or does not load."""
        what, takes = "linear layer", "packed weights"
        without = f"skip='*.{layer.rpartition('.')[2]}'"
        if isinstance(self.layouts[layer], TableLayout):
            what, takes, without = "embedding", "int8 rows", "embeddings='dense'"
        elif layer in self.heads:
            what, without = "output head", "head=False"
        return ArchitectureError(
            f"{self.engine} has no {what} {layer} that takes {takes}; "
            f"compress again with {without}, or {ADVICE}"
        )
