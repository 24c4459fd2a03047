"""What is compiled for CUDA and how: sources, architectures, nvcc. Standard library only, because setup.py loads this file by path.

The device code in csrc/cuda includes nothing but itself and format.h, so nvcc (here, ahead of time) and NVRTC (nvrtc.py, at
run time) compile the same text with the same options. As a script it builds the images ahead of time, like setup.py:

    python slab_kernels/backends/cuda/compile.py [--nvcc NVCC] [FOLDER]     (--which: only says which nvcc that would be)
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]
IMAGES = (
    PACKAGE / "cubins"
)  # where setup.py puts <source>.<architecture>.cubin, <source>.compute_80.ptx and the record
RECORD = "built.json"  # the last file written: images without it, or of other sources, are not used

# 90a and 120a: wgmma and the block-scaled mma exist only under the "a"; such a cubin runs on exactly that capability.
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a")
FALLBACK = "compute_80"  # PTX that the driver compiles for every newer device
# capability -> cubins that run on it, best first. Absent ones take the fallback: a cubin serves later minors of its major,
# but not across desktop and Tegra (8.7), and never with an "a".
RUNS = {
    (8, 0): ("sm_80",),
    (8, 6): ("sm_86", "sm_80"),
    (8, 9): ("sm_89", "sm_86", "sm_80"),
    (9, 0): ("sm_90a",),
    (12, 0): ("sm_120a",),
}
OPTIONS = (
    "-std=c++17",
)  # of nvcc and NVRTC alike; their defaults agree on fma contraction, division and denormals
NVCC_OPTIONS = (*OPTIONS, "-O3", "-Xptxas=-v")


class Impossible(Exception):
    """The images cannot be built here; the message says why."""


def source_folder() -> Path | None:
    """The folder with format.h and cuda/: the copy inside an installed package, or csrc of a checkout."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "format.h").is_file() and any((folder / "cuda").glob("*.cu")):
            return folder
    return None


def read_sources(folder: Path) -> dict[str, str]:
    """Path below the folder -> text, of everything that a kernel may include. Raises: OSError if one cannot be read."""
    files = [
        folder / "format.h",
        *sorted(p for p in (folder / "cuda").iterdir() if p.suffix in (".cu", ".cuh", ".h")),
    ]
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in files}


def units(sources: dict[str, str]) -> list[str]:
    """The compiled files without their ending: one image each for every architecture."""
    return sorted(Path(name).stem for name in sources if name.endswith(".cu"))


def digest(sources: dict[str, str], *more: str) -> str:
    """Hexadecimal SHA-256 of all names, texts and further strings, unambiguous about where one ends."""
    return hashlib.sha256(json.dumps([sorted(sources.items()), more]).encode()).hexdigest()


def image_name(unit: str, architecture: str) -> str:
    return f"{unit}.{architecture}.{'ptx' if architecture.startswith('compute') else 'cubin'}"


def find_nvcc() -> str:
    """nvcc of CUDA_HOME, of PATH, of the pip packages nvidia-cuda-nvcc and nvidia-nvvm, or of /usr/local/cuda.

    Raises: Impossible if there is none.
    """
    places = [
        Path(home, "bin/nvcc")
        for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))
        if home
    ]
    places += [Path(found) for found in (shutil.which("nvcc"),) if found]
    spec = importlib.util.find_spec("nvidia")  # a namespace: nothing is run
    for folder in (spec.submodule_search_locations or []) if spec else []:
        places += sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    for place in places:
        if os.access(place, os.X_OK):
            return str(place)
    raise Impossible(
        "no nvcc in CUDA_HOME, on PATH or among the pip packages (pip install nvidia-cuda-nvcc)"
    )


def nvcc_command(nvcc: str, source: Path, architecture: str, output: Path) -> list[str]:
    kind = "-ptx" if architecture.startswith("compute") else "-cubin"
    return [nvcc, kind, f"-arch={architecture}", *NVCC_OPTIONS, str(source), "-o", str(output)]


