"""setup.py: builds with what is there, says why when it cannot, and the library it makes is what
its tag promises.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from slab_kernels import native

ROOT = Path(__file__).resolve().parents[1]


def copy_of_the_sources(tmp_path):
    """The folder of a checkout in which nothing is built."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.tmp", "cubins")
    for name in ("slab_kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    return source


def wheel(tmp_path, **environment):
    """Builds a wheel of a copy of the sources; returns the process and the wheel's path."""
    source, out = copy_of_the_sources(tmp_path), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(out),
        str(source),
    ]
    environment = {
        **os.environ,
        "SLAB_KERNELS_CUDA": "0",
        **environment,
    }  # the cubins are test_cuda_build.py's
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done, next(out.glob("*.whl"), None)


def test_torch_is_neither_imported_nor_required_to_build(setup_py):
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert not any(line.startswith(("import torch", "from torch")) for line in text.splitlines())
    assert 'requires = ["setuptools>=77"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_without_a_compiler_the_wheel_is_pure_and_says_why(tmp_path):
    done, built = wheel(tmp_path, CXX="no-such-compiler")
    assert built is not None, done.stdout + done.stderr
    assert built.name.endswith("py3-none-any.whl")
    assert "CXX=no-such-compiler is not an executable" in done.stdout + done.stderr
    names = zipfile.ZipFile(built).namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert "slab_kernels/backends/cuda/measured.json" in names


def test_native_demanded_but_impossible_fails(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("SLAB_KERNELS_NATIVE", "1")
    monkeypatch.setenv("SLAB_KERNELS_TORCH", str(tmp_path))
    with pytest.raises(SystemExit, match="no stable-ABI headers"):
        setup_py.build_native(tmp_path, tmp_path)


def test_native_switched_off(setup_py, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SLAB_KERNELS_NATIVE", "0")
    assert not setup_py.build_native(tmp_path, tmp_path)
    assert "SLAB_KERNELS_NATIVE=0" in capsys.readouterr().err


def test_failing_compiler_is_quoted(setup_py, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("SLAB_KERNELS_NATIVE", raising=False)
    monkeypatch.setenv("CXX", "false")
    assert not setup_py.build_native(tmp_path / "package", tmp_path / "objects")
    assert "false -std=c++17" in capsys.readouterr().err


FAKE_COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo made > "$2"
"""


def test_build_ext_in_place_builds_the_library_in_the_checkout_or_says_why_not(tmp_path):
    source, compiler = copy_of_the_sources(tmp_path), tmp_path / "c++"
    compiler.write_text(FAKE_COMPILER)
    compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    library = source / "slab_kernels" / "_C.so"

    def build(**environment):
        given = {**os.environ, **environment}
        return subprocess.run(command, cwd=source, env=given, capture_output=True, text=True)

    for environment, text in (
        ({"CXX": "no-such-compiler"}, "CXX=no-such-compiler is not an executable"),
        ({"SLAB_KERNELS_NATIVE": "0"}, "SLAB_KERNELS_NATIVE=0"),
    ):
        done = build(**environment)
        assert done.returncode == 1 and not library.exists()
        assert f"_C.so cannot be built: {text}" in done.stderr
    done = build(CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    assert library.read_text() == "made\n" and f"built {library}" in done.stdout
    assert not (source / "slab_kernels" / "cubins").exists()


def test_every_source_is_listed(setup_py):
    sources = {str(path.relative_to(ROOT / "csrc")) for path in (ROOT / "csrc").rglob("*.cpp")}
    assert sources == set(setup_py.BUILD["sources"])


OLDER_COMPILER = """#!/bin/sh
for flag; do case "$flag" in -mamx*) exit 1;; esac; done
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flags are of x86")
def test_flags_that_an_older_compiler_does_not_know_are_left_out(setup_py, tmp_path):
    older = tmp_path / "c++"
    older.write_text(OLDER_COMPILER)
    older.chmod(0o755)
    for source, own in setup_py.BUILD["sources"].items():
        newer = own.get("newer_x86_flags", [])
        command = setup_py.compile_command([str(older)], source, tmp_path)
        assert not set(newer) & set(command) and set(own.get("x86_flags", [])) <= set(command)
        if newer and shutil.which("g++"):
            command = setup_py.compile_command(["g++"], source, tmp_path)
            if setup_py.knows(("g++",), tuple(newer)):
                assert set(newer) <= set(command)
            command = [flag for flag in command if flag not in newer]
            subprocess.run([*command, "-fsyntax-only"], check=True)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_cmake_compiles_with_the_same_flags(setup_py, tmp_path):
    """Both read csrc/sources.json; CMake adds its own flags before."""
    command = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(tmp_path),
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads((tmp_path / "compile_commands.json").read_text(encoding="utf-8"))
    theirs = {entry["file"]: shlex.split(entry["command"]) for entry in entries}
    torch = setup_py.find_torch()
    for source in setup_py.BUILD["sources"]:
        _, *ours = setup_py.compile_command(["c++"], source, torch)
        mapping = next(flag for flag in ours if flag.startswith("-ffile-prefix-map="))
        flags = [
            flag for flag in ours[:-2] if flag != mapping
        ]  # the last two are -c and the source
        command = theirs[ours[-1]]
        assert [flag for flag in command if flag in flags][-len(flags) :] == flags


@pytest.mark.skipif(native.missing_library() is not None, reason="no native library")
def test_library_needs_neither_python_nor_a_second_openmp():
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    dynamic = subprocess.run(
        ["readelf", "-d", native.LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    needed = [line.split("[")[1].split("]")[0] for line in dynamic.splitlines() if "NEEDED" in line]
    assert "libtorch_cpu.so" in needed
    assert not [
        name
        for name in needed
        if name.startswith(("libgomp", "libiomp", "libomp", "libpython", "libc10"))
    ]


@pytest.mark.skipif(
    "SLAB_KERNELS_TEST_BUILD" not in os.environ,
    reason="compiles everything: SLAB_KERNELS_TEST_BUILD=1",
)
def test_native_wheel(tmp_path):
    done, built = wheel(tmp_path, SLAB_KERNELS_NATIVE="1")
    assert built is not None, done.stdout + done.stderr
    assert "-py3-none-" in built.name and not built.name.endswith("any.whl")
    archive = zipfile.ZipFile(built)
    assert "slab_kernels/_C.so" in archive.namelist()
    assert str(tmp_path).encode() not in archive.read("slab_kernels/_C.so")
