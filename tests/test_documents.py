"""README.md and docs/*.md: Python blocks run, command lines are understood, named things exist.

What a block is follows from its look alone. Fenced as `python`: run, statement by statement,
    in a folder where a tiny model
appears under every name that is opened. Indented,
    with a known command in front: a command line. Anything else is a listing.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import tiny_models
import typer

import slab_kernels
from slab_kernels.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# Programs of other projects, whose command lines are not ours to check.
FOREIGN = {"vllm", "curl", "trtllm-serve", "git", "docker", "convert_hf_to_gguf.py"}
OWN = {"slab-kernels", "make", "python", "pytest", "pip", "torchrun", ".ci/packages", ".ci/run"}
# Commands that run; the others, which need a GPU, a data set or much time, are parsed only.
RUN = {"explain", "info", "inspect", "check", "decompress", "generate"}
NEEDS_A_GPU = ('"cuda"', "'cuda'", "vllm", "torchrun")
OPENERS = {"load", "from_pretrained", "compress", "decompress", "save"}


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def command_lines(text: str) -> list[list[str]]:
    """The words of every line in an indented or shell block that starts with a known command."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    fenced = "\n".join(
        re.findall(r"^```(?:sh|bash|console|shell)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    )
    lines = (
        re.findall(r"^ {4}(\S.*)$", prose.replace("\\\n", " "), re.MULTILINE)
        + fenced.replace("\\\n", " ").splitlines()
    )
    words = [
        shlex.split(line.removeprefix("$ "), comments=True)
        for line in lines
        if line.removeprefix("$ ").split(" ")[0] in OWN | FOREIGN
    ]
    return [line[: line.index("|")] if "|" in line else line for line in words]


def spans(text: str) -> list[str]:
    """Inline code of a document, outside of fences."""
    return re.findall(
        r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    )


def each(find) -> list:
    """A parameter for everything that `find` finds in a document."""
    found = {
        (document, str(item)): item for document in DOCUMENTS for item in find(text_of(document))
    }
    return [
        pytest.param(item, id=f"{document.stem}: {label[:50]}")
        for (document, label), item in found.items()
    ]


def opened_folders(statement: ast.stmt) -> list[tuple[str, bool]]:
    """Folder names that a statement opens, and whether a dense model belongs there."""
    found = []
    for call in ast.walk(statement):
        name = getattr(
            getattr(call, "func", None), "attr", getattr(getattr(call, "func", None), "id", None)
        )
        if (
            isinstance(call, ast.Call)
            and name in OPENERS - {"save"}
            and call.args
            and isinstance(call.args[0], ast.Constant)
        ):
            dense = name == "compress" or any(
                keyword.arg == "quantization_config" for keyword in call.keywords
            )
            found.append((str(call.args[0].value), dense))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense and a packed folder to put under the names that documents use."""
    top = tmp_path_factory.mktemp("models")
    tiny_models.write(top / "dense")
    slab_kernels.compress(
        top / "dense",
        top / "packed",
        method="magnitude",
        calibration=tiny_models.tokens(),
        progress=False,
    )
    return top


def provide(models: Path, name: str, dense: bool) -> None:
    if not Path(name).exists():
        shutil.copytree(models / ("dense" if dense else "packed"), name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_python_blocks_run(document, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in python_blocks(text_of(document)):
        for statement in ast.parse(block).body:
            code = ast.unparse(statement)
            if any(word in code for word in NEEDS_A_GPU):
                continue
            for name, dense in opened_folders(statement):
                provide(models, name, dense)
            exec(compile(code, str(document), "exec"), namespace)


USAGE_ERROR = typer.BadParameter.__mro__[
    1
]  # click's own or typer's copy of it, whichever this typer uses
GROUP = typer.main.get_command(cli.app)
ANY_OPTION = {
    name
    for command in GROUP.commands.values()
    for parameter in command.params
    for name in (*parameter.opts, *parameter.secondary_opts)
}


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


@pytest.mark.parametrize("words", each(command_lines))
def test_command_lines(words, models, tmp_path, monkeypatch, capsys):
    check_line(words)
    if words[0] == "slab-kernels" and words[1] in RUN:
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


@pytest.mark.parametrize("span", each(our_spans))
def test_commands_within_sentences(span):
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
        scripts = set().union(
            *(
                options_in(path)
                for path in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*/__main__.py")]
            )
        )
        assert words[0].partition("=")[0] in ANY_OPTION | scripts, f"no command has {words[0]}"
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


FOLDERS = ("benchmarks/", "tests/", "docs/", "csrc/", "slab_kernels/", ".ci/")


def named_files(text: str) -> list[str]:
    """Paths in inline code, and the targets of links and pictures."""
    inline = [span for span in spans(text) if span.startswith(FOLDERS) and " " not in span]
    return inline + [
        target for target in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in target
    ]


@pytest.mark.parametrize("name", each(named_files))
def test_named_files_exist(name):
    """A star stands for any name, as in a shell; a result's name may stop before its ending."""
    pattern = name.rstrip("*") + "*"
    assert any(
        next(folder.glob(pattern), None)
        for folder in {document.parent for document in DOCUMENTS} | {ROOT}
    ), f"{name} does not exist"


def names_of_ours(text: str) -> list[str]:
    return re.findall(
        r"\bslab_kernels\.([A-Za-z_.]+[A-Za-z_])", "\n".join([*spans(text), *python_blocks(text)])
    )


@pytest.mark.parametrize("name", each(names_of_ours))
def test_names_of_the_package_exist(name):
    first, *rest = name.split(".")
    if importlib.util.find_spec(f"slab_kernels.{first}") and not hasattr(slab_kernels, first):
        owner = importlib.import_module(f"slab_kernels.{first}")
    else:
        owner = getattr(slab_kernels, first)
    for attribute in rest:
        owner = getattr(owner, attribute)
