"""NVRTC, the compiler library that every CUDA build of torch brings: found, loaded and called through ctypes.

It needs no GPU and no driver, so the tests compile every architecture with it. Nothing is looked for or loaded at import.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from ...errors import CompileError
from .compile import FALLBACK, OPTIONS

_NAME = re.compile(
    r"libnvrtc(?:-[0-9a-f]+)?\.so\.(\d+)[.\d]*"
)  # not libnvrtc-builtins, not the .alt variant
_LOADING = threading.Lock()


class Nvrtc(NamedTuple):
    library: ctypes.CDLL
    path: str
    version: str
    architectures: frozenset[int]  # 80, 86, 90 …


def places(major: str | None = None) -> list[Path]:
    """Every libnvrtc among the pip packages, in torch's own folder, in this Python's prefix and in CUDA_HOME.

    `major` is the CUDA major version of torch, "13": libraries of that version come first, since the driver that serves
    torch serves them too.
    """
    folders: list[Path] = []
    nvidia, torch = importlib.util.find_spec("nvidia"), importlib.util.find_spec("torch")
    for folder in (nvidia.submodule_search_locations or []) if nvidia else []:
        folders += sorted(Path(folder).glob("*/lib"))
    if torch and torch.origin:
        folders.append(Path(torch.origin).parent / "lib")
    folders.append(Path(sys.prefix, "lib"))
    folders += [
        Path(home, "lib64") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home
    ]
    found = [
        (m[1], path)
        for folder in folders
        for path in sorted(folder.glob("libnvrtc*"))
        if (m := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, key=lambda pair: (pair[0] != major, -int(pair[0])))]


def find(major: str | None = None) -> Nvrtc | None:
    """The library, loaded once, whichever thread comes first; None if there is none that loads."""
    with _LOADING:
        return _find(major)


@functools.cache
def _find(major: str | None) -> Nvrtc | None:
    for path in places(major):
        try:
            # libnvrtc asks the loader for its built-ins by bare name and would not find them beside itself.
            for builtins in sorted(path.parent.glob("libnvrtc-builtins*.so.*")):
                if ".alt." not in builtins.name:
                    ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return _opened(ctypes.CDLL(str(path)), str(path))
        except (OSError, AttributeError):
            continue
    for known in (
        (major,) if major else ("13", "12")
    ):  # what the system's loader finds, or this process has already
        try:
            return _opened(ctypes.CDLL(f"libnvrtc.so.{known}"), f"libnvrtc.so.{known}")
        except (OSError, AttributeError):
            continue
    return None


def _opened(library: ctypes.CDLL, path: str) -> Nvrtc:
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    library.nvrtcGetSupportedArchs(known)
    return Nvrtc(library, path, f"{major.value}.{minor.value}", frozenset(known))


def target(nvrtc: Nvrtc, capability: tuple[int, int]) -> str:
    """What to compile for that device: its own architecture, or PTX if this NVRTC is older than the device."""
    number = 10 * capability[0] + capability[1]
    if number not in nvrtc.architectures:
        return FALLBACK
    return f"sm_{number}a" if capability in ((9, 0), (12, 0)) else f"sm_{number}"


def compile_unit(
    sources: dict[str, str], unit: str, architecture: str, nvrtc: Nvrtc | None = None
) -> bytes:
    """The image of cuda/<unit>.cu: a cubin for sm_NN, PTX for compute_NN. All includes come from `sources`.

    Raises: CompileError with NVRTC's log, or if there is no NVRTC.
    """
    nvrtc = nvrtc or find()
    if nvrtc is None:
        raise CompileError("no libnvrtc was found")
    library, program = nvrtc.library, ctypes.c_void_p()
    headers = {_included(name): text for name, text in sources.items() if not name.endswith(".cu")}

    def strings(texts) -> ctypes.Array:
        encoded = [text.encode() for text in texts]
        return (ctypes.c_char_p * len(encoded))(*encoded)

    def check(code: int) -> None:
        if code:
            said = library.nvrtcGetErrorString(code).decode()
            raise CompileError(
                f"NVRTC {nvrtc.version} on cuda/{unit}.cu for {architecture}: {said}{log()}"
            )

    def read(size_of, get) -> bytes:
        size = ctypes.c_size_t()
        if size_of(program, ctypes.byref(size)) or not size.value:
            return b""
        buffer = ctypes.create_string_buffer(size.value)
        return b"" if get(program, buffer) else buffer.raw

    def log() -> str:
        text = read(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog) if program else b""
        return "\n" + text.rstrip(b"\0\n").decode(errors="replace")

    main, names = sources[f"cuda/{unit}.cu"].encode(), strings(headers)
    check(
        library.nvrtcCreateProgram(
            ctypes.byref(program),
            main,
            f"{unit}.cu".encode(),
            len(headers),
            strings(headers.values()),
            names,
        )
    )
    try:
        # Unmarked constexpr functions, as in format.h, count as device functions.
        options = strings(
            [f"--gpu-architecture={architecture}", *OPTIONS, "--device-as-default-execution-space"]
        )
        check(library.nvrtcCompileProgram(program, len(options), options))
        if architecture.startswith("compute"):
            return read(library.nvrtcGetPTXSize, library.nvrtcGetPTX).rstrip(b"\0")
        return read(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _included(name: str) -> str:
    """As a file in cuda/ includes it: its siblings by name, format.h as ../format.h. NVRTC compares the spelling only."""
    return name.removeprefix("cuda/") if name.startswith("cuda/") else f"../{name}"
