"""Imports go down only. The table is the architecture: it says which room knows which.

A room is a folder of the package or a file beside them. The hourglass: `methods` sees the format
and knows no backend, `backends` sees the format and knows no method, and `format` knows neither.
"""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "slab_kernels"

# Each room has the rooms that it imports, at the top of a file or inside a function: exactly these,
# so that an arrow nobody uses leaves the table. A room imports only rooms above it in the table.
ROOMS: dict[str, str] = {
    "errors": "",
    "terminal": "",
    "plugins": "terminal",
    "paths": "errors",
    "settings": "errors",
    "device": "errors",
    "native": "errors",
    # the waist
    "format": "errors",
    # above the waist: numbers for a layer
    "methods": "errors format native plugins settings",
    # below the waist: who runs a layer
    "reference": "format",
    "testing": "format",
    "ops": "errors format reference",
    "backends": "errors format native ops plugins",
    "nn": "backends errors format ops",
    "bench": "backends errors format native testing",
    # a whole model
    "text": "errors paths settings terminal",
    "models": "device errors format nn paths terminal text",
    "compression": "device errors format methods models nn paths settings terminal text",
    "evaluate": "compression device errors format models paths settings terminal text",
    "engines": "backends compression errors format models nn terminal",
    # what a person sees
    "report": "errors paths",
    "cli": "backends bench compression device engines errors evaluate format methods models"
    " nn paths report terminal text",
    "__main__": "cli",
}
VERSION = "__init__"  # every room may ask the package for its version


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def module(path: Path) -> str:
    """The dotted name of a file within the package; of a folder's `__init__` the folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {module(path): path for path in FILES}


def imported_modules(path: Path) -> set[str]:
    """The modules of this package that a file imports anywhere, outside of type-checking blocks."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and getattr(node.test, "id", getattr(node.test, "attr", "")) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    here = ("slab_kernels", *path.relative_to(PACKAGE).parts[:-1])
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == "slab_kernels" or name.startswith("slab_kernels."):
                inner = name.removeprefix("slab_kernels").lstrip(".")
                while inner and inner not in MODULES:
                    inner = inner.rpartition(".")[0]
                found.add(inner or VERSION)
    return found - {module(path)}


def imported_rooms(name: str) -> set[str]:
    files = (path for path in FILES if room(path) == name)
    return {seen.partition(".")[0] for path in files for seen in imported_modules(path)} - {name}


def test_importing_the_package_loads_only_the_hook_that_waits_for_other_libraries():
    assert imported_modules(PACKAGE / "__init__.py") == {"engines"}


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_exactly_what_the_table_says(name):
    allowed = set(ROOMS[name].split())
    assert allowed <= set(list(ROOMS)[: list(ROOMS).index(name)]), "imports go up in the table"
    assert imported_rooms(name) - {VERSION} == allowed


def test_every_file_has_a_room_and_every_room_a_file():
    assert {room(path) for path in FILES} == set(ROOMS) | {VERSION}


def test_no_two_files_need_each_other():
    """Not even by an import inside a function."""
    waiting = {name: imported_modules(path) - {VERSION} for name, path in MODULES.items()}
    while ready := [name for name, needed in waiting.items() if not needed & set(waiting)]:
        for name in ready:
            del waiting[name]
    assert not waiting, f"a circle among {sorted(waiting)}"


def test_triton_knows_the_stream_of_the_cuda_backend_and_nothing_else_of_it():
    inside = {name: path for name, path in MODULES.items() if name.startswith("backends.triton")}
    seen = set().union(*map(imported_modules, inside.values()))
    stream = {"backends.cuda.layout", "backends.cuda.unpack"}
    assert {name for name in seen if name.startswith("backends.cuda")} == stream
    reverse = (path for name, path in MODULES.items() if name.startswith("backends.cuda"))
    assert not any(
        name.startswith("backends.triton") for p in reverse for name in imported_modules(p)
    )


# Built-in exceptions that may leave a file, and why; all others come from `errors`.
BUILTIN = {
    ("__init__", "AttributeError"): "Python asks for it in __getattr__",
    ("backends.cuda.compile", "SystemExit"): "the end of a program",
}


def builtin(node: ast.AST | None) -> type[BaseException] | None:
    """The built-in exception that a node names or calls."""
    called = node.func if isinstance(node, ast.Call) else node
    kind = getattr(builtins, called.id, None) if isinstance(called, ast.Name) else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseException) else None


