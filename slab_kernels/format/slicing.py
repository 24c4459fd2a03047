"""Which part of every packed tensor makes up a part of the weight: slicing rows and inputs.

Along N, tensors are cut by rows; V and Q stay whole. Along K, a slice begins at a multiple of
`PackedLayout.slice_multiple` inputs; U, P and scales of whole rows stay whole. A slice is a packed
weight of its own, with the sizes of `Slice.layout`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import ShapeError
from .layout import PackedLayout

ROWS_ONLY = ("U", "P")  # tensors without a K dimension
INPUTS_ONLY = ("V", "Q")  # tensors without an N dimension, whose first dimension is K


@dataclass(frozen=True)
class Slice:
    """Some rows and inputs of a weight of layout `whole`.

    Rows first_row .. first_row + rows, inputs first_input .. first_input + inputs.

    Raises on construction: ShapeError if it is not inside, or cuts what cannot be cut.
    """

    whole: PackedLayout
    first_row: int
    rows: int
    first_input: int
    inputs: int

    def __post_init__(self) -> None:
        whole = self.whole
        _check_range("out_features", self.first_row, self.rows, whole.out_features)
        unit = whole.slice_multiple
        _check_range("in_features", self.first_input, self.inputs, whole.in_features, unit)

    @property
    def layout(self) -> PackedLayout:
        """The layout of the slice."""
        return replace(self.whole, out_features=self.rows, in_features=self.inputs)

    def narrow(self, name: str, tensor: Tensor) -> Tensor:
        """The slice's part of the whole weight's tensor called `name`, as a view of it."""
        shape = self.layout.tensors()[name][1]
        if name not in INPUTS_ONLY:
            tensor = tensor.narrow(0, self.first_row, self.rows)
        if name not in ROWS_ONLY:
            axis = 0 if name in INPUTS_ONLY else 1
            first = self.first_input * tensor.shape[axis] // self.whole.padded_in_features
            tensor = tensor.narrow(axis, first, shape[axis])
        return tensor


def _check_range(name: str, start: int, length: int, size: int, multiple: int = 1) -> None:
    """Refuse start .. start + length if it leaves a dimension of `size` or cuts a unit of
    `multiple`.

    Raises: ShapeError.
    """
    for what, number in (("start", start), ("length", length)):
        if type(number) is not int:
            kind = type(number).__name__
            raise ShapeError(f"cannot slice {name}: {what}={number!r} must be an int, not a {kind}")
    last = start + length
    asked = f"cannot slice {name} {start}..{last} of {size}"
    if not 0 <= start < last <= size:
        raise ShapeError(f"{asked}: it must begin at 0 or later, hold one and end by {size}")
    if start % multiple or (last % multiple and last != size):
        raise ShapeError(f"{asked}: start and length must be multiples of {multiple}")
