"""Packing: a Decomposition becomes the canonical stored tensors, folded and rounded."""

from __future__ import annotations

from dataclasses import replace
from reprlib import repr as short
from types import EllipsisType

import torch
from torch import Tensor

from ..errors import PatternError, RangeError, ShapeError, ValueTypeError
from . import bits
from .layout import (
    AUTO,
    FACTOR_TYPES,
    INTEGER_RANGES,
    VALUE_TYPES,
    PackedLayout,
    ceil_div,
    fitting_group_size,
)
from .rounding import MOST_LOST, fitting_dtype, round_adapter, round_factors, rounding_error
from .weight import Decomposition, PackedWeight

MOST_LOST_OF_ADDED = 2.0**-5  # the fraction of what is added to an int8 adapter that int8 may lose


def pack(
    decomposition: Decomposition,
    values: str | None = None,
    group_size: int | str | EllipsisType | None = ...,
    factor_dtype: torch.dtype | None = None,
    adapter_values: str | EllipsisType | None = ...,
) -> PackedWeight:
    """Fold a decomposition and pack it, as it says itself unless an argument asks for another form.

    The stored weight equals the decomposition to one rounding of S' to `values` and of U, V, P, Q
    to their types; numbers that lie on those types already stay as they are. Groups with fewer than
    two kept entries are filled from the lowest free position. The planes are the decomposition's.

    An argument that differs from the decomposition is a conversion, which rounds once:
    fp16, bf16 -> the other one; fp16, bf16 -> an integer, with scales of absolute maxima, which
    costs more than `decompose(..., values=...)`, where the rest of the layer makes up for the
    rounding; an integer -> fp16 or bf16, of which fp16 keeps 11 and bf16 8 significant bits;
    P and Q from int8 to the factors' type and back. One integer grid to another would round twice
    and is refused.

    Args:
        values: "fp16", "bf16", "int8", "int4" or "int3"; default the decomposition's, else "fp16".
        group_size: inputs that share a scale: 32, 64, 128, None (one scale per row) or "auto", the
            largest that divides K, else the one that pads it least. Default the decomposition's
            where it names an integer type, else "auto". Ignored for fp16 and bf16.
        factor_dtype: of U and V, and of P and Q that are not int8; default fp16 where it holds
            them, else fp32.
        adapter_values: "int8" to store P and Q as int8 with one exponent per row; None or "fp16"
            for the type of the factors; default the decomposition's.

    Raises: PatternError for anything but 2:4, RangeError for numbers that do not fit,
        ValueTypeError for an unknown type, or integers of another grid than the decomposition's
        own, ShapeError.
    """
    d = decomposition
    layout = _layout(d, values, group_size, factor_dtype, adapter_values)
    Kp = layout.padded_in_features
    mask = _two_of_four(_pad(d.mask, Kp))
    S, term = d.S.float(), d.sign_term()
    if term is not None and d.B is not None:
        # Where B is 0 the value is folded already and is taken as it is: -0.0 + 0.0 would lose its
        # sign.
        S = torch.where(mask[:, : d.in_features] & (d.B != 0), S + term, S)
    metadata = bits.pack_metadata(mask)
    i0, i1 = bits.kept_positions(metadata)
    stored, scales = _encode_values(bits.gather_positions(_pad(S, Kp), i0, i1), d, layout)
    parts = {"values": stored, "metadata": metadata}
    if scales is not None:
        parts["scales"] = scales
    if d.U is not None and d.V is not None and d.B is not None:
        level = _pad(d.B.to(torch.int8), Kp, fill=2**layout.planes - 1)
        pruned = bits.gather_positions(level, *bits.pruned_positions(i0, i1))
        parts["signs"] = _encode_levels(pruned, layout.planes)
        dtype = FACTOR_TYPES[layout.factors]
        U, V = round_factors(d.U, d.V, dtype)
        parts["U"], parts["V"] = U.to(dtype), _pad_rows(V.to(dtype), Kp)
    if d.P is not None and d.Q is not None:
        parts["P"], parts["Q"] = pack_adapter(d.P, d.Q, layout)
    return PackedWeight(layout, **{name: t.contiguous() for name, t in parts.items()})


