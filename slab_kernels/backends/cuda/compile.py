"""What is compiled for CUDA and how: sources, architectures, nvcc.

Only the standard library is used here, because setup.py loads this file by its path. The device
code in csrc/cuda includes nothing but itself and format.h, so nvcc (here, ahead of time) and NVRTC
(nvrtc.py, at run time) compile the same text with the same options. As a script, this file builds
the images ahead of time as setup.py does:

    python slab_kernels/backends/cuda/compile.py [--nvcc NVCC] [FOLDER]
    python slab_kernels/backends/cuda/compile.py --which     (only names the nvcc it would use)
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]
# Where setup.py puts <source>.<architecture>.cubin, <source>.compute_80.ptx and the record.
IMAGES = PACKAGE / "cubins"
# The record is written last: images without it, or of other sources, are not used.
RECORD = "built.json"

# wgmma and the block-scaled mma exist only under the "a" of 90a and 120a. Such a cubin runs on
# exactly that capability.
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a")
FALLBACK = "compute_80"  # PTX, which the driver compiles for every newer device
# These are assembled from the fallback's PTX instead of being compiled from the source again. No
# source tells them apart, since the only condition on an architecture is __CUDA_ARCH__ >= 900.
ASSEMBLED = ("sm_80", "sm_86", "sm_89")
# The cubins that run on a capability, best first. A capability that is absent takes the fallback: a
# cubin serves later minor versions of its major one, but no Tegra (8.7), and no other one with an
# "a".
RUNS = {
    (8, 0): ("sm_80",),
    (8, 6): ("sm_86", "sm_80"),
    (8, 9): ("sm_89", "sm_86", "sm_80"),
    (9, 0): ("sm_90a",),
    (12, 0): ("sm_120a",),
}
# Units for these architectures alone: no other has their instructions, so there is no PTX of them
# either, and their kernels are asked for on no other device.
ONLY_FOR = {"prefill": ("sm_90a",)}
# The options of nvcc and NVRTC alike. Their defaults agree on fma contraction, division and
# denormals.
OPTIONS = ("-std=c++17",)
NVCC_OPTIONS = (*OPTIONS, "-O3", "-Xptxas=-v")


class Impossible(Exception):
    """Something cannot be built here, the library or the images; the message says why."""


def source_folder() -> Path | None:
    """The folder with format.h and cuda/, in an installed package or a checkout, or None."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "format.h").is_file() and any((folder / "cuda").glob("*.cu")):
            return folder
    return None


def read_sources(folder: Path) -> dict[str, str]:
    """The text of everything that a kernel may include, by its path below the folder.

    Raises: OSError if a file cannot be read.
    """
    files = [
        folder / "format.h",
        *sorted(p for p in (folder / "cuda").iterdir() if p.suffix in (".cu", ".cuh", ".h")),
    ]
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in files}


def units(sources: dict[str, str]) -> list[str]:
    """The names of the compiled files without their ending; each gives an image for each of its
    targets."""
    return sorted(Path(name).stem for name in sources if name.endswith(".cu"))


def is_for(unit: str, architecture: str) -> bool:
    """Whether a unit is compiled for an architecture."""
    return unit not in ONLY_FOR or architecture in ONLY_FOR[unit]


def runs_on(unit: str, capability: tuple[int, int]) -> list[str]:
    """The architectures whose images of a unit run on a capability, best first.

    There are none if no kernel of the unit is meant for it.
    """
    return [a for a in (*RUNS.get(capability, ()), FALLBACK) if is_for(unit, a)]


def digest(sources: dict[str, str], *more: str) -> str:
    """SHA-256, in hexadecimal, of all names, texts and further strings and of where each ends."""
    return hashlib.sha256(json.dumps([sorted(sources.items()), more]).encode()).hexdigest()


def image_name(unit: str, architecture: str) -> str:
    return f"{unit}.{architecture}.{'ptx' if architecture.startswith('compute') else 'cubin'}"


def find_nvcc() -> str:
    """The first nvcc of CUDA_HOME, PATH, the pip packages and /usr/local/cuda.

    The pip packages are nvidia-cuda-nvcc and nvidia-nvvm. Raises: Impossible if there is no nvcc.
    """
    places = [
        Path(home, "bin/nvcc")
        for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))
        if home
    ]
    places += [Path(found) for found in (shutil.which("nvcc"),) if found]
    spec = importlib.util.find_spec("nvidia")  # It is a namespace, so nothing is run.
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
    """source: a .cu file, or the PTX of one that nvcc only has to assemble."""
    kind = "-ptx" if architecture.startswith("compute") else "-cubin"
    return [nvcc, kind, f"-arch={architecture}", *NVCC_OPTIONS, str(source), "-o", str(output)]


def run(command: list[str]) -> str:
    """Run a command and return its stdout. Raises: as `ran`."""
    return ran(command).stdout


