"""Other libraries' kernels on a GPU.

This file is written against the public interfaces of torch 2.13, gemlite 0.6.0, humming-kernels
0.1.19 and of vLLM as of 0.6 to 2026. vLLM's Marlin and Machete functions lost and gained arguments;
they are called by the names that the installed one has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .peer import GROUP, Peer, Prepared, directly, quantized


def _semi_structured(W: Tensor) -> Prepared:
    """torch's own 2:4 linear (cuSPARSELt); the larger two of four are kept."""
    groups = W.unflatten(1, (-1, 4))
    kept = torch.zeros_like(groups).scatter(-1, groups.abs().topk(2, -1).indices, 1)
    dense = (groups * kept).flatten(1).contiguous()
    sparse = torch.sparse.to_sparse_semi_structured(dense)
    size = sum(part.nbytes for part in (sparse.packed, sparse.meta) if part is not None)
    return Prepared(directly(lambda x: torch.nn.functional.linear(x, sparse)), size, dense)


def _gemlite(W: Tensor) -> Prepared:
    """gemlite's Triton kernels, in HQQ's convention (W_q - zeros) * scales."""
    from gemlite.helper import A16W4_HQQ_INT

    codes, scales, dense = quantized(W)
    per_group = scales.reshape(-1, 1)
    zeros = torch.full_like(per_group, 8)
    layer = A16W4_HQQ_INT(device=str(W.device), dtype=W.dtype).from_weights(codes, per_group, zeros)
    size = layer.W_q.nbytes + layer.scales.nbytes + layer.zeros.nbytes
    return Prepared(directly(layer), size, dense)


def _humming(W: Tensor) -> Prepared:
    """Humming's JIT-compiled kernels, quantised by Humming itself."""
    from humming.layer import HummingLayer
    from humming.schema import HummingWeightSchema

    schema = HummingWeightSchema(b_dtype="uint4", weight_scale_group_size=GROUP)
    tensors = HummingWeightSchema.quant_tensor(W, schema, W.dtype)
    dense = schema.dequant_tensors(tensors)
    N, K = W.shape
    layer = HummingLayer(shape_n=N, shape_k=K, weight_config=schema, torch_dtype=W.dtype).to(
        W.device
    )
    layer.load_from_tensors(tensors)
    layer.transform()
    size = sum(parameter.nbytes for parameter in layer.parameters())
    return Prepared(directly(layer), size, dense)


def _marlin(W: Tensor) -> Prepared:
    """Marlin as vLLM ships it, from GPTQ's packing.

    That packs eight codes of one output column in an int32, the lowest first.
    """
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    (N, K), where = W.shape, W.device
    codes, scales, dense = quantized(W)
    words = _gptq_words(codes)
    none = torch.empty(0, dtype=torch.int, device=where)  # no zero points, no reordering of inputs
    weight = _called(
        ops.gptq_marlin_repack,
        b_q_weight=words,
        perm=none,
        size_k=K,
        size_n=N,
        num_bits=4,
    )
    scale = marlin_utils.marlin_permute_scales(
        scales.T.contiguous(), size_k=K, size_n=N, group_size=GROUP
    )
    workspace = marlin_utils.marlin_make_workspace_new(where)

    def linear(x: Tensor) -> Tensor:
        return _called(
            marlin_utils.apply_gptq_marlin_linear,
            input=x,
            weight=weight,
            weight_scale=scale,
            weight_zp=none,
            g_idx=none,
            g_idx_sort_indices=none,
            workspace=workspace,
            wtype=scalar_types.uint4b8,
            output_size_per_partition=N,
            input_size_per_partition=K,
            is_k_full=True,
            bias=None,
        )

    return Prepared(directly(linear), weight.nbytes + scale.nbytes, dense)


def _machete(W: Tensor) -> Prepared:
    """Machete, Hopper's mixed-input kernel, as vLLM ships it, from the same packing."""
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    codes, scales, dense = quantized(W)
    kind = scalar_types.uint4b8
    # It takes words [K / 8, N] that follow each other down a column.
    weight = _called(
        ops.machete_prepack_B,
        b_q_weight=_gptq_words(codes).T.contiguous().T,
        a_type=W.dtype,
        b_type=kind,
        group_scales_type=W.dtype,
    )
    scale = scales.T.contiguous()

    def linear(x: Tensor) -> Tensor:
        return _called(
            ops.machete_mm,
            a=x,
            b_q=weight,
            b_type=kind,
            b_group_scales=scale,
            b_group_zeros=None,
            b_group_size=GROUP,
        )

    return Prepared(directly(linear), weight.nbytes + scale.nbytes, dense)


def _gptq_words(codes: Tensor) -> Tensor:
    """Codes [N, K] as GPTQ packs them: [K / 8, N] int32."""
    N, K = codes.shape
    eights = codes.T.reshape(K // 8, 8, N).long()
    words = (eights << 4 * torch.arange(8, device=codes.device)[None, :, None]).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def _called(function: Callable[..., Any], **arguments: Any) -> Any:
    """The function called with those of the arguments that this version of it names."""
    known = inspect.signature(function).parameters
    return function(**{name: value for name, value in arguments.items() if name in known})


CUDA_PEERS = (
    Peer("torch-2:4", (), "2:4", None, (32, 64), _semi_structured, capability=(8, 0)),
    Peer("marlin", ("vllm",), "int4", GROUP, (64, GROUP), _marlin, capability=(8, 0)),
    Peer("machete", ("vllm",), "int4", GROUP, (128, GROUP), _machete, capability=(9, 0)),
    Peer("gemlite", ("gemlite",), "int4", GROUP, (32, GROUP), _gemlite, capability=(8, 0)),
    Peer("humming", ("humming",), "int4", GROUP, (64, GROUP), _humming, capability=(8, 0)),
)
