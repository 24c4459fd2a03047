"""Other libraries' kernels on a GPU: who can run what, and that each gets its weight in its own
packing.

None of them is installed here: fake modules decode what they are given and multiply by it.
test_peers_cpu.py has those on a CPU.
"""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

from slab_kernels.bench import peer as one
from slab_kernels.bench import peers
from slab_kernels.errors import PeerError


def by_name(name: str) -> one.Peer:
    return next(peer for peer in peers.PEERS if peer.name == name)


def test_peers_say_why_not(monkeypatch):
    half = torch.float16
    assert all("CUDA" in peer.reason(128, 128, half, "cpu") for peer in peers.CUDA_PEERS)
    assert all("CPUs" in peer.reason(128, 128, half, "cuda") for peer in peers.CPU_PEERS)
    assert peers.on("cuda:1") == peers.CUDA_PEERS and peers.on("cpu") == peers.CPU_PEERS
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gemlite" else True
    )
    assert "'gemlite' is not installed" in by_name("gemlite").reason(128, 128, half, "cuda")
    assert "8.0" in by_name("marlin").reason(128, 128, half, "cuda")
    assert "float32" in by_name("torch-2:4").reason(128, 128, torch.float32, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "1000x1030" in by_name("marlin").reason(1000, 1030, half, "cuda")
    assert by_name("humming").reason(4096, 4096, half, "cuda") is None


def test_int4_of_the_peers():
    W = torch.randn(6, 256)
    codes, scales, dense = one.quantized(W)
    assert codes.dtype == torch.uint8 and int(codes.max()) <= 15 and scales.shape == (6, 2)
    assert torch.equal(dense, (codes.float() - 8) * scales.repeat_interleave(128, 1))
    assert bool(((dense - W).abs() <= scales.repeat_interleave(128, 1) * 0.501).all())


def test_torch_semi_structured(monkeypatch):
    class Sparse:
        def __init__(self, dense):
            self.dense, self.packed, self.meta = (
                dense,
                dense[:, ::2],
                torch.zeros(4, dtype=torch.int16),
            )

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", Sparse)
    real = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, W: real(x, W.dense))
    W = torch.randn(32, 64)
    found = by_name("torch-2:4").prepare(W)
    kept = found.dense.unflatten(1, (-1, 4))
    assert bool(((kept != 0).sum(-1) == 2).all()) and torch.equal(
        kept[kept != 0], W.unflatten(1, (-1, 4))[kept != 0]
    )
    assert found.weight_bytes == 32 * 32 * 4 + 8
    one.agree(torch.randn(3, 64), found)


def module(monkeypatch, name: str, **content) -> None:
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**content))


def test_gemlite(monkeypatch):
    class A16W4:
        def __init__(self, device, dtype):
            assert (device, dtype) == ("cpu", torch.float32)

        def from_weights(self, codes, scales, zeros):
            assert codes.dtype == torch.uint8 and scales.shape == zeros.shape == (
                codes.numel() // 128,
                1,
            )
            W = ((codes.float().view(-1, 128) - zeros) * scales).view(codes.shape)
            layer = torch.nn.Linear(*codes.shape[::-1], bias=False)
            layer.weight = torch.nn.Parameter(W, requires_grad=False)
            layer.W_q, layer.scales, layer.zeros = codes, scales, zeros
            return layer

    module(monkeypatch, "gemlite")
    module(monkeypatch, "gemlite.helper", A16W4_HQQ_INT=A16W4)
    one.agree(torch.randn(3, 256), by_name("gemlite").prepare(torch.randn(32, 256)))


def test_humming(monkeypatch):
    class Schema:
        def __init__(self, b_dtype, weight_scale_group_size):
            assert (b_dtype, weight_scale_group_size) == ("uint4", 128)

        @staticmethod
        def quant_tensor(W, schema, dtype):
            codes, scales, _ = one.quantized(W)
            return {"weight": codes, "weight_scale": scales}

        def dequant_tensors(self, tensors):
            return (tensors["weight"].float() - 8) * tensors["weight_scale"].repeat_interleave(
                128, 1
            )

    class Layer(torch.nn.Module):
        def __init__(self, shape_n, shape_k, weight_config, torch_dtype):
            super().__init__()
            self.schema, self.shape = weight_config, (shape_n, shape_k)

        def load_from_tensors(self, tensors):
            self.loaded = tensors

        def transform(self):
            self.weight = torch.nn.Parameter(
                self.schema.dequant_tensors(self.loaded), requires_grad=False
            )
            assert self.weight.shape == self.shape

        def forward(self, x):
            return x @ self.weight.T

    module(monkeypatch, "humming")
    module(monkeypatch, "humming.layer", HummingLayer=Layer)
    module(monkeypatch, "humming.schema", HummingWeightSchema=Schema)
    found = by_name("humming").prepare(torch.randn(64, 256))
    assert found.weight_bytes == 64 * 256 * 4
    one.agree(torch.randn(3, 256), found)


