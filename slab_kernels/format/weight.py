"""The two records: methods end in a `Decomposition`, kernels start from a `PackedWeight`.

W ~ S + (U V^T) * B + P Q^T, with S 2:4 sparse, B signs, and P Q^T a plain adapter; parts may be
absent. Packing *folds*: on the positions that S keeps, S absorbs (U V^T) * B, so signs are stored
for pruned positions only (2 bits in a group of four instead of 4) and a pruned entry is exactly
+-(U V^T)_ij. docs/format.md is the specification to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from ..errors import DtypeError, MissingTensorError, ShapeError, UnknownTensorError
from . import bits
from .check import check_tensors
from .layout import FACTOR_TYPES, MAX_PLANES, TENSOR_NAMES, PackedLayout, plane_unit
from .slicing import Slice


@dataclass(frozen=True)
class Decomposition:
    """W ~ S + (U V^T) * B + P Q^T as dense tensors on one device; what every method returns.

    S [N,K] float: zero outside `mask` [N,K] bool. A kept value may be 0.0: kept is what the mask
        says.
    U [N,R], V [K,R], B [N,K] int8: the sign term, all or none. B counts in units of the last of
        `planes` signs and is odd, within +-(2^planes - 1), so +1 or -1 for one plane; it is 0 on
        kept positions of an already folded decomposition.
    P [N,R'], Q [K,R']: the adapter, both or neither.
    values: the type that the kept values were found for, and that `pack` stores them in: "fp16",
        "bf16", "int8", "int4" or "int3"; None if nothing says so.
    scales, group_size: the step sizes [N, ceil(K / group_size)] (or [N,1] where group_size is
        None), if the folded kept values lie on the grid of an integer type already. Integers
        without scales get them when they are packed, one for each group_size inputs.
    adapter_values: "int8" where P and Q were rounded to it, None for the type of U and V.

    Raises on construction: MissingTensorError if a part of a term is absent.
    """

    S: Tensor
    mask: Tensor
    U: Tensor | None = None
    V: Tensor | None = None
    B: Tensor | None = None
    P: Tensor | None = None
    Q: Tensor | None = None
    scales: Tensor | None = None
    values: str | None = None
    group_size: int | None = None
    planes: int = 1
    adapter_values: str | None = None

    def __post_init__(self) -> None:
        for term in ("UVB", "PQ"):
            absent = [name for name in term if getattr(self, name) is None]
            if absent and len(absent) < len(term):
                raise MissingTensorError(
                    f"a decomposition has {', '.join(term)} or none of them; here "
                    f"{', '.join(absent)} is None"
                )

    @property
    def out_features(self) -> int:
        return self.S.shape[0]

    @property
    def in_features(self) -> int:
        return self.S.shape[1]

    def sign_term(self) -> Tensor | None:
        """(U V^T) * B as [N,K] fp32, or None."""
        if self.U is None or self.V is None or self.B is None:
            return None
        with torch.autocast(self.S.device.type, enabled=False):
            return (self.U.float() @ self.V.float().T) * self.B * plane_unit(self.planes)

    def dense(self) -> Tensor:
        """The weight it stands for, [N,K] fp32."""
        W = self.S.float()
        if (term := self.sign_term()) is not None:
            W = W + term
        if self.P is not None and self.Q is not None:
            with torch.autocast(self.S.device.type, enabled=False):
                W = W + self.P.float() @ self.Q.float().T
        return W

    def folded(self) -> Decomposition:
        """The same function with S' = S + (U V^T) * B on kept positions and B = 0 there."""
        if self.B is None or (term := self.sign_term()) is None:
            return self
        S = self.S.float() + torch.where(self.mask, term, 0.0)
        return replace(self, S=S, B=torch.where(self.mask, 0, self.B).to(torch.int8))


