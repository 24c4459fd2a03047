"""Options of this library that an engine hands on with settings of its own; no engine is needed.

vLLM has a dict for whatever its plugins want: `--additional-config '{"slab_kernels": {"prefill":
"dense"}}'`, or `LLM(..., additional_config={"slab_kernels": {"prefill": "dense"}})`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..backends import dense_copy
from ..errors import ArgumentError

OURS = "slab_kernels"  # our key in such a dict
KNOWN = ("prefill",)


def prefill_word(additional: Any) -> str:
    """Whether layers keep a dense copy: what the engine's settings say, else the environment.

    Raises: ArgumentError for an option or a word that is unknown.
    """
    given = additional.get(OURS) if isinstance(additional, Mapping) else None
    options = {} if given is None else given
    if not isinstance(options, Mapping):
        raise ArgumentError(f"additional_config[{OURS!r}]={options!r} must be a dict")
    if unknown := sorted(str(name) for name in options if name not in KNOWN):
        raise ArgumentError(
            f"additional_config[{OURS!r}] has the unknown option {unknown[0]!r}; "
            f"there is {', '.join(KNOWN)}"
        )
    return dense_copy.named(options.get("prefill"))
