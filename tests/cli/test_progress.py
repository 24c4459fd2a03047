"""Progress of long commands: lines in a log, a bar on a terminal, nothing on stdout."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time

import pytest
import tiny_models

from slab_kernels.cli import main as cli
from slab_kernels.cli import progress
from slab_kernels.cli.progress import Progress


@pytest.fixture
def impatient(monkeypatch):
    """Lines after 0.05 seconds and every 0.05 from then on."""
    monkeypatch.setattr(progress, "FIRST_LINE", 0.05)
    monkeypatch.setattr(progress, "NEXT_LINE", 0.05)


def test_a_log_gets_a_line_from_time_to_time(impatient, capsys):
    with Progress("eval", "windows") as seen:
        time.sleep(0.12)
        seen(10, 100)
        seen(20, 100)
        time.sleep(0.2)
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert not shown.out and 3 <= len(lines) <= 8
    assert lines[0] == "eval: 0:00:00 elapsed", "nothing is counted yet"
    assert lines[-1].startswith("eval: 20 of 100 windows, 0:00:00 elapsed, about 0:00:0")
    time.sleep(0.15)
    assert not capsys.readouterr().err, "it is silent once the work is over"


def test_short_work_says_nothing(capsys):
    with Progress("eval", "windows") as seen:
        seen(1, 2)
        seen(2, 2)
    assert capsys.readouterr().err == ""


def test_the_time_left_is_the_rest_at_the_pace_so_far(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    seen = Progress("eval", "windows")
    assert seen.seconds_left() is None
    clock[0] = 160.0  # a minute of loading does not count
    seen(5, 105)
    assert seen.seconds_left() is None, "one step tells no pace"
    clock[0] = 180.0
    seen(15, 105)
    assert seen.seconds_left() == 180.0
    clock[0] = 190.0
    assert seen.seconds_left() == 170.0
    assert str(seen) == "eval: 15 of 105 windows, 0:01:30 elapsed, about 0:02:50 left"


def test_a_failure_ends_it(impatient, capsys):
    with pytest.raises(ZeroDivisionError), Progress("eval", "windows"):
        1 / 0  # noqa: B018
    capsys.readouterr()
    time.sleep(0.15)
    assert capsys.readouterr().err == ""


def on_terminal(code: str) -> tuple[str, str]:
    """stdout, and what a terminal behind stderr gets."""
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", code]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    out, _ = child.communicate(timeout=60)
    os.close(leader)
    assert child.returncode == 0
    return out.decode(), shown.decode(errors="replace")


def test_a_terminal_gets_a_bar():
    out, shown = on_terminal(
        "import time\n"
        "from slab_kernels.cli.progress import Progress\n"
        "with Progress('eval', 'windows') as seen:\n"
        "    seen(3, 12); time.sleep(0.4); seen.say('a line'); seen(12, 12)\n"
        "print('done')"
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert out == "done\n" and "3/12 windows" in plain and "a line" in plain


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model, a text, and the model packed."""
    folder = tmp_path_factory.mktemp("progress")
    tiny_models.write(folder / "tiny")
    (folder / "text.txt").write_text(tiny_models.text())
    more = ["--samples", "4", "--window", "32", "--device", "cpu", "--method", "magnitude"]
    command = ["compress", str(folder / "tiny"), str(folder / "packed"), *more]
    assert cli.run([*command, "--calibration", str(folder / "text.txt")]) == 0
    return folder


LONG_COMMANDS = {
    "eval": ["eval", "packed", "--text", "text.txt", "--window", "8", "--json"],
    "decompress": ["decompress", "packed", "dense", "--json"],
    "train": ["train", "packed", "trained", "--text", "text.txt", "--steps", "6", "--window", "16",
              "--samples", "8", "--adapter-rank", "2", "--json"],
    "report": ["report", "packed", "--json"],
    "bench": ["bench", "--shape", "64x32", "--shape", "32x64", "--m", "1", "--m", "2",
              "--seconds", "0", "--dtype", "fp32", "--device", "cpu", "--json"],
}  # fmt: skip


@pytest.mark.parametrize("name", LONG_COMMANDS)
def test_long_commands_count_their_steps(name, folders, monkeypatch, capsys):
    """Every step up to the last; stdout holds the JSON object alone."""
    calls = []
    counted = Progress.__call__

    def note(self, done: int, total: int) -> None:
        calls.append((done, total))
        counted(self, done, total)

    monkeypatch.setattr(Progress, "__call__", note)
    monkeypatch.chdir(folders)
    capsys.readouterr()
    assert cli.run(LONG_COMMANDS[name]) == 0
    assert json.loads(capsys.readouterr().out)
    done = [step for step, _ in calls]
    assert len(calls) >= 2 and done == sorted(done)
    assert calls[-1][0] == calls[-1][1], calls
