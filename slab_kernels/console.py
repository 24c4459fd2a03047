"""How a command ends: its result as a table or as one JSON object, its failure as one sentence, its exit code.

stdout carries the result and nothing else. With --json whatever a library prints goes to stderr, and an error is
{"error": {"type", "message"}} on stdout.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

OK, UNEXPECTED, BAD_INPUT, BAD_FILE, CANNOT_RUN, NO_SPACE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
EXIT_CODES = (
    "Exit codes: 0 done · 2 wrong usage or input · 3 a file, checkpoint or model that cannot be used · 4 a backend, device or "
    "optional package that cannot run here · 5 disk or memory full, or no permission · 130 interrupted · 1 a bug of ours."
)
DEBUG = "SLAB_KERNELS_DEBUG"

# By class name along the exception's ancestors, nearest first: naming the classes here would import torch.
CODES = {
    "BackendError": CANNOT_RUN,
    "PlotsUnavailable": CANNOT_RUN,
    "ImportError": CANNOT_RUN,
    "OutOfMemoryError": NO_SPACE,
    "MemoryError": NO_SPACE,
    "CheckpointError": BAD_FILE,
    "ConfigError": BAD_FILE,
    "ArchitectureError": BAD_FILE,
    "VersionError": BAD_FILE,
    "OSError": BAD_FILE,
    "ValueError": BAD_INPUT,
}
NO_SPACE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG}


@dataclass(frozen=True)
class Outcome:
    """What a command found: `data` for --json, `show` prints the same for people."""

    data: dict[str, Any]
    show: Callable[[], None]


INTERRUPTION = "interrupted; compress goes on where it stopped with --resume, tune has kept the rows it wrote"


def exit_code(error: BaseException) -> int:
    """The exit code for an exception: a full disk or missing permission anywhere in its causes, else by its class."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in NO_SPACE_ERRNOS:
            return NO_SPACE
        cause = cause.__cause__
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
        return NO_SPACE  # torch has no class of its own for a CPU that is out of memory
    if isinstance(error, ImportError) and (error.name or "").startswith("slab_kernels"):
        return UNEXPECTED  # a module of ours, not an optional package
    return next((CODES[c.__name__] for c in type(error).__mro__ if c.__name__ in CODES), UNEXPECTED)


def run(command: Callable[[], Outcome | int | None], as_json: bool) -> int:
    """Runs a command to its end and prints its result or its failure; returns the exit code."""
    import typer

    interrupts: list[int] = []
    usage_error = typer.BadParameter.__mro__[1]  # click's own or typer's copy of it, whichever this typer uses
    click_error = usage_error.__mro__[1]
    stdout = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr if as_json else stdout), noted_interrupts() as interrupts:
            outcome = command()
        if outcome == INTERRUPTED:  # typer catches KeyboardInterrupt itself
            raise KeyboardInterrupt
        if not isinstance(outcome, Outcome):  # --help, or a bare exit
            return int(outcome or 0)
        if as_json:
            print(json.dumps(finite(outcome.data), allow_nan=False), file=stdout)
        else:
            outcome.show()
        stdout.flush()
        return OK
    except BrokenPipeError:  # `slab-kernels inspect ... | head` is no error
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return fail(stdout, as_json, "Interrupted", INTERRUPTION, INTERRUPTED)
    except click_error as error:
        hint = getattr(getattr(error, "ctx", None), "command_path", None)
        message = one_line(error.format_message()) + (f" (see: {hint} --help)" if hint else "")
        return fail(stdout, as_json, "UsageError", message, BAD_INPUT)
    except Exception as error:
        if interrupts or type(error).__name__ == "Abort":
            return fail(stdout, as_json, "Interrupted", INTERRUPTION, INTERRUPTED)
        if type(error).__name__ == "Exit":
            return error.exit_code
        if os.environ.get(DEBUG):
            traceback.print_exc()
        code = exit_code(error)
        message = as_options(one_line(str(error) or type(error).__name__))
        if code == UNEXPECTED:
            message = f"unexpected {type(error).__name__}: {message}; {DEBUG}=1 shows where; please report it"
        return fail(stdout, as_json, type(error).__name__, message, code)


@contextlib.contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Ctrl-C raises KeyboardInterrupt and is noted: torch turns one that arrives inside it into a ValueError."""
    noted: list[int] = []

    def handle(number: int, frame) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield noted
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def fail(stdout, as_json: bool, kind: str, message: str, code: int) -> int:
    if as_json:
        print(json.dumps({"error": {"type": kind, "message": message}}), file=stdout, flush=True)
    else:
        print(f"slab-kernels: {message}", file=sys.stderr, flush=True)
    return code


def as_options(message: str) -> str:
    """Advice in Python's words, said in the command line's: resume=True -> --resume, skip='*.x' -> --skip '*.x'."""
    message = message.replace("resume=True", "--resume")
    return re.sub(r"\b(skip|device|calibration|window|values|group_size)=(?=['\"])", lambda m: f"--{m[1].replace('_', '-')} ", message)


def one_line(message: str) -> str:
    return " ".join(message.split())


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def say(message: str) -> None:
    """A line of progress."""
    print(message, file=sys.stderr, flush=True)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """A table on stdout: first column left, the others right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if title:
        print(title)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, name in enumerate(head):
        table.add_column(name, justify="left" if position == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # In a pipe rich would fold tables at 80 columns; there is no screen to fit.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 240).print(table)


def print_pairs(pairs: Iterable[tuple[str, str]], title: str | None = None) -> None:
    """Names and values, one pair a line."""
    if title:
        print(title)
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        print(f"  {name:<{width}}  {value}" if value else f"  {name}")
