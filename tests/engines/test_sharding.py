"""Tensor parallelism on packed tensors: the outputs of all ranks against the whole layer's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from slab_kernels import reference
from slab_kernels.backends import dispatch
from slab_kernels.engines.sharding import (
    LayerParts,
    column_parallel,
    row_parallel,
    vocabulary_parallel,
)
from slab_kernels.errors import CheckpointError, MetadataError, PaddingError, ShapeError
from slab_kernels.format import PackedLayout, PackedWeight, Slice
from slab_kernels.testing import random_packed

FORMS = {
    "fp16": {},
    "bf16, rank 3": {"values": "bf16", "rank": 3},
    "pure 2:4": {"rank": 0},
    "int8, groups": {"values": "int8", "group_size": 32},
    "int4, a scale a row, two planes": {"values": "int4", "planes": 2},
    "int3, groups, three planes, int8 adapter": {
        "values": "int3",
        "group_size": 64,
        "planes": 3,
        "adapter_rank": 5,
        "adapter_values": "int8",
    },
    "adapter only": {"values": "int4", "group_size": 32, "rank": 0, "adapter_rank": 4},
}


def form(N: int, K: int, name: str) -> PackedLayout:
    return PackedLayout(N, K, **{"rank": 1, **FORMS[name]})


def assemble(slices: list[Slice], wholes: list[PackedWeight]) -> list[PackedWeight]:
    """What a rank holds once every tensor has come, part by part."""
    shards = LayerParts([f"part{i}" for i in range(len(slices))], slices)
    for i, whole in enumerate(wholes):
        for name, tensor in whole.tensors().items():
            shards.load(name, tensor, i if len(wholes) == len(slices) else None)
    return shards.packed()


def outputs(parts: list[PackedWeight], x: torch.Tensor) -> torch.Tensor:
    backend, state = dispatch.prepare_fused(parts, x.dtype)
    return backend.linear_fused(x, state)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_outputs_split_over_ranks(name, world):
    """q, k, v of a layer with 8 heads of 6, and 2 key and value heads: at 4 ranks two share one."""
    sizes, K = (48, 12, 12), 200
    wholes = [random_packed(form(N, K, name), seed=i) for i, N in enumerate(sizes)]
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(9))
    replicas = max(1, world // 2)
    local = [48 // world, 12 * replicas // world, 12 * replicas // world]
    want = [reference.linear(x.double(), whole) for whole in wholes]
    for rank in range(world):
        parts = assemble(
            column_parallel([w.layout for w in wholes], local, rank, world, replicas), wholes
        )
        got = outputs(parts, x).double().split(local, -1)
        for i, (mine, whole) in enumerate(zip(got, want, strict=True)):
            at = (rank if i == 0 else rank // replicas) * local[i]
            torch.testing.assert_close(mine, whole[:, at : at + local[i]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_inputs_split_over_ranks(name, world):
    K = 512 if world > 1 else 500  # one rank may have any size
    whole = random_packed(form(40, K, name))
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(9))
    total = torch.zeros(5, 40, dtype=torch.float64)
    for rank in range(world):
        piece = row_parallel(whole.layout, rank, world)
        part = assemble([piece], [whole])
        total += outputs(
            part, x[:, piece.first_input : piece.first_input + piece.inputs].contiguous()
        ).double()
    torch.testing.assert_close(total, reference.linear(x.double(), whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_the_ranks_hold_every_byte_once(name):
    whole = random_packed(form(48, 256, name))
    for cut, axis in (
        (lambda r: column_parallel([whole.layout], [12], r, 4)[0], 0),
        (lambda r: row_parallel(whole.layout, r, 4), 1),
    ):
        for tensor_name, tensor in whole.tensors().items():
            ranks = [LayerParts(["part"], [cut(r)]) for r in range(4)]
            for rank in ranks:
                rank.load(tensor_name, tensor)
            parts = [rank.tensors[0][tensor_name] for rank in ranks]
            if tensor_name in ("V", "Q"):
                joined = torch.cat(parts) if axis else None
            elif tensor_name in ("U", "P") or tensor.shape[1] == 1:
                joined = None if axis else torch.cat(parts)
            else:
                joined = torch.cat(parts, axis)
            if joined is None:
                assert all(torch.equal(p, tensor) for p in parts)
            else:
                assert torch.equal(joined, tensor)
            # No part holds on to the storage of the whole tensor.
            assert all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in parts)


@pytest.mark.parametrize("name", FORMS)
def test_one_weight_that_holds_q_k_v_below_each_other(name):
    whole, world = random_packed(form(48 + 12 + 12, 200, name)), 2
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(9))
    want = reference.linear(x.double(), whole).split([48, 12, 12], -1)
    for rank in range(world):
        got = outputs(
            assemble(column_parallel([whole.layout], [24, 6, 6], rank, world), [whole]), x
        ).double()
        mine = torch.cat([part.chunk(world, -1)[rank] for part in want], -1)
        torch.testing.assert_close(got, mine, rtol=1e-4, atol=1e-4)


def test_parts_of_different_types_stand_side_by_side():
    wholes = [
        random_packed(form(32, 128, name), seed=i)
        for i, name in enumerate(("int4, a scale a row, two planes", "fp16", "adapter only"))
    ]
    x = torch.randn(2, 128)
    parts = assemble(column_parallel([w.layout for w in wholes], [16] * 3, 1, 2), wholes)
    want = torch.cat([reference.linear(x.double(), w)[:, 16:] for w in wholes], -1)
    torch.testing.assert_close(outputs(parts, x).double(), want, rtol=1e-4, atol=1e-4)


def test_worlds_that_cut_a_unit_are_refused_with_those_that_fit():
    layout = form(64, 1536, "int8, groups")
    assert row_parallel(layout, 2, 3).inputs == 512
    with pytest.raises(
        ShapeError,
        match="in_features=1536 over 5 ranks.*multiple of 32.*may be 1, 2, 3, 4, 6, 8, 12, 16",
    ):
        row_parallel(layout, 0, 5)
    with pytest.raises(ShapeError, match="splits 64 outputs over 2 ranks.*out_features=48"):
        column_parallel([form(48, 64, "fp16")], [32], 0, 2)
    with pytest.raises(ShapeError, match="splits 72 outputs over 2 ranks.*out_features=100"):
        column_parallel([form(100, 64, "fp16")], [24, 6, 6], 0, 2)
    with pytest.raises(ShapeError, match="2 packed weights cannot make the 3 parts"):
        column_parallel([form(48, 64, "fp16")] * 2, [24, 24, 24], 0, 2)
    with pytest.raises(ShapeError, match="must be multiples of 16"):
        Slice(layout := form(8, 64, "fp16"), 0, 8, 8, 16)
    with pytest.raises(ShapeError, match="must begin at 0 or later"):
        Slice(layout, 4, 8, 0, 64)
    outside, strange = ((-8, 8, 0, 64), (0, 8, -16, 16)), ((0, True, 0, 64), (0.0, 8, 0, 64))
    for wrong in outside + strange:
        with pytest.raises(ShapeError, match="cannot slice"):
            Slice(layout, *wrong)
    for rank, world in ((-1, 2), (2, 2), (0, 0), (0.0, 1), (0, True)):
        with pytest.raises(ShapeError, match="there is no such rank"):
            row_parallel(layout, rank, world)
        with pytest.raises(ShapeError, match="there is no such rank"):
            column_parallel([layout], [8], rank, world)


def test_what_is_missing_or_strange_is_refused_by_name():
    whole = random_packed(form(32, 64, "fp16"))
    shards = LayerParts(["layer.o_proj"], [row_parallel(whole.layout, 0, 2)])
    tensors = whole.tensors()
    for name in tensors.keys() - {"signs"}:
        shards.load(name, tensors[name])
    with pytest.raises(CheckpointError, match=r"lacks tensor 'layer\.o_proj\.signs'"):
        shards.packed()
    with pytest.raises(CheckpointError, match=r"layer\.o_proj: signs is .*config\.json says"):
        shards.load("signs", tensors["signs"][:, :2])
    with pytest.raises(
        CheckpointError, match=r"layer\.o_proj holds the unexpected tensor 'scales'"
    ):
        shards.load("scales", tensors["signs"])
    shards.load("signs", tensors["signs"])
    shards.load("metadata", torch.zeros_like(tensors["metadata"]))
    with pytest.raises(MetadataError, match=r"^layer\.o_proj: "):
        shards.packed()


def test_padding_is_checked_in_the_only_slice_that_has_some():
    whole = random_packed(form(16, 40, "fp16"))
    values = whole.values.clone()
    values[0, -1] = 1
    with pytest.raises(PaddingError):
        assemble(
            [row_parallel(whole.layout, 0, 1)],
            [PackedWeight(whole.layout, **{**whole.tensors(), "values": values})],
        )


@pytest.mark.parametrize("name", FORMS)
def test_a_layer_without_a_checkpoint_is_zero(name):
    shards = LayerParts(["q", "k"], column_parallel([form(16, 64, name)] * 2, [8, 8], 1, 2))
    shards.fill()
    assert not any(part.dense().any() for part in shards.packed())


def shard(first: int, last: int, added: int = 0) -> SimpleNamespace:
    """What vLLM knows of a rank's range of the vocabulary."""
    return SimpleNamespace(
        org_vocab_start_index=first,
        org_vocab_end_index=last,
        added_vocab_start_index=0,
        added_vocab_end_index=added,
    )


@pytest.mark.parametrize("name", FORMS)
def test_a_head_splits_by_the_vocabulary(name):
    """50 tokens on two ranks, padded to 64: the second has 18 of its 32 rows."""
    whole = random_packed(form(50, 96, name), seed=1)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(9))
    slices = [vocabulary_parallel(whole.layout, shard(a, b)) for a, b in ((0, 32), (32, 50))]
    found = [outputs(assemble([piece], [whole]), x) for piece in slices]
    right = reference.linear(x.double(), whole)
    torch.testing.assert_close(torch.cat(found, -1).double(), right, atol=1e-3, rtol=1e-3)


def test_a_vocabulary_that_does_not_fit_is_refused():
    layout = form(50, 96, "fp16")
    for wrong in (shard(50, 50), shard(32, 64), shard(0, 32, added=8)):
        with pytest.raises(ShapeError):
            vocabulary_parallel(layout, wrong)
