"""Methods and backends that other installed packages add, found by their entry points.

A package declares one in its pyproject.toml, under the name by which it is to be asked for:

    [project.entry-points."slab_kernels.methods"]
    my-method = "my_package.method:METHOD"

A package whose object cannot be used is left out with the reason; it does not stop the others.
"""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Any, NamedTuple

from .terminal import first_line

METHODS = "slab_kernels.methods"
BACKENDS = "slab_kernels.backends"


class Plugin(NamedTuple):
    """What one entry point gave: `value`, or the `problem` in a sentence.

    origin: the distribution and its version, such as "my-package 1.2".
    """

    name: str
    origin: str
    value: Any
    problem: str | None


@functools.cache
def load(group: str, kind: type, taken: frozenset[str]) -> tuple[Plugin, ...]:
    """What the entry points of `group` name, each imported, in order of their names.

    The installed packages are read once in a process.

    Args:
        group: METHODS or BACKENDS.
        kind: the class whose instances are taken; they have a `name`.
        taken: names that no plug-in may have.
    """
    found: list[Plugin] = []
    for entry in sorted(metadata.entry_points(group=group), key=lambda entry: entry.name):
        origin = "an unknown package"
        if entry.dist is not None:
            origin = f"{entry.dist.name} {entry.dist.version}"
        others = {plugin.name: plugin.origin for plugin in found if plugin.problem is None}
        value, reason = _import(entry, kind)
        if entry.name in taken:
            reason = "the name is one of slab_kernels' own"
        elif entry.name in others:
            reason = f"{others[entry.name]} has taken the name"
        problem = None
        if reason is not None:
            what = f"the entry point {entry.name!r} of {group}"
            problem = f"{origin} cannot add {what}: {reason}; update or uninstall that package"
        found.append(Plugin(entry.name, origin, value, problem))
    return tuple(found)


def _import(entry: metadata.EntryPoint, kind: type) -> tuple[Any, str | None]:
    """The object that an entry point names, and why it cannot be used, or None."""
    try:
        value = entry.load()
    except Exception as error:  # the package's own code runs here, and may raise anything
        return (
            None,
            f"loading {entry.value} failed with {type(error).__name__}: {first_line(error)}",
        )
    if not isinstance(value, kind):
        return None, f"{entry.value} is a {type(value).__name__}, no {kind.__name__}"
    if getattr(value, "name", None) != entry.name:
        return None, f"{entry.value} has another name, {getattr(value, 'name', None)!r}"
    return value, None
