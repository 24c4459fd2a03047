"""`python -m tests.sanitizers`: builds `_C.so` with AddressSanitizer and
UndefinedBehaviorSanitizer, and runs the tests that execute it.

Everything happens in a temporary copy of the tree, so the checkout keeps its own library. Every
instruction set that this machine runs is built and tested. Exit code 1 if a sanitizer reports
anything or a test fails.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..mutants.__main__ import LEFT_OUT, environment
from ..mutants.fault import ROOT

# Those of the CPU products go through every instruction set by themselves, and so do those of the
# solver.
TESTS = (
    "tests/backends/cpu/test_cpu_backend.py",
    "tests/backends/cpu/test_cpu_bf16.py",
    "tests/backends/cpu/test_cpu_int8.py",
    "tests/backends/cpu/test_cpu_int8_terms.py",
    "tests/methods/test_compiled_steps.py",
)
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
# With -O1 the build takes minutes and not half an hour; what the kernels read and write is the
# same.
BUILD = """
import pathlib, setuptools
setuptools.setup = lambda **_: None
import setup
setup.BUILD["flags"] = ["-O1" if flag == "-O3" else flag for flag in setup.BUILD["flags"]]
setup.compile_native(pathlib.Path("slab_kernels/_C.so"), pathlib.Path("build/objects"))
"""


def runtime(compiler: str) -> str:
    """The sanitizers' libraries, which have to be loaded before Python.

    Raises: SystemExit if the compiler has none.
    """
    paths = []
    for name in ("libasan.so", "libubsan.so"):
        command = [compiler, f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(found).is_absolute():
            raise SystemExit(f"tests.sanitizers: {compiler} has no {name}; install g++ with it")
        paths.append(found)
    return ":".join(paths)


def sanitized(copy: Path, compiler: str, reports: Path) -> dict[str, str]:
    """What the tests run with. Reports of subprocesses too become files in a folder.

    Python and torch are not built for the sanitizers, so what they never free is not reported.
    """
    address = f"detect_leaks=0:log_path={reports}/address"
    undefined = f"print_stacktrace=1:log_path={reports}/undefined"
    ours = {"ASAN_OPTIONS": address, "UBSAN_OPTIONS": undefined, "LD_PRELOAD": runtime(compiler)}
    return environment(copy) | ours


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitizers", description=__doc__)
    parser.add_argument(
        "--every", type=int, default=5, metavar="N", help="run each N-th test; default: 5"
    )
    parser.add_argument("tests", nargs="*", default=TESTS, help="pytest's arguments")
    options = parser.parse_args()
    compiler = os.environ.get("CXX") or "g++"
    if platform.system() != "Linux" or shutil.which(compiler) is None:
        print(f"tests.sanitizers: needs Linux and g++, and {compiler} is not here", file=sys.stderr)
        return 1
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="slab-sanitizers-") as folder:
        copy, reports = Path(folder, "tree"), Path(folder, "reports")
        reports.mkdir()
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
        built = environment(copy) | {"CXX": f"{compiler} {SANITIZE}"}
        subprocess.run([sys.executable, "-c", BUILD], cwd=copy, env=built, check=True)
        print(f"built after {time.monotonic() - begun:.0f} s", flush=True)
        # pytest's own handler of crashes would take the place of the sanitizer's.
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:faulthandler"]
        command += ["-p", "no:cacheprovider", "--every", str(options.every), *options.tests]
        done = subprocess.run(command, cwd=copy, env=sanitized(copy, compiler, reports))
        found = sorted(reports.iterdir())
        for report in found:
            print(report.read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
    verdict = f"{len(found)} reports of sanitizers, tests ended with {done.returncode}"
    print(f"{verdict}, {time.monotonic() - begun:.0f} s")
    return 1 if found or done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
