"""A decomposition carries the form that its settings name, and `pack` stores it so."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pairwise import grid

from slab_kernels import Decomposition, InputStats, decompose, pack, unpack
from slab_kernels.errors import ShapeError
from slab_kernels.methods import METHODS, Config, LayerSettings, Method, decompose_layer

N, K = 24, 96


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, InputStats]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(400, K, generator=g) @ torch.randn(K, K, generator=g)
    return torch.randn(N, K, generator=g), InputStats.from_inputs(x)


@grid(
    method=tuple(METHODS),
    values=("fp16", "bf16", "int8", "int4", "int3"),
    adapter_values=("int8", "fp16"),
    group_size=("auto", 32, None),
    size=(1.0, 1e12),
)
@pytest.mark.filterwarnings("ignore:ADMM")
def test_packing_without_a_word_gives_the_layout_of_the_settings(
    method, values, adapter_values, group_size, size, layer
):
    W, stats = layer
    if size != 1 and values == "fp16":
        size = 1.0  # fp16 ends at 65504
    settings = LayerSettings(
        method=method, values=values, adapter_values=adapter_values, group_size=group_size
    )
    found = decompose_layer(W * size, stats, settings)
    packed = pack(found)
    expected = settings.layout((N, K))
    assert packed.layout == dataclasses.replace(expected, factors=packed.layout.factors)
    assert (found.values, found.group_size) == (values, expected.group_size)
    if size == 1:
        assert packed.bits_per_weight() == expected.bits_per_weight()
    again = pack(unpack(packed), factor_dtype=torch.float32)
    assert dataclasses.replace(again.layout, factors="fp16") == expected


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("values", ["bf16", "int4"])
def test_planes_and_adapter_of_slab_are_kept(planes, values, layer):
    W, stats = layer
    settings = LayerSettings(values=values, planes=planes, adapter_rank=4, options={"rounds": 0})
    packed = pack(decompose_layer(W, stats, settings))
    assert packed.layout == settings.layout((N, K)) and packed.layout.adapter_values == "int8"


def test_a_method_that_knows_no_grid_leaves_integers_to_packing(layer, monkeypatch):
    def halves(weight, stats, config):
        mask = (torch.arange(K) % 4 < 2).expand(N, K)
        return Decomposition(weight * mask, mask)

    monkeypatch.setitem(METHODS, "halves", Method("halves", halves, Config, "none", "two of four"))
    W, _ = layer
    d = decompose(W, method="halves", values="int4", group_size=32)
    assert (d.values, d.group_size, d.scales) == ("int4", 32, None)
    packed = pack(d)
    assert packed.layout == LayerSettings(method="halves", values="int4").layout((N, K))
    steps = packed.scales.float().repeat_interleave(32, 1)
    assert ((packed.dense() - d.S).abs() <= 0.51 * steps).all()


def test_auto_is_a_number_once_the_shape_is_known(layer):
    settings = LayerSettings(values="int4", planes=2)
    assert settings.group_size == "auto" == settings.to_dict()["group_size"]
    for inputs, size in ((4096, 128), (576, 64), (96, 32), (40, 64)):
        fixed = settings.for_shape((N, inputs))
        assert fixed.group_size == size == fixed.stored_group_size
        assert fixed == dataclasses.replace(settings, group_size=size)
        assert settings.layout((N, inputs)) == fixed.layout((N, inputs))
        assert settings.config((N, inputs)).group_size == size
    given = LayerSettings(values="int4", group_size=128)
    assert given.for_shape((N, 576)) is given
    by_row = LayerSettings(values="int4", group_size=None).for_shape((N, 576))
    assert by_row.stored_group_size is None and by_row.layout((N, 576)).group_size is None
    assert LayerSettings().for_shape((N, 576)).stored_group_size is None  # fp16 has no scales


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"group_size": 48}, r"group_size=48 must be one of 32, 64, 128, 'auto' or None"),
        ({"group_size": "best"}, r"group_size='best' must be an integer of at least 1 or 'auto'"),
        ({"group_size": True}, "group_size=True"),
        ({"pattern": "2:5"}, "group_size='auto': none of 32, 64, 128 is a multiple of 5"),
    ],
)
def test_group_sizes_that_do_not_exist_are_refused(settings, text):
    with pytest.raises(ShapeError, match=text):
        LayerSettings(values="int4", **settings)


def test_auto_suits_the_pattern_too():
    settings = LayerSettings(values="int8", pattern="32:64")
    assert settings.for_shape((N, 192)).group_size == 64
    by_row = LayerSettings(values="int8", pattern="2:5", group_size=None)
    assert by_row.config((20, 60)).group_size is None
