"""What `slab_kernels` offers: the same names to Python, to editors and to type checkers."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

import slab_kernels

ROOT = Path(__file__).resolve().parents[1]


def typed_names() -> dict[str, str]:
    """The names imported under TYPE_CHECKING, with the modules that they come from."""
    tree = ast.parse(Path(slab_kernels.__file__).read_text(encoding="utf-8"))
    block = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_python_and_type_checkers_are_told_the_same():
    assert typed_names() == slab_kernels._HOMES
    assert sorted(slab_kernels.__all__) == sorted(slab_kernels._HOMES)
    assert set(slab_kernels.__all__) <= set(dir(slab_kernels))


@pytest.mark.parametrize("name", slab_kernels.__all__)
def test_every_name_is_there(name):
    assert getattr(slab_kernels, name).__name__ == name


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = slab_kernels.compres


def test_mypy_sees_the_signatures(tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api")
    program = tmp_path / "program.py"
    program.write_text(
        "import slab_kernels\n"
        "reveal_type(slab_kernels.compress)\n"
        "reveal_type(slab_kernels.pack)\n"
        "reveal_type(slab_kernels.SlabError)\n"
        "slab_kernels.compres\n"
    )
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    config = tmp_path / "mypy.ini"
    # Without the types of torch, and of what else is imported, mypy takes seconds.
    others = "".join(
        f"[mypy-{name}.*]\nfollow_imports = skip\nignore_missing_imports = True\n"
        for name in ("torch", "transformers", "safetensors", "tokenizers", "numpy", "rich")
    )
    config.write_text(f"[mypy]\nfollow_imports = silent\nignore_missing_imports = True\n{others}")
    said, complaints, _ = api.run(
        [f"--config-file={config}", f"--cache-dir={tmp_path}", str(program)]
    )
    lines = [line for line in said.splitlines() if line.startswith(str(program))]
    assert not complaints and len(lines) == 4, said
    compress, pack, base, absent = lines
    assert "pattern: str =" in compress and "seed: int =" in compress
    assert "decomposition: slab_kernels.format.weight.Decomposition" in pack
    assert "-> slab_kernels.format.weight.PackedWeight" in pack
    assert "slab_kernels.errors.SlabError" in base
    assert 'has no attribute "compres"' in absent


def test_the_marker_of_a_typed_package_is_shipped():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["setuptools"]["package-data"]["slab_kernels"] == ["py.typed"]
    assert (ROOT / "slab_kernels/py.typed").is_file()
