"""How torch's threads wait for one another while a command runs."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# libgomp and LLVM's or Intel's OpenMP read these when torch is loaded. Their default is that a
# waiting thread keeps its core busy. On a machine with other work to do, it then takes the core
# from the very thread that it waits for.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
CHOICES = (*PASSIVE, "GOMP_SPINCOUNT")  # if any of them is set, the user has chosen


def wait_passively(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets waiting threads sleep, unless the user chose how they wait. Call it before torch
    loads."""
    if not any(name in environment for name in CHOICES):
        environment.update(PASSIVE)
