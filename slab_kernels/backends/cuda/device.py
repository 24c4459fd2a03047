"""Where kernels go, and the words and numbers that name the types of what they work on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import tensor_map
from .gpus import Gpu
from .layout import INT4, INT8, W16

# As the kernels' names have them.
VALUE_NAMES = {W16: "w16", INT8: "int8", INT4: "int4"}
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
# bias_type of csrc/cuda/params.h and prefill.h; 0 is no bias.
BIAS_CODES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


class CudaDevice(NamedTuple):
    """The facts that plans need, a way to queue a kernel, and one to describe a matrix to it."""

    gpu: Gpu
    # It takes name, grid, block, shared bytes, params, and whether the kernel is dependent.
    queue: Callable[..., None]
    # It takes what tensor_map.encode does, and returns 128 bytes as that does.
    tensor_map: Callable[..., bytes] = tensor_map.encode