@dataclass(frozen=True)
class PackedWeight:
    """One weight in the canonical packed form, as stored on disk: no engine's, and sliceable.

    The shapes and dtypes of its tensors are those of `layout.tensors()`.
    """

    layout: PackedLayout
    values: Tensor
    metadata: Tensor
    signs: Tensor | None = None
    scales: Tensor | None = None
    U: Tensor | None = None
    V: Tensor | None = None
    P: Tensor | None = None
    Q: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.layout.out_features

    @property
    def in_features(self) -> int:
        return self.layout.in_features

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by name."""
        return {name: t for name in TENSOR_NAMES if (t := getattr(self, name)) is not None}

    def sign_factors(self) -> tuple[Tensor, Tensor]:
        """U [N,R] and V [Kp,R] of a weight that has them.

        Raises: MissingTensorError.
        """
        if self.U is None or self.V is None:
            raise MissingTensorError("this packed weight has no sign term: U and V are absent")
        return self.U, self.V

    def adapter(self) -> tuple[Tensor, Tensor]:
        """P [N,R'] and Q [Kp,R'] as numbers: fp32 if they are stored as int8, else in their own
        type.

        Raises: MissingTensorError for a weight without them.
        """
        if self.P is None or self.Q is None:
            raise MissingTensorError("this packed weight has no adapter: P and Q are absent")
        if self.layout.adapter_values:
            return bits.unpack_shared(self.P), bits.unpack_shared(self.Q)
        return self.P, self.Q

    def bits_per_weight(self, factors: bool = True) -> float:
        """The stored bits per weight; see `PackedLayout.bits_per_weight`."""
        return self.layout.bits_per_weight(factors)

    def dense(self) -> Tensor:
        """The weight it stands for, [N,K] fp32."""
        return unpack(self).dense()

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on `device`."""
        return PackedWeight(self.layout, **{n: t.to(device) for n, t in self.tensors().items()})

    def narrow_out(self, start: int, length: int) -> PackedWeight:
        """Rows start .. start + length, as views.

        Raises: ShapeError.
        """
        return self._narrowed(Slice(self.layout, start, length, 0, self.in_features))

    def narrow_in(self, start: int, length: int) -> PackedWeight:
        """Inputs start .. start + length, as views.

        Both are multiples of `layout.slice_multiple`, or the end is in_features.

        Raises: ShapeError.
        """
        return self._narrowed(Slice(self.layout, 0, self.out_features, start, length))

    def _narrowed(self, part: Slice) -> PackedWeight:
        tensors = {name: part.narrow(name, t) for name, t in self.tensors().items()}
        return PackedWeight(part.layout, **tensors)

    @classmethod
    def from_tensors(
        cls,
        tensors: dict[str, Tensor],
        out_features: int,
        in_features: int,
        values: str = "fp16",
        group_size: int | None = None,
    ) -> PackedWeight:
        """Check everything, then build. Ranks are read off U and P, planes off signs.

        Raises: the FormatError subclass named after the first defect found.
        """
        for name in tensors:
            if name not in TENSOR_NAMES:
                raise UnknownTensorError(
                    f"tensor {name!r} is not part of the packed format ({', '.join(TENSOR_NAMES)})"
                )
        known = (*FACTOR_TYPES.values(), torch.int8)
        for name in ("U", "P"):
            if (tensor := tensors.get(name)) is None:
                continue
            if tensor.dim() != 2 or tensor.shape[1] == 0:
                shape = tuple(tensor.shape)
                raise ShapeError(f"{name} has shape {shape}, expected [out_features, rank >= 1]")
            if tensor.dtype not in known:
                raise DtypeError(
                    f"U or P is {tensor.dtype}, expected one of "
                    f"{', '.join(map(str, FACTOR_TYPES.values()))}, or int8 for P"
                )
        factors = read_factors(tensors.get("U"), tensors.get("P"))
        layout = PackedLayout(out_features, in_features, values, group_size, **factors)
        if "signs" in tensors and layout.rank and tensors["signs"].dim() == 2:
            units = layout.padded_in_features // 16
            planes = tensors["signs"].shape[1] // units
            if 1 < planes <= MAX_PLANES and planes * units == tensors["signs"].shape[1]:
                layout = replace(layout, planes=planes)
        check_tensors(tensors, layout)
        return cls(layout=layout, **tensors)


class FactorFields(TypedDict):
    """The fields of a PackedLayout that U and P show."""

    rank: int
    adapter_rank: int
    factors: str
    adapter_values: str | None


def read_factors(U, P) -> FactorFields:
    """What the dtypes and shapes of U and P (or None) say of their PackedLayout.

    They may be tensors or the entries of a file's header.
    """
    names = {dtype: name for name, dtype in FACTOR_TYPES.items()}
    shared = P is not None and P.dtype == torch.int8
    stored = [names[t.dtype] for t in (U, P) if t is not None and t.dtype in names]
    return {
        "rank": 0 if U is None else U.shape[1],
        "adapter_rank": 0 if P is None else P.shape[1] - shared,
        "factors": stored[0] if stored else "fp16",
        "adapter_values": "int8" if shared else None,
    }


def unpack(packed: PackedWeight) -> Decomposition:
    """Exactly what is stored, as a folded Decomposition in fp32.

    It carries the types and the group size, so that `pack(unpack(p))` gives p back bit for bit,
    unless p has factors of another type than fp16, which `factor_dtype` names.
    """
    layout, K = packed.layout, packed.in_features
    i0, i1 = bits.kept_positions(packed.metadata)
    kept = bits.unpack_values(packed.values, layout.values).float()
    if packed.scales is not None:
        per_group = kept.shape[1] // packed.scales.shape[1]
        kept = (kept.unflatten(1, (-1, per_group)) * packed.scales.float()[..., None]).flatten(1)
    S = bits.scatter_positions(kept, i0, i1)[:, :K]
    mask = bits.unpack_mask(packed.metadata)[:, :K]
    found = Decomposition(S, mask, values=layout.values, group_size=layout.group_size)
    if packed.signs is not None:
        level = bits.unpack_planes(packed.signs, layout.planes)
        B = bits.scatter_positions(level, *bits.pruned_positions(i0, i1))[:, :K]
        U, V = packed.sign_factors()
        found = replace(found, U=U.float(), V=V[:K].float(), B=B, planes=layout.planes)
    if packed.P is not None:
        P, Q = packed.adapter()
        found = replace(found, P=P.float(), Q=Q[:K].float(), adapter_values=layout.adapter_values)
    if packed.scales is not None:
        found = replace(found, scales=packed.scales.float())
    return found