def _layout(
    d: Decomposition,
    values: str | None,
    group_size: int | str | EllipsisType | None,
    factor_dtype: torch.dtype | None,
    adapter_values: str | EllipsisType | None,
) -> PackedLayout:
    """The layout to pack d in, from the arguments of `pack`."""
    value_type, size = _grid(d, values, group_size)
    if isinstance(adapter_values, EllipsisType):
        adapter_values = d.adapter_values
    elif adapter_values == "fp16":
        adapter_values = None
    if factor_dtype is None:
        pairs = [(d.U, d.V)] if adapter_values else [(d.U, d.V), (d.P, d.Q)]
        factor_dtype = fitting_dtype(*((a, b) for a, b in pairs if a is not None and b is not None))
    names = {dtype: name for name, dtype in FACTOR_TYPES.items()}
    if factor_dtype not in names:
        raise ValueTypeError(
            f"factor_dtype={factor_dtype} is unknown; choose one of {', '.join(map(str, names))}"
        )
    return PackedLayout(
        d.out_features,
        d.in_features,
        value_type,
        size,
        rank=0 if d.U is None else d.U.shape[1],
        adapter_rank=0 if d.P is None else d.P.shape[1],
        factors=names[factor_dtype],
        planes=d.planes,
        adapter_values=adapter_values,
    )


def _grid(
    d: Decomposition, values: str | None, group_size: int | str | EllipsisType | None
) -> tuple[str, int | None]:
    """The value type and group size to pack d with, those asked for or its own.

    Raises: ValueTypeError or ShapeError if they contradict each other.
    """
    values = values or d.values or "fp16"
    if isinstance(group_size, EllipsisType):
        group_size = d.group_size if d.values in INTEGER_RANGES else AUTO
    if d.scales is not None:
        _check_own_grid(d, d.scales)
    if values not in INTEGER_RANGES:
        return values, None
    if group_size == AUTO:
        group_size = fitting_group_size(d.in_features)
    if isinstance(group_size, str):
        raise ValueTypeError(
            f"group_size={short(group_size)} must be 32, 64, 128, None (one scale per row) or "
            f"{AUTO!r}"
        )
    if d.scales is not None and (values, group_size) != (d.values, d.group_size):
        raise ValueTypeError(
            f"the decomposition lies on a grid of values={d.values!r} with "
            f"group_size={d.group_size}, which values={values!r} with group_size={group_size} "
            "would round once more; pack it as it is, or decompose again"
        )
    return values, group_size


def _check_own_grid(d: Decomposition, scales: Tensor) -> None:
    if d.values not in INTEGER_RANGES:
        raise ValueTypeError(f"a decomposition with values={d.values!r} and scales is on no grid")
    shape = (d.out_features, ceil_div(d.in_features, d.group_size) if d.group_size else 1)
    if tuple(scales.shape) != shape:
        raise ShapeError(
            f"scales has shape {tuple(scales.shape)}, expected {shape} for values={d.values!r} "
            f"with group_size={d.group_size}"
        )


