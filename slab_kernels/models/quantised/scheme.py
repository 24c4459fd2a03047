"""What the quantization_config of compressed-tensors says of one linear."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ...errors import CheckpointError
from .fp8 import block_size
from .stored import integer

PACKED = "pack-quantized"
PLAIN = ("float-quantized", "int-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")
ANY_LINEAR = "Linear"  # a target that is the name of a class


class Scheme(NamedTuple):
    """A group of `config_groups`: how the weights of the linears that it names are stored.

    targets: names, regular expressions behind "re:", and classes. strategy: what shares a scale,
    one of STRATEGIES. size: rows and columns of that, where they are given. symmetric: whether
    there are no zero points.
    """

    format: str
    targets: tuple[str, ...]
    bits: int
    strategy: str
    size: tuple[int, int]
    symmetric: bool

    def names(self, module: str) -> bool:
        """Whether a target is this module's own name, or a pattern of it."""
        for target in self.targets:
            pattern = target.removeprefix("re:")
            if target == module or (pattern != target and re.match(pattern, module)):
                return True
        return False

    def block(self, N: int, K: int) -> tuple[int, int]:
        """Rows and columns of a weight [N, K] that share a scale."""
        if self.strategy == "tensor":
            return N, K
        return (1, K) if self.strategy == "channel" else self.size

    def __str__(self) -> str:
        rows, columns = self.size
        said = {
            "tensor": "one scale per weight",
            "channel": "one scale per row",
            "group": f"groups of {columns}",
            "block": f"blocks of {rows}x{columns}",
        }
        return f"{self.format}, {self.bits} bits, {said[self.strategy]}"


def schemes(config: Mapping[str, Any]) -> list[Scheme]:
    """The groups of a quantization_config that say something of weights.

    Raises: CheckpointError for what cannot be read, by its name.
    """
    sparsity = config.get("sparsity_config") or {}
    kind = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
    if kind not in (None, "dense"):
        raise _unreadable(kind)
    if transforms := config.get("transform_config"):
        raise _unreadable({"transform_config": transforms})
    listed = config.get("config_groups") or {}
    if not isinstance(listed, dict):
        raise _unreadable(listed)
    found = []
    for group in listed.values():
        if not isinstance(group, dict):
            raise _unreadable(group)
        if group.get("weights") is not None:
            found.append(_scheme(group, config))
    if not found:
        raise _unreadable(config.get("format"))
    return found


def scheme_of(module: str, known: list[Scheme]) -> Scheme:
    """The scheme of a quantised linear: one that names it goes before one for all linears.

    Raises: CheckpointError if there is none.
    """
    named = [scheme for scheme in known if scheme.names(module)]
    usual = [scheme for scheme in known if ANY_LINEAR in scheme.targets]
    for scheme in (*named, *usual):
        return scheme
    raise CheckpointError(
        f"{module} is stored quantised, and no target of config_groups in quantization_config "
        "names it; copy or download config.json again"
    )


def _scheme(group: dict[str, Any], config: Mapping[str, Any]) -> Scheme:
    kind, weights = group.get("format") or config.get("format"), group["weights"]
    if not isinstance(kind, str) or kind not in (PACKED, *PLAIN):
        raise _unreadable(kind)
    if not isinstance(weights, dict) or weights.get("strategy") not in STRATEGIES:
        raise _unreadable(weights)
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise _unreadable(targets)
    strategy = weights["strategy"]
    size = (1, 1)
    if strategy == "group":
        size = 1, max(1, integer(weights, "group_size"))
    elif strategy == "block":
        size = block_size("block_structure", weights.get("block_structure"))
    bits = integer(weights, "num_bits", (2, 4, 8) if kind == PACKED else (8,))
    symmetric = weights.get("symmetric", True) is not False
    return Scheme(kind, tuple(targets), bits, strategy, size, symmetric)


def _unreadable(what: Any) -> CheckpointError:
    return CheckpointError(
        f"the weights are stored in a format of compressed-tensors that is not read here "
        f"({reprlib.repr(what)}); read are {', '.join((PACKED, *PLAIN))}, with a scale for a "
        f"{', '.join(STRATEGIES)}; open the model with transformers and compressed-tensors, call "
        "dequantize() on it, save it, and compress that copy"
    )
