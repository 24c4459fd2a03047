"""How a command ends: its result as a table or as one JSON object, its failure as one sentence, its
exit code.

stdout carries the result and nothing else. With --json whatever a library prints goes to stderr,
and an error is {"error": {"type", "message"}} on stdout.
"""

from __future__ import annotations

import contextlib
import errno
import io
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

from ..errors import (
    BAD_FILE,
    BAD_INPUT,
    BUG,
    CANNOT_RUN,
    DONE,
    INTERRUPTED,
    NO_SPACE,
    TERMINATED,
    SlabError,
)
from ..terminal import ERRORS, TEXT, visible

EXIT_CODES = (
    "Exit codes: 0 done · 2 wrong usage or input · 3 a file, checkpoint or model that cannot be "
    "used · 4 a backend, device or optional package that cannot run here · 5 disk or memory full, "
    "or no permission · 130 interrupted, 143 by SIGTERM · 1 a bug of ours."
)
DEBUG = "SLAB_KERNELS_DEBUG"

# Exceptions of Python and torch, by class name: naming torch's classes here would import torch.
CODES = {
    "ImportError": CANNOT_RUN,
    "OutOfMemoryError": NO_SPACE,
    "MemoryError": NO_SPACE,
    "OSError": BAD_FILE,
    "ValueError": BAD_INPUT,
}
NO_SPACE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG}


@dataclass(frozen=True)
class Outcome:
    """What a command found: `data` for --json, `show` prints the same for people.

    code: the exit code.
    """

    data: dict[str, Any]
    show: Callable[[], None]
    code: int = DONE


def exit_code(error: BaseException) -> int:
    """The exit code for an exception: by a full disk or missing permission anywhere in its causes,
    else by its class."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in NO_SPACE_ERRNOS:
            return NO_SPACE
        cause = cause.__cause__
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
        return NO_SPACE  # torch has no class of its own for a CPU that is out of memory
    if isinstance(error, ImportError) and (error.name or "").startswith("slab_kernels"):
        return BUG  # a module of ours, not an optional package
    if isinstance(error, SlabError):
        return error.exit_code
    return next((CODES[c.__name__] for c in type(error).__mro__ if c.__name__ in CODES), BUG)


def run(command: Callable[[], Outcome | int | None], as_json: bool) -> int:
    """Runs a command to its end and prints its result or its failure; returns the exit code."""
    _prepare_streams()
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if as_json else stdout), noted_signals():
        code, text = _carry_out(command, as_json)
    try:
        stdout.write(text)
        stdout.flush()
    except BrokenPipeError:  # `slab-kernels inspect ... | head` is no error
        _mute(stdout)
    except OSError as error:  # a full disk behind it
        _mute(stdout)
        reason = error.strerror or error
        say(f"slab-kernels: the result cannot be written to the standard output: {reason}")
        if code == DONE:
            code = NO_SPACE
        else:
            say(text.strip())  # why the command failed
    return code


def _carry_out(command: Callable[[], Outcome | int | None], as_json: bool) -> tuple[int, str]:
    """The exit code, and what is to stand on stdout.

    Of failures, what is not said there is said on stderr.
    """
    import typer

    # The base class of click, or of typer's copy of click, whichever this typer uses.
    usage_error = typer.BadParameter.__mro__[1]
    click_error: Any = usage_error.__mro__[1]
    try:
        outcome = command()
        if outcome == INTERRUPTED:  # typer catches KeyboardInterrupt itself
            raise KeyboardInterrupt
        if not isinstance(outcome, Outcome):  # --help, or a bare exit
            return int(outcome or 0), ""
        if as_json:
            return outcome.code, json.dumps(finite(outcome.data), allow_nan=False) + "\n"
        with contextlib.redirect_stdout(io.StringIO()) as page:
            outcome.show()
        return outcome.code, visible(page.getvalue(), keep=TEXT)
    except KeyboardInterrupt:
        return _interrupted("", as_json)
    except Interrupted as error:
        return _interrupted(str(error), as_json)
    except click_error as error:
        hint = getattr(getattr(error, "ctx", None), "command_path", None)
        message = one_line(error.format_message()) or "no command is given"
        message += f" (see: {hint} --help)" if hint else ""
        return fail(as_json, "UsageError", message, BAD_INPUT)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):
            return DONE, ""  # rich's answer to a closed pipe: `slab-kernels --help | head -1`
        return error.code if isinstance(error.code, int) else BUG, ""
    except Exception as error:
        if SIGNALS or type(error).__name__ == "Abort":
            return _interrupted("", as_json)
        if type(error).__name__ == "Exit":
            return getattr(error, "exit_code", BUG), ""
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            traceback.print_exc()
        code = exit_code(error)
        message = as_options(one_line(str(error) or type(error).__name__))
        if code == BUG:
            message = (
                f"unexpected {type(error).__name__}: {message}; {DEBUG}=1 shows where; "
                "please report it"
            )
        return fail(as_json, type(error).__name__, message, code)


class Interrupted(Exception):
    """A command was interrupted; the message says what was kept."""


SIGNALS: list[int] = []  # the signals that came while the command ran


@contextlib.contextmanager
def noted_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt, and are noted.

    torch makes a ValueError of one that arrives inside it.
    """

    def handle(number: int, frame) -> None:
        SIGNALS.append(number)
        raise KeyboardInterrupt

    SIGNALS.clear()
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible(kept: Callable[[], str]) -> Iterator[None]:
    """Around a command that keeps some of its work: `kept` says what, once it was interrupted."""
    try:
        yield
    except BaseException as error:
        if SIGNALS or isinstance(error, KeyboardInterrupt):
            raise Interrupted(kept()) from error
        raise


