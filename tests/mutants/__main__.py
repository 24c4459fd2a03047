"""`python -m tests.mutants`: plants every fault in a copy of the tree and runs the tests that must
see it.

The checkout is never changed. Exit code 1 if a fault was not found, or if the tests fail without
any.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .fault import ROOT, Fault
from .faults import FAULTS

LEFT_OUT = (".git", ".venv*", ".cache", ".*_cache", "__pycache__", "build", "dist", "*.egg-info")
# Compiles _C.so into the copy: setup.py without its call of setuptools.
BUILD = """
import pathlib, setuptools
setuptools.setup = lambda **_: None
import setup
setup.compile_native(pathlib.Path("slab_kernels/_C.so"), pathlib.Path("build/objects"))
"""


def environment(copy: Path) -> dict[str, str]:
    """Ours, with the copy in the place of the checkout."""
    ours = ("PYTEST_", "TRITON_INTERPRET")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return inherited | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def is_native(fault: Fault) -> bool:
    return fault.files.startswith(("csrc/cpu", "csrc/int8"))


def build(copy: Path) -> None:
    subprocess.run([sys.executable, "-c", BUILD], cwd=copy, env=environment(copy), check=True)


def test(copy: Path, fault: Fault) -> subprocess.CompletedProcess:
    """The fault's tests in the copy, up to the first that fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *fault.tests]
    return subprocess.run(
        command,
        cwd=copy,
        env=environment(copy) | dict(fault.environment),
        capture_output=True,
        text=True,
    )


def failed_test(done: subprocess.CompletedProcess) -> str | None:
    """The test, or the file that could not be loaded, that failed; None if there is none.

    A fault that writes beside its memory may end the process, which is a failure too.
    """
    if done.returncode < 0:
        return f"- the process, which signal {-done.returncode} ended"
    lines = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" - ")[0] if done.returncode in (1, 2) and lines else None


def plant(copy: Path, fault: Fault) -> str:
    """Run the fault's tests with the fault in the copy, which is as before when it returns.

    What found it, or "".
    """
    path, begin, end = fault.place(copy)
    original, before = path.read_text(encoding="utf-8"), path.stat()
    try:
        path.write_text(original[:begin] + fault.new + original[end:], encoding="utf-8")
        if is_native(fault):
            build(copy)
        done = test(copy, fault)
    finally:
        path.write_text(original, encoding="utf-8")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        if is_native(fault):
            shutil.copy2(ROOT / "slab_kernels/_C.so", copy / "slab_kernels/_C.so")
    found = failed_test(done)
    if found is None and done.returncode:
        print(done.stdout[-3000:] + done.stderr[-1000:], file=sys.stderr)
    return found or ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="the faults with this text in name or file")
    parser.add_argument(
        "--sound", action="store_true", help="first run the tests without a fault: all must pass"
    )
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if options.only in f"{fault.name} {fault.files}"]
    missed = []
    with tempfile.TemporaryDirectory(prefix="slab-mutants-") as folder:
        copy = Path(folder, "tree")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
        if options.sound:
            for fault in {(fault.tests, fault.environment): fault for fault in faults}.values():
                done = test(copy, fault)
                if done.returncode:
                    print(f"without a fault: {' '.join(fault.tests)}\n{done.stdout[-3000:]}")
                    return 1
        for fault in faults:
            begun = time.monotonic()
            found = plant(copy, fault)
            verdict = f"found by {found.partition(' ')[2]}" if found else "NOT FOUND"
            seconds = time.monotonic() - begun
            print(f"{fault.name} ({fault.files}): {verdict}, {seconds:.0f} s", flush=True)
            if not found:
                missed.append(fault.name)
    print(f"{len(faults) - len(missed)} of {len(faults)} faults found")
    return 1 if missed or not faults else 0


if __name__ == "__main__":
    sys.exit(main())
