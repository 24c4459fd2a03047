"""A dense head on a CPU multiplies a sliced token as a matrix, not as a batch of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from slab_kernels.nn.dense_head import copy_slices


class Called(TorchDispatchMode):
    """The names of the operators that torch calls."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


class Model(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head.requires_grad_(False)

    def get_output_embeddings(self):
        return self.head


def called(head, x):
    with torch.no_grad(), Called() as seen:
        y = head(x)
    return y, seen.names


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [slice(-1, None), slice(0, 1), slice(2, 5)])
def test_a_slice_is_one_matrix(batch, dtype, part):
    head = nn.Linear(64, 96, bias=False, dtype=dtype)
    model, x = Model(head), torch.randn(batch, 8, 64).to(dtype)[:, part]
    before, names = called(head, x)
    if batch > 1 or x.shape[1] == 1:
        assert "bmm" in names, "torch has mended it: the hook can go"
    copy_slices(model)
    copy_slices(model)
    assert len(head._forward_pre_hooks) == 1
    after, names = called(head, x)
    assert "bmm" not in names and "mm" in names
    exact = x.double() @ head.weight.double().T
    assert after.dtype == dtype and after.shape == before.shape
    bound = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
    magnitude = x.double().abs() @ head.weight.double().abs().T
    assert bool(((after.double() - exact).abs() <= bound * magnitude).all())


@pytest.mark.parametrize("x", [torch.randn(2, 3, 64), torch.randn(5, 64)[1:3], torch.randn(64)])
def test_what_is_no_slice_is_not_copied(x):
    head = nn.Linear(64, 96)
    copy_slices(Model(head))
    seen = []
    head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    head(x)
    assert seen[0] is x


def test_models_without_a_dense_head_stay_as_they_are():
    other = nn.Embedding(4, 8)
    for model in (nn.Linear(8, 8), Model(other)):
        copy_slices(model)
    assert not other._forward_pre_hooks


def test_a_gradient_goes_through_the_copy():
    head = nn.Linear(8, 4, bias=False)
    copy_slices(Model(head))
    x = torch.randn(1, 3, 8, requires_grad=True)
    head(x[:, -1:]).sum().backward()
    assert torch.allclose(x.grad[0, -1], head.weight.sum(0)) and not bool(x.grad[0, :2].any())
