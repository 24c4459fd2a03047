"""The waist of the hourglass: every method ends in a `Decomposition`, every kernel starts from a `PackedWeight`.

W ~= S + (U V^T) * B + P Q^T, with S 2:4 sparse, B signs, and P Q^T a plain adapter; parts may be absent. Packing
*folds*: on the positions that S keeps, S absorbs (U V^T) * B, so signs are stored for pruned positions only (2 bits in
a group of four instead of 4) and a pruned entry is exactly +-(U V^T)_ij. The byte-exact spec is in the README.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import EllipsisType

import torch
from torch import Tensor

from ..errors import (
    DtypeError,
    PatternError,
    RangeError,
    ShapeError,
    UnknownTensorError,
    ValueTypeError,
)
from . import bits
from .layout import (
    FACTOR_TYPES,
    INTEGER_RANGES,
    MAX_PLANES,
    TENSOR_NAMES,
    VALUE_TYPES,
    PackedLayout,
    check_range,
    check_tensors,
    plane_unit,
)
from .rounding import (
    MOST_LOST,
    fitting_dtype,
    round_adapter,
    round_factors,
    rounding_error,
)


@dataclass(frozen=True)
class Decomposition:
    """W ~= S + (U V^T) * B + P Q^T as dense tensors on one device; what every method returns.

    S [N,K] float, zero outside `mask` [N,K] bool (a kept value may be 0.0: kept is what the mask says, never what the
    value is). U [N,R], V [K,R], B [N,K] int8, in units of the last of `planes` signs: odd, within +-(2^planes - 1), so +1 or -1
    for one plane; and 0 on kept positions of an already folded decomposition.
    P [N,R'], Q [K,R']. If the folded kept values lie on an integer grid, `values` is "int8", "int4" or "int3", `scales`
    [N, ceil(K/group_size)] (or [N,1] when group_size is None) the step sizes.
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

    @property
    def out_features(self) -> int:
        return self.S.shape[0]

    @property
    def in_features(self) -> int:
        return self.S.shape[1]

    def sign_term(self) -> Tensor | None:
        """(U V^T) * B as [N,K] fp32, B counted in units of its last plane; or None."""
        if self.U is None:
            return None
        with torch.autocast(self.S.device.type, enabled=False):
            return (self.U.float() @ self.V.float().T) * self.B * plane_unit(self.planes)

    def dense(self) -> Tensor:
        """The weight it stands for, [N,K] fp32."""
        W = self.S.float()
        if self.U is not None:
            W = W + self.sign_term()
        if self.P is not None:
            with torch.autocast(self.S.device.type, enabled=False):
                W = W + self.P.float() @ self.Q.float().T
        return W

    def folded(self) -> Decomposition:
        """The same function with S' = S + (U V^T) * B on kept positions and B = 0 there."""
        if self.U is None:
            return self
        S = self.S.float() + torch.where(self.mask, self.sign_term(), 0.0)
        return replace(self, S=S, B=torch.where(self.mask, 0, self.B).to(torch.int8))


