"""Other libraries' kernels on a CPU: torch's own are called; the others are called where they are
installed, and everywhere stand-ins decode what they are given and multiply by it."""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch

from slab_kernels.bench import ggml, peers, peers_cpu
from slab_kernels.bench.peer import agree, quantized
from slab_kernels.errors import PeerError

N, K = 64, 512


def by_name(name: str):
    return next(peer for peer in peers.CPU_PEERS if peer.name == name)


def held_to_its_own_weight(name: str, tokens=(1, 3)):
    """The peer's prepared weight, after both its copies agreed with the weight it stands for."""
    peer, W = by_name(name), torch.randn(N, K, dtype=torch.bfloat16)
    prepared = peer.prepare(W)
    assert ((prepared.dense - W.float()).norm() / W.float().norm()).item() < 0.15
    for m in tokens:
        x = torch.randn(m, K, dtype=torch.bfloat16).to(peer.fed or torch.bfloat16)
        agree(x, prepared, peer.activations)
        first = prepared.result(prepared.bind(x)()).clone()
        again = prepared.result(prepared.another()(x)())
        assert first.shape == (m, N) and torch.equal(first, again)
    return prepared


@pytest.mark.parametrize("name", [peer.name for peer in peers.CPU_PEERS])
def test_each_that_is_here_agrees_with_its_own_weight(name):
    if reason := by_name(name).reason(N, K, torch.bfloat16, "cpu"):
        pytest.skip(reason)
    held_to_its_own_weight(name)


def test_bits_of_torchs_own():
    W = torch.randn(N, K, dtype=torch.bfloat16)
    assert by_name("torch-int8-fbgemm").prepare(W).weight_bytes == N * K + 4 * N
    assert by_name("torch-int4").prepare(W).weight_bytes == N * K // 2 + N * K // 128 * 4


@pytest.mark.parametrize("engine", ["fbgemm", "onednn"])
def test_an_engine_is_asked_for_and_the_one_before_put_back(monkeypatch, engine):
    peer, before = by_name(f"torch-int8-{engine}"), torch.backends.quantized.engine
    packed = []
    prepack = torch.ops.quantized.linear_prepack

    def seen(*arguments):
        packed.append(torch.backends.quantized.engine)
        return prepack(*arguments)

    monkeypatch.setattr(torch.ops.quantized, "linear_prepack", seen)
    peer.prepare(torch.randn(N, K))
    assert packed == [engine] and torch.backends.quantized.engine == before
    fewer = types.SimpleNamespace(supported_engines=["qnnpack"])
    monkeypatch.setattr(torch.backends, "quantized", fewer)
    assert peer.reason(N, K, torch.bfloat16, "cpu") == (f"this torch has no {engine}, only qnnpack")


def test_a_package_that_is_absent_and_a_shape_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reasons = {p.name: p.reason(N, K, torch.bfloat16, "cpu") for p in peers.CPU_PEERS}
    assert reasons["openvino"] == "the package 'openvino' is not installed"
    assert reasons["ggml-q4_0"] == "the package 'llama_cpp' is not installed"
    assert by_name("torch-int4").reason(N, 130, torch.float32, "cpu").endswith("not 64x130")


# ONNX Runtime


