"""The frame around the commands on consoles of every kind: narrow, full, closed, hostile names,
signals. Light processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from slab_kernels import terminal
from slab_kernels.cli import console
from slab_kernels.cli import main as cli

SLAB = [sys.executable, "-m", "slab_kernels"]
ROW = {
    "backend": "cpu",
    "m": 1,
    "n": 64,
    "k": 32,
    "values": "int4",
    "dtype": "bf16",
    "median_us": 4.0,
    "speedup_vs_dense": 2.5,
    "gbytes_per_s": 3.0,
}
HOSTILE = "a\x1b]0;title\x07\x1b[2J\nb\r\u202ec\u2066\x9b31m\ud800"
SPELT = r"a\x1b]0;title\x07\x1b[2J\nb\r\u202ec\u2066\x9b31m\ud800"


@pytest.fixture
def report(tmp_path):
    """A command that loads neither torch nor transformers, and prints × and –."""
    (tmp_path / "bench.json").write_text(
        json.dumps({"device": "two cores · fast", "rows": [ROW] * 400})
    )
    return ["report", str(tmp_path / "bench.json"), "--no-plots", "--out", str(tmp_path / "page")]


def shell(line: str, arguments: list[str], **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", line, "bash", *SLAB, *arguments], capture_output=True, text=True, **more
    )


@pytest.mark.parametrize(
    "variables",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_a_console_that_cannot_print_a_character_gets_a_plain_one(variables):
    environment = os.environ | variables
    done = subprocess.run(
        [*SLAB, "explain", "--shape", "64x32", "--device", "cpu"],
        capture_output=True,
        env=environment,
    )
    assert (
        done.returncode == 0
        and done.stdout.startswith(b"64x32, m=1")
        and done.stdout.isascii()
        and not done.stderr
    )
    done = subprocess.run([*SLAB, "--help"], capture_output=True, env=environment)
    assert done.returncode == 0 and done.stdout.isascii()


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_full_stdout_is_exit_code_5_in_one_sentence(report, more):
    done = shell('"$@" > /dev/full', [*report, *more])
    assert (
        done.returncode == 5
        and "cannot be written to the standard output: No space left" in done.stderr
    )
    assert done.stderr.count("\n") == 1, done.stderr
    done = shell('"$@" > /dev/full', ["report", "nowhere", *more])
    assert (
        done.returncode == 2
        and "Exception ignored" not in done.stderr
        and "Traceback" not in done.stderr
    )
    assert "nowhere" in done.stderr
    done = shell('"$@" > /dev/full', ["--help"])
    assert (
        done.returncode == 5
        and "Traceback" not in done.stderr
        and "Exception ignored" not in done.stderr
    )


@pytest.mark.parametrize("ending", ["| head -1 > /dev/null", "| true"])
def test_a_reader_that_has_seen_enough_is_no_failure(report, ending):
    for arguments in (report, [*report, "--json"], ["--help"]):
        done = shell(f'"$@" {ending}; echo ${{PIPESTATUS[0]}}', arguments)
        assert done.stdout.strip() == "0" and not done.stderr, (arguments, done)


def test_a_closed_stream_swallows_what_it_is_given(report):
    for line in ('"$@" >&-', '"$@" 2>&-', '"$@" >&- 2>&-', '"$@" 2> /dev/full'):
        assert shell(line, report).returncode == 0, line
        assert shell(line, ["report", "nowhere"]).returncode == 2, line


def test_stderr_without_a_reader_does_not_stop_the_work(capfd):
    read, write = os.pipe()
    os.close(read)
    code = (
        "from slab_kernels.cli import console\n"
        "for i in range(3): console.say('line')\n"
        "print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=write)
    os.close(write)
    assert done.returncode == 0 and done.stdout == b"done\n"


def test_control_characters_are_spelt_out(tmp_path, capsys):
    assert (
        terminal.visible(HOSTILE) == SPELT
        and terminal.visible("ä × 漢 \U0001f600") == "ä × 漢 \U0001f600"
    )
    assert terminal.visible("a\n\tb\u200d\x1b", keep=terminal.TEXT) == "a\n\tb\u200d\\x1b"

    def show():
        console.print_table((HOSTILE,), [(HOSTILE,)], HOSTILE)
        console.print_pairs([(HOSTILE, HOSTILE)], HOSTILE)
        print(f"in a sentence {HOSTILE}")
        console.say(HOSTILE)

    assert console.run(lambda: console.Outcome({"name": HOSTILE}, show), as_json=False) == 0
    shown = capsys.readouterr()
    for unsafe in HOSTILE.replace("\n", ""):
        assert unsafe.isprintable() or unsafe not in shown.out + shown.err
    assert shown.out.count(SPELT) >= 4 and SPELT in shown.err
    assert console.run(lambda: console.Outcome({"name": HOSTILE}, show), as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"name": HOSTILE}, "JSON stays exact"

    def fail():
        raise ValueError(HOSTILE)

    assert console.run(fail, as_json=False) == 2
    assert (
        "\\x1b" in (err := capsys.readouterr().err) and "\x1b" not in err and err.count("\n") == 1
    )


def test_an_event_of_a_run_is_spelt_out_in_the_bar(capsys):
    from slab_kernels.compression.events import ProgressEvent, listener

    bar = listener(True)
    bar(ProgressEvent("warning", message=HOSTILE))
    bar.close()
    assert "\\x1b]0;title" in (err := capsys.readouterr().err) and "]0;title\x07" not in err


def test_nothing_given_says_so(capsys):
    from slab_kernels.cli import main as cli

    assert cli.run([]) == 2 and "no command is given" in capsys.readouterr().err


WAITING = """
    import sys, time
    from slab_kernels.cli import console

    def work():
        with console.interruptible(lambda: {kept!r}):
            print("ready", file=sys.stderr, flush=True)
            time.sleep(30)

    sys.exit(console.run(work, as_json=False))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("kept", "sentence"), [("half is in X", "interrupted; half is in X"), ("", "interrupted")]
)
def test_a_signal_ends_in_one_sentence_that_says_what_was_kept(number, code, kept, sentence):
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WAITING.format(kept=kept))],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr.readline() == "ready\n"
    child.send_signal(number)
    assert (
        child.communicate(timeout=20)[1] == f"slab-kernels: {sentence}\n"
        and child.returncode == code
    )


