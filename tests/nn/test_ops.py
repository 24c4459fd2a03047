"""The canonical op, the drop-in module and dispatch."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from slab_kernels import ops, reference
from slab_kernels.backends import dispatch
from slab_kernels.backends.base import LinearProblem
from slab_kernels.errors import BackendError, DtypeError, FormatError, ShapeError
from slab_kernels.format import PackedLayout, pack, unpack
from slab_kernels.nn import FusedSlabLinear, SlabLinear
from slab_kernels.nn.prepared import Prepared, Snapshot
from slab_kernels.nn.replacement import replace_linear
from slab_kernels.testing import SHAPES, VALUE_LAYOUTS, error_bound, oracle, random_packed

LAYOUT = PackedLayout(24, 48, "fp16", rank=2, adapter_rank=3)


def arguments(packed, x, bias=None):
    tensors = packed.tensors()
    return x, *(tensors.get(name) for name in ops.TENSOR_ARGUMENTS), bias, packed.in_features


@pytest.fixture(autouse=True)
def registered():
    ops.register()


@pytest.mark.parametrize("values, group_size", VALUE_LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_reference_against_fp64(values, group_size, shape, dtype):
    N, K = shape
    packed = random_packed(
        PackedLayout(N, K, values, group_size, rank=min(2, N), adapter_rank=min(3, N))
    )
    x, bias = torch.randn(3, K).to(dtype), torch.randn(N)
    y = reference.linear(x, packed, bias)
    exact, magnitude = oracle(x, packed, bias)
    assert y.dtype == dtype
    assert bool(((y.double() - exact).abs() <= error_bound(magnitude, exact, dtype, K)).all())


def test_reference_serves_patterns_that_do_not_pack():
    d = unpack(random_packed(LAYOUT))
    x = torch.randn(2, 48)
    assert torch.allclose(reference.linear(x, d), x @ d.dense().T, atol=1e-5)


@pytest.mark.parametrize("values, group_size", VALUE_LAYOUTS)
def test_opcheck(values, group_size):
    packed = random_packed(PackedLayout(24, 48, values, group_size, rank=1))
    x = torch.randn(2, 3, 48)
    for sample in (x, x.clone().requires_grad_(), x.to(torch.bfloat16)):
        torch.library.opcheck(
            torch.ops.slab_kernels.linear.default, arguments(packed, sample, torch.randn(24))
        )


def test_gradients_of_input_and_bias():
    packed = random_packed(LAYOUT)
    x, bias = torch.randn(5, 48, requires_grad=True), torch.randn(24, requires_grad=True)
    y = torch.ops.slab_kernels.linear(*arguments(packed, x, bias))
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.allclose(x.grad, grad @ packed.dense(), atol=1e-5)
    assert torch.allclose(bias.grad, grad.sum(0), atol=1e-5)


def test_compile_fullgraph_dynamic_and_export():
    module = SlabLinear.from_packed(random_packed(LAYOUT), torch.randn(24))
    eager = [module(torch.ones(m, 48)) for m in (1, 3, 17)]
    torch._dynamo.reset()  # Other tests of this process compile the same code.
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for y, m in zip(eager, (1, 3, 17), strict=True):
        assert torch.allclose(compiled(torch.ones(m, 48)), y, atol=1e-5)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(module, (torch.ones(3, 48),), dynamic_shapes=({0: tokens},))
    assert torch.allclose(program.module()(torch.ones(17, 48)), eager[2], atol=1e-5)


def test_compiling_before_the_first_call_is_right():
    module = SlabLinear.from_packed(random_packed(LAYOUT))
    torch._dynamo.reset()  # Other tests of this process compile the same code.
    y = torch.compile(module, fullgraph=True, dynamic=True)(torch.ones(2, 48))
    assert torch.allclose(y, module(torch.ones(2, 48)), atol=1e-5)


def test_module_is_a_drop_in():
    packed = random_packed(LAYOUT)
    module = SlabLinear.from_packed(packed, torch.randn(24))
    x = torch.randn(2, 5, 48)
    dense = module.to_linear()
    assert torch.allclose(module(x), dense(x), atol=1e-4)
    assert module(x[:, :0]).shape == (2, 0, 24)
    assert torch.allclose(module(x.transpose(0, 1)), dense(x).transpose(0, 1), atol=1e-4)
    with pytest.raises(ShapeError, match=r"\[2, 5, 47\], but this layer takes in_features=48"):
        module(x[..., :-1])
    assert "bits per weight" in repr(module)


def test_a_bias_that_does_not_fit_is_refused_before_the_first_call():
    packed = random_packed(PackedLayout(16, 32))
    for bias, error, said in (
        (torch.ones(5), ShapeError, r"shape \[5\] and the weight 16 outputs"),
        (torch.ones(16, dtype=torch.int32), DtypeError, "not torch.int32"),
        ([0.0] * 16, DtypeError, "not list"),
    ):
        with pytest.raises(error, match=said):
            SlabLinear.from_packed(packed, bias)


def test_training_after_a_first_call_in_inference_mode():
    module = SlabLinear.from_packed(random_packed(LAYOUT))
    with torch.inference_mode():
        module(torch.ones(1, 48))
    x = torch.ones(48, requires_grad=True)
    module(x).sum().backward()
    assert torch.allclose(x.grad, module.packed().dense().sum(0), atol=1e-4)


def test_bias_gradient_of_a_single_token_without_batch():
    for backend in ("reference", None):
        module = SlabLinear.from_packed(random_packed(LAYOUT), torch.zeros(24))
        module.bias.requires_grad_()
        if backend:
            state = dispatch.backend(backend).prepare(module.packed())
            source = Snapshot.of(module._buffers.values())
            module._linears[torch.float32] = (Prepared(dispatch.backend(backend), state, source),)
        module(torch.ones(48)).sum().backward()
        assert torch.equal(module.bias.grad, torch.ones(24))


def test_the_reference_is_fp32_under_autocast():
    packed, x = random_packed(LAYOUT), torch.randn(2, 48)
    y = reference.linear(x, packed)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reference.linear(x, packed), y)


def test_inputs_that_are_no_activations_are_refused():
    module = SlabLinear.from_packed(random_packed(LAYOUT))
    with pytest.raises(BackendError, match="floating point"):
        module(torch.ones(2, 48, dtype=torch.long))
    with pytest.raises(ShapeError, match=r"shape \[\]"):
        module(torch.tensor(1.0))


def test_state_dict_is_the_canonical_form():
    packed = random_packed(LAYOUT)
    module = SlabLinear.from_packed(packed, torch.randn(24))
    x = torch.randn(1, 48)
    y = module(x)
    assert module.backend in dispatch.ORDER
    other = SlabLinear(LAYOUT, bias=True)
    other(x)  # prepared from rubbish: loading must drop it
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), y)
    assert set(module.state_dict()) == {*packed.tensors(), "bias"}
    assert torch.equal(copy.deepcopy(module)(x), y)


def test_casting_leaves_packed_tensors_alone():
    module = SlabLinear.from_packed(random_packed(LAYOUT), torch.randn(24)).to(torch.bfloat16)
    assert (
        module.values.dtype == module.U.dtype == torch.float16
        and module.bias.dtype == torch.bfloat16
    )
    x = torch.randn(2, 48, dtype=torch.bfloat16)
    assert module(x).dtype == torch.bfloat16
    meta = module.to("meta")
    assert meta.values.is_meta and meta.metadata.dtype == torch.uint8


def test_replace_linear_checks_before_it_replaces():
    model = torch.nn.Sequential(
        torch.nn.Linear(48, 24), torch.nn.ReLU(), torch.nn.Linear(24, 48, bias=False)
    )
    packed = random_packed(LAYOUT)
    with pytest.raises(KeyError, match="ReLU"):
        replace_linear(model, {"0": packed, "1": packed})
    with pytest.raises(ShapeError, match="48x24, the packed weight 24x48"):
        replace_linear(model, {"0": packed, "2": packed})
    assert type(model[0]) is torch.nn.Linear
    bias = model[0].bias
    replace_linear(model, {"0": packed})
    x = torch.randn(2, 48)
    assert torch.allclose(model[0](x), reference.linear(x, packed, bias), atol=1e-4)


def test_dispatch_explains_and_never_falls_back_silently(monkeypatch):
    problem = LinearProblem.of(LAYOUT, 1, torch.float32, "cpu")
    reasons = dispatch.explain(problem)
    assert list(reasons) == list(dispatch.ORDER) and reasons["reference"] == []
    assert dispatch.select(problem, "reference").name == "reference"
    with pytest.raises(
        BackendError, match="'tpu' is unknown; known backends: cuda, cpu, triton, reference"
    ):
        dispatch.select(problem, "tpu")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "cpu")
    with pytest.raises(BackendError, match="cannot run"):
        dispatch.select(LinearProblem.of(LAYOUT, 1, torch.float64, "cuda"))
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    module = SlabLinear.from_packed(pack(unpack(random_packed(LAYOUT))))
    module(torch.randn(1, 48))
    assert module.backend == "reference"


def test_offloaded_layers_work_save_and_prepare_again():
    module = SlabLinear.from_packed(random_packed(LAYOUT), torch.randn(24))
    with pytest.raises(RuntimeError, match=r"call prepare\(dtype\) first"):
        module.offload()
    x, saved = torch.randn(3, 48), {name: t.clone() for name, t in module.state_dict().items()}
    want, wide = module(x), module(x.double())
    del module._linears[torch.float64]
    assert torch.equal(module.offload()(x), want) and torch.equal(module(x.double()), wide)
    assert module._home == torch.device("cpu")
    assert all(torch.equal(t, saved[name]) for name, t in module.state_dict().items())
    moved = module.to("meta")
    assert moved._home is None and moved._linears == {} and moved.values.is_meta


def test_vmap_runs_over_x_and_refuses_anything_else():
    packed, bias = random_packed(LAYOUT), torch.randn(24)
    layer = SlabLinear.from_packed(packed, bias)
    x = torch.randn(3, 5, 48)
    assert torch.equal(torch.vmap(layer, in_dims=1, out_dims=1)(x), layer(x))
    canonical = torch.ops.slab_kernels.linear
    _, *tensors, _, K = arguments(packed, x)
    assert torch.equal(
        torch.vmap(lambda x: canonical(x, *tensors, bias, K))(x), canonical(x, *tensors, bias, K)
    )
    with pytest.raises(NotImplementedError, match="only x may be batched"):
        torch.vmap(lambda b: canonical(x[0], *tensors, b, K))(torch.randn(2, 24))
    with pytest.raises(NotImplementedError, match="only x may be batched"):
        torch.vmap(lambda x, U: canonical(x, *tensors[:4], U, *tensors[5:], None, K))(
            x, torch.stack([packed.U] * 3)
        )


def test_threads_share_a_layer_from_its_first_call_on():
    """Eight threads meet in a fresh layer: preparing races, and every result is the one of a single
    thread."""
    packed = random_packed(PackedLayout(160, 512, "int4", 32, rank=2, adapter_rank=3))
    fused = [random_packed(PackedLayout(n, 512, "int8", rank=1), seed=n) for n in (96, 32)]
    xs = [
        torch.randn(m, 512, generator=torch.Generator().manual_seed(m)) for m in (1, 2, 7, 33) * 2
    ]

    def make():
        single = SlabLinear.from_packed(packed)
        return single, FusedSlabLinear(map(SlabLinear.from_packed, fused))

    alone = make()
    want = [(alone[0](x), *alone[1](x)) for x in xs]
    for _ in range(5):
        layer, both = make()
        together = threading.Barrier(len(xs))

        def run(x, layer=layer, both=both, together=together):
            together.wait()
            return [(layer(x), *both(x)) for _ in range(20)]

        with ThreadPoolExecutor(len(xs)) as pool:
            for results, expected in zip(pool.map(run, xs), want, strict=True):
                assert all(
                    torch.equal(a, b)
                    for result in results
                    for a, b in zip(result, expected, strict=True)
                )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor(tmp_path):
    """A model in a file that runs without its Python: our op by its name, any number of tokens."""
    model = torch.nn.Sequential(
        SlabLinear.from_packed(random_packed(LAYOUT), torch.randn(24)), torch.nn.ReLU()
    ).eval()
    model(torch.randn(1, 48))  # prepares: the file then holds what the CPU kernels read
    exported = torch.export.export(
        model, (torch.randn(4, 48),), dynamic_shapes=({0: torch.export.Dim("M", min=2)},)
    )
    file = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "model.pt2")
    )
    loaded = torch._inductor.aoti_load_package(file)
    for M in (2, 9):
        x = torch.randn(M, 48)
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_another_weight_in_a_prepared_layer(monkeypatch, backend):
    """Assigned, written in place, loaded, put there for one call, and loaded while another thread
    calls: what runs is what the layer holds."""
    monkeypatch.setenv(dispatch.ENVIRONMENT, backend)
    first, second = (random_packed(LAYOUT, seed=seed) for seed in (1, 2))
    x, new = torch.randn(2, 48), second.tensors()
    old, want = SlabLinear.from_packed(first)(x), SlabLinear.from_packed(second)(x)

    def prepared():
        module = SlabLinear.from_packed(pack(unpack(first)))
        assert torch.equal(module(x), old)
        return module

    assigned, written, loaded, called, raced, part = (prepared() for _ in range(6))
    for name, tensor in new.items():
        setattr(assigned, name, tensor)
    assert torch.equal(assigned(x), want)
    for name, tensor in new.items():
        getattr(written, name).copy_(tensor)
    assert torch.equal(written.prepare()(x), want)
    loaded.load_state_dict(new)
    assert torch.equal(loaded(x), want)
    assert torch.equal(torch.func.functional_call(called, new, x), want) and torch.equal(
        called(x), old
    )
    raced.register_load_state_dict_pre_hook(lambda module, *_: module(x))
    raced.load_state_dict(new)
    assert torch.equal(raced(x), want)
    fused = FusedSlabLinear([part, prepared()])
    fused(x)
    part.load_state_dict(new)
    assert all(torch.equal(y, w) for y, w in zip(fused(x), (want, old), strict=True))
    state = part.prepare()._linears[torch.float32][0].state
    again = part.prepare()._linears[torch.float32][0].state
    assert again is state  # a CUDA graph may hold its addresses
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference" if backend == "cpu" else "cpu")
    assert part.prepare().backend != backend


def test_a_state_dict_of_another_format_is_refused_before_anything_is_copied():
    module = SlabLinear.from_packed(random_packed(LAYOUT))
    before = {name: t.clone() for name, t in module.state_dict().items()}
    other = SlabLinear.from_packed(
        random_packed(dataclasses.replace(LAYOUT, values="bf16"), seed=3)
    ).state_dict()
    with pytest.raises(
        RuntimeError, match=r"values is torch\.bfloat16, this layer's is torch\.float16"
    ):
        module.load_state_dict(other)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_forward_mode_derivatives_are_refused():
    module, x = SlabLinear.from_packed(random_packed(LAYOUT), torch.randn(24)), torch.randn(2, 48)
    for layer in (module, FusedSlabLinear([module])):
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    _, tangent = torch.func.jvp(
        lambda t: module(x).sum() * t, (torch.ones(()),), (torch.ones(()),)
    )  # x has none
    assert torch.equal(tangent, module(x).sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, "scales is absent"),
        ({"scales": lambda t: t[:1]}, r"scales is torch\.bfloat16 \[1, 3\]"),
        ({"U": lambda t: t[:1]}, r"U is torch\.float16 \[1, 2\]"),
        ({"values": lambda t: t[:, :5]}, r"values \[24, 5\].*of no value type"),
        ({"metadata": lambda t: t[:, :0]}, r"metadata has shape \[24, 0\]"),
        ({"bias": torch.zeros(1)}, r"bias has shape \[1\], expected \[24\]"),
        ({"x": torch.zeros(2, 95)}, r"x has shape \[2, 95\], but the weight takes in_features=96"),
    ],
)
def test_the_canonical_op_refuses_tensors_that_do_not_belong_together(change, message):
    packed = random_packed(
        dataclasses.replace(LAYOUT, in_features=96, values="int8", group_size=32)
    )
    arguments = {**dict.fromkeys(ops.TENSOR_ARGUMENTS), **packed.tensors(), "bias": None}
    for name, new in change.items():
        arguments[name] = new(arguments[name]) if callable(new) else new
    x = arguments.pop("x", torch.randn(2, 96))
    with pytest.raises(FormatError, match=message):
        torch.ops.slab_kernels.linear(x, *arguments.values(), 96)
