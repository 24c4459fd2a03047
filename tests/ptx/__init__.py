"""A PTX interpreter: runs the text that nvcc emits on a machine without a GPU, and finds the faults
a GPU would hide.
"""

from . import (  # noqa: F401
    dependent,
    floats,
    integers,
    loads,
    matrix,
    mbarriers,
    moves,
    proxies,
    warpgroups,
    warps,
    wgmma,
)
from .decode import PtxError
from .machine import launch
from .memory import Memory
from .parse import Module
from .tensor_maps import tensor_map

__all__ = ["Memory", "Module", "PtxError", "launch", "tensor_map"]