def pack_adapter(P: Tensor, Q: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
    """P [N,R'], Q [K,R'] as the tensors of `layout`, Q padded.

    Raises: RangeError if a number does not fit.
    """
    dtype = FACTOR_TYPES[layout.factors]
    P, Q = round_adapter(P, Q, layout.adapter_values, dtype)
    Q = _pad_rows(Q, layout.padded_in_features)
    if layout.adapter_values:
        return bits.pack_shared(P), bits.pack_shared(Q)
    return P.to(dtype).contiguous(), Q.to(dtype).contiguous()


def with_adapter(packed: PackedWeight, P: Tensor, Q: Tensor) -> PackedWeight:
    """The weight plus P Q^T, P [N,r] and Q [K,r] of a floating dtype: its adapter grows by rank r.

    P and Q are stored as those that are there already, which are rounded once more, and as U and V
    where there are none. An int8 adapter takes the type of U and V where int8 would lose more than
    MOST_LOST_OF_ADDED of P Q^T, in the Frobenius norm. Columns of P or Q that are all zero add
    nothing and are left out. The other tensors are shared, not copied.

    Raises: RangeError for numbers that are not finite or do not fit.
    """
    layout, device = packed.layout, packed.values.device
    P, Q = P.detach().to(device).float(), Q.detach().to(device).float()
    adds = (P != 0).any(0) & (Q != 0).any(0)
    if not bool(adds.any()):
        return packed
    P, Q = added = P[:, adds], Q[:, adds]
    if packed.P is not None:
        old_P, old_Q = packed.adapter()
        P = torch.cat([old_P.float(), P], 1)
        Q = torch.cat([old_Q[: layout.in_features].float(), Q], 1)
    grown = replace(layout, adapter_rank=P.shape[1])
    if grown.adapter_values:
        kept = round_adapter(P, Q, grown.adapter_values)
        lost = torch.cat([kept[0], -P], 1), torch.cat([kept[1], Q], 1)
        if not _product_norm(*lost) <= MOST_LOST_OF_ADDED * _product_norm(*added):
            grown = replace(grown, adapter_values=None)
    stored_P, stored_Q = pack_adapter(P, Q, grown)
    return replace(packed, layout=grown, P=stored_P, Q=stored_Q)


def _product_norm(P: Tensor, Q: Tensor) -> float:
    """The Frobenius norm of P Q^T, without making it."""
    P, Q = P.double(), Q.double()
    return float(((P.T @ P) * (Q.T @ Q)).sum().clamp_min(0).sqrt())


def _two_of_four(mask: Tensor) -> Tensor:
    """The mask [N,Kp] with groups of fewer than two filled up from the lowest free position."""
    groups = mask.unflatten(-1, (-1, 4))
    count = groups.sum(-1, keepdim=True)
    if bool((over := count > 2).any()):
        raise PatternError(
            "pack stores 2:4 only, because that is the pattern sparse tensor cores and the kernels "
            f"read: {int(over.sum())} of {over.numel()} groups of four keep more than two entries; "
            "decompose with pattern='2:4', or keep the dense result for 4:8 and unstructured "
            "patterns"
        )
    return (groups | ((~groups).cumsum(-1) <= 2 - count) & ~groups).flatten(-2)


def _encode_levels(pruned: Tensor, planes: int) -> Tensor:
    """The sign planes of B's pruned entries [N,Kp/2]: [N, planes Kp/16] uint8."""
    most = 2**planes - 1
    if zeros := int((pruned == 0).sum()):
        raise PatternError(f"B is 0 on {zeros} pruned positions; it must be +1 or -1 there")
    if bool(((pruned & 1 == 0) | (pruned.abs() > most)).any()):
        raise PatternError(
            f"B holds {int(pruned.abs().max())} at most; with planes={planes} it is odd and within "
            f"+-{most}"
        )
    return bits.pack_planes(pruned, planes)


def _encode_values(
    kept: Tensor, d: Decomposition, layout: PackedLayout
) -> tuple[Tensor, Tensor | None]:
    """The kept entries [N,Kp/2] fp32 as stored, and the scales of integers."""
    if not bool(kept.isfinite().all()):
        raise RangeError(f"{int((~kept.isfinite()).sum())} kept values are NaN or infinite")
    if layout.values in INTEGER_RANGES:
        return _encode_integers(kept, d.scales, layout)
    stored, most = kept.to(VALUE_TYPES[layout.values]), kept.abs().max()
    if not bool(stored.isfinite().all()):
        raise RangeError(
            f"a kept value of {most:.4g} does not fit {layout.values}; use values='bf16'"
        )
    if rounding_error(kept, stored.dtype) > MOST_LOST:
        raise RangeError(
            f"kept values of up to {most:.3g} are below what values={layout.values!r} holds; use "
            "values='bf16', or integers"
        )
    return stored, None


def _encode_integers(
    kept: Tensor, own: Tensor | None, layout: PackedLayout
) -> tuple[Tensor, Tensor]:
    """Integers and their scales: the decomposition's `own`, or those of absolute maxima."""
    low, high = INTEGER_RANGES[layout.values]
    groups = kept.unflatten(1, (layout.tensors()["scales"][1][1], -1))
    scales = groups.abs().amax(-1) / high if own is None else own
    scales = scales.to(torch.bfloat16)
    scales = torch.where(scales == 0, 1.0, scales).to(torch.bfloat16)
    steps = (groups / scales.float()[..., None]).round()
    beyond = (steps < low) | (steps > high)
    if own is not None and bool(beyond.any()):
        found = f"{int(beyond.sum())} kept values"
        raise RangeError(f"{found} lie beyond {low} .. {high} steps of the decomposition's scales")
    q = steps.clamp(low, high).flatten(1).to(torch.int8)
    return bits.pack_values(q, layout.values), scales


def _pad(t: Tensor, width: int, fill: int = 0) -> Tensor:
    return torch.nn.functional.pad(t, (0, width - t.shape[1]), value=fill)


def _pad_rows(t: Tensor, height: int) -> Tensor:
    return torch.nn.functional.pad(t, (0, 0, 0, height - t.shape[0]))
