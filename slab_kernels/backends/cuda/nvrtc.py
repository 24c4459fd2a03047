"""Compiles by NVRTC, which every CUDA build of torch brings; it is called through ctypes.

It needs no GPU and no driver, so the tests compile every architecture with it. Nothing is looked
for or loaded at import.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ...errors import CompileError
from .compile import FALLBACK, OPTIONS

# The name matches neither libnvrtc-builtins nor the .alt variant.
_NAME = re.compile(r"libnvrtc(?:-[0-9a-f]+)?\.so\.(\d+)[.\d]*")
_LOADING = threading.Lock()


class Nvrtc(NamedTuple):
    """A loaded NVRTC."""

    library: ctypes.CDLL
    path: str
    version: str
    architectures: frozenset[int]  # such as 80, 86, 90


def places(major: str | None = None) -> list[Path]:
    """Every libnvrtc of the pip packages, torch's own folder, this Python's prefix and CUDA_HOME.

    major: the major version of CUDA that torch was built with, such as "13". Libraries of that
    version come first, since the driver that serves torch serves them too.
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
    """`find` without its lock: the first of `places` that loads, else the system loader's."""
    for path in places(major):
        try:
            # libnvrtc asks the loader for its built-ins by bare name and would not find them beside
            # itself, so they are loaded first.
            for builtins in sorted(path.parent.glob("libnvrtc-builtins*.so.*")):
                if ".alt." not in builtins.name:
                    ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return _opened(ctypes.CDLL(str(path)), str(path))
        except (OSError, AttributeError):
            continue
    # The system's loader may find one, or this process may have loaded one already.
    for known in (major,) if major else ("13", "12"):
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
    """What to compile for a device: its own architecture, or PTX if NVRTC does not know it."""
    number = 10 * capability[0] + capability[1]
    if number not in nvrtc.architectures:
        return FALLBACK
    return f"sm_{number}a" if capability in ((9, 0), (12, 0)) else f"sm_{number}"


def compile_unit(
    sources: dict[str, str], unit: str, architecture: str, nvrtc: Nvrtc | None = None
) -> bytes:
    """The image of cuda/<unit>.cu: a cubin for sm_NN, PTX for compute_NN.

    sources: path -> text of everything that may be included.

    Raises: CompileError with NVRTC's log, or if there is no NVRTC.
    """
    nvrtc = nvrtc or find()
    if nvrtc is None:
        raise CompileError("no libnvrtc was found")
    library, program = nvrtc.library, ctypes.c_void_p()

    def check(code: int) -> None:
        if not code:
            return
        said = library.nvrtcGetErrorString(code).decode()
        log = b""
        if program:
            log = _read(program, library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog)
        raise CompileError(
            f"NVRTC {nvrtc.version} on cuda/{unit}.cu for {architecture}: {said}\n"
            + log.rstrip(b"\0\n").decode(errors="replace")
        )

    main = sources[f"cuda/{unit}.cu"].encode()
    headers = {_included(name): text for name, text in sources.items() if not name.endswith(".cu")}
    texts, names = _strings(headers.values()), _strings(headers)
    name, into = f"{unit}.cu".encode(), ctypes.byref(program)
    check(library.nvrtcCreateProgram(into, main, name, len(headers), texts, names))
    try:
        # The last option makes unmarked constexpr functions, as in format.h, device functions.
        options = _strings(
            [f"--gpu-architecture={architecture}", *OPTIONS, "--device-as-default-execution-space"]
        )
        check(library.nvrtcCompileProgram(program, len(options), options))
        if architecture.startswith("compute"):
            return _read(program, library.nvrtcGetPTXSize, library.nvrtcGetPTX).rstrip(b"\0")
        return _read(program, library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN)
    finally:
        library.nvrtcDestroyProgram(into)


def _strings(texts: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def _read(program: ctypes.c_void_p, get_size: Callable[..., int], get: Callable[..., int]) -> bytes:
    """What a pair of NVRTC's functions gives of a program; nothing if they fail."""
    size = ctypes.c_size_t()
    if get_size(program, ctypes.byref(size)) or not size.value:
        return b""
    buffer = ctypes.create_string_buffer(size.value)
    return b"" if get(program, buffer) else buffer.raw


def _included(name: str) -> str:
    """The path as a file in cuda/ spells it in an include, which is all that NVRTC compares.

    Siblings are spelt by their name, format.h as ../format.h.
    """
    return name.removeprefix("cuda/") if name.startswith("cuda/") else f"../{name}"