def run(command: list[str]) -> str:
    """Its stdout. Raises: Impossible with all that it printed if it fails or cannot be started."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Impossible(f"{command[0]} cannot be started: {error}") from None
    if done.returncode:
        raise Impossible(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def known_architectures(nvcc: str) -> tuple[list[str], list[str]]:
    """Those of ours that this nvcc can compile for, and those that it cannot. Raises: Impossible if nvcc does not run."""
    listed = set(run([nvcc, "--list-gpu-arch"]).split())
    known, unknown = [], []
    for name in (*ARCHITECTURES, FALLBACK):
        virtual = "compute_" + name.split("_")[1].rstrip(
            "a"
        )  # the list names 90 and 120 without their "a"
        (known if virtual in listed else unknown).append(name)
    return known, unknown


def record(folder: Path) -> dict[str, object]:
    """What `build` wrote about the images of a folder; empty if it is missing or damaged."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def build(folder: Path, csrc: Path, nvcc: str | None = None) -> list[str]:
    """Compile every csrc/cuda/*.cu for every architecture into the folder, on all cores; returns remarks for the user.

    Nothing is compiled if the folder already holds the images of these sources, this nvcc and these options.
    Raises: Impossible if there is no nvcc or source, or if nvcc fails.
    """
    if not any((csrc / "cuda").glob("*.cu")):
        raise Impossible(f"{csrc} has no cuda/*.cu")
    nvcc = nvcc or find_nvcc()
    sources = read_sources(csrc)
    known, unknown = known_architectures(nvcc)
    if not known:
        raise Impossible(f"{nvcc} compiles for none of {', '.join(ARCHITECTURES)}")
    version = run([nvcc, "--version"])
    names = sorted(
        image_name(unit, architecture) for unit in units(sources) for architecture in known
    )
    # The sources alone are what the running package can compare; the rest only decides whether to compile again.
    wanted = {
        "sources": digest(sources),
        "compiler": digest({}, version, *NVCC_OPTIONS),
        "images": names,
    }
    remarks = [f"{nvcc} is too old for {', '.join(unknown)}"] if unknown else []
    if record(folder) == wanted and all((folder / name).is_file() for name in names):
        return remarks
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    jobs = []
    for unit in units(sources):
        for architecture in known:
            target = folder / image_name(unit, architecture)
            jobs.append(
                (
                    nvcc_command(
                        nvcc, csrc / f"cuda/{unit}.cu", architecture, target.with_suffix(".tmp")
                    ),
                    target,
                )
            )

    def compile_one(job: tuple[list[str], Path]) -> None:
        command, target = job
        try:
            run(command)
            Path(command[-1]).replace(target)  # a process that reads the old image keeps it
        finally:
            Path(command[-1]).unlink(missing_ok=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs))
    if digest(read_sources(csrc)) != wanted["sources"]:
        raise Impossible(f"{csrc} was edited while nvcc read it; build again")
    for stale in folder.iterdir():  # of a source or architecture that is gone
        if stale.suffix in (".cubin", ".ptx") and stale.name not in names:
            stale.unlink()
    fresh = folder / f"{RECORD}.tmp"
    fresh.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    fresh.replace(folder / RECORD)
    return remarks


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels ahead of time.")
    parser.add_argument("folder", type=Path, nargs="?", default=IMAGES, metavar="FOLDER")
    parser.add_argument("--nvcc", help="the compiler; default: the first that is found")
    parser.add_argument(
        "--which", action="store_true", help="print the compiler and its version, compile nothing"
    )
    arguments = parser.parse_args()
    try:
        if arguments.which:
            nvcc = arguments.nvcc or find_nvcc()
            return print(nvcc, run([nvcc, "--version"]).split("\n")[-3:-1][0])
        remarks = build(
            arguments.folder, source_folder() or PACKAGE.parent / "csrc", arguments.nvcc
        )
    except Impossible as reason:
        raise SystemExit(f"slab_kernels: the CUDA kernels cannot be compiled: {reason}") from None
    print(
        *[f"slab_kernels: {remark}" for remark in remarks],
        f"{arguments.folder}: up to date",
        sep="\n",
    )


if __name__ == "__main__":
    sys.exit(main())
