"""How torch's threads wait for one another while a command runs."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# libgomp and LLVM's or Intel's OpenMP read these when torch is loaded. By default a thread that waits
# keeps its core busy, which on a machine with other work takes the core from the thread it waits for.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
CHOICES = (*PASSIVE, "GOMP_SPINCOUNT")  # any of them set by the user is the user's choice


def wait_passively(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets waiting threads sleep, unless the user chose how they wait. Call it before torch loads."""
    if not any(name in environment for name in CHOICES):
        environment.update(PASSIVE)
