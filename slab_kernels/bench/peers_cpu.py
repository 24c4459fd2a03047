"""Other libraries' kernels on a CPU, each with as many threads as torch has.

This file is written against torch 2.13, onnxruntime 1.32 with onnx 1.23, and openvino 2026.4.
llama.cpp's kernels are in ggml.py. All but torch's int4 kernel take x in fp32 and round it to 8-bit
integers themselves, which is part of the time.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import PeerError
from . import ggml
from .clocks import Call
from .peer import GROUP, Bind, Peer, Prepared, directly, pairs, quantized

SMALL_GROUP = 32  # inputs that a scale covers in ONNX Runtime's other usual format


def _torch_int8(W: Tensor, engine: str) -> Prepared:
    """torch's dynamically quantised linear by one of its engines: int8 weights with a scale per
    row; x as 8-bit integers with one scale and zero point for all tokens of a call."""
    scales = W.float().abs().amax(1).clamp_min(1e-30) / 127
    zeros = torch.zeros(len(W), dtype=torch.int64)
    with warnings.catch_warnings():  # torch deprecates such tensors, but not yet this linear
        warnings.simplefilter("ignore", UserWarning)
        weight = torch.quantize_per_channel(W.float(), scales.double(), zeros, 0, torch.qint8)

    def another() -> Bind:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            packed = torch.ops.quantized.linear_prepack(weight, None)
        finally:
            torch.backends.quantized.engine = before
        return directly(lambda x: torch.ops.quantized.linear_dynamic(x, packed, False))

    # Without AVX-512 fbgemm adds two products in 16 bits, which saturates: 0.046 was seen. So may
    # oneDNN, which was not seen there.
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return Prepared(
        another(),
        W.numel() + scales.nbytes,
        weight.dequantize(),
        another=another,
        saturates=None if wide else 0.06,
    )


def _without(engine: str) -> str | None:
    there = torch.backends.quantized.supported_engines
    return None if engine in there else f"this torch has no {engine}, only {', '.join(there)}"


def _torch_int4(W: Tensor) -> Prepared:
    """torch's int4 linear: weights in groups with a scale and a zero, x as it is."""
    codes, scales, dense = quantized(W)
    both = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)

    def another() -> Bind:
        mine, numbers = packed.clone(), both.clone()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        return directly(lambda x: product(x, mine, GROUP, numbers))

    return Prepared(another(), packed.nbytes + both.nbytes, dense, another=another)


def _onnxruntime(W: Tensor, group: int) -> Prepared:
    """ONNX Runtime's MatMulNBits, with int8 activations (accuracy_level 4)."""
    import numpy
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    (N, K), (codes, scales, dense) = W.shape, quantized(W.float(), group)
    blocks = pairs(codes).view(N, K // group, group // 2)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        N=N,
        K=K,
        bits=4,
        block_size=group,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", N])],
        [
            numpy_helper.from_array(blocks.numpy(), "codes"),
            numpy_helper.from_array(scales.flatten().numpy(), "scales"),
        ],
    )
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    content = helper.make_model(graph, opset_imports=versions, ir_version=8).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    # Threads of their own would spin for a while after a call and disturb the next session's.
    _onnxruntime_threads(torch.get_num_threads())
    options.use_per_session_threads = False

    def another() -> Bind:
        session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])

        def bind(x: Tensor) -> Call:
            y = onnxruntime.OrtValue.ortvalue_from_shape_and_type([len(x), N], numpy.float32)
            places = session.io_binding()
            value = onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy())
            places.bind_ortvalue_input("x", value)
            places.bind_ortvalue_output("y", y)

            def call() -> Any:
                session.run_with_iobinding(places)
                return y

            return call

        return bind

    size = blocks.nbytes + scales.nbytes
    return Prepared(another(), size, dense, lambda y: torch.from_numpy(y.numpy()), another)


