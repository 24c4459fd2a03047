"""Several processes at one model, started by torchrun: they share out the layers of a group.

Every process reads the calibration text through the same blocks, so statistics are equal to the
last bit and the result does not depend on how many processes there are. All get all results. Only
process 0 writes.

A process may work for any length of time while the others wait. Each shows that it is alive by
counting in a store that all reach; who waits watches those counts, and speaks of a process that has
stopped instead of waiting for ever. Results are gathered once everyone is there.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from ..errors import TeamError
from ..terminal import first_line

ARRIVAL = 45.0  # seconds within which all processes must have come
SILENCE = 40.0  # seconds without a sign of life after which a process counts as dead
BEAT = 2.0  # seconds between two signs of life
_TEAMS = itertools.count()  # every process makes its teams in the same order


class Team:
    """The processes of this run: 1 without torchrun, which sets RANK, WORLD_SIZE and where to meet.

    device: where results of other processes go if they were made on a GPU. As a context manager it
    lets the others know when this process leaves.

    Raises: TeamError if the environment is incomplete or the other processes do not come.
    """

    def __init__(self, device: Any = "cpu") -> None:
        self.rank, self.size = _place()
        self.device, self._steps = device, itertools.count()
        self._left = threading.Event()
        if self.size > 1:
            try:
                self._meet()
            except BaseException:
                self._left.set()  # no sign of life from one that has given up
                raise

    def _meet(self) -> None:
        """Find the store that all processes reach, show there that this one lives, and wait for the
        others.

        Raises: TeamError if the others do not come.
        """
        import torch.distributed as dist

        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            if dist.is_initialized():
                store = dist.distributed_c10d._get_default_store()
            else:
                # For an unknown host torch would print its stack.
                socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
                store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=ARRIVAL)))
        except Exception as error:  # torch raises many types: a port in use, an unknown host, ...
            reason = first_line(error)
            raise TeamError(f"{self._expected(address)} ({reason})") from error
        self._store = dist.PrefixStore(f"slab_kernels/{next(_TEAMS)}", store)
        self._alive = dist.PrefixStore("alive", self._store)
        threading.Thread(target=self._beat, daemon=True).start()
        self._counts = {rank: (b"", time.monotonic()) for rank in range(self.size)}
        began = time.monotonic()
        while missing := [rank for rank in range(self.size) if not self._alive.check([str(rank)])]:
            if time.monotonic() - began > ARRIVAL:
                raise TeamError(f"{self._expected(address)} (process {missing[0]} did not come)")
            time.sleep(0.1)
        if not dist.is_initialized():
            group = dist.PrefixStore("gloo", self._store)
            dist.init_process_group("gloo", store=group, rank=self.rank, world_size=self.size)

    def _expected(self, address: str) -> str:
        return (
            f"WORLD_SIZE={self.size} processes were to meet at {address} within {ARRIVAL:.0f} "
            "seconds; start them all with torchrun, or unset RANK and WORLD_SIZE to work alone"
        )

    def _beat(self) -> None:
        for count in itertools.count():
            try:
                self._alive.set(str(self.rank), str(count))
            except Exception:  # The store is gone, and with it whoever could read this.
                return
            if self._left.wait(BEAT):
                return

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        """Who leaves by an error tells the others, which then need not wait for its silence."""
        if self.size > 1:
            # A store that is gone is no news beside the error that ends this process.
            with contextlib.suppress(TeamError):
                if kind is not None:
                    self._tell(f"left/{self.rank}", f"{kind.__name__}: {error}")
            self._left.set()

    def share(
        self, names: list[str] | tuple[str, ...], work: Callable[[str], Any]
    ) -> dict[str, Any]:
        """name -> work(name). Every name is done by one process, in turn; all receive all results.

        Raises: what `work` raised, on every process alike, for the first name that failed;
            TeamError if a process is gone.
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
            mine = {name: result for part in self._gather(mine) for name, result in part.items()}
        for name in names:
            if isinstance(mine.get(name), Exception):
                raise mine[name]
        return {name: mine[name] for name in names}

    def from_leader(self, make: Callable[[], Any]) -> Any:
        """What process 0 makes, on every process. Raises: what it raised."""
        return self.share(("",), lambda _: make())[""]

    def _gather(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """Everyone's `mine`, in the order of the processes."""
        import torch.distributed as dist

        data, step = _packed(mine), next(self._steps)
        self._tell(f"done/{step}/{self.rank}", "")
        for rank in range(self.size):
            self._await(f"done/{step}/{rank}", rank)
        everyone: list[bytes] = [b""] * self.size
        try:
            dist.all_gather_object(everyone, data)
        except RuntimeError as error:
            reason = first_line(error)
            raise TeamError(
                f"a process of this run stopped while results were shared ({reason})"
            ) from error
        return [
            mine if rank == self.rank else _unpacked(part, self.device)
            for rank, part in enumerate(everyone)
        ]

    def _await(self, key: str, rank: int) -> None:
        """Wait until process `rank` has set `key`, for as long as it lives. Raises: TeamError."""
        pause = 0.002
        try:
            while not self._store.check([key]):
                if self._store.check([f"left/{rank}"]):
                    reason = self._store.get(f"left/{rank}").decode()
                    raise TeamError(f"process {rank} of this run stopped ({reason})")
                count, since = self._counts[rank]
                now = self._alive.get(str(rank))
                if now != count:
                    self._counts[rank] = now, time.monotonic()
                elif time.monotonic() - since > SILENCE:
                    raise TeamError(
                        f"process {rank} of this run has given no sign of life for {SILENCE:.0f} s"
                    )
                time.sleep(pause)
                pause = min(2 * pause, 0.5)
        except TeamError:
            raise
        except RuntimeError as error:
            raise _gone(error) from error

    def _tell(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        except RuntimeError as error:
            raise _gone(error) from error


def _gone(error: RuntimeError) -> TeamError:
    reason = first_line(error)
    return TeamError(f"the process that holds this run together is gone ({reason})")


def _place() -> tuple[int, int]:
    """RANK and WORLD_SIZE, (0, 1) without them.

    Raises: TeamError for an environment that names no place among processes.
    """
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and size is None:
        return 0, 1
    if rank is None or size is None:
        lone, other = ("WORLD_SIZE", "RANK") if rank is None else ("RANK", "WORLD_SIZE")
        raise TeamError(
            f"{lone} is set in the environment without {other}; start with torchrun, which sets "
            "both, or unset it"
        )
    try:
        place = int(rank), int(size)
    except ValueError:
        place = -1, 0
    if not 0 <= place[0] < place[1]:
        raise TeamError(
            f"RANK={rank!r} and WORLD_SIZE={size!r} of the environment are no place among "
            "processes; unset them"
        )
    if place[1] > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise TeamError(
            f"WORLD_SIZE={size} is set in the environment without MASTER_ADDR and MASTER_PORT, "
            "where the processes would meet; start with torchrun, which sets all, or unset RANK "
            "and WORLD_SIZE"
        )
    return place


def _packed(mine: dict[str, Any]) -> bytes:
    """Results as bytes for another process; an exception that cannot travel as one that can."""
    import torch

    for name, result in mine.items():
        if isinstance(result, Exception):
            try:
                pickle.loads(pickle.dumps(result))
            except Exception:  # The constructor of such an exception wants more than its message.
                mine = {**mine, name: RuntimeError(f"{type(result).__name__}: {result}")}
    file = io.BytesIO()
    torch.save(mine, file)
    return file.getvalue()


def _unpacked(data: bytes, device: Any) -> dict[str, Any]:
    """What another process packed; what was on its GPU comes to `device`."""
    import torch

    def place(storage: Any, location: str) -> Any:
        if location == "cpu":
            return storage
        return torch.serialization.default_restore_location(storage, str(device))

    return torch.load(io.BytesIO(data), map_location=place, weights_only=False)
