"""A decomposition is packed as what it carries; anything else is a conversion, or refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from slab_kernels import errors
from slab_kernels import format as fmt
from slab_kernels.testing import random_packed

N, K = 24, 160


@pytest.fixture
def plain() -> fmt.Decomposition:
    """S on a 2:4 mask and P Q^T, random fp32 numbers that lie on no stored type."""
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(N, K // 4, 4, generator=g).argsort(-1) < 2
    S = torch.randn(N, K, generator=g) * mask.flatten(1)
    P, Q = torch.randn(N, 3, generator=g), torch.randn(K, 3, generator=g)
    return fmt.Decomposition(S, mask.flatten(1), P=P, Q=Q)


@pytest.mark.parametrize("values", [None, "fp16", "bf16"])
def test_floats_become_any_other_type_by_one_rounding(plain, values):
    d = dataclasses.replace(plain, values=values)
    assert fmt.pack(d).layout.values == (values or "fp16")
    for other, lost in (("bf16", 2**-8), ("fp16", 2**-11)):
        stored = fmt.unpack(fmt.pack(d, other))
        assert stored.values == other
        assert ((stored.S - d.S).abs() <= lost * d.S.abs() + 1e-7).all()
    # 160 inputs hold whole groups of 32, and none of 64 or 128.
    packed = fmt.pack(d, "int4")
    assert packed.layout.group_size == 32
    largest = d.S.unflatten(1, (5, 32)).abs().amax(-1) / 7
    assert torch.equal(packed.scales, largest.to(torch.bfloat16))
    assert fmt.pack(d, "int8", None).scales.shape == (N, 1)


def test_adapters_are_packed_as_the_decomposition_says_unless_asked_otherwise(plain):
    d = dataclasses.replace(plain, adapter_values="int8")
    codes, numbers = fmt.pack(d), fmt.pack(plain)
    assert (codes.layout.adapter_values, numbers.layout.adapter_values) == ("int8", None)
    for other in ("fp16", None):
        wide = fmt.pack(d, adapter_values=other)
        assert wide.layout == numbers.layout and torch.equal(wide.P, numbers.P)
    again = fmt.pack(plain, adapter_values="int8")
    assert again.layout == codes.layout and torch.equal(again.P, codes.P)
    assert torch.equal(again.Q, codes.Q)
    with pytest.raises(errors.ValueTypeError, match="adapter_values='int4' is unknown"):
        fmt.pack(d, adapter_values="int4")


def test_integers_without_scales_get_them_in_the_groups_that_they_name(plain):
    d = dataclasses.replace(plain, values="int4", group_size=64)
    for given in ({}, {"values": "int4"}, {"group_size": 64}):
        layout = fmt.pack(d, **given).layout
        assert (layout.values, layout.group_size) == ("int4", 64)
    assert fmt.pack(d, "int8", "auto").layout.group_size == 32
    with pytest.raises(errors.ValueTypeError, match="group_size='64' must be 32, 64, 128, None"):
        fmt.pack(d, "int4", "64")


@pytest.mark.parametrize("values, group_size", [("fp16", None), ("bf16", None), ("int3", 64)])
@pytest.mark.parametrize("adapter_values", [None, "int8"])
def test_unpacking_and_packing_without_a_word_gives_the_same_weight(
    values, group_size, adapter_values
):
    layout = fmt.PackedLayout(
        N, K, values, group_size, 1, 2, planes=2, adapter_values=adapter_values
    )
    packed = random_packed(layout)
    again = fmt.pack(fmt.unpack(packed))
    assert again.layout == layout
    ours = packed.tensors()
    assert all(torch.equal(t, ours[name]) for name, t in again.tensors().items())


@pytest.mark.parametrize(
    ("in_features", "size", "padded"),
    [
        *((4096, 128, 4096), (576, 64, 576), (1536, 128, 1536), (96, 32, 96), (32, 32, 32)),
        # None divides: 40 inputs take 64 in groups of 32 and of 64; 200 take 224 in groups of 32.
        *((40, 64, 64), (200, 32, 224), (16, 32, 32), (100, 128, 128)),
    ],
)
def test_the_group_size_that_fits_and_what_its_padding_costs(in_features, size, padded):
    assert fmt.fitting_group_size(in_features) == size
    assert fmt.fitting_group_size(in_features, 64) in (64, 128)
    assert fmt.fitting_group_size(in_features, 5) is None
    layout = fmt.PackedLayout(24, in_features, "int4", size, rank=1, adapter_rank=2, planes=2)
    assert layout.padded_in_features == padded
    beyond = sum(
        8 * t.nbytes * (1 - in_features / padded)
        for name, t in random_packed(layout).tensors().items()
        if name not in ("U", "P")  # which have a row for each output
    )
    assert math.isclose(layout.padding_bits_per_weight(), beyond / (24 * in_features), abs_tol=1e-9)


@pytest.mark.parametrize("small", [1, 1e-3], ids=["alike", "small beside what is there"])
@pytest.mark.parametrize("stored", [None, "int8", "absent"])
def test_an_adapter_that_is_added(plain, stored, small):
    """int8 stays where it holds the sum well; elsewhere the type of the factors takes its place."""
    d = dataclasses.replace(plain, adapter_values="int8" if stored == "int8" else None)
    if stored == "absent":
        d = dataclasses.replace(d, P=None, Q=None)
    packed = fmt.pack(d)
    g = torch.Generator().manual_seed(1)
    P, Q = torch.randn(N, 2, generator=g) * small, torch.randn(K, 2, generator=g)
    wider = fmt.with_adapter(packed, P, Q)
    assert wider.layout.adapter_rank == (2 if stored == "absent" else 5)
    int8 = stored == "int8" and small == 1
    assert wider.layout.adapter_values == ("int8" if int8 else None)
    added = P @ Q.T
    lost = (wider.dense() - packed.dense() - added).norm() / added.norm()
    assert lost < (2**-5 if int8 else 2**-9)
    assert wider.values is packed.values and wider.metadata is packed.metadata
    with pytest.raises(errors.RangeError, match="nan"):
        fmt.with_adapter(packed, P * float("nan"), Q)
