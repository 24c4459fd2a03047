"""Imports go down only. The table is the architecture: who may know whom, in Python and in C++.

Rooms from the waist up and down: methods see the format and the statistics, backends see the format and the reference, and
neither sees the other. A new module has to be placed here.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "slab_kernels"

FORMAT = {"bitpacking", "layout", "rounding", "format"}
WAIST_DOWN = FORMAT | {"reference", "ops", "backends", "dispatch"}
MODEL = {
    "model", "source", "pipeline", "plan", "sinks", "team", "matching", "budget", "training", "checkpoint",
    "packed_checkpoint", "progress", "record", "blocks", "streams", "inputs", "stored_names", "text", "unpacking",
    "packed_config", "surroundings", "arguments", "token_ids", "ties", "side_files",
}  # fmt: skip
ALLOWED: dict[str, set[str]] = {
    # the waist
    "bitpacking": set(),
    "layout": {"bitpacking"},
    "rounding": {"bitpacking", "layout"},
    "format": {"bitpacking", "layout", "rounding"},
    # below it: who runs a problem
    "reference": FORMAT,
    "ops": FORMAT | {"reference"},
    "backends": FORMAT | {"reference", "ops"},
    "dispatch": FORMAT | {"backends"},
    "prepared": {"backends"},
    "nn": WAIST_DOWN | {"prepared"},
    "replacement": FORMAT | {"nn"},
    "testing": FORMAT | {"reference"},
    "timing": set(),
    "roofline": {"timing"},
    "peers": set(),
    "bench": WAIST_DOWN | {"nn", "testing", "timing", "roofline", "peers"},
    "tuning": FORMAT | {"backends", "bench", "machine", "testing", "timing"},
    # what many rooms share, knowing none of them
    "settings": set(),
    "paths": set(),
    "terminal": set(),
    # above it: pure functions of a weight and its input statistics
    "calibration": FORMAT,
    "methods": FORMAT | {"calibration", "settings"},
    # a whole model
    "stdlib_text": set(),
    "rows": {"calibration", "terminal"},
    "text": {"calibration", "checkpoint", "paths", "rows", "settings", "stdlib_text", "terminal"},
    "shards": set(),
    "checkpoint": {"shards"},
    "side_files": {"checkpoint", "terminal"},
    "progress": {"checkpoint"},
    "record": FORMAT | {"checkpoint", "terminal"},
    "team": {"terminal"},
    "memory": set(),
    "surroundings": set(),
    "matching": FORMAT | {"record", "settings", "streams"},
    "plan": FORMAT | {"calibration", "matching", "methods"},
    "budget": FORMAT | {"blocks", "calibration", "inputs", "plan", "settings", "streams"},
    "arguments": {"budget", "plan", "text"},
    "sinks": FORMAT | {"checkpoint", "plan", "progress", "record", "source"},
    "blocks": set(),
    "streams": {"blocks", "text"},
    "inputs": {"streams", "text"},
    "stored_names": {"checkpoint", "terminal"},
    "skeleton": {"blocks"},
    "ties": {"stored_names"},
    "architecture": FORMAT | {"blocks", "checkpoint", "skeleton", "terminal"},
    "source": FORMAT
    | {"architecture", "blocks", "checkpoint", "paths", "side_files", "skeleton", "stored_names", "terminal", "text", "ties"},
    "packed_config": FORMAT | {"checkpoint"},
    "pipeline": FORMAT
    | {"blocks", "calibration", "checkpoint", "inputs", "matching", "memory", "plan", "record", "sinks", "source"}
    | {"streams", "team", "ties"},
    "packed_checkpoint": FORMAT
    | {"architecture", "blocks", "checkpoint", "nn", "packed_config", "paths", "pipeline", "progress", "side_files", "source"}
    | {"stored_names", "surroundings", "ties"},
    "unpacking": FORMAT
    | {"checkpoint", "packed_checkpoint", "packed_config", "paths", "progress", "side_files", "source", "surroundings"},
    "finish": FORMAT | {"checkpoint", "replacement", "packed_config", "plan", "progress", "record", "sinks"},
    "model": FORMAT | MODEL | {"finish", "paths"},
    "token_ids": {"calibration", "checkpoint", "source"},
    "training": FORMAT | {"checkpoint", "nn", "packed_checkpoint", "paths", "settings", "source", "surroundings", "text", "token_ids"},
    "evaluate": {"blocks", "checkpoint", "nn", "packed_checkpoint", "source", "terminal", "text", "token_ids"},
    "inspection": FORMAT | {"checkpoint", "packed_config", "paths", "record"},
    "tasks": {"evaluate", "packed_checkpoint", "paths", "settings", "token_ids"},
    "engines": FORMAT | {"blocks", "nn"}
    | {"arguments", "checkpoint", "dispatch", "model", "packed_checkpoint", "packed_config", "side_files", "skeleton"}
    | {"source", "terminal", "ties"},
    # what a person sees
    "machine": {"dispatch", "backends"},
    "support": FORMAT | {"dispatch", "backends"},
    "figures": set(),
    "page": set(),
    "measurements": {"paths"},
    "report": {"figures", "measurements", "page", "paths"},
    "console": {"terminal"},
    "options": set(),
    "layer_shapes": set(),
    "__main__": {"cli"},
    "cli": MODEL | {"dispatch", "evaluate", "inspection", "report", "tasks", "engines", "console", "options", "kernel_commands", "methods", "paths"},
    "kernel_commands": FORMAT | {"backends", "bench", "console", "dispatch", "layer_shapes", "machine", "methods", "options", "paths", "pipeline", "report", "support", "tuning"},
}
ANY = {"__init__"}  # the version


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> set[str]:
    """Rooms of this package that a file imports, at its top or inside a function; type-checking blocks do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", getattr(node.test, "attr", "")) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    here = ("slab_kernels", *path.relative_to(PACKAGE).parts[:-1])
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            # `from . import a, b` names modules; `from .a import b` names a
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for parts in names:
            if parts[0] == "slab_kernels":
                known = len(parts) > 1 and ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file())
                found.add(parts[1] if known else "__init__")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_python_imports_go_down(path):
    name = room(path)
    if name == "__init__":
        assert imports(path) == {"engines"}, "importing the package imports only the hook that waits for transformers"
        return
    assert name in ALLOWED, f"place {name} in the table"
    assert imports(path) - {name} <= ALLOWED[name] | ANY