def stand_in_onnx(monkeypatch) -> dict:
    """Modules onnx and onnxruntime whose model is what the graph was made from."""
    seen: dict = {"threads": [], "nodes": []}

    def make_node(kind, inputs, outputs, **settings):
        seen["nodes"].append((kind, settings))
        return settings

    def make_model(graph, **_):
        (settings,), _, _, _, numbers = graph
        return types.SimpleNamespace(SerializeToString=lambda: (settings, dict(numbers)))

    class Value:
        def __init__(self, data):
            self.data = data

        ortvalue_from_numpy = classmethod(lambda cls, data: cls(data))

        @classmethod
        def ortvalue_from_shape_and_type(cls, shape, kind):
            return cls(np.full(shape, np.nan, kind))

        def numpy(self):
            return self.data

    class Session:
        def __init__(self, content, options, providers):
            assert options.use_per_session_threads is False
            settings, tensors = content
            codes = tensors["codes"]
            assert codes.shape == (settings["N"], settings["K"] // settings["block_size"],
                                   settings["block_size"] // 2)  # fmt: skip
            halves = np.stack((codes & 15, codes >> 4), -1).reshape(*codes.shape[:2], -1)
            scales = tensors["scales"].reshape(*codes.shape[:2], 1)
            self.W = ((halves.astype(np.float32) - 8) * scales).reshape(N, K)

        def io_binding(self):
            places = {}
            return types.SimpleNamespace(
                places=places,
                bind_ortvalue_input=places.__setitem__,
                bind_ortvalue_output=places.__setitem__,
            )

        def run_with_iobinding(self, binding):
            binding.places["y"].data[:] = binding.places["x"].data @ self.W.T

    helper = types.SimpleNamespace(
        make_node=make_node,
        make_graph=lambda *parts: parts,
        make_tensor_value_info=lambda *_: None,
        make_opsetid=lambda *_: None,
        make_model=make_model,
    )
    arrays = types.SimpleNamespace(from_array=lambda array, name: (name, array))
    proto = types.SimpleNamespace(FLOAT=1)
    onnx = types.SimpleNamespace(helper=helper, numpy_helper=arrays, TensorProto=proto)
    runtime = types.SimpleNamespace(
        SessionOptions=types.SimpleNamespace,
        InferenceSession=Session,
        OrtValue=Value,
        set_global_thread_pool_sizes=lambda *counts: seen["threads"].append(counts),
    )
    monkeypatch.setitem(sys.modules, "onnx", onnx)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    monkeypatch.setattr(peers_cpu, "_POOL", [])
    return seen


@pytest.mark.parametrize(("group", "bits"), [(128, 4.25), (32, 5.0)])
def test_onnxruntime_gets_its_packing_and_the_threads_of_the_run(monkeypatch, group, bits):
    seen = stand_in_onnx(monkeypatch)
    prepared = held_to_its_own_weight(f"onnxruntime-{group}")
    assert 8 * prepared.weight_bytes / (N * K) == bits
    ((kind, settings),) = seen["nodes"]
    assert kind == "MatMulNBits" and settings["accuracy_level"] == 4 and settings["bits"] == 4
    assert seen["threads"] == [(torch.get_num_threads(), 1)]


def test_onnxruntime_cannot_change_its_threads(monkeypatch):
    stand_in_onnx(monkeypatch)
    peers_cpu._onnxruntime_threads(1)
    peers_cpu._onnxruntime_threads(1)
    with pytest.raises(PeerError, match="got 1 threads .* to 2; start a new process"):
        peers_cpu._onnxruntime_threads(2)


# OpenVINO


class Half:
    """A u4 tensor that owns its bytes, the first element in the lower half."""

    def __init__(self, kind, shape):
        assert kind == "u4"
        self.shape, self.data = shape, np.zeros(int(np.prod(shape)) // 2, np.uint8)

    def elements(self):
        both = np.stack((self.data & 15, self.data >> 4), -1)
        return both.reshape(self.shape).astype(np.float32)


def stand_in_openvino(monkeypatch) -> dict:
    seen: dict = {}

    def tensor(what, shape=None, shared_memory=False):
        return what if shape is None else Half(what, shape)

    def constant(*given):
        return given[0].elements() if len(given) == 1 else np.full(given[1], given[2], np.float32)

    def matmul(x, W, transposed, weight_transposed):
        assert (transposed, weight_transposed) == (False, True)
        return lambda value: value @ W.T

    class Request:
        def __init__(self, product):
            self.product = product

        def set_input_tensor(self, value):
            self.value = value

        def infer(self):
            self.y = types.SimpleNamespace(data=self.product(self.value))

        def get_output_tensor(self):
            return self.y

    class Core:
        def compile_model(self, product, device, settings):
            seen.update(settings)
            return types.SimpleNamespace(create_infer_request=lambda: Request(product))

    operations = types.SimpleNamespace(
        parameter=lambda shape, kind, name: None,
        convert=lambda what, kind: what,
        constant=lambda array: array.astype(np.float32),
        subtract=np.subtract,
        multiply=np.multiply,
        reshape=lambda what, shape, special: what.reshape(shape),
        matmul=matmul,
    )
    module = types.SimpleNamespace(
        Core=Core,
        Tensor=tensor,
        Shape=tuple,
        Type=types.SimpleNamespace(u4="u4", f32="f32"),
        op=types.SimpleNamespace(Constant=constant),
        Model=lambda results, parameters, name: results[0],
        opset13=operations,
    )
    monkeypatch.setitem(sys.modules, "openvino", module)
    return seen


def test_openvino_gets_its_packing_and_the_threads_of_the_run(monkeypatch):
    seen = stand_in_openvino(monkeypatch)
    prepared = held_to_its_own_weight("openvino")
    assert 8 * prepared.weight_bytes / (N * K) == 4.125
    assert seen["INFERENCE_NUM_THREADS"] == torch.get_num_threads() and seen["NUM_STREAMS"] == 1
    assert seen["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == 128


# llama.cpp

REORDERED, PLAIN, ROUNDED = 7001, 7002, 2  # types of buffers, and the number of q4_0


class Ggml:
    """ggml's functions over torch: a format is int8 codes of one byte with one scale for all."""

    def __init__(self, reorders: bool):
        self.reorders, self.threads, self.things, self.live = reorders, [], {}, []
        self.used: set[int] = set()  # where weights were when they were multiplied
        keep = self.kept = []
        self.set_threads = ggml.ctypes.CFUNCTYPE(None, ggml.Pointer, ggml.ctypes.c_int)(
            lambda backend, count: self.threads.append(count)
        )
        self.types = (ggml.Pointer * 2)(REORDERED, None)
        self.extra = ggml.ctypes.CFUNCTYPE(ggml.Pointer, ggml.Pointer)(
            lambda device: ggml.ctypes.addressof(self.types)
        )
        keep += [self.set_threads, self.extra]

    def new(self, **what) -> int:
        self.things[number := len(self.things) + 1] = types.SimpleNamespace(**what)
        return number

    def ggml_init(self, parameters):
        assert parameters.no_alloc and parameters.size > 0
        self.live.append(number := self.new(tensors=[]))
        return number

    def ggml_free(self, context):
        self.live.remove(context)
        for thing in self.things.values():
            if getattr(thing, "context", None) == context:
                thing.data = None  # whoever reads it now reads memory of somebody else

    def ggml_log_set(self, function, data):
        pass

    def ggml_tensor_overhead(self):
        return 368

    ggml_graph_overhead = ggml_tensor_overhead

    def ggml_row_size(self, kind, inputs):
        return inputs

    def ggml_quantize_chunk(self, kind, source, target, first, rows, inputs, importance):
        W = view(source, rows * inputs, np.float32)
        view(target, rows * inputs, np.int8)[:] = (W * 20).round().clip(-127, 127)

    def ggml_new_tensor_2d(self, context, kind, inputs, rows):
        return self.new(context=context, kind=kind, size=(rows, inputs), place=None, data=None)

    def ggml_mul_mat(self, context, weight, x):
        return self.new(context=context, kind=0, parts=(weight, x), data=None)

    def ggml_cast(self, context, weight, kind):
        return self.new(context=context, kind=kind, parts=(weight,), data=None)

    def ggml_new_graph(self, context):
        return self.new(result=None)

    def ggml_build_forward_expand(self, graph, result):
        self.things[graph].result = result

    def ggml_backend_dev_by_type(self, kind):
        assert kind == ggml.CPU_DEVICE
        return 9001

    def ggml_backend_dev_init(self, device, parameters):
        return 9002

    def ggml_backend_dev_backend_reg(self, device):
        return 9003

    def ggml_backend_dev_buffer_type(self, device):
        return PLAIN

    def ggml_backend_dev_supports_op(self, device, product):
        weight = self.things[self.things[product].parts[0]]
        return self.reorders or weight.place == PLAIN

    def ggml_backend_reg_get_proc_address(self, registry, name):
        function = {
            b"ggml_backend_set_n_threads": self.set_threads,
            b"ggml_backend_dev_get_extra_bufts": self.extra,
        }[name]
        return ggml.ctypes.cast(function, ggml.Pointer).value

    def ggml_backend_alloc_ctx_tensors_from_buft(self, context, place):
        for thing in self.things.values():
            if hasattr(thing, "place") and thing.place is None:
                thing.place = place
        self.live.append(number := self.new())
        return number

    def ggml_backend_buffer_free(self, buffer):
        self.live.remove(buffer)

    def ggml_backend_free(self, backend):
        pass

    def ggml_backend_tensor_set(self, tensor, source, offset, size):
        thing = self.things[tensor]
        kind = np.float32 if thing.kind == 0 else np.int8
        numbers = view(source, size // np.dtype(kind).itemsize, kind).copy()
        thing.data = numbers.reshape(thing.size).astype(np.float32)
        thing.data /= 1 if thing.kind == 0 else 20

    def ggml_backend_tensor_get(self, tensor, target, offset, size):
        numbers = self.things[tensor].data
        view(target, numbers.size, np.float32)[:] = numbers.flatten()

    def ggml_backend_graph_compute(self, backend, graph):
        result = self.things[self.things[graph].result]
        weight, *x = (self.things[part].data for part in result.parts)
        result.data = x[0] @ weight.T if x else weight
        if x:
            self.used.add(self.things[result.parts[0]].place)
        return 0


def view(address: int, count: int, kind: type) -> np.ndarray:
    """Numbers in memory."""
    size = count * np.dtype(kind).itemsize
    return np.frombuffer((ggml.ctypes.c_char * size).from_address(address), kind)


@pytest.mark.parametrize("reorders", [True, False])
def test_ggml_gets_weights_where_its_products_want_them(monkeypatch, reorders):
    library = Ggml(reorders)
    monkeypatch.setattr(ggml, "_library", lambda: library)
    prepared = held_to_its_own_weight("ggml-q4_0")
    placed = {t.place for t in library.things.values() if getattr(t, "kind", 0) == ROUNDED}
    assert prepared.weight_bytes == N * K and PLAIN in placed and REORDERED in placed
    assert library.used == {REORDERED if reorders else PLAIN}
    assert set(library.threads) == {torch.get_num_threads()}
    del prepared
    assert not library.live, "contexts and buffers are given back"


def test_a_folder_without_ggmls_library_is_a_reason(monkeypatch, tmp_path):
    found = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    reason = by_name("ggml-q8_0").reason(N, K, torch.bfloat16, "cpu")
    assert reason == "the package 'llama_cpp' has no shared library of ggml in its folder lib"
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libggml.so").write_bytes(b"no library")
    ggml._library.cache_clear()
    reason = by_name("ggml-q8_0").reason(N, K, torch.bfloat16, "cpu")
    assert reason.startswith("ggml's library cannot be used:")


def test_int4_of_smaller_groups():
    W = torch.randn(6, 256)
    codes, scales, dense = quantized(W, 32)
    assert scales.shape == (6, 8)
    assert torch.equal(dense, (codes.float() - 8) * scales.repeat_interleave(32, 1))