def test_compress_says_whether_resume_has_something_to_go_on_with(tmp_path, monkeypatch, capsys):
    from slab_kernels.cli import main as cli
    from slab_kernels.compression import model

    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "compress", interrupted)
    assert (
        cli.run(["compress", "m", str(tmp_path)]) == 130
        and "nothing was kept" in capsys.readouterr().err
    )
    (tmp_path / "slab_progress.json").write_text("{}")
    assert cli.run(["compress", "m", str(tmp_path)]) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err


def test_a_failure_while_showing_prints_no_half_of_a_result(capsys):
    def show():
        print("half")
        raise ValueError("no more")

    assert console.run(lambda: console.Outcome({}, show), as_json=False) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "python, option",
    [
        (
            "preset='small' means head=False, and head=True contradicts it",
            "--preset 'small' means --no-head, and --head contradicts it",
        ),
        ("method='slab', pattern='2:4'", "--method 'slab', --pattern '2:4'"),
        ("planes=1, rank=0, bits=4.2", "--planes 1, --rank 0, --bits 4.2"),
        ("samples=-3 must be an integer", "--samples -3 must be an integer"),
        ("bits=nan, seed=7, rate=-1.0", "--bits nan, --seed 7, --rate -1.0"),
        ("prefill='foo', activations='foo'", "--prefill 'foo', --activations 'foo'"),
        (
            "no tokenizer; give tokenizer= or put its files there",
            "no tokenizer; put its files there",
        ),
        ("Layout(group_size=None), overhead=True", "Layout(group_size=None), overhead=True"),
        ("refit_damping=-1, embed.rank=3", "refit_damping=-1, embed.rank=3"),
    ],
)
def test_advice_in_pythons_words_names_the_options(python, option):
    assert console.as_options(python) == option


@pytest.mark.parametrize("size", ["48", "big", "-1"])
def test_a_group_size_that_is_none_is_refused_with_those_that_are(size, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["compress", str(tmp_path), str(out), f"--group-size={size}"]
    assert cli.run(command) == 2
    said = capsys.readouterr().err
    assert size in said and "32, 64, 128" in said and "auto" in said and "None" not in said
    assert not out.exists()
