"""Where the library computes, and with which of torch's settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from .errors import ArgumentError

# Functions of torch.cpu that tell whether this CPU has instructions for products of bf16.
NATIVE_BF16 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of that name, where "auto" is a GPU if there is one.

    Raises: ArgumentError for a device that is unknown, cannot compute, or is not on this machine.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device={device!r} is unknown; use 'auto', 'cpu' or 'cuda'") from error
    if resolved.type not in ("cpu", "cuda"):
        raise ArgumentError(
            f"device={str(device)!r} holds no numbers that can be computed with here; use 'auto', "
            "'cpu' or 'cuda'"
        )
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(
            f"device={str(device)!r} is not on this machine (torch sees "
            f"{torch.cuda.device_count()} GPUs); use device='cpu'"
        )
    return resolved


def local_device(device: str) -> str:
    """The device that this process shall use.

    Under torchrun "auto" and "cuda" are the GPU that LOCAL_RANK names; else it is `device`.
    """
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or device not in ("auto", "cuda"):
        return device
    return f"cuda:{rank}" if torch.cuda.is_available() else device


MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where the system does not say.

    Of a CPU's memory it is what Linux holds available, or less where a control group has a limit
    (proc(5), MemAvailable; the kernel's documentation of cgroup v2, memory.max).
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found: int | None = None
    with suppress(OSError, ValueError, IndexError):
        lines = MEMINFO.read_text().splitlines()
        available = [line.split()[1] for line in lines if line.startswith("MemAvailable")]
        found = int(available[0]) << 10
        limit, used = ((CGROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        lines = (CGROUP / "memory.stat").read_text().splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file"))
        found = min(found, int(limit) - int(used) + cached)  # "max" stands for no limit
    return found


def native_products(device: torch.device) -> torch.dtype | None:
    """bf16 on a CPU that multiplies it by instructions of its own (AVX512-BF16, AMX), else None.

    There torch's products of bf16 matrices, which are summed in fp32, take half the time of fp32.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    asked = (getattr(torch.cpu, name, None) for name in NATIVE_BF16)
    return torch.bfloat16 if any(ask is not None and ask() for ask in asked) else None


@contextmanager
def usual_torch() -> Iterator[None]:
    """torch as it is after its import, so that a computation gives the same bytes wherever it runs.

    The caller's inference mode, autocast, gradients, default device and default dtype do not apply
    inside.
    """
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if before != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, before)
        yield
