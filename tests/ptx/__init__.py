"""A PTX interpreter: runs the text that nvcc emits on a machine without a GPU, and finds the faults
a GPU would hide.
"""

from . import dependent, floats, integers, loads, matrix, moves, warps  # noqa: F401
from .decode import PtxError
from .machine import launch
from .memory import Memory
from .parse import Module

__all__ = ["Memory", "Module", "PtxError", "launch"]
