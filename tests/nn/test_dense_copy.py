"""prefill="dense": what the copy is, which calls use it, and that it follows the layer's weight."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from stand_ins import DENSE_FROM, cuda_here, triton_here
from torch.func import functional_call
from torch.nn.functional import linear

from slab_kernels import FusedSlabLinear, SlabLinear
from slab_kernels.backends import cuda, dense_copy, dispatch
from slab_kernels.backends import triton as triton_backend
from slab_kernels.errors import ArgumentError, BackendError, RangeError
from slab_kernels.format import PackedLayout
from slab_kernels.testing import VALUE_LAYOUTS, random_packed

HALF = (torch.float16, torch.bfloat16)
LAYOUT = PackedLayout(40, 96, "int4", 32, rank=1, adapter_rank=3)
FEW, MANY = (torch.randn(m, 96, generator=torch.Generator().manual_seed(m)) for m in (4, 70))


@pytest.fixture
def packed_calls(monkeypatch):
    with cuda_here(monkeypatch) as calls:
        yield calls


def layer_of(seed=0, layout=LAYOUT, bias=False):
    given = torch.randn(layout.out_features, generator=torch.Generator().manual_seed(seed))
    return SlabLinear.from_packed(random_packed(layout, seed=seed), given if bias else None)


def state_of(layer, dtype=torch.float16):
    return layer._linears[dtype][-1].state


@pytest.fixture
def memory(monkeypatch):
    """The free bytes of the device, to be set, and no copy on it."""
    found = {"free": 0}
    monkeypatch.setattr(dense_copy, "free", lambda device: found["free"])
    monkeypatch.setattr(dense_copy, "_kept", {})
    return found


# The copy


@pytest.mark.parametrize("values, group_size", VALUE_LAYOUTS)
@pytest.mark.parametrize("dtype", HALF)
def test_the_copy_is_the_weight_of_the_dense_layer_to_the_bit(
    monkeypatch, packed_calls, values, group_size, dtype
):
    """However many rows are made at a time, and whatever the caller's autocast."""
    monkeypatch.setattr(dense_copy, "BAND_ROWS", 16)
    for rank, adapter in ((0, 0), (1, 0), (2, 5)):
        layer = layer_of(layout=PackedLayout(40, 96, values, group_size, rank, adapter))
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            layer.prepare(dtype, prefill="dense")
        found, want = state_of(layer, dtype).dense, layer.to_linear(dtype).weight
        assert torch.equal(found, want) and found.dtype == dtype and found.is_contiguous()
        assert not found.is_inference()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bias", [True, False])
def test_many_tokens_are_a_dense_product_and_few_are_not(packed_calls, dtype, bias):
    layer = layer_of(bias=bias).prepare(dtype, prefill="dense")
    dense = layer.to_linear(dtype)
    for m, packed in ((1, 1), (DENSE_FROM - 1, 1), (DENSE_FROM, 0), (70, 0)):
        x = torch.randn(m, 96).to(dtype)
        before = packed_calls.calls
        with torch.autocast("cpu", HALF[1 - HALF.index(dtype)], enabled=False):
            y = layer(x)
        assert packed_calls.calls - before == packed and y.dtype == dtype
        if not packed:
            assert torch.equal(y, linear(x, dense.weight, dense.bias))
            assert torch.equal(layer(x.view(1, m, 96))[0], y) and torch.equal(layer(x), y)
    assert layer(torch.ones(0, 96, dtype=dtype)).shape == (0, 40)


