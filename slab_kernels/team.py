"""Several processes at one model, started by torchrun: the layers of a group are shared out, results go to everyone.

Every process reads the calibration text through the same blocks, so statistics are equal to the last bit and the result does
not depend on how many processes there are. Only process 0 writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


class Team:
    """The processes of this run. size 1 without torchrun, which sets RANK, WORLD_SIZE and the meeting point."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self.size > 1:
            import torch.distributed as dist

            if not dist.is_initialized():
                dist.init_process_group("gloo")  # results travel through host memory: they are small beside the work

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, names: list[str] | tuple[str, ...], work: Callable[[str], Any]) -> dict[str, Any]:
        """name -> work(name): every name is done by one process, round robin; all receive all results.

        Raises: what `work` raised, on every process alike, for the first name that failed.
        """
        mine: dict[str, Any] = {}
        for name in names[self.rank :: self.size]:
            try:
                mine[name] = work(name)
            except Exception as error:
                mine[name] = error
                if self.size == 1:
                    raise
                break
        if self.size > 1:
            import torch.distributed as dist

            everyone: list[dict[str, Any]] = [{}] * self.size
            dist.all_gather_object(everyone, mine)
            mine = {name: result for part in everyone for name, result in part.items()}
        for name in names:
            if isinstance(mine.get(name), Exception):
                raise mine[name]
        return {name: mine[name] for name in names}

    def from_leader(self, make: Callable[[], Any]) -> Any:
        """What process 0 makes, on every process. Raises: what it raised."""
        return self.share(("",), lambda _: make())[""]


def local_device(device: str) -> str:
    """ "auto" and "cuda" under torchrun: the GPU of this process, by LOCAL_RANK."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or device not in ("auto", "cuda"):
        return device
    import torch

    return f"cuda:{rank}" if torch.cuda.is_available() else device
