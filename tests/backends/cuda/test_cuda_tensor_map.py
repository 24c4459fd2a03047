"""backends/cuda/tensor_map.py against a libcuda that only remembers (fake_cuda.c): what the
driver's encoder is asked for."""

from __future__ import annotations

import ctypes

import pytest
import torch
from test_cuda_driver import fake, fresh, library, needs_compiler  # noqa: F401

from slab_kernels.backends.cuda import driver, tensor_map
from slab_kernels.errors import CudaError

ADDRESS = 0x7F0123456780


class Map(ctypes.Structure):
    """`map` of fake_cuda.c."""

    _fields_ = [
        ("address", ctypes.c_uint64),
        ("dims", ctypes.c_uint64 * 2),
        ("stride", ctypes.c_uint64),
        ("rank", ctypes.c_uint),
        ("box", ctypes.c_uint * 2),
        ("steps", ctypes.c_uint * 2),
        *((name, ctypes.c_int) for name in ("type", "interleave", "swizzle", "promotion", "fill")),
        ("aligned", ctypes.c_int),
        ("calls", ctypes.c_int),
    ]


@pytest.fixture
def encoder(fake):  # noqa: F811
    """The fake driver, without what was encoded before."""
    tensor_map.encode.cache_clear()
    yield fake
    tensor_map.encode.cache_clear()


def last(encoder) -> Map:
    return Map.in_dll(encoder.library, "map")


@needs_compiler
@pytest.mark.parametrize(("dtype", "code"), [(torch.float16, 6), (torch.bfloat16, 9)])
def test_every_argument_of_the_encoder(encoder, dtype, code):
    encoded = tensor_map.encode(ADDRESS, 4100, 1 << 31, 8208, 256, dtype)
    asked = last(encoder)
    assert (asked.type, asked.rank, asked.address) == (code, 2, ADDRESS)
    assert (list(asked.dims), asked.stride) == ([4100, 1 << 31], 8208)
    assert (list(asked.box), list(asked.steps)) == ([64, 256], [1, 1])
    assert (asked.interleave, asked.swizzle, asked.promotion, asked.fill) == (0, 3, 3, 0)
    assert asked.aligned, "the driver wants its 128 bytes aligned to 64"
    assert encoded == bytes(range(1, 129))


@needs_compiler
def test_a_map_is_encoded_once(encoder):
    first = tensor_map.encode(ADDRESS, 64, 17, 128, 64, torch.float16)
    assert tensor_map.encode(ADDRESS, 64, 17, 128, 64, torch.float16) is first
    assert last(encoder).calls == 1
    for other in (
        (ADDRESS + 16, 64, 17, 128, 64, torch.float16),
        (ADDRESS, 56, 17, 128, 64, torch.float16),
        (ADDRESS, 64, 18, 128, 64, torch.float16),
        (ADDRESS, 64, 17, 144, 64, torch.float16),
        (ADDRESS, 64, 17, 128, 128, torch.float16),
        (ADDRESS, 64, 17, 128, 64, torch.bfloat16),
    ):
        assert tensor_map.encode(*other) != first


@needs_compiler
def test_a_refusal_says_what_was_asked_and_is_not_remembered(encoder):
    encoder.map_code = 1
    with pytest.raises(CudaError) as caught:
        tensor_map.encode(ADDRESS, 64, 17, 136, 64, torch.float16)
    assert str(caught.value) == (
        "a matrix of 17 rows of 64 torch.float16 elements, 136 bytes apart at 0x7f0123456780, in "
        "boxes of 64 rows has no tensor map: CUDA_ERROR_OTHER (something else)"
    )
    encoder.map_code = 0
    assert len(tensor_map.encode(ADDRESS, 64, 17, 136, 64, torch.float16)) == 128


def test_a_driver_without_the_encoder(monkeypatch):
    tensor_map.encode.cache_clear()
    monkeypatch.setattr(driver, "library", lambda: object())
    with pytest.raises(CudaError, match="has no cuTensorMapEncodeTiled; it has to know CUDA 12"):
        tensor_map.encode(ADDRESS, 64, 17, 128, 64, torch.float16)