def test_the_triton_backend_takes_the_copy_from_17_tokens_on(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    with triton_here(monkeypatch) as packed:
        layer = layer_of(bias=True).prepare(torch.float16, prefill="dense")
        dense = layer.to_linear(torch.float16)
        for m in (1, 16, 17, 70):
            before, x = packed.calls, torch.randn(m, 96).half()
            y = layer(x)
            assert packed.calls - before == (m <= 16)
            if m > 16:
                assert torch.equal(y, linear(x, dense.weight, dense.bias))


def test_gradients_of_x_are_those_of_the_dense_layer(monkeypatch, packed_calls):
    for backend in ("cuda", "triton"):
        monkeypatch.setenv(dispatch.ENVIRONMENT, backend)
        with triton_here(monkeypatch):
            layer = layer_of(bias=True).prepare(torch.bfloat16, prefill="dense")
            dense = layer.to_linear(torch.bfloat16)
            for source in (FEW, MANY):
                x, same = (source.bfloat16().requires_grad_() for _ in range(2))
                layer(x).sum().backward()
                dense(same).sum().backward()
                assert torch.equal(x.grad, same.grad)


@pytest.mark.parametrize("op", ["linear_cuda", "linear_cuda_frozen"])
def test_opcheck(packed_calls, op):
    layer = layer_of(bias=True).prepare(torch.float16, prefill="dense")
    state = state_of(layer)
    call = getattr(torch.ops.slab_kernels, op).default
    for x in (FEW.half(), MANY.half()):
        arguments = (x, *state[: cuda.BIAS], layer.bias.detach(), *state[cuda.BIAS :])
        torch.library.opcheck(call, arguments)


def test_compiled_and_exported(packed_calls):
    layer = layer_of(bias=True)
    torch._dynamo.reset()  # Other tests of this process compile the same code.
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(FEW.half())
    assert state_of(layer).dense is None  # prepared by the trace, as nobody told it otherwise
    layer.prepare(torch.float16, prefill="dense")
    for x in (FEW.half(), MANY.half()):
        assert torch.equal(compiled(x), layer(x))
    tokens = torch.export.Dim("tokens", min=2, max=128)
    program = torch.export.export(layer, (MANY.half(),), dynamic_shapes=({0: tokens},))
    for x in (FEW.half(), MANY.half()):
        assert torch.equal(program.module()(x), layer(x))


# The word


def test_the_argument_the_environment_and_the_default(monkeypatch):
    monkeypatch.delenv(dense_copy.ENVIRONMENT, raising=False)
    assert dense_copy.named(None) == "packed" and dense_copy.named("auto") == "auto"
    monkeypatch.setenv(dense_copy.ENVIRONMENT, "dense")
    assert dense_copy.named(None) == "dense" and dense_copy.named("packed") == "packed"
    with pytest.raises(ArgumentError, match="prefill='fast' is unknown; use one of packed, dense"):
        layer_of().prepare(prefill="fast")
    with pytest.raises(ArgumentError, match="prefill=1 is unknown"):
        FusedSlabLinear(layer_of()).prepare(prefill=1)
    monkeypatch.setenv(dense_copy.ENVIRONMENT, "fast")
    with pytest.raises(ArgumentError, match=r"\(SLAB_KERNELS_PREFILL names it\) is unknown"):
        layer_of()(FEW)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backends_that_keep_no_copy(monkeypatch, backend):
    """Wanted by name it is refused, in a call too; "auto" does without."""
    monkeypatch.setenv(dispatch.ENVIRONMENT, backend)
    message = (
        f"and the {backend} backend keeps none of 40x96 with int4 values.*use prefill='packed'"
    )
    for layer in (layer_of(), FusedSlabLinear(layer_of())):
        want = layer(FEW)
        with pytest.raises(BackendError, match=message):
            layer.prepare(prefill="dense")
        assert layer._prefill is None
        again = layer.prepare(prefill="auto")(FEW)
        assert torch.equal(torch.cat([*again]), torch.cat([*want]))
    monkeypatch.setenv(dense_copy.ENVIRONMENT, "dense")
    with pytest.raises(BackendError, match=r"\(SLAB_KERNELS_PREFILL names it\)"):
        layer_of()(FEW)
    assert layer_of().prepare(prefill="packed").backend == backend


def test_auto_makes_copies_while_they_take_half_of_what_is_free(packed_calls, memory):
    """All copies on a device together, whichever layer made them."""
    size = 40 * 96 * 2
    memory["free"] = 4 * size
    layers = [layer_of(seed) for seed in range(4)]
    for layer in layers:
        layer.prepare(torch.float16, prefill="auto")
        memory["free"] -= size if state_of(layer).dense is not None else 0
    assert [state_of(layer).dense is not None for layer in layers] == [True, True, False, False]
    assert state_of(layers[0].prepare(torch.float16)).dense is not None  # what is there may stay
    layers[0].prepare(torch.float16, prefill="packed")
    memory["free"] += size
    assert state_of(layers[2].prepare(torch.float16)).dense is not None


def test_a_weight_that_16_bits_do_not_hold(monkeypatch, packed_calls, memory):
    """The packed kernels scale by powers of two and hold it."""
    memory["free"] = 1 << 30
    packed = random_packed(PackedLayout(40, 96, "int8", 32, 0))
    layer = SlabLinear.from_packed(replace(packed, scales=torch.full_like(packed.scales, 1e5)))
    with pytest.raises(RangeError, match=r"the weight reaches .* which float16 does not hold"):
        layer.prepare(torch.float16, prefill="dense")
    layer.prepare(torch.float16, prefill="auto")
    assert state_of(layer).dense is None


# The layer


def test_a_copy_comes_and_goes_beside_the_same_stream(packed_calls):
    """CUDA graphs may hold its address."""
    layer = layer_of().prepare(torch.float16)
    before = state_of(layer)
    with_copy = state_of(layer.prepare(torch.float16, prefill="dense"))
    assert before.dense is None and with_copy.dense is not None
    assert with_copy.stream is before.stream
    assert state_of(layer.prepare(torch.float16)) is with_copy  # as it was told
    without = state_of(layer.prepare(torch.float16, prefill="packed"))
    assert without.dense is None and without.stream is before.stream
    assert len(layer._linears[torch.float16]) == 1


def test_the_copy_follows_what_is_written_lent_and_loaded(packed_calls):
    first, second = random_packed(LAYOUT, seed=1), random_packed(LAYOUT, seed=2)
    other = SlabLinear.from_packed(second).prepare(torch.float16, prefill="dense")
    x = MANY.half()
    want = other(x)
    own = {name: t.clone() for name, t in first.tensors().items()}
    layer = SlabLinear.from_packed(replace(first, **own)).prepare(torch.float16, prefill="dense")
    before, kept = layer(x), state_of(layer)
    assert torch.equal(functional_call(layer, second.tensors(), x), want)
    assert torch.equal(layer(x), before) and not torch.equal(before, want)
    assert state_of(layer).dense is kept.dense or layer._linears[torch.float16][0].state is kept
    for name, tensor in second.tensors().items():
        layer._buffers[name].copy_(tensor)
    assert torch.equal(layer(x), want)
    layer.load_state_dict(first.tensors())
    assert torch.equal(layer(x), before) and state_of(layer).dense is not None
    assert packed_calls.calls == 0


def test_dtypes_offloading_copies_and_pickles(packed_calls):
    layer = layer_of(bias=True).prepare(torch.float16, prefill="dense")
    x = MANY.half()
    want = layer(x)
    layer.half().offload()
    assert torch.equal(layer(x), want)
    assert layer(MANY.bfloat16()).dtype == torch.bfloat16  # from the canonical tensors again
    assert state_of(layer, torch.bfloat16).dense.dtype == torch.bfloat16
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for again in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert again._linears == {} and torch.equal(again(x), want)
        assert state_of(again).dense is not None
    assert packed_calls.calls == 0 and set(layer.state_dict()) == {*layer.layout.tensors(), "bias"}


@pytest.mark.parametrize("first, second", [("cuda", "triton"), ("triton", "cuda")])
def test_a_backend_takes_the_copy_of_the_other(monkeypatch, packed_calls, first, second):
    with triton_here(monkeypatch):
        monkeypatch.setenv(dispatch.ENVIRONMENT, first)
        layer = layer_of().prepare(torch.float16, prefill="dense")
        before = state_of(layer)
        monkeypatch.setenv(dispatch.ENVIRONMENT, second)
        layer.prepare(torch.float16)
        assert layer.backend == second and state_of(layer).dense is before.dense


def test_one_copy_of_fused_parts(packed_calls):
    layouts = [replace(LAYOUT, out_features=n) for n in (40, 8, 17)]
    parts = [layer_of(n, layout, bias=True) for n, layout in enumerate(layouts)]
    parts[0].prepare(torch.float16, prefill="dense")
    for part in parts:
        part.prepare(torch.float16, prefill="dense")
    fused = FusedSlabLinear(parts)
    assert all(part.backend is None for part in parts)  # memory would hold their weights twice
    outputs, x = fused(MANY.half()), MANY.half()  # the parts had been told
    weights = [part.to_linear(torch.float16) for part in parts]
    assert torch.equal(state_of(fused).dense, torch.cat([dense.weight for dense in weights]))
    for y, dense in zip(outputs, weights, strict=True):
        assert torch.allclose(y, dense(x), rtol=1e-3, atol=1e-3)
    assert packed_calls.calls == 0 and "dense copy of 0.01 MB, 16.00 bits" in repr(fused)
    fused.prepare(torch.float16, prefill="packed")
    assert state_of(fused).dense is None and "dense copy" not in repr(fused)


def test_fused_parts_of_unequal_layouts_have_a_copy_each(packed_calls):
    parts = [layer_of(), layer_of(layout=PackedLayout(8, 96, "fp16", rank=1))]
    fused = FusedSlabLinear(parts).prepare(torch.float16, prefill="dense")
    copies = [state.dense for state, _ in state_of(fused)]
    assert [t.shape for t in copies] == [(40, 96), (8, 96)]
    fused(MANY.half())
    assert packed_calls.calls == 0
    fused.prepare(torch.float16, prefill="packed")
    assert all(state.dense is None for state, _ in state_of(fused))


def test_repr_names_the_memory(packed_calls):
    layer = layer_of()
    assert "dense copy" not in repr(layer)
    layer.prepare(torch.float16, prefill="dense")
    assert "dense copy of 0.01 MB, 16.00 bits per weight" in repr(layer)
    layer.prepare(torch.bfloat16)
    assert "dense copy of 0.02 MB, 32.00 bits per weight" in repr(layer)


def test_no_copy_of_what_the_plain_triton_kernels_read():
    state = triton_backend.launch.prepare((random_packed(LAYOUT),), torch.float32)
    backend = triton_backend.BACKEND
    assert backend.dense_device(state) is None and backend.dense_bytes(state) == 0
    assert backend.without_dense(state) is state
