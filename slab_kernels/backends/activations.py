"""How x enters a product on a CPU: a stated accuracy mode.

exact   x as it is given, in sums of fp32
int8    x as integers with a step for each piece of it, for int8, int4 and int3 values: of 8 bits
        for 32 or 64 inputs; with AVX2 and many tokens of 13 bits for 128, and there the weight
        becomes such integers too. Weights with 16-bit values stay exact. The default

The mode is of what a layer prepared, and changes no stored weight. docs/cpu.md states how far the
results of int8 may be from exact ones.
"""

from __future__ import annotations

import os
import reprlib

from ..errors import ArgumentError

MODES = ("exact", "int8")
DEFAULT = "int8"
ENVIRONMENT = "SLAB_KERNELS_CPU_ACTIVATIONS"  # the word where no argument says one


def named(activations: str | None) -> str:
    """The word that holds: the argument, else the environment's, else DEFAULT.

    Raises: ArgumentError for any other than MODES.
    """
    told = activations if activations is not None else os.environ.get(ENVIRONMENT) or DEFAULT
    if not isinstance(told, str) or told not in MODES:
        origin = f" ({ENVIRONMENT} names it)" if activations is None else ""
        known = ", ".join(MODES)
        raise ArgumentError(
            f"activations={reprlib.repr(told)}{origin} is unknown; use one of {known}"
        )
    return told
