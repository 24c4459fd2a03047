"""The format: exhaustive identities, golden bytes, inverses, slices, a named error per defect."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slab_kernels import errors
from slab_kernels import format as fmt
from slab_kernels.format import bits
from slab_kernels.format.check import check_tensors
from slab_kernels.testing import VALUE_LAYOUTS, random_packed

PATTERNS = list(itertools.combinations(range(4), 2))


def random_decomposition(N, K, rank=1, seed=0, kept=2, adapter_rank=0):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(N, K, generator=g)
    score = torch.rand(N, -(-K // 4), 4, generator=g)
    mask = torch.zeros_like(score, dtype=torch.bool).scatter_(
        -1, score.topk(kept, -1).indices, True
    )
    mask = mask.flatten(1)[:, :K]
    parts = {}
    if rank:
        B = torch.where(torch.rand(N, K, generator=g) < 0.5, -1, 1).to(torch.int8)
        parts = {
            "U": torch.rand(N, rank, generator=g),
            "V": torch.rand(K, rank, generator=g),
            "B": B,
        }
    if adapter_rank:
        parts |= {
            "P": torch.randn(N, adapter_rank, generator=g),
            "Q": torch.randn(K, adapter_rank, generator=g),
        }
    return fmt.Decomposition(S=W * mask, mask=mask, **parts)


def same(a: fmt.PackedWeight, b: fmt.PackedWeight) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    return a.layout == b.layout and all(torch.equal(ours[n], theirs[n]) for n in ours | theirs)


# ---- the identity that makes the format fast (design: complement of a 2:4 mask is a 2:4 mask) ----


def test_legal_nibbles_are_the_ascending_pairs():
    assert sorted(bits.LEGAL_NIBBLES) == sorted(i0 | i1 << 2 for i0, i1 in PATTERNS)


def test_pruned_positions_are_the_complement():
    for i0, i1 in PATTERNS:
        p0, p1 = bits.pruned_positions(torch.tensor(i0), torch.tensor(i1))
        assert [int(p0), int(p1)] == sorted({0, 1, 2, 3} - {i0, i1})


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_bit_packers_are_inverse(data):
    N, Kp = data.draw(st.integers(1, 5)), 16 * data.draw(st.integers(1, 9))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    nibbles = torch.tensor(bits.LEGAL_NIBBLES, dtype=torch.uint8)[
        torch.randint(6, (N, Kp // 4), generator=g)
    ]
    metadata = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    assert torch.equal(bits.pack_metadata(bits.unpack_mask(metadata)), metadata)
    signs = torch.randint(0, 256, (N, Kp // 16), generator=g, dtype=torch.uint8)
    assert torch.equal(bits.pack_signs(bits.unpack_signs(signs)), signs)
    q = torch.randint(-8, 8, (N, Kp // 2), generator=g, dtype=torch.int8)
    assert torch.equal(bits.unpack_int4(bits.pack_int4(q)), q)
    q = torch.randint(-4, 4, (N, Kp // 2), generator=g, dtype=torch.int8)
    assert torch.equal(bits.unpack_int3(bits.pack_int3(q)), q)
    for planes in (1, 2, 3):
        stored = torch.randint(0, 256, (N, planes * Kp // 16), generator=g, dtype=torch.uint8)
        odd = bits.unpack_planes(stored, planes)
        assert bool((odd % 2 != 0).all()) and int(odd.abs().max()) < 2**planes
        assert torch.equal(bits.pack_planes(odd, planes), stored)
    assert torch.equal(
        bits.unpack_planes(signs, 1), 1 - 2 * bits.unpack_signs(signs).to(torch.int8)
    )


# ---- golden bytes: the README's spec, worked by hand ----


def golden():
    """One row of 16 inputs: groups keep (0,1), (0,2), (1,3), (2,3)."""
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1]], dtype=torch.bool)
    S = torch.zeros(1, 16)
    S[mask] = torch.tensor([1.0, -2.0, 3.0, 0.5, 7.0, -7.0, 4.0, -1.0])
    B = torch.ones(1, 16, dtype=torch.int8)
    B[0, [3, 5, 8, 13]] = -1  # pruned entries ascending: 2 3 | 5 7 | 8 10 | 12 13
    B[mask] = 0
    return fmt.Decomposition(
        S=S, mask=mask, U=torch.tensor([[0.5]]), V=torch.full((16, 1), 0.25), B=B
    )


def test_golden_bytes_fp16():
    t = {
        name: bytes(v.view(torch.uint8).flatten().tolist()).hex()
        for name, v in fmt.pack(golden()).tensors().items()
    }
    # nibbles 4 (0|1<<2), 8 (0|2<<2), D (1|3<<2), E (2|3<<2); signs: entries 1, 2, 4, 7 are
    # negative.
    assert t["metadata"] == "84ed"
    assert t["signs"] == f"{0b10010110:02x}"
    assert t["values"] == "003c00c000420038004700c7004400bc"
    assert t["U"] == "0038" and t["V"] == "0034" * 16


def test_golden_bytes_int4():
    p = fmt.pack(
        fmt.Decomposition(S=golden().S * (golden().S.abs() != 0.5), mask=golden().mask),
        "int4",
        None,
    )
    # absolute maximum 7 over a range of 7: step 1. Nibbles two's complement, first kept value low.
    assert bytes(p.values.flatten().tolist()).hex() == "e1" + "03" + "97" + "f4"
    assert p.scales.tolist() == [[1.0]]


def test_golden_bytes_int3():
    S = golden().S.clone()
    S[golden().mask] = torch.tensor([1.0, -2.0, 3.0, -4.0, 2.0, 0.0, -1.0, -3.0])
    p = fmt.pack(
        fmt.Decomposition(S=S, mask=golden().mask, scales=torch.ones(1, 1), values="int3"),
        "int3",
        None,
    )
    # two's complement, three bits each, the first value lowest: 001 110 011 100 010 000 111 101
    word = 0b101_111_000_010_100_011_110_001
    assert bytes(p.values.flatten().tolist()) == word.to_bytes(3, "little")


def test_golden_bytes_of_two_planes():
    d = golden()
    B = torch.zeros(1, 16, dtype=torch.int8)
    B[0, [2, 3, 5, 7, 8, 10, 12, 13]] = torch.tensor([3, -3, 1, -1, 3, 3, -1, 1], dtype=torch.int8)
    d = fmt.Decomposition(S=d.S, mask=d.mask, U=d.U, V=d.V, B=B, planes=2)
    p = fmt.pack(d)
    # B / 2 in magnitudes: plane 0 counts 1, plane 1 counts 1/2; 3 = ++, 1 = +-, -1 = -+, -3 = --;
    # set bits are minus.
    assert p.signs.tolist() == [[0b01001010, 0b10000110]]
    low = 0.5 * 0.25
    assert p.dense()[0, [2, 3, 5, 7, 8, 10, 12, 13]].tolist() == [
        1.5 * low,
        -1.5 * low,
        low / 2,
        -low / 2,
        1.5 * low,
        1.5 * low,
        -low / 2,
        low / 2,
    ]


@pytest.mark.parametrize("planes", [2, 3])
def test_planes_round_trip_slice_and_are_read_off_the_signs(planes):
    layout = fmt.PackedLayout(9, 52, "int3", 32, rank=2, planes=planes)
    p = random_packed(layout)
    check_tensors(p.tensors(), layout)
    assert same(fmt.pack(fmt.unpack(p), "int3", 32), p)
    assert same(fmt.PackedWeight.from_tensors(p.tensors(), 9, 52, "int3", 32), p)
    assert layout.bits_per_weight(False) == pytest.approx((1 + 1.5 + planes / 2 + 0.5) * 64 / 52)
    torch.testing.assert_close(p.narrow_in(32, 20).dense(), p.dense()[:, 32:])
    torch.testing.assert_close(p.narrow_out(3, 4).dense(), p.dense()[3:7])
    d = fmt.unpack(p)
    for wrong in (2, 2**planes + 1):
        B = torch.where(d.mask, 0, wrong).to(torch.int8)
        with pytest.raises(errors.PatternError, match=f"planes={planes}"):
            fmt.pack(fmt.Decomposition(d.S, d.mask, d.U, d.V, B, planes=planes))
    with pytest.raises(errors.ShapeError, match="planes=4"):
        fmt.PackedLayout(9, 52, rank=1, planes=4)


# ---- pack and unpack ----


@pytest.mark.parametrize("values, group_size", VALUE_LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 2), (5, 7), (3, 172), (16, 256)])
@pytest.mark.parametrize("rank, adapter_rank", [(0, 0), (1, 0), (2, 2), (0, 1)])
def test_unpack_is_the_exact_inverse(values, group_size, shape, rank, adapter_rank):
    rank, adapter_rank = min(rank, *shape), min(adapter_rank, *shape)
    d = random_decomposition(*shape, rank=rank, adapter_rank=adapter_rank)
    p = fmt.pack(d, values, group_size)
    assert same(fmt.pack(fmt.unpack(p), values, group_size), p)
    assert same(fmt.PackedWeight.from_tensors(p.tensors(), *shape, values, group_size), p)


@pytest.mark.parametrize("values, group_size", VALUE_LAYOUTS)
def test_packing_random_packed_weights_gives_them_back(values, group_size):
    layout = fmt.PackedLayout(33, 260, values, group_size, rank=2, adapter_rank=3)
    p = random_packed(layout)
    check_tensors(p.tensors(), layout)
    assert same(fmt.pack(fmt.unpack(p), values, group_size), p)


def test_packing_changes_the_weight_by_one_rounding_only():
    d = random_decomposition(64, 128, rank=2, adapter_rank=3)
    p, W = fmt.pack(d, "fp16"), d.dense()
    adapter = d.P.abs() @ d.Q.abs().T  # every product of two rounded factors: 2 roundings
    L = d.U @ d.V.T
    bound = 2.0**-11 * (1.01 * (d.folded().S.abs() + 2 * L + 2 * adapter))
    assert bool(((p.dense() - W).abs() <= bound + 1e-7).all())


def test_folding_keeps_the_function_and_halves_the_signs():
    d = random_decomposition(32, 64)
    folded = d.folded()
    assert torch.allclose(folded.dense(), d.dense(), atol=1e-6)
    assert int((folded.B != 0).sum()) == 32 * 64 // 2
    assert same(fmt.pack(d), fmt.pack(folded))


def test_kept_is_what_the_mask_says_not_what_the_value_is():
    mask = torch.tensor([[True, False, True, False]])
    d = fmt.Decomposition(S=torch.tensor([[0.0, 0.0, -0.0, 0.0]]), mask=mask)
    p = fmt.pack(d)
    assert torch.equal(fmt.unpack(p).mask, mask)
    assert p.values.view(torch.int16)[0, 1] == -(1 << 15)  # -0.0 is stored as -0.0


def test_sparser_groups_are_filled_and_denser_refused():
    one = random_decomposition(8, 16, kept=1)
    assert torch.allclose(fmt.pack(one).dense(), one.dense(), atol=2e-3)
    with pytest.raises(errors.PatternError, match="2:4 only.*keep more than two"):
        fmt.pack(random_decomposition(8, 16, kept=3))


def test_bits_per_weight_of_the_design():
    full = fmt.PackedLayout(4096, 4096, "fp16", rank=1)
    assert full.bits_per_weight(factors=False) == 9.5
    assert fmt.PackedLayout(4096, 4096, "int8", 128, rank=1).bits_per_weight() < 5.65
    assert fmt.PackedLayout(4096, 4096, "int4", 128, rank=1).bits_per_weight() <= 3.65
    p = random_packed(fmt.PackedLayout(64, 128, "fp16", rank=1))
    assert p.bits_per_weight() == 8 * sum(t.nbytes for t in p.tensors().values()) / (64 * 128)


@pytest.mark.parametrize("values, group_size", VALUE_LAYOUTS)
def test_slices_are_plain_narrows(values, group_size):
    layout = fmt.PackedLayout(48, 512, values, group_size, rank=2, adapter_rank=3)
    p = random_packed(layout)
    W = p.dense()
    assert torch.equal(p.narrow_out(7, 12).dense(), W[7:19])
    multiple = layout.slice_multiple
    part = p.narrow_in(multiple, 512 - multiple)
    check_tensors(part.tensors(), part.layout)
    assert torch.equal(part.dense(), W[:, multiple:])
    with pytest.raises(errors.ShapeError, match=f"multiples of {multiple}"):
        p.narrow_in(multiple // 2, multiple)


@pytest.mark.parametrize(
    ("start", "length"),
    [
        *((-16, 16), (0, 0), (0, -16), (16, 512), (512, 16)),
        *((True, 16), (0, True), (0.0, 16), (0, 16.0), ("0", 16)),
    ],
)
def test_slices_that_are_not_inside_are_refused(start, length):
    p = random_packed(fmt.PackedLayout(48, 512, rank=1))
    for name, slicer in (("out_features", p.narrow_out), ("in_features", p.narrow_in)):
        with pytest.raises(errors.ShapeError, match=f"cannot slice {name}"):
            slicer(start, length)


def test_a_decomposition_is_packed_on_its_own_grid():
    p = random_packed(fmt.PackedLayout(16, 256, "int8", 64, rank=1))
    d = fmt.unpack(p)
    for again in (fmt.pack(d), fmt.pack(d, "int8"), fmt.pack(d, group_size=64)):
        assert same(again, p)
    wide = fmt.pack(d, "bf16")
    assert wide.layout.values == "bf16" and torch.allclose(wide.dense(), p.dense(), rtol=2**-8)
    others = (("int4", 64), ("int3", ...), ("int8", 32), ("int8", None), (None, 128))
    for values, group_size in others:
        with pytest.raises(
            errors.ValueTypeError, match="'int8' with group_size=64.*round once more"
        ):
            fmt.pack(d, values, group_size)
    replaced = dataclasses.replace
    with pytest.raises(errors.ValueTypeError, match="values='fp16' and scales is on no grid"):
        fmt.pack(replaced(d, values="fp16"))
    with pytest.raises(errors.ShapeError, match=r"scales has shape \(16, 1\), expected \(16, 4\)"):
        fmt.pack(replaced(d, scales=d.scales[:, :1]))
    with pytest.raises(errors.RangeError, match="beyond -127 .. 127 steps"):
        fmt.pack(replaced(d, S=3 * d.S))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-9, 1e-7, 1e-5, 1e4])
def test_weights_of_any_size_keep_their_precision_or_are_refused(scale):
    d = random_decomposition(16, 64, rank=2, adapter_rank=2)
    root = scale**0.5
    factors = {name: getattr(d, name) * root for name in ("U", "V", "P", "Q")}
    d = dataclasses.replace(d, S=d.S * scale, **factors)
    W = d.dense()
    half, coarse = (("bf16", None), ("fp16", None)), (("bf16", "int8"), ("int8", None))
    for values, adapter_values in half + coarse:
        if values == "fp16" and scale < 1e-6:
            with pytest.raises(errors.RangeError, match="below what values='fp16' holds; use"):
                fmt.pack(d, values)
            continue
        packed = fmt.pack(d, values, adapter_values=adapter_values)
        assert packed.layout.factors == ("fp16" if scale > 1e-10 else "fp32")
        lost = float((packed.dense().double() - W).norm() / W.double().norm())
        assert lost < (4e-3 if (values, adapter_values) in half else 2e-2)
    if scale < 1e-10:
        with pytest.raises(errors.RangeError, match="does not fit torch.float16; pack with factor"):
            fmt.pack(d, "bf16", factor_dtype=torch.float16)


def test_factors_far_apart_are_balanced_and_stay_in_fp16():
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(40, 2, generator=generator) * 2.0**13
    V = torch.randn(24, 2, generator=generator) * 2.0**-13
    u, v = fmt.round_factors(U, V)
    ratio = u.abs().amax(0) / v.abs().amax(0)
    assert bool(((ratio >= 0.5) & (ratio <= 2)).all())
    assert torch.equal(u.half().float(), u) and torch.equal(v.half().float(), v)


def test_factors_keep_their_product_in_range():
    U, V = (
        torch.rand(8, 2) * 1e-6,
        torch.rand(16, 2) * 1e5,
    )  # v alone would overflow fp16, u alone underflow
    u, v = fmt.round_factors(U, V)
    assert torch.allclose(u @ v.T, U @ V.T, rtol=2e-3)
    assert all(torch.equal(a, b) for a, b in zip(fmt.round_factors(u, v), (u, v), strict=True))
    with pytest.raises(errors.RangeError, match="does not fit torch.float16"):
        fmt.round_factors(torch.full((2, 1), 1e30), torch.full((4, 1), 1e30), torch.float16)


def test_golden_bytes_of_an_int8_adapter():
    rows = torch.tensor([[127.0, -3.0], [1.0, -0.5], [0.0, 0.0], [2.0**-140, 0.0], [3e38, -1e38]])
    assert bits.pack_shared(rows).tolist() == [
        [127, -3, 0],
        [64, -32, -6],
        [0, 0, 0],
        [0, 0, 0],
        [127, -75, 120],
    ]
    stored = bits.pack_shared(torch.randn(200, 7) * torch.logspace(-30, 30, 200)[:, None])
    again = bits.pack_shared(bits.unpack_shared(stored))
    assert torch.equal(again, stored) and int(stored[:, :-1].abs().amax(1).min()) >= 64


@pytest.mark.parametrize("bad", [3e38, float("inf"), float("nan")])
def test_an_int8_adapter_beyond_its_range_is_refused(bad):
    d = random_decomposition(16, 32, adapter_rank=2)
    d.P[3, 1] = bad
    with pytest.raises(errors.RangeError, match="int8 adapters|NaN"):
        fmt.pack(d, adapter_values="int8")


def test_int8_adapters_round_trip_and_cost_half():
    P, Q = torch.randn(20, 6) * 1e-6, torch.randn(40, 6) * 1e4
    mask = torch.zeros(20, 40, dtype=torch.bool)
    mask[:, ::2] = True
    d = fmt.Decomposition(torch.zeros(20, 40), mask, P=P, Q=Q)
    packed = fmt.pack(d, adapter_values="int8")
    assert (
        packed.P.dtype == torch.int8
        and tuple(packed.Q.shape) == (48, 7)
        and packed.layout.adapter_rank == 6
    )
    assert float((packed.dense() - P @ Q.T).norm() / (P @ Q.T).norm()) < 0.01
    assert fmt.PackedWeight.from_tensors(packed.tensors(), 20, 40).layout == packed.layout
    again = fmt.pack(fmt.unpack(packed), adapter_values="int8")
    assert all(torch.equal(again.tensors()[name], t) for name, t in packed.tensors().items())
    assert torch.equal(packed.narrow_out(3, 9).dense(), packed.dense()[3:12])
    assert torch.equal(packed.narrow_in(16, 24).dense(), packed.dense()[:, 16:])
    plain = fmt.pack(d)
    assert packed.bits_per_weight() < plain.bits_per_weight() - 8 * 5 * (20 + 40) / (20 * 40)
    for place, bad, error in (("P", -128, "code -128"), ("Q", 121, "exponent beyond")):
        parts = {name: t.clone() for name, t in packed.tensors().items()}
        parts[place][0, 0 if bad < 0 else -1] = bad
        with pytest.raises(errors.RangeError, match=error):
            fmt.PackedWeight.from_tensors(parts, 20, 40)


# ---- one named error per defect, before anything is used ----


def tensors(**changes):
    base = random_packed(fmt.PackedLayout(8, 40, "fp16", rank=1, adapter_rank=2)).tensors()
    return {name: t for name, t in (base | changes).items() if t is not None}


DEFECTS = {
    "missing": (lambda: tensors(metadata=None), errors.MissingTensorError, "'metadata' is missing"),
    "missing factor": (lambda: tensors(V=None), errors.MissingTensorError, "'V' is missing"),
    "unknown": (
        lambda: tensors(weight=torch.zeros(1)),
        errors.UnknownTensorError,
        "'weight' is not part",
    ),
    "left over": (lambda: tensors(U=None), errors.UnknownTensorError, "does not belong"),
    "scales of fp16": (
        lambda: tensors(scales=torch.ones(8, 1)),
        errors.UnknownTensorError,
        "'scales'",
    ),
    "wrong dtype": (
        lambda: tensors(values=torch.zeros(8, 24)),
        errors.DtypeError,
        "values is torch.float32",
    ),
    "wrong factor dtype": (
        lambda: tensors(U=torch.ones(8, 1, dtype=torch.int8)),
        errors.DtypeError,
        "torch.int8",
    ),
    "truncated": (
        lambda: tensors(values=tensors()["values"][:, :-1]),
        errors.ShapeError,
        "expected (8, 24)",
    ),
    "flat factor": (
        lambda: tensors(U=torch.ones(8, dtype=torch.float16)),
        errors.ShapeError,
        "rank >= 1",
    ),
    "illegal nibble": (
        lambda: tensors(metadata=torch.zeros(8, 6, dtype=torch.uint8)),
        errors.MetadataError,
        "96 nibbles",
    ),
    "NaN": (
        lambda: tensors(values=tensors()["values"] * torch.nan),
        errors.RangeError,
        "values holds NaN",
    ),
    "dirty padding": (
        lambda: tensors(V=torch.ones(48, 1).half()),
        errors.PaddingError,
        "in_features=40",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_named(defect):
    make, error, text = DEFECTS[defect]
    with pytest.raises(error) as caught:
        fmt.PackedWeight.from_tensors(make(), 8, 40)
    assert type(caught.value) is error and text in str(caught.value)


@pytest.mark.parametrize("K", [5, 6, 7])
def test_padding_inside_the_last_group_is_checked(K):
    layout = fmt.PackedLayout(8, K, "fp16", rank=1)
    clean = random_packed(layout)
    check_tensors(clean.tensors(), layout)
    assert same(fmt.pack(fmt.unpack(clean)), clean)
    metadata = clean.metadata.clone()
    metadata[0, 0] = (
        0xE4  # the second group keeps positions 2 and 3, padding while real inputs are free
    )
    with pytest.raises(errors.PaddingError):
        check_tensors(clean.tensors() | {"metadata": metadata}, layout)
    signs = (
        clean.signs | 0b1000
    )  # entry 3: the second group's last pruned position, which is padding
    with pytest.raises(errors.PaddingError):
        check_tensors(clean.tensors() | {"signs": signs}, layout)


def test_finite_parts_whose_product_overflows_are_refused():
    layout = fmt.PackedLayout(8, 64, "fp16", rank=1, factors="fp32")
    t = random_packed(layout).tensors()
    with pytest.raises(errors.RangeError, match="beyond fp32"):
        check_tensors(t | {"U": t["U"] * 1e30, "V": t["V"] * 1e30}, layout)
    scaled = fmt.PackedLayout(8, 64, "int8", 32)
    t = random_packed(scaled).tensors()
    with pytest.raises(errors.RangeError, match="must be positive"):
        check_tensors(t | {"scales": t["scales"] * 0}, scaled)


def test_negative_zero_and_narrow_slices_survive():
    p = random_packed(fmt.PackedLayout(32, 64, "fp16", rank=4))
    p.values.fill_(-0.0)
    assert bool(fmt.pack(fmt.unpack(p)).values.signbit().all())
    assert p.narrow_out(3, 2).dense().shape == (2, 64)  # fewer rows than ranks


def test_minus_128_is_refused():
    p = random_packed(fmt.PackedLayout(8, 64, "int8", 32))
    p.values[3, 3] = -128
    with pytest.raises(errors.RangeError, match="-128"):
        check_tensors(p.tensors(), p.layout)


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"values": "fp8"}, errors.ValueTypeError, "fp16, bf16, int8, int4"),
        ({"factors": "fp8"}, errors.ValueTypeError, "fp16, bf16, fp32"),
        ({"values": "int4", "group_size": 48}, errors.ValueTypeError, "32, 64, 128"),
        ({"group_size": 64}, errors.ValueTypeError, "fp16 and bf16 only None"),
        ({"out_features": 1 << 40}, errors.ShapeError, "out_features"),
        ({"in_features": 0}, errors.ShapeError, "in_features"),
        ({"in_features": -4}, errors.ShapeError, "in_features"),
        ({"rank": -1}, errors.ShapeError, "rank=-1"),
        ({"rank": False}, errors.ShapeError, "rank=False"),
        ({"values": {}}, errors.ValueTypeError, "values={}"),
        ({"values": "int4", "group_size": 32.0}, errors.ValueTypeError, "group_size=32.0"),
    ],
)
def test_absurd_layouts_are_refused(changes, error, text):
    with pytest.raises(error) as caught:
        fmt.PackedLayout(**({"out_features": 8, "in_features": 40} | changes))
    assert text in str(caught.value)


def test_numbers_that_do_not_fit_are_refused():
    d = random_decomposition(4, 8, rank=0)
    big = fmt.Decomposition(S=d.S * 1e6, mask=d.mask)
    with pytest.raises(errors.RangeError, match="use values='bf16'"):
        fmt.pack(big)
    assert fmt.pack(big, "bf16").dense().isfinite().all()
    nan = fmt.Decomposition(S=torch.where(d.mask, torch.nan, 0.0), mask=d.mask)
    with pytest.raises(errors.RangeError, match="16 kept values are NaN"):
        fmt.pack(nan)
    unsigned = random_decomposition(4, 8)
    with pytest.raises(errors.PatternError, match="B is 0 on 16 pruned"):
        fmt.pack(
            fmt.Decomposition(
                unsigned.S, unsigned.mask, unsigned.U, unsigned.V, B=unsigned.B * unsigned.mask
            )
        )


def test_layout_survives_json_and_ignores_what_it_does_not_know():
    layout = fmt.PackedLayout(8, 40, "int4", 32, rank=2, adapter_rank=1, factors="bf16")
    assert fmt.PackedLayout.from_dict(layout.to_dict() | {"planes": 1}) == layout
    with pytest.raises(errors.ShapeError, match="lacks in_features"):
        fmt.PackedLayout.from_dict({"out_features": 3})
