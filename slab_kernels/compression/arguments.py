"""The arguments of `compress`, checked and brought to one plain form before anything is read."""

from __future__ import annotations

import reprlib
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ArgumentError
from ..methods import LayerSettings
from ..settings import enforce, setting
from ..text.windows import Sampling
from .budget import check_bits
from .by_pattern import ByPattern
from .matching import Matching
from .plan import Plan
from .presets import preset_of, resolve
from .vocabulary import EMBEDDINGS, Wanted


@dataclass(frozen=True)
class Arguments:
    """What is to be done with a model, whatever the model and the text.

    bits: the budget of a search, in stored bits per weight over the whole model; None: no search.
    skip: fnmatch patterns of module names that stay dense.
    embeddings, head: what becomes of the input embedding and of the output head (see `compress`).
    permute: whether channels are put into orders that suit the groups of the pattern.
    optional: those of "embeddings" and "head" that stay dense in a model that cannot have them,
        with a warning, because a preset says them and nobody else.

    Raises on construction: ArgumentError.
    """

    plan: Plan
    bits: float | None
    sampling: Sampling
    skip: tuple[str, ...]
    embeddings: str = setting("dense", "how the token embeddings are stored", choices=EMBEDDINGS)
    head: bool = setting(False, "whether the output head is packed too")
    optional: tuple[str, ...] = ()
    permute: bool = False

    def __post_init__(self) -> None:
        enforce(self)
        self.wanted.check_pattern(self.plan)

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.embeddings, self.head, self.optional)

    @classmethod
    def of(
        cls,
        *,
        matching: Matching | int | bool | None = None,
        bits: float | None = None,
        samples: int = 128,
        window: int = 2048,
        seed: int = 0,
        skip: Any = (),
        preset: str | None = None,
        values: str | None = None,
        planes: int | None = None,
        embeddings: str | None = None,
        head: bool | None = None,
        permute: bool = False,
        settings_by_pattern: Any = None,
        **layer: Any,
    ) -> Arguments:
        """The arguments that the keywords of `compress` stand for.

        values, planes, embeddings, head: None for what the preset says.
        layer: the other keywords of `LayerSettings.from_keywords`.

        Raises: MethodError, FormatError, CalibrationError, BudgetError or ArgumentError, in one
            sentence.
        """
        given = {"values": values, "planes": planes, "embeddings": embeddings, "head": head}
        chosen = resolve(preset, given, bits, layer)
        outside = {name: chosen.pop(name) for name in ("embeddings", "head")}
        settings = LayerSettings.from_keywords(**layer, **chosen)
        budget = None if bits is None else check_bits(bits, settings)
        by_pattern = ByPattern.of(settings_by_pattern, budget)
        plan = Plan(settings, Matching.of(matching), by_pattern=by_pattern)
        sampling = Sampling(samples, window, seed)
        optional = tuple(name for name in outside if given[name] is None)
        orders = _permutes(permute, settings)
        return cls(
            plan, budget, sampling, _patterns(skip), **outside, optional=optional, permute=orders
        )

    @property
    def preset(self) -> str | None:
        """The name of the preset that the settings amount to; None if they are no preset's.

        A preset says one thing of all layers.
        """
        if self.plan.by_pattern.entries:
            return None
        return preset_of(self._settings(), self.bits)

    def _settings(self) -> dict[str, Any]:
        outside = {"embeddings": self.embeddings, "head": self.head}
        return self.plan.usual.to_dict() | outside

    def to_dict(self) -> dict[str, Any]:
        """What records and progress files call the settings of the plan."""
        matching, options = self.plan.matching, self.plan.usual.options
        return self._settings() | {
            "preset": self.preset,
            "matching": None if matching is None else asdict(matching),
            "bits": self.bits,
            "settings_by_pattern": self.plan.by_pattern.to_list(),
            "permute": self.permute,
            "options": {name: repr(value) for name, value in sorted(options.items())},
        }


def _permutes(permute: Any, settings: LayerSettings) -> bool:
    """Whether orders are sought.

    Raises: ArgumentError for what is neither True nor False, and for a pattern without groups,
        which no order can help.
    """
    if not isinstance(permute, bool):
        raise ArgumentError(f"permute={reprlib.repr(permute)} must be True or False")
    if permute and not settings.parsed.structured:
        raise ArgumentError(
            f"permute=True chooses which weights share a group, and pattern={settings.pattern!r} "
            "has no groups; leave one out"
        )
    return permute


def _patterns(skip: Any) -> tuple[str, ...]:
    """The patterns of `skip`, which may be None, one of them, or several."""
    if skip is None:
        return ()
    if isinstance(skip, str):
        return (skip,)
    several = isinstance(skip, tuple | list | set | frozenset)
    if not several or not all(isinstance(pattern, str) for pattern in skip):
        raise ArgumentError(
            f"skip={reprlib.repr(skip)} must be a pattern of module names such as '*.down_proj', "
            "or a list of them"
        )
    return tuple(sorted(skip) if isinstance(skip, set | frozenset) else skip)