def ran(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command. Raises: Impossible, with all that it printed, if it fails or cannot start."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Impossible(f"{command[0]} cannot be started: {error}") from None
    if done.returncode:
        raise Impossible(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done


def known_architectures(nvcc: str) -> tuple[list[str], list[str]]:
    """Our architectures that this nvcc can compile for, and those that it cannot.

    Raises: Impossible if nvcc does not run.
    """
    listed = set(run([nvcc, "--list-gpu-arch"]).split())
    known: list[str] = []
    unknown: list[str] = []
    for name in (*ARCHITECTURES, FALLBACK):
        # nvcc lists 90 and 120 without their "a".
        virtual = "compute_" + name.split("_")[1].rstrip("a")
        (known if virtual in listed else unknown).append(name)
    return known, unknown


def record(folder: Path) -> dict[str, object]:
    """The record that `build` wrote in a folder; empty if it is missing or damaged."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def warnings_in(printed: str) -> list[str]:
    """The lines in which the compiler warns: of the language, or of lost performance (C75xx)."""
    return [line for line in printed.splitlines() if re.search(r"\bC75\d\d\b|[Ww]arning", line)]


def compile_image(
    nvcc: str, source: Path, folder: Path, unit: str, architecture: str
) -> tuple[str, list[str]]:
    """Compile a source to the image of a unit for an architecture.

    A process that reads the old image keeps it. Returns the image's name and the compiler's
    warnings. Raises: Impossible if nvcc fails.
    """
    target = folder / image_name(unit, architecture)
    output = target.with_suffix(".tmp")
    try:
        done = ran(nvcc_command(nvcc, source, architecture, output))
        output.replace(target)
    finally:
        output.unlink(missing_ok=True)
    return target.name, warnings_in(done.stdout + done.stderr)


def compile_images(
    nvcc: str, csrc: Path, folder: Path, pairs: list[tuple[str, str]]
) -> dict[str, list[str]]:
    """Compile pairs of a unit and an architecture on all cores, PTX first and then the rest.

    Returns the compiler's warnings by the name of the image. Raises: Impossible if nvcc fails.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def start(unit: str, architecture: str, source: Path) -> Future[tuple[str, list[str]]]:
            return pool.submit(compile_image, nvcc, source, folder, unit, architecture)

        def text(unit: str) -> Path:
            return csrc / f"cuda/{unit}.cu"

        fallbacks = {unit: start(unit, a, text(unit)) for unit, a in pairs if a == FALLBACK}
        jobs = list(fallbacks.values())
        assembled = [(unit, a) for unit, a in pairs if a in ASSEMBLED and unit in fallbacks]
        for unit, architecture in pairs:
            if architecture != FALLBACK and (unit, architecture) not in assembled:
                jobs.append(start(unit, architecture, text(unit)))
        for unit, architecture in assembled:
            fallbacks[unit].result()
            jobs.append(start(unit, architecture, folder / image_name(unit, FALLBACK)))
        return dict(sorted(job.result() for job in jobs))


def build(folder: Path, csrc: Path, nvcc: str | None = None) -> list[str]:
    """Compile every csrc/cuda/*.cu for every architecture into the folder, on all cores.

    Returns remarks for the user. Nothing is compiled if the folder already holds the images of
    these sources, this nvcc and these options. Raises: Impossible if there is no nvcc or source, or
    if nvcc fails.
    """
    if not any((csrc / "cuda").glob("*.cu")):
        raise Impossible(f"{csrc} has no cuda/*.cu")
    nvcc = nvcc or find_nvcc()
    sources = read_sources(csrc)
    known, unknown = known_architectures(nvcc)
    if not known:
        raise Impossible(f"{nvcc} compiles for none of {', '.join(ARCHITECTURES)}")
    remarks = [f"{nvcc} is too old for {', '.join(unknown)}"] if unknown else []
    pairs = [
        (unit, architecture)
        for unit in units(sources)
        for architecture in known
        if is_for(unit, architecture)
    ]
    names = sorted(image_name(*pair) for pair in pairs)
    # The running package can compare the sources alone. The compiler only decides whether to
    # compile again.
    wanted = {
        "sources": digest(sources),
        "compiler": digest({}, run([nvcc, "--version"]), *NVCC_OPTIONS),
        "images": names,
    }
    kept = record(folder)
    same = all(kept.get(name) == value for name, value in wanted.items())
    if same and all((folder / name).is_file() for name in names):
        return remarks
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    warnings = compile_images(nvcc, csrc, folder, pairs)
    if digest(read_sources(csrc)) != wanted["sources"]:
        raise Impossible(f"{csrc} was edited while nvcc read it; build again")
    remove_stale_images(folder, names)
    fresh = folder / f"{RECORD}.tmp"
    fresh.write_text(json.dumps(wanted | {"warnings": warnings}, indent=1) + "\n", encoding="utf-8")
    fresh.replace(folder / RECORD)
    return remarks


def remove_stale_images(folder: Path, names: list[str]) -> None:
    """Delete every image with another name: its source or architecture is gone."""
    for image in folder.iterdir():
        if image.suffix in (".cubin", ".ptx") and image.name not in names:
            image.unlink()


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
            print(nvcc, run([nvcc, "--version"]).split("\n")[-3:-1][0])
            return
        csrc = source_folder() or PACKAGE.parent / "csrc"
        remarks = build(arguments.folder, csrc, arguments.nvcc)
    except Impossible as reason:
        raise SystemExit(f"slab_kernels: the CUDA kernels cannot be compiled: {reason}") from None
    for remark in remarks:
        print(f"slab_kernels: {remark}")
    print(f"{arguments.folder}: up to date")


if __name__ == "__main__":
    main()