@dataclass(frozen=True)
class PackedWeight:
    """One weight in the canonical packed form: engine-neutral, sliceable with plain `narrow`, as stored on disk."""

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

    def adapter(self) -> tuple[Tensor, Tensor]:
        """P [N,R'] and Q [Kp,R'] as numbers: fp32 if they are stored as int8, else in the factors' type."""
        return (
            (bits.unpack_shared(self.P), bits.unpack_shared(self.Q))
            if self.layout.adapter_values
            else (self.P, self.Q)
        )

    def bits_per_weight(self, factors: bool = True) -> float:
        return self.layout.bits_per_weight(factors)

    def dense(self) -> Tensor:
        """The weight it stands for, [N,K] fp32."""
        return unpack(self).dense()

    def to(self, device: torch.device | str) -> PackedWeight:
        return replace(self, **{name: t.to(device) for name, t in self.tensors().items()})

    def narrow_out(self, start: int, length: int) -> PackedWeight:
        """Rows start .. start+length: every tensor with an N dimension is narrowed, V and Q shared.

        Raises: ShapeError.
        """
        check_range("out_features", start, length, self.out_features)
        parts = {
            name: t.narrow(0, start, length)
            for name, t in self.tensors().items()
            if name not in ("V", "Q")
        }
        layout = replace(
            self.layout,
            out_features=length,
        )
        return replace(self, layout=layout, **parts)

    def narrow_in(self, start: int, length: int) -> PackedWeight:
        """Columns start .. start+length.

        Both are multiples of `layout.slice_multiple`, or the end is in_features.

        Raises: ShapeError.
        """
        check_range("in_features", start, length, self.in_features, self.layout.slice_multiple)
        layout = replace(self.layout, in_features=length)
        table, Kp = layout.tensors(), self.layout.padded_in_features
        parts = {}
        for name, t in self.tensors().items():
            if name in ("V", "Q"):
                parts[name] = t.narrow(0, start, table[name][1][0])
            elif name not in ("U", "P") and not (
                name == "scales" and self.layout.group_size is None
            ):
                parts[name] = t.narrow(1, start * t.shape[1] // Kp, table[name][1][1])
        return replace(self, layout=layout, **parts)

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

        Raises: a FormatError subclass named after the first defect found.
        """
        for name in tensors:
            if name not in TENSOR_NAMES:
                raise UnknownTensorError(
                    f"tensor {name!r} is not part of the packed format ({', '.join(TENSOR_NAMES)})"
                )
        for name in ("U", "P"):
            if name in tensors and (tensors[name].dim() != 2 or tensors[name].shape[1] == 0):
                raise ShapeError(
                    f"{name} has shape {tuple(tensors[name].shape)}, expected [out_features, rank >= 1]"
                )
        types = [tensors[name].dtype for name in ("U", "P") if name in tensors]
        if unknown := [
            dtype for dtype in types if dtype not in (*FACTOR_TYPES.values(), torch.int8)
        ]:
            raise DtypeError(
                f"U or P is {unknown[0]}, expected one of {', '.join(map(str, FACTOR_TYPES.values()))}, or int8 for P"
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


def read_factors(U, P) -> dict[str, int | str | None]:
    """rank, adapter_rank, factors and adapter_values of a PackedLayout, from the dtypes and shapes of U and P (or None)."""
    names = {dtype: name for name, dtype in FACTOR_TYPES.items()}
    shared = P is not None and P.dtype == torch.int8
    stored = [names[t.dtype] for t in (U, P) if t is not None and t.dtype in names]
    return {
        "rank": 0 if U is None else U.shape[1], "adapter_rank": 0 if P is None else P.shape[1] - shared,
        "factors": stored[0] if stored else "fp16", "adapter_values": "int8" if shared else None,
    }  # fmt: skip


def pack(
    decomposition: Decomposition,
    values: str | None = None,
    group_size: int | EllipsisType | None = ...,
    factor_dtype: torch.dtype | None = None,
    adapter_values: str | None = None,
) -> PackedWeight:
    """Fold a decomposition and pack it.

    The stored weight equals the decomposition to one rounding of S' to `values` and of U, V, P, Q to `factor_dtype`.
    A decomposition on an integer grid (its `values`, `scales` and `group_size`) is packed on that
    grid; one without gets absolute-maximum scales. Groups with fewer than two kept entries are
    filled from the lowest free position.

    Args:
        values: "fp16", "bf16", "int8", "int4" or "int3"; default the type of the decomposition's
            own grid, else "fp16".
        group_size: inputs a scale, 32, 64, 128 or None (one scale a row); default that of the
            decomposition's own grid, else 128. Ignored for fp16 and bf16.
        factor_dtype: of U and V, and of P and Q without `adapter_values`; default fp16 where it
            holds them, else fp32.
        adapter_values: "int8" to store P and Q as int8 with an exponent a row, None for `factor_dtype`.

    Raises: PatternError for anything but 2:4, RangeError for numbers that do not fit,
        ValueTypeError for integers of another grid than the decomposition's own, ShapeError.
    """
    N, K = decomposition.S.shape
    values, group_size = _grid(decomposition, values, group_size)
    factor_names = {dtype: name for name, dtype in FACTOR_TYPES.items()}
    if factor_dtype is None:
        d = decomposition
        pairs = [(d.U, d.V), *([] if adapter_values else [(d.P, d.Q)])]
        factor_dtype = fitting_dtype(*(pair for pair in pairs if pair[0] is not None))
    if factor_dtype not in factor_names:
        raise ValueTypeError(
            f"factor_dtype={factor_dtype} is unknown; choose one of {', '.join(map(str, factor_names))}"
        )
    rank = 0 if decomposition.U is None else decomposition.U.shape[1]
    adapter_rank = 0 if decomposition.P is None else decomposition.P.shape[1]
    layout = PackedLayout(
        N,
        K,
        values,
        group_size,
        rank,
        adapter_rank,
        factor_names[factor_dtype],
        decomposition.planes,
        adapter_values,
    )
    Kp = layout.padded_in_features

    d = decomposition
    mask = _two_of_four(_pad(d.mask, Kp))
    term = d.sign_term()
    # Where B is 0 the value is folded already and is taken as it is: -0.0 + 0.0 would lose its sign.
    S = (
        d.S.float()
        if term is None
        else torch.where(mask[:, :K] & (d.B != 0), d.S.float() + term, d.S.float())
    )
    i0, i1 = bits.kept_positions(metadata := bits.pack_metadata(mask))
    kept = bits.gather_positions(_pad(S, Kp), i0, i1)
    parts = {"metadata": metadata}
    parts["values"], parts["scales"] = _encode_values(kept, d, layout)
    if rank:
        most = 2**layout.planes - 1
        level = _pad(d.B.to(torch.int8), Kp, fill=most)
        pruned = bits.gather_positions(level, *bits.pruned_positions(i0, i1))
        if bool((pruned == 0).any()):
            raise PatternError(
                f"B is 0 on {int((pruned == 0).sum())} pruned positions; it must be +1 or -1 there"
            )
        if bool(((pruned & 1 == 0) | (pruned.abs() > most)).any()):
            raise PatternError(
                f"B holds {int(pruned.abs().max())} at most; with planes={layout.planes} it is odd and within +-{most}"
            )
        parts["signs"] = bits.pack_planes(pruned, layout.planes)
        U, V = round_factors(d.U, d.V, factor_dtype)
        parts["U"], parts["V"] = U.to(factor_dtype), _pad_rows(V.to(factor_dtype), Kp)
    if adapter_rank:
        parts["P"], parts["Q"] = pack_adapter(d.P, d.Q, layout)
    return PackedWeight(
        layout=layout, **{name: t.contiguous() for name, t in parts.items() if t is not None}
    )


def _grid(
    d: Decomposition, values: str | None, group_size: int | EllipsisType | None
) -> tuple[str, int | None]:
    """The value type and group size to pack d with, those asked for or those of its own grid.

    Raises: ValueTypeError or ShapeError if they contradict each other.
    """
    own = d.values is not None or d.scales is not None
    values = values or d.values or "fp16"
    if group_size is ...:
        group_size = d.group_size if own else 128
    if own and (d.values not in INTEGER_RANGES or d.scales is None):
        has = "no scales" if d.scales is None else "scales"
        raise ValueTypeError(f"a decomposition with values={d.values!r} and {has} is on no grid")
    shape = (d.out_features, -(-d.in_features // d.group_size) if d.group_size else 1)
    grid = f"values={d.values!r} with group_size={d.group_size}"
    if own and tuple(d.scales.shape) != shape:
        raise ShapeError(f"scales has shape {tuple(d.scales.shape)}, expected {shape} for {grid}")
    if values not in INTEGER_RANGES:
        return values, None
    if own and (values, group_size) != (d.values, d.group_size):
        raise ValueTypeError(
            f"the decomposition lies on a grid of {grid}, which values={values!r} with "
            f"group_size={group_size} would round once more; pack it as it is, or decompose again"
        )
    return values, group_size


def pack_adapter(P: Tensor, Q: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
    """P [N,R'], Q [K,R'] -> the tensors of `layout`, Q padded. Raises RangeError if a number does not fit."""
    dtype = FACTOR_TYPES[layout.factors]
    P, Q = round_adapter(P, Q, layout.adapter_values, dtype)
    Q = _pad_rows(Q, layout.padded_in_features)
    stored = [
        bits.pack_shared(t) if layout.adapter_values else t.to(dtype).contiguous() for t in (P, Q)
    ]
    return stored[0], stored[1]


def unpack(packed: PackedWeight) -> Decomposition:
    """Exactly what is stored, as a folded Decomposition in fp32: `pack(unpack(p), ...)` gives p back bit for bit."""
    layout, K = packed.layout, packed.in_features
    i0, i1 = bits.kept_positions(packed.metadata)
    kept = bits.unpack_values(packed.values, layout.values).float()
    if packed.scales is not None:
        per_group = kept.shape[1] // packed.scales.shape[1]
        kept = (kept.unflatten(1, (-1, per_group)) * packed.scales.float()[..., None]).flatten(1)
    mask = bits.unpack_mask(packed.metadata)[:, :K]
    parts = {"S": bits.scatter_positions(kept, i0, i1)[:, :K], "mask": mask}
    if packed.signs is not None:
        level = bits.unpack_planes(packed.signs, layout.planes)
        parts["B"] = bits.scatter_positions(level, *bits.pruned_positions(i0, i1))[:, :K]
        parts["planes"] = layout.planes
        parts["U"], parts["V"] = packed.U.float(), packed.V[:K].float()
    if packed.P is not None:
        P, Q = packed.adapter()
        parts["P"], parts["Q"] = P.float(), Q[:K].float()
    if packed.scales is not None:
        parts |= {
            "scales": packed.scales.float(),
            "values": layout.values,
            "group_size": layout.group_size,
        }
    return Decomposition(**parts)


def _two_of_four(mask: Tensor) -> Tensor:
    """The mask with groups of fewer than two filled up from the lowest free position."""
    groups = mask.unflatten(-1, (-1, 4))
    count = groups.sum(-1, keepdim=True)
    if bool((over := count > 2).any()):
        raise PatternError(
            f"pack stores 2:4 only, because that is the pattern sparse tensor cores and the kernels read: "
            f"{int(over.sum())} of {over.numel()} groups of four keep more than two entries; decompose with "
            "pattern='2:4', or keep the dense result for 4:8 and unstructured patterns"
        )
    return (groups | ((~groups).cumsum(-1) <= 2 - count) & ~groups).flatten(-2)


def _encode_values(
    kept: Tensor, d: Decomposition, layout: PackedLayout
) -> tuple[Tensor, Tensor | None]:
    if not bool(kept.isfinite().all()):
        raise RangeError(f"{int((~kept.isfinite()).sum())} kept values are NaN or infinite")
    if layout.values not in INTEGER_RANGES:
        stored = kept.to(VALUE_TYPES[layout.values])
        if not bool(stored.isfinite().all()):
            raise RangeError(
                f"a kept value of {kept.abs().max():.4g} does not fit {layout.values}; use values='bf16'"
            )
        if rounding_error(kept, stored.dtype) > MOST_LOST:
            raise RangeError(
                f"kept values of up to {kept.abs().max():.3g} are below what "
                f"values={layout.values!r} holds; use values='bf16', or integers"
            )
        return stored, None
    low, high = INTEGER_RANGES[layout.values]
    count = layout.tensors()["scales"][1][1]
    groups = kept.unflatten(1, (count, -1))
    if d.scales is not None:
        scales = d.scales.to(torch.bfloat16)
    else:
        scales = (groups.abs().amax(-1) / high).to(torch.bfloat16)
    scales = torch.where(scales == 0, 1.0, scales).to(torch.bfloat16)
    steps = (groups / scales.float()[..., None]).round()
    beyond = (steps < low) | (steps > high)
    if d.scales is not None and bool(beyond.any()):
        found = f"{int(beyond.sum())} kept values"
        raise RangeError(f"{found} lie beyond {low} .. {high} steps of the decomposition's scales")
    q = steps.clamp(low, high).flatten(1).to(torch.int8)
    return bits.pack_values(q, layout.values), scales


def _pad(t: Tensor, width: int, fill: int = 0) -> Tensor:
    return torch.nn.functional.pad(t, (0, width - t.shape[1]), value=fill)


def _pad_rows(t: Tensor, height: int) -> Tensor:
    return torch.nn.functional.pad(t, (0, 0, 0, height - t.shape[0]))