@pytest.mark.parametrize("old", [True, False], ids=["with g_idx", "without"])
def test_marlin(monkeypatch, old):
    def repack(words, K, N):  # GPTQ's packing undone
        return ((words.long()[:, None] >> 4 * torch.arange(8)[None, :, None]) & 15).reshape(K, N)

    def older(b_q_weight, perm, size_k, size_n, num_bits):
        assert perm.numel() == 0 and num_bits == 4
        return repack(b_q_weight, size_k, size_n)

    def newer(b_q_weight, size_k, size_n, num_bits, is_a_8bit=False):
        return repack(b_q_weight, size_k, size_n)

    def apply(input, weight, weight_scale, wtype):
        assert wtype == "uint4b8"
        return input @ ((weight - 8) * weight_scale.repeat_interleave(128, 0))

    def apply_older(
        input,
        weight,
        weight_scale,
        weight_zp,
        g_idx,
        g_idx_sort_indices,
        workspace,
        wtype,
        output_size_per_partition,
        input_size_per_partition,
        is_k_full,
        bias=None,
    ):
        assert (output_size_per_partition, input_size_per_partition, is_k_full, bias) == (
            64,
            256,
            True,
            None,
        )
        return apply(input, weight, weight_scale, wtype)

    def apply_newer(
        input,
        weight,
        weight_scale,
        weight_zp,
        workspace,
        wtype,
        output_size_per_partition,
        input_size_per_partition,
        input_global_scale=None,
        bias=None,
    ):
        return apply(input, weight, weight_scale, wtype)

    def permute_scales(s, size_k, size_n, group_size):
        assert s.shape == (size_k // group_size, size_n)
        return s

    utils = types.SimpleNamespace(
        marlin_permute_scales=permute_scales,
        marlin_make_workspace_new=lambda device: torch.zeros(1),
        apply_gptq_marlin_linear=apply_older if old else apply_newer,
    )
    for name in (
        "vllm.model_executor",
        "vllm.model_executor.layers",
        "vllm.model_executor.layers.quantization",
    ):
        module(monkeypatch, name)
    module(
        monkeypatch,
        "vllm",
        _custom_ops=types.SimpleNamespace(gptq_marlin_repack=older if old else newer),
    )
    module(monkeypatch, "vllm.model_executor.layers.quantization.utils", marlin_utils=utils)
    module(monkeypatch, "vllm.scalar_type", scalar_types=types.SimpleNamespace(uint4b8="uint4b8"))
    one.agree(torch.randn(3, 256), by_name("marlin").prepare(torch.randn(64, 256)))


def test_machete(monkeypatch):
    def prepack(b_q_weight, a_type, b_type, group_scales_type):
        assert b_q_weight.stride(0) == 1 and a_type == group_scales_type == torch.float32
        words = b_q_weight.long()
        return (words[:, None] >> 4 * torch.arange(8)[None, :, None] & 15).flatten(0, 1)

    def multiply(a, b_q, b_type, out_type=None, b_group_scales=None, b_group_zeros=None,
                 b_group_size=None):  # fmt: skip
        assert b_type == "uint4b8" and b_group_zeros is None
        return a @ ((b_q - 8) * b_group_scales.repeat_interleave(b_group_size, 0))

    ops = types.SimpleNamespace(machete_prepack_B=prepack, machete_mm=multiply)
    module(monkeypatch, "vllm", _custom_ops=ops)
    module(monkeypatch, "vllm.scalar_type", scalar_types=types.SimpleNamespace(uint4b8="uint4b8"))
    one.agree(torch.randn(3, 256), by_name("machete").prepare(torch.randn(128, 256)))


def test_a_wrong_result_and_nan_are_told_apart_from_rounding():
    W = torch.randn(64, 256)
    for factor, right in ((1.001, True), (1.05, False), (float("nan"), False)):
        linear = one.directly(lambda x, factor=factor: factor * x @ W.T)
        prepared = one.Prepared(linear, 0, W)
        if right:
            one.agree(torch.randn(3, 256), prepared)
        else:
            with pytest.raises(PeerError, match="disagrees"):
                one.agree(torch.randn(3, 256), prepared)


def test_rounded_activations_may_be_off_by_more():
    W = torch.randn(64, 256)
    prepared = one.Prepared(one.directly(lambda x: 1.025 * x @ W.T), 0, W)
    one.agree(torch.randn(3, 256), prepared, "int8")
    with pytest.raises(PeerError, match=r"by 0\.025, relative; at most 0\.02 is allowed"):
        one.agree(torch.randn(3, 256), prepared)
