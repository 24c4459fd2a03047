"""Builds slab_kernels/_C.so and the cubins beside the Python package, or installs without them.

Where it builds less than asked for, it says why. torch is never imported and is no build
requirement: only the headers of an installed torch are read, and of those only the stable ABI, so
that the library serves every later torch. Under build isolation torch is invisible. The headers are
then found through SLAB_KERNELS_TORCH=/path/to/site-packages/torch, or the build is pure Python.

    SLAB_KERNELS_NATIVE=auto|0|1   auto: build the library if possible (default); 0: never;
                                   1: fail if it is impossible
    CXX=clang++                    the compiler; default: the first of c++, g++, clang++
    SLAB_KERNELS_CUDA=auto|0|1     auto: compile for every GPU if there is an nvcc (default);
                                   0: never; 1: fail if it is impossible

`python setup.py build_ext --inplace` builds the library of a checkout anew and nothing else.

The cubins need nothing of CUDA but nvcc, at build time, and they are data: a wheel with them and
without the library suits any platform.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    raise SystemExit(
        f"slab_kernels: the build needs setuptools >= 77, here is {setuptools.__version__}: "
        "pip install 'setuptools>=77'"
    ) from None

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
LIBRARY = "_C.so"
BUILD = json.loads((CSRC / "sources.json").read_text(encoding="utf-8"))  # CMake reads it too
X86 = platform.machine().lower() in ("x86_64", "amd64")


def load_cuda_recipe():
    """Load slab_kernels/backends/cuda/compile.py by its path: the package itself needs torch."""
    path = ROOT / "slab_kernels" / "backends" / "cuda" / "compile.py"
    spec = importlib.util.spec_from_file_location("slab_kernels_cuda_recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda_recipe = load_cuda_recipe()
Impossible = cuda_recipe.Impossible


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


@functools.cache
def knows(compiler: tuple[str, ...], flags: tuple[str, ...]) -> bool:
    """Whether the compiler compiles an empty file with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder, "empty.cpp")
        empty.touch()
        command = [*compiler, *flags, "-c", str(empty), "-o", str(empty.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def compile_command(compiler: list[str], source: str, torch: Path) -> list[str]:
    """The command that compiles one file of csrc, without its output."""
    own = BUILD["sources"][source]
    command = [*compiler, *BUILD["flags"], *own.get("flags", [])]
    command.append(f"-ffile-prefix-map={ROOT}/=")  # keeps the build's path out of the binary
    if X86:
        command += own.get("x86_flags", [])
        newer = own.get("newer_x86_flags", [])
        if newer and knows(tuple(compiler), tuple(newer)):
            command += newer
    if own.get("uses_torch"):
        include = str(torch / "include")
        command += [f"-DTORCH_TARGET_VERSION={BUILD['torch_target']}", "-isystem", include]
    return [*command, "-c", str(CSRC / source)]


def compile_native(target: Path, objects: Path) -> None:
    """Compile csrc and link it as the target. Raises: Impossible."""
    if sys.platform == "win32":
        raise Impossible("Windows is not supported by the native build")
    torch, compiler = find_torch(), find_compiler()
    objects.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    jobs, outputs = [], []
    for source in BUILD["sources"]:
        output = str(objects / source.replace("/", "_").replace(".cpp", ".o"))
        outputs.append(output)
        jobs.append([*compile_command(compiler, source, torch), "-o", output])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(cuda_recipe.run, jobs))
    # It is linked beside the target and then renamed: a process that has the old library open keeps
    # it.
    fresh = target.with_suffix(".tmp")
    if sys.platform == "darwin":
        libraries = ["-undefined", "dynamic_lookup"]
    else:
        libraries = ["-Wl,--no-as-needed", "-ltorch_cpu"]
    search = f"-L{torch / 'lib'}"
    cuda_recipe.run([*compiler, "-shared", *outputs, "-o", str(fresh), search, *libraries])
    fresh.replace(target)


def choice(variable: str) -> str:
    """What an environment variable asks for: auto, 0 or 1. Raises: SystemExit for anything else."""
    wanted = os.environ.get(variable) or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"slab_kernels: {variable}={wanted} must be auto, 0 or 1")
    return wanted


def build_native(package: Path, objects: Path) -> bool:
    """Build package/_C.so and return True, or say why not and return False.

    Raises: SystemExit if SLAB_KERNELS_NATIVE=1 demands what is impossible.
    """
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


def build_cuda(package: Path) -> bool:
    """Build package/cubins and return True, or say why not and return False.

    Raises: SystemExit if SLAB_KERNELS_CUDA=1 demands what is impossible.
    """
    wanted = choice("SLAB_KERNELS_CUDA")
    try:
        if wanted == "0":
            raise Impossible("SLAB_KERNELS_CUDA=0")
        remarks = cuda_recipe.build(package / cuda_recipe.IMAGES.name, CSRC)
    except Impossible as reason:
        if wanted == "1":
            raise SystemExit(f"slab_kernels: SLAB_KERNELS_CUDA=1, but {reason}") from None
        print(
            "slab_kernels: no CUDA kernels ahead of time, "
            f"a GPU machine compiles them on first use: {reason}",
            file=sys.stderr,
        )
        return False
    for remark in remarks:
        print(f"slab_kernels: {remark}", file=sys.stderr)
    return True


def copy_cuda_sources(package: Path) -> None:
    """Copy what NVRTC compiles where no cubin fits the GPU; a checkout reads csrc itself."""
    for name, text in cuda_recipe.read_sources(CSRC).items():
        target = package / "csrc" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


class BuildPython(build_py):
    """Builds the Python package, then the native library and the cubins inside it.

    An editable install has them in the source tree.
    """

    def run(self):
        super().run()
        package = (
            ROOT / "slab_kernels" if self.editable_mode else Path(self.build_lib) / "slab_kernels"
        )
        objects = Path(self.get_finalized_command("build").build_temp) / "slab_kernels"
        if not self.editable_mode:
            # An earlier build with other choices may have left its own here, and a pure wheel must
            # not carry them.
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


class BuildLibrary(build_ext):
    """Builds the native library alone, with --inplace in the source tree.

    It was asked for by name, so it fails where the library cannot be built.
    """

    def run(self):
        package = (ROOT if self.inplace else Path(self.build_lib)) / "slab_kernels"
        try:
            if choice("SLAB_KERNELS_NATIVE") == "0":
                raise Impossible("SLAB_KERNELS_NATIVE=0")
            compile_native(package / LIBRARY, Path(self.build_temp) / "slab_kernels")
        except Impossible as reason:
            raise SystemExit(f"slab_kernels: {LIBRARY} cannot be built: {reason}") from None
        print(f"slab_kernels: built {package / LIBRARY}")


class Wheel(bdist_wheel):
    """Tags a wheel with the library py3-none-<platform>, because it uses nothing of CPython."""

    def run(self):
        if not self.skip_build:
            self.run_command("build")  # The tag depends on what was built.
        super().run()

    def get_tag(self):
        if not self.distribution.native:
            return "py3", "none", "any"
        return "py3", "none", sysconfig.get_platform().replace("-", "_").replace(".", "_")


class SlabDistribution(Distribution):
    native = False


setup(
    distclass=SlabDistribution,
    cmdclass={"build_py": BuildPython, "build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