def handled(handler: ast.ExceptHandler) -> list[type[BaseException]]:
    return [kind for node in ast.walk(handler.type or handler) if (kind := builtin(node))]


def builtin_raises(path: Path) -> set[str]:
    """The built-in exceptions that a file raises and does not catch itself.

    It catches one around the raise, or by its name anywhere. A bare `raise NotImplementedError`
    marks a method that subclasses define, AssertionError what cannot happen.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    named = {k for node in nodes if isinstance(node, ast.ExceptHandler) for k in handled(node)}
    caught_around = {
        id(inner): tuple(kind for handler in node.handlers for kind in handled(handler))
        for node in nodes
        if isinstance(node, ast.Try)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = set()
    for node in nodes:
        kind = builtin(node.exc) if isinstance(node, ast.Raise) else None
        if kind is None or kind in named or issubclass(kind, caught_around.get(id(node), ())):
            continue
        abstract = kind is NotImplementedError and not isinstance(node.exc, ast.Call)
        if kind is not AssertionError and not abstract:
            found.add(kind.__name__)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_exceptions_that_reach_a_user_are_the_librarys_own(name):
    strange = {kind for kind in builtin_raises(MODULES[name]) if (name, kind) not in BUILTIN}
    assert not strange, f"{name} raises {strange}; slab_kernels/errors.py has one for every kind"


def includes(path: Path) -> list[str]:
    return re.findall(
        r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.MULTILINE
    )


# What each C++ file includes of csrc, and no more: only arrows that exist, all of them downward.
INCLUDES = {
    "format.h": "",
    "solver.h": "",
    "launch.h": "format.h solver.h",
    "int16.h": "launch.h",
    "int8.h": "int16.h",
    "arguments.h": "launch.h",
    "memory.h": "arguments.h",
    "linear.h": "int16.h memory.h",
    "int8_linear.h": "int8.h memory.h",
    "bindings.cpp": "linear.h",
    "prepared_bindings.cpp": "linear.h",
    "exact_linear.cpp": "linear.h",
    "int16_linear.cpp": "linear.h",
    "int8_bindings.cpp": "int8_linear.h linear.h",
    "solver_bindings.cpp": "memory.h",
    "cpu/stream.h": "launch.h",
    "cpu/lookup.h": "stream.h",
    "cpu/rebuild.h": "stream.h",
    "cpu/tile.h": "rebuild.h",
    "cpu/tokens.h": "stream.h",
    "cpu/dequantize.h": "rebuild.h",
    "cpu/states.h": "solver.h stream.h",
    "cpu/descent.h": "states.h",
    "cpu/sweep.h": "states.h",
    "cpu/kernel.h": "dequantize.h descent.h lookup.h sweep.h tile.h tokens.h",
    "cpu/avx512.h": "stream.h",
    "cpu/scalar.cpp": "kernel.h",
    "cpu/avx2.h": "stream.h",
    "cpu/avx2.cpp": "launch.h avx2.h kernel.h",
    "cpu/avx512.cpp": "launch.h avx512.h kernel.h",
    "cpu/bf16_panel.h": "launch.h",
    "cpu/avx512_bf16.cpp": "launch.h avx512.h bf16_panel.h tile.h",
    "cpu/amx_config.h": "",
    "cpu/amx_emulated.h": "amx_config.h",
    "cpu/amx.h": "avx512.h bf16_panel.h tile.h tokens.h",
    "cpu/avx512_amx.cpp": "launch.h amx.h amx_config.h",
    "cpu/avx512_amx_emulated.cpp": "launch.h amx.h amx_emulated.h",
    "cpu/prepare.cpp": "launch.h",
    "cpu/dispatch.cpp": "int8.h",
    "cpu/int8_tokens.h": "int8.h",
    "cpu/int8_product.h": "int8.h stream.h",
    "cpu/int8_panel.h": "int8_product.h",
    "cpu/int8_quads.h": "int8.h stream.h",
    "cpu/int8_quad_panel.h": "int8_panel.h int8_quads.h int8_tokens.h",
    "cpu/int8_tables.h": "int8_quad_panel.h int8_tokens.h",
    "cpu/int8_scalar.cpp": "int8_tokens.h",
    "cpu/int8_shuffle.h": "int8_tokens.h stream.h",
    "cpu/int16_panel.h": "int16.h avx2.h int8_shuffle.h rebuild.h",
    "cpu/int16_tile.h": "int16_panel.h tile.h",
    "cpu/int8_avx2.cpp": "int8.h int16_tile.h int8_shuffle.h",
    "cpu/int8_vnni.cpp": "int8.h avx512.h int8_quad_panel.h int8_tables.h",
    "cuda/params.h": "format.h",
    "cuda/ptx.cuh": "format.h",
    "cuda/dense.cuh": "params.h ptx.cuh",
    "cuda/rebuilt.cuh": "params.h ptx.cuh",
    "cuda/traits.cuh": "params.h ptx.cuh rebuilt.cuh",
    "cuda/place.cuh": "traits.cuh",
    "cuda/warp.cuh": "place.cuh",
    "cuda/plan.cuh": "warp.cuh",
    "cuda/copy.cuh": "warp.cuh",
    "cuda/mainloop.cuh": "warp.cuh",
    "cuda/bias.cuh": "params.h ptx.cuh",
    "cuda/epilogue.cuh": "bias.cuh warp.cuh",
    "cuda/linear.cuh": "plan.cuh copy.cuh mainloop.cuh epilogue.cuh",
    "cuda/rebuild.cuh": "linear.cuh",
    "cuda/decode_place.cuh": "params.h ptx.cuh",
    "cuda/decode_operands.cuh": "params.h ptx.cuh",
    "cuda/decode_end.cuh": "bias.cuh decode_place.cuh",
    "cuda/narrow_columns.cuh": "decode_place.cuh",
    "cuda/narrow.cuh": "decode_end.cuh decode_operands.cuh narrow_columns.cuh",
    "cuda/wide_traits.cuh": "decode_operands.cuh",
    "cuda/wide_stage.cuh": "decode_place.cuh wide_traits.cuh",
    "cuda/wide_signs.cuh": "decode_end.cuh decode_operands.cuh wide_stage.cuh",
    "cuda/wide.cuh": "decode_end.cuh decode_operands.cuh wide_signs.cuh wide_stage.cuh",
    "cuda/linear.cu": "bias.cuh linear.cuh dense.cuh narrow.cuh rebuild.cuh wide.cuh",
    "cuda/prefill.h": "params.h",
    "cuda/hopper.cuh": "prefill.h ptx.cuh",
    "cuda/wgmma.cuh": "ptx.cuh",
    "cuda/prefill_place.cuh": "prefill.h ptx.cuh",
    "cuda/prefill_traits.cuh": "prefill.h ptx.cuh",
    "cuda/prefill_factors.cuh": "prefill_place.cuh prefill_traits.cuh rebuilt.cuh",
    "cuda/prefill_sparse.cuh": "hopper.cuh prefill_factors.cuh wgmma.cuh",
    "cuda/prefill_rebuild.cuh": "hopper.cuh prefill_factors.cuh wgmma.cuh",
    "cuda/prefill_end.cuh": "bias.cuh hopper.cuh prefill_place.cuh prefill_traits.cuh",
    "cuda/prefill_consumer.cuh": "prefill_end.cuh prefill_rebuild.cuh prefill_sparse.cuh",
    "cuda/prefill_producer.cuh": "hopper.cuh prefill_place.cuh prefill_traits.cuh",
    "cuda/prefill_kernel.cuh": "prefill_consumer.cuh prefill_producer.cuh",
    "cuda/prefill_reduce.cuh": "prefill_end.cuh",
    "cuda/prefill.cu": "prefill_kernel.cuh prefill_reduce.cuh",
}
# The files that include torch.
TORCH = (
    "arguments.h", "memory.h", "int8_linear.h", "exact_linear.cpp",
    "int16_linear.cpp", "bindings.cpp", "prepared_bindings.cpp", "int8_bindings.cpp",
    "solver_bindings.cpp",
)  # fmt: skip
CPP = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu"))


@pytest.mark.parametrize("path", CPP, ids=lambda p: str(p.relative_to(ROOT)))
def test_cpp_includes_go_down(path):
    """Also: torch is included by the files of TORCH alone."""
    name = path.relative_to(ROOT / "csrc").as_posix()
    seen = includes(path)
    torch = [x for x in seen if x.startswith(("torch/", "ATen/", "c10/", "Python.h", "pybind11/"))]
    assert not torch or name in TORCH
    own = {Path(x).name for x in seen if (path.parent / x).is_file()}
    assert own == set(INCLUDES[name].split()), f"place {name} in the table"
    above = list(INCLUDES).index(name)
    below = [Path(file).name for file in list(INCLUDES)[:above]]
    assert own <= set(below)