def _interrupted(kept: str, as_json: bool) -> tuple[int, str]:
    code = TERMINATED if signal.SIGTERM in SIGNALS else INTERRUPTED
    return fail(as_json, "Interrupted", f"interrupted; {kept}" if kept else "interrupted", code)


def fail(as_json: bool, kind: str, message: str, code: int) -> tuple[int, str]:
    """A failure's exit code, and what is to stand on stdout.

    That is the JSON error, or nothing, and the sentence goes to stderr.
    """
    if as_json:
        return code, json.dumps({"error": {"type": kind, "message": message}}) + "\n"
    say(f"slab-kernels: {message}")
    return code, ""


def _prepare_streams() -> None:
    """Let every character be printed on whatever console, and nothing fail on a closed stream."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        # What stands in for a stream may lack `reconfigure`.
        with contextlib.suppress(AttributeError, ValueError):
            getattr(sys, name).reconfigure(errors=ERRORS)


def _mute(stream) -> None:
    """Send what a stream still holds nowhere: Python, when it ends, would fail to write it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# What advice calls a thing in Python, and on the command line.
WORDS = {
    "resume=True": "--resume",
    "trust_remote_code=True": "--trust-remote-code",
    "group_size=None (one scale per row)": "--group-size 0 (one scale per row)",
    "None (one scale per row)": "0 (one scale per row)",
    "apply_chat_template=True": "--apply-chat-template",
    "head=True": "--head",
    "head=False": "--no-head",
    "permute=True": "--permute",
    "settings_by_pattern": "--set",
    "give tokenizer= or put": "put",
}
TEXTS = (
    "skip device calibration field revision subfolder window values group_size preset embeddings "
    "method pattern batch_size task_files output_path prefill activations"
).split()
NUMBERS = (
    "rank planes adapter_rank group_size bits samples window limit num_fewshot batch_size seed "
    "steps batch rate every"
).split()


def as_options(message: str) -> str:
    """Advice in Python's words, said in the command line's: resume=True becomes --resume,
    skip='*.x' becomes --skip '*.x', and planes=2 becomes --planes 2."""
    for python, option in WORDS.items():
        message = re.sub(rf"(?<![\w.]){re.escape(python)}", option, message)
    for names, value in ((TEXTS, "['\"]"), (NUMBERS, r"-?(?:\d|nan|inf)")):
        message = re.sub(
            rf"(?<![\w.])({'|'.join(names)})=(?={value})",
            lambda m: f"--{m[1].replace('_', '-')} ",
            message,
        )
    return message


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
    """A line of progress, or of failure. Where nobody can read it any more, the work goes on."""
    try:
        print(visible(message), file=sys.stderr, flush=True)
    except OSError:
        _mute(sys.stderr)


def print_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None
) -> None:
    """A table on stdout: first column left, the others right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if title:
        print(visible(title))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, name in enumerate(head):
        table.add_column(name, justify="left" if position == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    # In a pipe rich would fold tables at 80 columns; there is no screen to fit. Its own writing
    # would end the process at a closed pipe, so it writes into memory, without colours.
    page = io.StringIO()
    on_screen = sys.__stdout__ is not None and sys.__stdout__.isatty()
    Console(file=page, width=None if on_screen else 240).print(table)
    print(page.getvalue(), end="")


def print_beside(names: Sequence[str], texts: Sequence[str]) -> None:
    """Texts in columns beside each other, each under its name."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for name in names:
        table.add_column(Text(visible(name)), ratio=1, overflow="fold")
    table.add_row(*(Text(visible(text, keep=TEXT)) for text in texts))
    page = io.StringIO()
    on_screen = sys.__stdout__ is not None and sys.__stdout__.isatty()
    Console(file=page, width=None if on_screen else 120).print(table)
    print(page.getvalue(), end="")


def print_pairs(pairs: Iterable[tuple[str, str]], title: str | None = None) -> None:
    """Names and values, one pair a line."""
    if title:
        print(visible(title))
    pairs = [(visible(name), visible(value)) for name, value in pairs]
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        print(f"  {name:<{width}}  {value}" if value else f"  {name}")
