"""Command lines of the documents: they are understood, and named commands and options exist."""

from __future__ import annotations

import ast
import functools
import itertools
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from docs.documents import (
    FOREIGN,
    OWN,
    ROOT,
    command_lines,
    each,
    provide,
    spans,
)
from slab_kernels.cli import main as cli

# Commands that run; the others, which need a GPU, a data set or much time, are parsed only.
RUN = {"explain", "info", "inspect", "check", "decompress", "generate"}
USAGE_ERROR = typer.BadParameter.__mro__[
    1
]  # click's own or typer's copy of it, whichever this typer uses
GROUP = typer.main.get_command(cli.app)
ANY_OPTION = {
    name
    for command in GROUP.commands.values()
    for parameter in command.params
    for name in (*parameter.opts, *parameter.secondary_opts)
} | {"--help"}


def options_of(name: str) -> set[str]:
    return {
        option
        for parameter in GROUP.commands[name].params
        for option in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help", "-h"}


def parse(words: list[str]) -> None:
    """Refuses what the command line would refuse."""
    if words[0].startswith("-"):
        return
    assert words[0] in GROUP.commands, f"slab-kernels has no command {words[0]}"
    GROUP.commands[words[0]].make_context(words[0], [word for word in words[1:] if word != "…"])


def options_in(source: Path) -> set[str]:
    """Every "--option" that stands in a script as a string."""
    constants = (
        node.value
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
    )
    return {value for value in constants if isinstance(value, str) and value.startswith("--")}


@functools.cache
def script_options() -> set[str]:
    """The options of every script in benchmarks/ and of every program there and in tests/."""
    programs = (ROOT.glob(f"{folder}/*/__main__.py") for folder in ("benchmarks", "tests"))
    scripts = itertools.chain(ROOT.glob("benchmarks/*.py"), *programs)
    return set().union(*map(options_in, scripts))


def check_script(words: list[str]) -> None:
    """python SCRIPT ... or python -m MODULE ...: it exists and has the options."""
    if words[0] == "-m":
        top = words[1].partition(".")[0]
        if top in FOREIGN:
            return
        path = ROOT / words[1].replace(".", "/")
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    elif words[0] in FOREIGN:
        return
    else:
        path = ROOT / words[0]
        if words[:2] == ["setup.py", "build_ext"]:  # a command of setuptools
            return
    assert path.is_file(), f"{path} does not exist"
    options = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
    assert options <= options_in(path) | {"--help"}, (
        f"{path.name} has no {', '.join(sorted(options - options_in(path)))}"
    )


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, variable, _ = word.partition("=")
        pattern = rf"^{name} *[?:]?=" if variable else rf"^{re.escape(name)}:"
        assert re.search(pattern, makefile, re.MULTILINE), (
            f"the Makefile has no {'variable' if variable else 'target'} {name}"
        )


def check_pytest(words: list[str]) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "pytest"
    ]["ini_options"]["markers"]
    for before, word in zip(["", *words], words, strict=False):
        assert before != "-m" or word in {marker.partition(":")[0] for marker in declared}, (
            f"no marker {word}"
        )
        assert "/" not in word or (ROOT / word.partition("::")[0]).exists(), (
            f"{word} does not exist"
        )


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    for word in words:
        for named in re.findall(r"^(?:slab-kernels|\.)\[(.*)\]$", word):
            assert set(named.split(",")) <= extras.keys(), f"pyproject.toml has no extra {named}"


def check_line(words: list[str]) -> None:
    """One command line, given by its words. Fails on what is not there."""
    program, rest = words[0], [word for word in words[1:] if word != "…"]
    if program == "slab-kernels":
        parse(rest)
    elif program == "torchrun":
        assert rest[rest.index("-m") + 1] == "slab_kernels"
        parse(rest[rest.index("-m") + 2 :])
    elif program.startswith(".ci/"):
        assert (ROOT / program).is_file()
    elif program not in FOREIGN:
        {"make": check_make, "python": check_script, "pytest": check_pytest, "pip": check_pip}[
            program
        ](rest)


@pytest.mark.parametrize(("document", "words"), each(command_lines))
def test_command_lines(document, words, models, tmp_path, monkeypatch, capsys):
    check_line(words)
    # The tiny model's tokenizer has no chat template.
    if words[0] == "slab-kernels" and words[1] in RUN and "--chat" not in words:
        monkeypatch.chdir(tmp_path)
        for argument in GROUP.commands[words[1]].params:
            if argument.param_type_name == "argument" and argument.name == "folder":
                provide(models, words[2], dense=False)
        assert cli.run(words[1:]) == 0, capsys.readouterr().err


def our_spans(text: str) -> list[str]:
    """Inline code that is a command line of ours, whole or in part, or begins with an option."""
    programs = tuple(f"{program} " for program in OWN)
    found = [span for span in spans(text) if span.startswith(programs) or span.startswith("--")]
    return found + [
        f"slab-kernels {span}"
        for span in spans(text)
        if span.split(" ")[0] in GROUP.commands and " " in span
    ]


@pytest.mark.parametrize(("document", "span"), each(our_spans))
def test_commands_within_sentences(document, span):
    """A sentence may name part of a command line; what it names has to be there."""
    words = shlex.split(span)
    if words[0] == "slab-kernels":
        if words[1] == "COMMAND" or words[1].startswith("-"):
            return
        named = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
        assert named <= options_of(words[1]), (
            f"slab-kernels {words[1]} has no {', '.join(sorted(named - options_of(words[1])))}"
        )
    elif words[0].startswith("--"):
        assert words[0].partition("=")[0] in ANY_OPTION | script_options(), (
            f"no command has {words[0]}"
        )
    else:
        check_line(words)


@pytest.mark.parametrize(
    "line",
    [
        "slab-kernels squeeze MODEL OUT", "slab-kernels compress MODEL",
            "slab-kernels compress MODEL OUT --sample 3", "slab-kernels eval out --limit none",
        "make tests", "make demo MODLE=x", "python benchmarks/demo.py --tiny",
            "python benchmarks/nothing.py", "python -m slab_kernels.nothing",
        "pytest -m fast", "pytest tests/test_nothing.py", "pip install slab-kernels[nothing]",
            "torchrun -m slab_kernels squeeze", ".ci/nothing",
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_seen(line):
    with pytest.raises((AssertionError, USAGE_ERROR)):
        check_line(shlex.split(line))