def test_the_table_has_no_cycle_and_no_ghost():
    assert {room(path) for path in FILES} == set(ALLOWED) | {"__init__"}
    graph = {name: set().union(*(imports(p) for p in FILES if room(p) == name)) - {name, "__init__"} for name in ALLOWED}
    placed: set[str] = set()
    while ready := [name for name in graph if name not in placed and graph[name] <= placed]:
        placed |= set(ready)
    assert placed == set(graph), f"a cycle among {sorted(set(graph) - placed)}"


def test_methods_and_backends_do_not_know_each_other():
    for above, below in (("methods", "backends"), ("calibration", "backends")):
        for path in FILES:
            seen = imports(path)
            assert not (room(path) == above and below in seen) and not (room(path) == below and above in seen)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.MULTILINE)


SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_cpp_includes_go_down(path):
    """bindings.cpp -> launch.h -> cpu/* -> format.h; torch in bindings.cpp alone."""
    relative = path.relative_to(ROOT / "csrc")
    seen = includes(path)
    torch = [name for name in seen if name.startswith(("torch/", "ATen/", "c10/", "Python.h", "pybind11/"))]
    assert not torch or relative.name == "bindings.cpp"
    own = {Path(name).name for name in seen if (path.parent / name).is_file() or (ROOT / "csrc" / name).is_file()}
    siblings = {p.name for p in path.parent.iterdir()}
    if relative.name == "format.h":
        assert own == set()
    elif relative.name == "launch.h":
        assert own <= {"format.h"}
    elif relative.name == "bindings.cpp":
        assert own <= {"launch.h"}
    else:
        assert own <= {"format.h", "launch.h"} | {name for name in siblings if name.endswith((".h", ".cuh"))}
