"""Named goals of `compress`: few bytes, few bits near the dense model, or values of 16 bits.

A preset is nothing but four settings of method `slab` at 2:4. Whoever names none gets those of
`DEFAULT`, each unless another value is asked for.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ArgumentError, BudgetError
from ..methods.settings import PACKABLE

METHOD = "slab"  # whose settings a preset names


@dataclass(frozen=True)
class Preset:
    """The settings of one goal.

    values, planes: of every linear in the blocks, as `slab_kernels.decompose` takes them.
    embeddings, head: how the token embeddings are stored, and whether the output head is packed,
        as `slab_kernels.compress` takes them.
    meaning: one line for people.
    """

    values: str = "fp16"
    planes: int = 1
    embeddings: str = "dense"
    head: bool = False
    meaning: str = ""

    def settings(self) -> dict[str, Any]:
        """Setting -> value, without the meaning."""
        return {name: value for name, value in asdict(self).items() if name != "meaning"}


# What the presets that save bytes do outside the blocks.
SMALL_EMBEDDINGS, SMALL_HEAD = "int8", False
PRESETS: dict[str, Preset] = {
    "small": Preset(
        "int4",
        1,
        SMALL_EMBEDDINGS,
        SMALL_HEAD,
        "fewest bytes of the three, fastest while it writes",
    ),
    "balanced": Preset(
        "int4", 2, SMALL_EMBEDDINGS, SMALL_HEAD, "nearer the dense model for half a bit more"
    ),
    "exact": Preset(
        "fp16", 2, "dense", False, "nearest the dense model of the three, values of 16 bits"
    ),
}
DEFAULT = "balanced"
PLAIN = Preset()  # where no preset applies: another method or pattern, or a budget of bits


def resolve(
    preset: str | None, given: Mapping[str, Any], bits: float | None, layer: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of a Preset, each as it was given, else as the preset says.

    preset: a key of PRESETS, or None for the default where one applies.
    given: values, planes, embeddings and head, None where nobody said.
    layer: the other settings of a layer, of which method, pattern and rank matter.

    Raises: ArgumentError, or BudgetError beside `bits`, for a preset that does not exist, or that
        something else contradicts.
    """
    if preset is not None:
        _check_named(preset, given, bits, layer)
    base = PRESETS[preset or DEFAULT] if _applies(bits, layer) else PLAIN
    usual = base.settings()
    if _signless(layer):
        usual["planes"] = 1
    return usual | {name: value for name, value in given.items() if value is not None}


def preset_of(settings: Mapping[str, Any], bits: float | None) -> str | None:
    """The preset that settings amount to, whether it was named or not; None if there is none."""
    if not _applies(bits, settings) or _signless(settings):
        return None
    for name, preset in PRESETS.items():
        if all(settings[key] == value for key, value in preset.settings().items()):
            return name
    return None


def _applies(bits: float | None, layer: Mapping[str, Any]) -> bool:
    packed = layer.get("pattern", PACKABLE[0]) in PACKABLE
    return bits is None and packed and layer.get("method", METHOD) == METHOD


def _signless(layer: Mapping[str, Any]) -> bool:
    return layer.get("rank", 1) == 0


def _check_named(
    preset: str, given: Mapping[str, Any], bits: float | None, layer: Mapping[str, Any]
) -> None:
    """Raises: ArgumentError or BudgetError, with both values."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ArgumentError(
            f"preset={reprlib.repr(preset)} is unknown; choose one of {', '.join(PRESETS)}"
        )
    if bits is not None:
        raise BudgetError(
            f"bits={bits} chooses values and planes layer by layer, which preset={preset!r} says "
            "for all of them; leave one out"
        )
    wanted = PRESETS[preset].settings()
    says = {"method": METHOD, "pattern": PACKABLE[0]} | wanted
    for name, value in {**layer, **given}.items():
        if name in says and value is not None and value != says[name]:
            raise ArgumentError(
                f"preset={preset!r} means {name}={says[name]!r}, and {name}={reprlib.repr(value)} "
                "contradicts it; leave one out"
            )
    if _signless(layer):
        raise ArgumentError(
            f"preset={preset!r} means planes={wanted['planes']} of signs, and rank=0 has no sign "
            "term; leave one out"
        )
