"""The entry `quantization_config` of a packed folder's config.json: the layout of every module."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError, FormatError, VersionError
from ..format import FORMAT_VERSION, PackedLayout
from .folder import Checkpoint

QUANT_METHOD = "slab_kernels"
TABLES_KEY = "embeddings"  # of quantization_config, where embeddings are int8 rows
# A folder has the lowest version that holds what is in it, so that older libraries read it; one
# that does not know a version refuses it, where it would open the embeddings with random numbers.
PACKED_VERSION, TABLES_VERSION = 2, 3
DESCRIBED = ("method", "pattern", "rank", "values", "group_size")  # settings that are kept there
UNTIED_KEY = "untied"  # there and true where a packed head was one matrix with the embedding


@functools.cache
def _damaged(kind: type[FormatError]) -> type[FormatError]:
    """`kind` as the error of a folder: a CheckpointError as well, so that it exits like one."""

    def reduce(error: FormatError) -> tuple[type[FormatError], tuple]:
        return kind, error.args  # pickled, it arrives as `kind`

    members = {"__module__": kind.__module__, "__reduce__": reduce}
    return type(kind.__name__, (CheckpointError, kind), members)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Around the use of what a folder holds: a FormatError becomes a CheckpointError too.

    Its message then begins with `what`. A FormatError that is no CheckpointError says that an
    argument breaks the format.
    """
    try:
        yield
    except FormatError as error:
        kind = _damaged(type(error))  # type: ignore[arg-type]  # mypy takes a class for unhashable
        raise kind(f"{what}: {error}") from error


def quantization_config(
    layouts: Mapping[str, PackedLayout],
    settings: Mapping[str, Any],
    tables: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The entry of config.json from which every module can be built.

    settings: of the run; those of DESCRIBED are kept, None where one is not there, and UNTIED_KEY.
    tables: name -> entry (`models.tables`) of every embedding of int8 rows.
    """
    described = {name: table.to_dict() for name, table in tables.items()}
    return {
        "quant_method": QUANT_METHOD,
        "format_version": TABLES_VERSION if tables else PACKED_VERSION,
        **{key: settings.get(key) for key in DESCRIBED},
        "modules": {name: module_entry(layout) for name, layout in layouts.items()},
        **({TABLES_KEY: described} if tables else {}),
        **({UNTIED_KEY: True} if settings.get(UNTIED_KEY) is True else {}),
    }


def module_entry(layout: PackedLayout) -> dict[str, Any]:
    """What `modules` of a quantization_config says of one module."""
    return {**layout.to_dict(), "signs": layout.rank > 0}


def quantization_entry(checkpoint: Checkpoint) -> dict[str, Any]:
    """The entry of a folder's config.json.

    Raises: CheckpointError if the folder was not written by this library, or has lost the entry.
    """
    entry = checkpoint.config.get("quantization_config")
    if not entry:
        refuse_lost_entry(checkpoint)
    if not isinstance(entry, dict) or entry.get("quant_method") != QUANT_METHOD:
        method = entry.get("quant_method") if isinstance(entry, dict) else entry
        found = f"quant_method {reprlib.repr(method)}" if entry else "a dense model"
        raise CheckpointError(
            f"{checkpoint.folder} was not written by slab_kernels (it holds {found}); "
            "compress it first, or open it with transformers"
        )
    return entry


def refuse_lost_entry(checkpoint: Checkpoint) -> None:
    """Look for packed layers in a folder whose config.json says nothing of them.

    Raises: CheckpointError if there is one, which cannot be read without its layout.
    """
    for name in checkpoint.entries:
        module, _, part = name.rpartition(".")
        if part == "metadata" and f"{module}.values" in checkpoint.entries:
            raise CheckpointError(
                f"{checkpoint.folder} holds packed layers ({module} is one), and its config.json "
                "has lost the entry quantization_config that says how they are laid out; put back "
                "the config.json that was written with them, or compress the model again"
            )


def read_layouts(checkpoint: Checkpoint) -> dict[str, PackedLayout]:
    """Module name -> layout, from config.json, with the sizes that its tensors have in the folder.

    Raises: CheckpointError if the folder was not written by this library or its sizes contradict
        its files, VersionError if a newer library wrote it, for an impossible layout a FormatError
        that is a CheckpointError too.
    """
    layouts = parse_layouts(quantization_entry(checkpoint), str(checkpoint.folder))
    for name, layout in layouts.items():
        for part, (dtype, shape) in layout.tensors().items():
            stored = checkpoint.entries.get(f"{name}.{part}")
            if stored is not None and stored.shape != shape:
                raise CheckpointError(
                    f"tensor '{name}.{part}' has shape {list(stored.shape)}, "
                    f"expected {list(shape)} by quantization_config"
                )
            if stored is not None and stored.dtype != dtype:
                raise CheckpointError(
                    f"tensor '{name}.{part}' is {stored.dtype}, "
                    f"expected {dtype} by quantization_config"
                )
    return layouts


def parse_layouts(entry: Mapping[str, Any], where: str) -> dict[str, PackedLayout]:
    """Module name -> layout, from a quantization_config; keys that are not known are ignored.

    where: the folder or model, for messages.

    Raises: CheckpointError, VersionError if a newer library wrote it, for an impossible layout a
        FormatError that is a CheckpointError too.
    """
    version = entry.get("format_version")
    if type(version) is not int or version < 1:  # isinstance would take true for an int
        raise CheckpointError(
            f"{where}: quantization_config has format_version {reprlib.repr(version)}, "
            "expected a positive integer"
        )
    if version > FORMAT_VERSION:
        raise VersionError(
            f"{where} has format_version {reprlib.repr(version)}, "
            f"this library reads up to {FORMAT_VERSION}; update slab_kernels"
        )
    modules = entry.get("modules")
    if (
        not isinstance(modules, dict)
        or not modules
        or not all(isinstance(m, dict) for m in modules.values())
    ):
        raise CheckpointError(f"{where}: quantization_config lists no compressed modules")
    layouts = {}
    for name, module in modules.items():
        with reading(f"module {name[:200]!r}"):
            layouts[name] = PackedLayout.from_dict(module)
    return layouts
