"""Builds slab_kernels/_C.so and the CUDA kernels' cubins beside the Python package, or installs without them and says why.

torch is never imported and is no build requirement: only the headers of the torch that is already installed are read
(stable ABI, so the library serves every later torch). Under build isolation torch is invisible; then the headers are
found through SLAB_KERNELS_TORCH=/path/to/site-packages/torch, or the build is pure Python.

    SLAB_KERNELS_NATIVE=auto|0|1   build if possible (default) | never | fail if impossible
    CXX=clang++                    the compiler; default: the first of c++, g++, clang++
    SLAB_KERNELS_CUDA=auto|0|1     compile for every GPU ahead of time if there is an nvcc (default) | never | fail if impossible

The cubins need nothing of CUDA at build or link time but nvcc, and are data: a wheel of them alone suits any platform.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    raise SystemExit(
        f"slab_kernels: the build needs setuptools >= 77, here is {setuptools.__version__}: pip install 'setuptools>=77'"
    ) from None

ROOT = Path(__file__).resolve().parent
LIBRARY = "_C.so"
TORCH_TARGET = "0x020b000000000000"  # 2.11: the oldest torch the library loads on
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
FLAGS.append(f"-ffile-prefix-map={ROOT}/=")  # no build paths in the binary
# One kernel source, three instruction sets: each file gets its own flags, the choice is made at run time.
SOURCES = {
    "cpu/scalar.cpp": [],
    "cpu/prepare.cpp": [],
    "cpu/dispatch.cpp": [],
    "cpu/avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "cpu/avx512.cpp": [
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
    ],
    "bindings.cpp": [],
}
X86 = platform.machine().lower() in ("x86_64", "amd64")


class Impossible(Exception):
    """The native library cannot be built here; the message says why."""


def find_torch() -> Path:
    """The folder of the installed torch, found without importing it."""
    if named := os.environ.get("SLAB_KERNELS_TORCH"):
        folder = Path(named)
    else:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise Impossible(
                "torch is not visible to the build (use pip install --no-build-isolation)"
            )
        folder = Path(spec.origin).parent
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        raise Impossible(f"the torch in {folder} has no stable-ABI headers (torch >= 2.11 has)")
    return folder


def find_compiler() -> list[str]:
    """CXX, which may hold arguments, or the first compiler on PATH."""
    if named := os.environ.get("CXX", "").split():
        if shutil.which(named[0]) is None:
            raise Impossible(f"CXX={named[0]} is not an executable")
        return named
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise Impossible("no C++ compiler on PATH (c++, g++ or clang++)")


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Impossible(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def compile_native(target: Path, objects: Path) -> None:
    """csrc -> target. Raises Impossible."""
    if sys.platform == "win32":
        raise Impossible("Windows is not supported by the native build")
    torch, compiler = find_torch(), find_compiler()
    objects.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    jobs, outputs = [], []
    for source, flags in SOURCES.items():
        output = objects / source.replace("/", "_").replace(".cpp", ".o")
        outputs.append(str(output))
        command = [*compiler, *FLAGS, *(flags if X86 else [])]
        if source == "bindings.cpp":
            command += [
                f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
                "-isystem",
                str(torch / "include"),
            ]
        if source == "cpu/avx512.cpp":  # gcc 12 warns about its own intrinsics
            command += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
        jobs.append([*command, "-c", str(ROOT / "csrc" / source), "-o", str(output)])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, jobs))
    # Beside the target and then renamed: a process that has the old library open keeps it.
    fresh = target.with_suffix(".tmp")
    libraries = (
        ["-undefined", "dynamic_lookup"]
        if sys.platform == "darwin"
        else ["-Wl,--no-as-needed", "-ltorch_cpu"]
    )
    run([*compiler, "-shared", *outputs, "-o", str(fresh), f"-L{torch / 'lib'}", *libraries])
    fresh.replace(target)


def choice(variable: str) -> str:
    """auto, 0 or 1."""
    wanted = os.environ.get(variable) or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"slab_kernels: {variable}={wanted} must be auto, 0 or 1")
    return wanted


def build_native(package: Path, objects: Path) -> bool:
    """Whether package/_C.so was built; says why not, and fails only if SLAB_KERNELS_NATIVE=1."""
    wanted = choice("SLAB_KERNELS_NATIVE")
    try:
        if wanted == "0":
            raise Impossible("SLAB_KERNELS_NATIVE=0")
        compile_native(package / LIBRARY, objects)
    except Impossible as reason:
        if wanted == "1":
            raise SystemExit(f"slab_kernels: SLAB_KERNELS_NATIVE=1, but {reason}") from None
        print(
            f"slab_kernels: installing without native kernels, the reference will run: {reason}",
            file=sys.stderr,
        )
        return False
    return True


def cuda_recipe():
    """slab_kernels/backends/cuda/compile.py, loaded by path: importing the package would import torch."""
    path = ROOT / "slab_kernels" / "backends" / "cuda" / "compile.py"
    spec = importlib.util.spec_from_file_location("slab_kernels_cuda_recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_cuda(package: Path) -> bool:
    """Whether package/cubins holds the CUDA kernels; says why not, and fails only if SLAB_KERNELS_CUDA=1."""
    wanted, recipe = choice("SLAB_KERNELS_CUDA"), cuda_recipe()
    try:
        if wanted == "0":
            raise Impossible("SLAB_KERNELS_CUDA=0")
        remarks = recipe.build(package / recipe.IMAGES.name, ROOT / "csrc")
    except (Impossible, recipe.Impossible) as reason:
        if wanted == "1":
            raise SystemExit(f"slab_kernels: SLAB_KERNELS_CUDA=1, but {reason}") from None
        print(
            f"slab_kernels: no CUDA kernels ahead of time, a GPU machine compiles them on first use: {reason}",
            file=sys.stderr,
        )
        return False
    for remark in remarks:
        print(f"slab_kernels: {remark}", file=sys.stderr)
    return True


def copy_cuda_sources(package: Path) -> None:
    """What NVRTC compiles on a machine that no cubin was built for; a checkout reads csrc itself."""
    for name, text in cuda_recipe().read_sources(ROOT / "csrc").items():
        target = package / "csrc" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


class BuildPython(build_py):
    """build_py, then the native library and the cubins: into build_lib, or into the source tree when editable."""

    def run(self):
        super().run()
        package = (
            ROOT / "slab_kernels" if self.editable_mode else Path(self.build_lib) / "slab_kernels"
        )
        objects = Path(self.get_finalized_command("build").build_temp) / "slab_kernels"
        if not self.editable_mode:  # an earlier build with other choices left its own here: a pure wheel must not carry them
            (package / LIBRARY).unlink(missing_ok=True)
            shutil.rmtree(package / "cubins", ignore_errors=True)
        self.distribution.native = build_native(package, objects)
        build_cuda(package)
        if not self.editable_mode:
            copy_cuda_sources(package)

    def get_outputs(self, include_bytecode=True):
        package = Path(self.build_lib) / "slab_kernels"
        native = [str(package / LIBRARY)] if self.distribution.native else []
        cuda = [
            str(path)
            for folder in ("cubins", "csrc")
            for path in (package / folder).rglob("*")
            if path.is_file()
        ]
        return [*super().get_outputs(include_bytecode), *native, *cuda]


class Wheel(bdist_wheel):
    """py3-none-<platform> when native: the library uses torch's stable ABI and nothing of CPython."""

    def run(self):
        if not self.skip_build:
            self.run_command("build")  # the tag depends on what was built
        super().run()

    def get_tag(self):
        if not self.distribution.native:
            return "py3", "none", "any"
        return "py3", "none", sysconfig.get_platform().replace("-", "_").replace(".", "_")


class SlabDistribution(Distribution):
    native = False


setup(distclass=SlabDistribution, cmdclass={"build_py": BuildPython, "bdist_wheel": Wheel})
