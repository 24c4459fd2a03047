"""Fused kernels for W ~ S + (U V^T) * B + P Q^T: 2:4 values, magnitudes times signs, adapters.

Importing this package imports nothing heavy: every public name loads its module on first use.
transformers, once it is imported, opens packed folders by `from_pretrained` (engines/).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .engines import watch

if TYPE_CHECKING:  # what editors and type checkers see; _HOMES says the same to Python
    from .compression.model import compress
    from .engines.transformers import SlabConfig
    from .errors import SlabError
    from .format import Decomposition, PackedLayout, PackedWeight, pack, unpack
    from .methods import decompose
    from .methods.inputs import InputStats
    from .models.decompress import decompress
    from .models.load import load
    from .models.packed import check
    from .models.save import save
    from .nn import FusedSlabLinear, SlabLinear, prepare, replace_linear

__version__ = "0.1.0"

__all__ = [
    "Decomposition",
    "FusedSlabLinear",
    "InputStats",
    "PackedLayout",
    "PackedWeight",
    "SlabConfig",
    "SlabError",
    "SlabLinear",
    "check",
    "compress",
    "decompose",
    "decompress",
    "load",
    "pack",
    "prepare",
    "replace_linear",
    "save",
    "unpack",
]

_HOMES = {
    "compress": "compression.model",
    "load": "models.load",
    "save": "models.save",
    "decompress": "models.decompress",
    "decompose": "methods",
    "Decomposition": "format",
    "PackedLayout": "format",
    "PackedWeight": "format",
    "pack": "format",
    "unpack": "format",
    "SlabLinear": "nn",
    "FusedSlabLinear": "nn",
    "prepare": "nn",
    "replace_linear": "nn",
    "InputStats": "methods.inputs",
    "SlabConfig": "engines.transformers",
    "SlabError": "errors",
    "check": "models.packed",
}

if not TYPE_CHECKING:  # a type checker would take every name for one that exists

    def __getattr__(name: str):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f".{_HOMES[name]}", __name__)
        value = getattr(module, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


watch()
