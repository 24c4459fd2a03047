"""Text that every Python installation carries: the sources of its standard library.

Calibration and the accuracy tests of this library need real text on machines without a network. The
standard library is about 9 MB of it. It is split by top-level module or package, so that no file of
a held-out package is seen in training, and the split is written out by name, so that it cannot move
by accident.
"""

from __future__ import annotations

import sysconfig
import tokenize
from pathlib import Path

from ..errors import StdlibSourceError

# These modules are never trained on and never used for calibration. They are 7 % of the bytes and
# hold parsers, numerics, text, archives, user interfaces and data structures. Modules with a
# near-copy elsewhere (wave/sunau/aifc, datetime/_pydatetime, ntpath/posixpath) are not among them,
# because the copy would leak.
HELD_OUT = frozenset({
    "argparse", "bisect", "calendar", "configparser", "csv", "fractions", "gzip", "heapq", "json",
    "netrc", "queue", "sched", "shlex", "statistics", "textwrap", "tomllib", "webbrowser",
    "zipfile",
})  # fmt: skip

# Packages and modules that are no Python prose: tests, bundled applications, generated tables, and
# files that an operating system's packager adds.
_EXCLUDED_MODULES = frozenset({
    "encodings", "ensurepip", "idlelib", "lib2to3", "lib-dynload", "locale", "pydoc_data",
    "site-packages", "dist-packages", "sitecustomize", "stringprep", "test", "this", "turtledemo",
    "usercustomize", "_distutils_system_mod",
})  # fmt: skip
_EXCLUDED_PREFIXES = ("_sysconfigdata", "_sysconfig_", "config-", ".")
_EXCLUDED_FOLDERS = frozenset({"__pycache__", "test", "tests", "idle_test"})
_EXCLUDED_FILES = frozenset({"html/entities.py"})

# A stripped interpreter can keep a handful of modules: fewer bytes than these are not the library.
_MINIMUM_BYTES = 1_000_000


def training_text() -> str:
    """All modules that may be trained or calibrated on, joined in path order.

    Raises: StdlibSourceError where the sources are not on this machine.
    """
    return "\n".join(training_modules().values())


def heldout_text() -> str:
    """All modules of HELD_OUT, joined in path order. Raises: as `training_text`."""
    return "\n".join(heldout_modules().values())


def training_modules() -> dict[str, str]:
    """Path relative to the standard library -> source, of the modules that are not held out.

    Raises: as `training_text`.
    """
    return _read(held_out=False)


def heldout_modules() -> dict[str, str]:
    """Path relative to the standard library -> source, of the held-out modules.

    Raises: as `training_text`.
    """
    return _read(held_out=True)


def _read(held_out: bool) -> dict[str, str]:
    """Path relative to the standard library -> source, of one side. Raises: StdlibSourceError."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = _source_files(root)
    size = sum(path.stat().st_size for path in sources.values())
    if size < _MINIMUM_BYTES:
        raise StdlibSourceError(
            f"The sources of the Python standard library are not on this machine: {root} holds "
            f"{size} bytes of usable .py files, at least {_MINIMUM_BYTES} are needed. Use a Python "
            "that ships them (python.org, pyenv, conda, apt install libpython3-stdlib), or pass a "
            "text file of your own."
        )
    texts = {}
    for name, path in sources.items():
        if (_top_level(name) in HELD_OUT) == held_out:
            # tokenize.open honours a coding cookie and turns line ends into \n.
            with tokenize.open(path) as file:
                texts[name] = file.read()
    return texts


def _source_files(root: Path) -> dict[str, Path]:
    """Every usable source under `root` by its relative path, in the same order everywhere."""
    names = (path.relative_to(root).as_posix() for path in root.rglob("*.py") if path.is_file())
    return {name: root / name for name in sorted(names) if _usable(name)}


def _usable(name: str) -> bool:
    top = _top_level(name)
    return (
        name not in _EXCLUDED_FILES
        and top not in _EXCLUDED_MODULES
        and not top.startswith(_EXCLUDED_PREFIXES)
        and _EXCLUDED_FOLDERS.isdisjoint(name.split("/")[:-1])
    )


def _top_level(name: str) -> str:
    return name.split("/", 1)[0].removesuffix(".py")
