"""Where a device's machine code comes from: built ahead of time, or compiled by NVRTC into a cache.

SLAB_KERNELS_CACHE names the cache folder, default ~/.cache/slab_kernels; it is made for its user
alone. A file's name holds a hash of all that went into it, and its last 32 bytes are the SHA-256 of
the rest: what a full disk or a crash left half-written is compiled again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import nvrtc as rtc
from .compile import (
    FALLBACK,
    IMAGES,
    OPTIONS,
    digest,
    image_name,
    is_for,
    read_sources,
    record,
    runs_on,
    source_folder,
    units,
)

_SUM = hashlib.sha256().digest_size


class Image(NamedTuple):
    """Machine code that the driver may load."""

    origin: str  # names it in error messages
    data: bytes  # a cubin, or PTX that ends in a zero byte as the driver wants it


@functools.cache
def kernel_sources() -> dict[str, str]:
    """Path -> text of every source, read once; empty where the sources are missing."""
    folder = source_folder()
    return read_sources(folder) if folder else {}


def kernel_units(capability: tuple[int, int]) -> list[str]:
    """The units that a device has kernels of: every csrc/cuda/*.cu, but for those that are for
    other architectures alone."""
    if sources := kernel_sources():
        every = units(sources)
    else:
        listed = record(IMAGES).get("images")
        built = listed if isinstance(listed, list) else []
        every = sorted({str(name).split(".")[0] for name in built})
    return [unit for unit in every if runs_on(unit, capability)]


def ahead_of_time(unit: str, capability: tuple[int, int]) -> list[Path]:
    """Images made by setup.py that run on such a device, best first.

    There are none if they were built from other sources than those here.
    """
    built, sources = record(IMAGES), kernel_sources()
    if not built or (sources and built.get("sources") != digest(sources)):
        return []
    names = [image_name(unit, architecture) for architecture in runs_on(unit, capability)]
    return [IMAGES / name for name in names if (IMAGES / name).is_file()]


def images(unit: str, capability: tuple[int, int], major: str | None = None) -> Iterator[Image]:
    """What to try to load, in order. NVRTC runs only when the driver refused all before.

    major: the major version of CUDA that torch was built with.

    Raises: CompileError if NVRTC refuses the source, OSError if an image cannot be read.
    """
    for path in ahead_of_time(unit, capability):
        yield Image(path.name, _terminated(path.read_bytes(), path.suffix == ".ptx"))
    if (nvrtc := rtc.find(major)) and kernel_sources():
        architecture = rtc.target(nvrtc, capability)
        if not is_for(unit, architecture):
            return
        data = compiled(kernel_sources(), unit, architecture, nvrtc)
        yield Image(
            f"{unit} by NVRTC {nvrtc.version} for {architecture}",
            _terminated(data, architecture == FALLBACK),
        )


def missing(capability: tuple[int, int], major: str | None = None) -> str | None:
    """Why there is no machine code for such a device and what to do about it, or None.

    Nothing is compiled.
    """
    needed = kernel_units(capability)
    if not needed:
        return "the CUDA kernels' sources are not installed (csrc/cuda); install slab-kernels again"
    needed = [unit for unit in needed if not ahead_of_time(unit, capability)]
    if not needed:
        return None
    if not kernel_sources():
        number = ".".join(map(str, capability))
        return f"no cubin for capability {number} is installed; install slab-kernels again"
    nvrtc = rtc.find(major)
    if nvrtc is None:
        suffix = f"-cu{major}" if major and int(major) < 13 else ""
        return (
            "no CUDA kernels were built at installation and libnvrtc is not found; pip install "
            f"nvidia-cuda-nvrtc{suffix}, or install again where nvcc is on PATH"
        )
    architecture = rtc.target(nvrtc, capability)
    if unknown := [unit for unit in needed if not is_for(unit, architecture)]:
        wanted = " or ".join(runs_on(unknown[0], capability))
        return (
            f"no CUDA kernels of {unknown[0]} were built at installation, and NVRTC "
            f"{nvrtc.version} does not compile for {wanted}; install a newer nvidia-cuda-nvrtc"
        )
    return None


def compiled(sources: dict[str, str], unit: str, architecture: str, nvrtc: rtc.Nvrtc) -> bytes:
    """The image from the cache, or compiled and put there.

    If the cache cannot be used, the kernels are compiled without it, with a line on stderr. A cache
    that other users may write counts as one: its images would run in this process.

    Raises: CompileError if NVRTC refuses the source.
    """
    key = digest(sources, unit, architecture, nvrtc.version, *OPTIONS)[:32]
    folder = _own_folder()
    suffix = Path(image_name(unit, architecture)).suffix
    kept = folder / f"{unit}.{architecture}.{key}{suffix}" if folder else None
    if kept and (data := _read(kept)):
        return data
    _tell(f"compiling the CUDA kernels of {unit} for {architecture}, once (a few minutes)")
    data = rtc.compile_unit(sources, unit, architecture, nvrtc)
    if kept:
        _write(kept, data)
    return data


def _own_folder() -> Path | None:
    """The cache folder, made if need be, for this user alone whatever the umask says.

    None, and a line on stderr, if it cannot be used.
    """
    try:
        folder = cache_folder()
    except RuntimeError:  # There is no home folder.
        return None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        reason = distrust(folder.stat())
    except OSError as error:
        reason = f"cannot be used ({error.strerror or error}); SLAB_KERNELS_CACHE may name another"
    if reason:
        _tell_once(f"the cache folder {folder} {reason}; until then kernels are compiled again")
    return None if reason else folder


def _read(kept: Path) -> bytes | None:
    """The image in that file if it is whole and no other user may have written it."""
    try:
        with kept.open("rb") as f:
            reason, whole = distrust(os.fstat(f.fileno())), f.read()
    except OSError:
        return None
    if reason:
        _tell_once(f"{kept} {reason}; it is compiled again")
    elif len(whole) > _SUM and hashlib.sha256(whole[:-_SUM]).digest() == whole[-_SUM:]:
        return whole[:-_SUM]
    return None


def _write(kept: Path, data: bytes) -> None:
    """Keep an image, or do without if the file cannot be written."""
    # The file is renamed when it is complete: of processes that compile the same at once the last
    # one wins, and all read whole files. A NamedTemporaryFile has mode 0600.
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile(
            dir=kept.parent, prefix=kept.name, suffix=".tmp", delete=False
        ) as fresh:
            try:
                fresh.write(data + hashlib.sha256(data).digest())
                fresh.close()
                os.replace(fresh.name, kept)
            except OSError:
                os.unlink(fresh.name)


def distrust(found: os.stat_result) -> str | None:
    """Why what is in a file or folder is not to be run, as the end of a sentence that begins with
    its name; or None.

    It has to belong to this user or to root, and nobody else may write to it. On a system without
    user ids nothing is distrusted.
    """
    if not hasattr(os, "getuid"):
        return None
    if found.st_uid not in (os.getuid(), 0):
        return f"belongs to another user (uid {found.st_uid})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(found.st_mode)
        return f"may be written by other users (mode {mode:04o}; chmod go-w makes it yours alone)"
    return None


def _tell(sentence: str) -> None:
    print(f"slab_kernels: {sentence}", file=sys.stderr, flush=True)


_tell_once = functools.cache(_tell)


def cache_folder() -> Path:
    """The folder that SLAB_KERNELS_CACHE names, or the one in the home folder.

    Raises: RuntimeError if it is in the home folder and there is none.
    """
    return Path(os.environ.get("SLAB_KERNELS_CACHE") or "~/.cache/slab_kernels").expanduser()


def _terminated(data: bytes, text: bool) -> bytes:
    return data + b"\0" if text and not data.endswith(b"\0") else data
