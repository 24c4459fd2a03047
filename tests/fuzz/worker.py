"""A process that runs cases within limits and writes one JSON line about each."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

SECONDS, WAITING = (
    5,
    30,
)  # of computing, which a busy machine does not stretch; of waiting for something that never comes
BYTES = 2 << 30


class Overtime(BaseException):
    """A case took too long. No Exception, so that nothing on the way takes it for its own."""


def data_bytes() -> int:
    """Private memory that this process has asked for."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmData")
    )
    return int(line.split()[1]) * 1024


def over(number: int, frame) -> None:
    raise Overtime("".join(traceback.format_stack(frame)[-3:]))


@contextlib.contextmanager
def in_time():
    """Raises: Overtime."""
    for which, limit in ((signal.ITIMER_PROF, SECONDS), (signal.ITIMER_REAL, WAITING)):
        signal.setitimer(which, limit)
    try:
        yield
    finally:
        for which in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(which, 0)


def open_libraries() -> None:
    import torch
    import transformers
    import transformers.quantizers.auto  # so that its import does not count as a case's time

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")


def main(
    top: Path, seed: int, start: int, stop: int, step: int, target: str | None, keep: Path | None
) -> None:
    """Run cases start, start + step, ... below `stop` on the folders below `top`.

    Two lines a case, before and after, go to descriptor 3.
    """
    open_libraries()
    from fuzz.file_damage import damaged
    from fuzz.folders import SHARDED, SINGLE, Place, read
    from fuzz.targets import TARGETS, Fault, Result, Targets

    report = os.fdopen(3, "w", buffering=1)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, over)
    bases = {name: read(top / name) for name in (SINGLE, SHARDED)}
    own = Path(tempfile.mkdtemp(dir=top))
    for name in bases:
        shutil.copytree(top / name, own / name)
    shutil.copy(top / "text.txt", own)
    targets, place = Targets(own, bases), Place(own / "damaged")
    for (
        base
    ) in bases.values():  # a first round, so that imports inside the library do not count either
        for each in TARGETS:
            targets.run(each, base, own / base.name, random.Random(0))
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + BYTES, resource.RLIM_INFINITY))
    for case in range(start, stop, step):
        kind, folder, rng = damaged(case, seed, bases)
        chosen = rng.choices(list(TARGETS), list(TARGETS.values()))[0]
        chosen = target or chosen
        print(
            json.dumps({"case": case, "kind": kind, "target": chosen, "damage": folder.damage}),
            file=report,
        )
        began = time.process_time()
        try:
            path = place.show(folder)
            with in_time():
                result = targets.run(chosen, folder, path, rng)
        except Fault as fault:
            result = Result(str(fault).partition(":")[0], str(fault), fault=True)
        except Overtime as error:
            result = Result("too slow", where=" ".join(str(error).split())[-300:], fault=True)
        except SystemExit as error:
            result = Result("exit", f"SystemExit: {error}", fault=True)
        except Exception as error:  # of the judgement itself, which reads what may not be readable
            result = Result(
                "judge failed",
                f"{type(error).__name__}: {error}",
                traceback.format_exc()[-700:],
                fault=True,
            )
        if keep:
            shutil.copytree(path, keep, symlinks=True, dirs_exist_ok=True)
        seconds = time.process_time() - began
        print(
            json.dumps({"case": case, "seconds": round(seconds, 3), **vars(result)}, default=str),
            file=report,
        )
    shutil.rmtree(own)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    main(Path(given.pop("top")), keep=Path(keep) if (keep := given.pop("keep")) else None, **given)
