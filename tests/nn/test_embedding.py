"""Embeddings of int8 rows and the head on the same rows, against fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from pairwise import grid
from torch import nn

from slab_kernels.errors import DtypeError, RangeError, ShapeError, WeightlessError
from slab_kernels.format import Int8Table, check_table, int8_table
from slab_kernels.nn import Int8Embedding, Int8Head

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def embedding(rows: int = 70, columns: int = 24, **settings) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(rows, columns, **settings)


def exact(module: Int8Embedding) -> torch.Tensor:
    return module.codes.double() * module.scales.double()[:, None]


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_a_table_is_within_half_a_step_of_the_matrix(size):
    weight = torch.randn(50, 33, generator=torch.Generator().manual_seed(1)) * size
    weight[7] = 0
    weight[9, 3] *= 40  # an outlier
    table = int8_table(weight)
    step = table.scales.double()[:, None]
    apart = (table.codes.double() * step - weight.double()).abs()
    assert bool((apart <= step * (0.5 + 1e-5)).all())  # of the scale as it is stored, in bf16
    assert bool((table.codes.abs().amax(1)[torch.arange(50) != 7] >= 126).all())
    assert not table.codes[7].any() and float(table.scales[7]) == 1
    assert int(table.codes.min()) >= -127


def test_a_table_refuses_numbers_that_are_not_finite():
    weight = torch.ones(4, 4)
    weight[2, 1] = torch.nan
    with pytest.raises(RangeError, match="1 rows"):
        int8_table(weight)


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda t: t._replace(codes=t.codes.float()), DtypeError),
        (lambda t: t._replace(codes=t.codes[:, :3]), ShapeError),
        (lambda t: t._replace(codes=torch.full_like(t.codes, -128)), RangeError),
        (lambda t: t._replace(scales=-t.scales), RangeError),
        (lambda t: t._replace(scales=t.scales * torch.nan), RangeError),
        (lambda t: t._replace(scales=t.scales * 1e39), RangeError),
    ],
)
def test_a_table_that_is_none_is_refused(change, error):
    table = int8_table(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    check_table(table._asdict(), 5, 4)
    with pytest.raises(error):
        check_table(change(table)._asdict(), 5, 4)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_rows_are_code_times_scale_rounded_once(dtype):
    module = Int8Embedding.from_embedding(embedding(padding_idx=3)).to(dtype)
    ids = torch.tensor([[0, 3, 69], [5, 5, 1]])
    assert torch.equal(module(ids), exact(module)[ids].to(dtype))
    assert not module(torch.tensor([3])).any()
    assert module.scales.dtype == torch.bfloat16 and module.codes.dtype == torch.int8


@grid(dtype=list(ROUNDING), tokens=(1, 3, 4, 5, 40), columns=(24, 1030), bias=(False, True))
def test_a_head_computes_from_the_rows_of_its_embedding(dtype, tokens, columns, bias):
    rows = 1100  # more than one piece of the wider table
    table = Int8Embedding.from_embedding(embedding(rows, columns))
    added = nn.Parameter(torch.randn(rows), requires_grad=False) if bias else None
    head = Int8Head(table, added)
    x = torch.randn(2, tokens, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    right = x.double() @ exact(table).T + (0 if added is None else added.to(dtype).double())
    found = head(x)
    assert found.dtype == dtype and found.shape == (2, tokens, rows)
    bound = ROUNDING[dtype] * float(right.abs().max())
    assert float((found.double() - right).abs().max()) <= bound
    assert list(head.state_dict()) == (["bias"] if bias else [])


def test_a_head_is_differentiable_in_its_input():
    table = Int8Embedding.from_embedding(embedding())
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Int8Head(table), (x,))


def test_a_copy_of_a_model_shares_its_own_table():
    table = Int8Embedding.from_embedding(embedding())
    model = nn.ModuleDict({"embed": table, "head": Int8Head(table)})
    twin = copy.deepcopy(model)
    assert twin["head"].embedding is twin["embed"] is not table
    twin.half()
    assert twin["embed"].dtype == torch.float16 and table.dtype == torch.float32


def test_what_needs_a_weight_is_told_that_there_is_none():
    module = Int8Embedding.from_embedding(embedding())
    assert not hasattr(module, "weight")
    with pytest.raises(WeightlessError, match="dequantize"):
        _ = module.weight
    with pytest.raises(ShapeError, match="in_features=24"):
        Int8Head(module)(torch.zeros(2, 23))
    with pytest.raises(IndexError):
        module(torch.tensor([70]))


@pytest.mark.slow
def test_both_compile_whole():
    table = Int8Embedding.from_embedding(embedding())
    model = nn.Sequential(table, Int8Head(table))
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(ids), model(ids))


def test_a_state_dict_of_other_types_is_refused():
    module = Int8Embedding.from_table(Int8Table(torch.ones(2, 2, dtype=torch.int8), torch.ones(2)))
    module.scales = module.scales.bfloat16()
    state = {name: t.float() for name, t in module.state_dict().items()}
    with pytest.raises(RuntimeError, match="int8"):
        module.load_state_dict(state)