_POOL: list[int] = []  # the threads of ONNX Runtime's pool, once it is there


def _onnxruntime_threads(count: int) -> None:
    """Gives ONNX Runtime a pool of so many threads that all sessions share.

    Raises: PeerError if the pool, of which a process has one, has another number.
    """
    import onnxruntime

    if not _POOL:
        onnxruntime.set_global_thread_pool_sizes(count, 1)
        _POOL.append(count)
    if _POOL[0] != count:
        raise PeerError(
            f"ONNX Runtime got {_POOL[0]} threads in this process before and cannot change to "
            f"{count}; start a new process"
        )


def _openvino(W: Tensor) -> Prepared:
    """OpenVINO's MatMul of a u4 weight in groups; x in blocks of as many inputs as int8."""
    import openvino
    from openvino import opset13 as operations

    (N, K), (codes, scales, dense) = W.shape, quantized(W.half())
    packed, numbers = pairs(codes).numpy(), scales.numpy()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,
    }
    core = openvino.Core()

    def another() -> Bind:
        x = operations.parameter([-1, K], openvino.Type.f32, "x")
        # Filled afterwards, it owns its memory; made from an array it would only borrow it.
        stored = openvino.Tensor(openvino.Type.u4, openvino.Shape([N, K // GROUP, GROUP]))
        stored.data[:] = packed.reshape(stored.data.shape)
        eight = openvino.op.Constant(openvino.Type.u4, openvino.Shape([1, 1, 1]), [8])
        groups = operations.subtract(
            operations.convert(openvino.op.Constant(stored), "f16"),
            operations.convert(eight, "f16"),
        )
        scale = operations.constant(numbers.reshape(N, K // GROUP, 1))
        weight = operations.reshape(operations.multiply(groups, scale), [N, K], False)
        y = operations.matmul(x, operations.convert(weight, "f32"), False, True)
        model = openvino.Model([y], [x], "linear")
        request = core.compile_model(model, "CPU", settings).create_infer_request()

        def bind(x: Tensor) -> Call:
            # A request keeps one input, so each call hands over its own; the data are not copied.
            value = openvino.Tensor(x.numpy(), shared_memory=True)

            def call() -> Any:
                request.set_input_tensor(value)
                request.infer()
                return request

            return call

        return bind

    size = packed.nbytes + numbers.nbytes
    read = lambda request: torch.from_numpy(request.get_output_tensor().data.copy())  # noqa: E731
    return Prepared(another(), size, dense, read, another)


EVERY = (torch.float32, torch.bfloat16, torch.float16)
_CPU: dict[str, Any] = {"device": "cpu", "dtypes": EVERY}
_INT8: dict[str, Any] = {**_CPU, "fed": torch.float32, "activations": "int8"}

CPU_PEERS = (
    *(
        Peer(
            f"torch-int8-{engine}",
            (),
            "int8",
            None,
            (1, 1),
            functools.partial(_torch_int8, engine=engine),
            missing=functools.partial(_without, engine),
            **_INT8,
        )
        for engine in ("fbgemm", "onednn")
    ),
    Peer("torch-int4", (), "int4", GROUP, (32, GROUP), _torch_int4, **_CPU),
    *(
        Peer(
            f"onnxruntime-{group}",
            ("onnxruntime", "onnx"),
            "int4",
            group,
            (1, group),
            functools.partial(_onnxruntime, group=group),
            **_INT8,
        )
        for group in (GROUP, SMALL_GROUP)
    ),
    Peer("openvino", ("openvino",), "u4", GROUP, (1, GROUP), _openvino, **_INT8),
    *(
        Peer(
            f"ggml-{name}",
            ("llama_cpp",),
            name,
            kind.group,
            (1, kind.block),
            functools.partial(ggml.prepare, kind=kind),
            missing=ggml.missing,
            **_INT8,
        )
        for name, kind in ggml.KINDS.items()
    ),
)
