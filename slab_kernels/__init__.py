"""Fused kernels for W ~= S + (U V^T) * B + P Q^T: 2:4 sparse values, low-rank magnitudes times signs, adapters.

Importing this package imports nothing else: every public name loads its module on first use. transformers, once it is imported,
opens packed folders by `from_pretrained` (engines/).
"""

from __future__ import annotations

import importlib

from .engines import watch

__version__ = "0.1.0"

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
    "replace_linear": "nn",
    "InputStats": "methods.inputs",
    "SlabConfig": "engines.transformers",
    "check": "models.packed",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_HOMES[name]}", __name__)
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


watch()
