"""Settings as fields of frozen dataclasses, each with what it means and what it may be.

    rounds: int = setting(3, "rounds of refit and descent at most", 0, 10_000)

Whoever makes the dataclass, from Python, the command line or a config.json, meets the same check
(`enforce`) and the same sentence.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from .errors import ArgumentError

RULE = "rule"  # where a field's metadata keeps its Rule
KINDS = {int: "an integer", float: "a number", bool: "True or False", str: "a text"}


@dataclass(frozen=True)
class Rule:
    """What a setting may be.

    kind: int, float, bool or str.
    low, high: the range of a number, both ends allowed unless `above` leaves `low` out.
    choices: the texts allowed, if not all are.
    words: texts that are values beside the numbers.
    optional: whether None is a value.
    error: what `enforce` raises for this setting, if not the class that it was given.
    """

    meaning: str
    kind: type
    low: float | None = None
    high: float | None = None
    above: bool = False
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    optional: bool = False
    error: type[ValueError] | None = None

    def accept(
        self, name: str, value: Any, error: type[ValueError] = ArgumentError, of: str = ""
    ) -> Any:
        """`value` as the plain Python type it stands for, also where it is one of NumPy's.

        of: the owner, such as " of training".

        Raises: `error`, in a sentence that names the setting, its value, its range and its meaning.
        """
        if value is None and self.optional:
            return None
        if isinstance(value, str) and value in self.words:
            return str(value)
        if self.choices:
            if not isinstance(value, str) or value not in self.choices:
                known = ", ".join(self.choices)
                raise error(f"{name}={reprlib.repr(value)}{of} is unknown; choose one of {known}")
            return str(value)
        plain = self._plain(value)
        if plain is None or not self._inside(plain):
            wanted = f"must be {self.range()}: {self.meaning}"
            raise error(f"{name}={reprlib.repr(value)}{of} {wanted}")
        return plain

    def _plain(self, value: Any) -> Any:
        """`value` as int, float, bool or str; None where it is of another kind or not finite."""
        logical = type(value).__name__ in ("bool", "bool_")  # Python's and NumPy's
        if self.kind is bool:
            return bool(value) if logical else None
        if logical:
            return None
        if self.kind is str:
            return str(value) if isinstance(value, str) else None
        if not isinstance(value, Integral if self.kind is int else Real):
            return None
        try:
            return plain if math.isfinite(plain := self.kind(value)) else None
        except OverflowError:
            return None

    def _inside(self, value: Any) -> bool:
        if self.low is not None and (value <= self.low if self.above else value < self.low):
            return False
        return self.high is None or value <= self.high

    def range(self) -> str:
        """The values that are allowed, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = KINDS[self.kind]
        if self.low is not None and self.high is not None:
            first, second = ("above", "and at most") if self.above else ("from", "to")
            words += f" {first} {_figure(self.low)} {second} {_figure(self.high)}"
        elif self.low is not None:
            words += f" above {self.low:g}" if self.above else f" of at least {self.low:g}"
        rest = [repr(word) for word in self.words] + ["None"] * self.optional
        return " or ".join([words, *rest])


def _figure(number: float) -> str:
    """Ends of the machine's integers as powers of two, since nobody reads their digits."""
    if abs(number) <= 1 << 31:
        return f"{number:,}"
    bits = int(number).bit_length()
    return f"2**{bits} - 1" if number > 0 else f"-2**{bits - 1}"


def setting(
    default: Any, meaning: str, low: float | None = None, high: float | None = None, **more: Any
) -> Any:
    """A dataclass field with its Rule; the kind is the default's type unless `kind` says otherwise.

    more: see Rule.
    """
    kind = more.pop("kind", type(default))
    return field(default=default, metadata={RULE: Rule(meaning, kind, low, high, **more)})


def rules(settings: Any) -> list[tuple[Field, Rule]]:
    """Every field of a dataclass (or of one of its instances) that has a Rule, in order."""
    return [(entry, entry.metadata[RULE]) for entry in fields(settings) if RULE in entry.metadata]


def enforce(settings: Any, error: type[ValueError] = ArgumentError, of: str = "") -> None:
    """Called in `__post_init__`: brings every setting to its plain type.

    Raises: `error` for the first that breaks its rule.
    """
    for entry, rule in rules(settings):
        value = rule.accept(entry.name, getattr(settings, entry.name), rule.error or error, of)
        object.__setattr__(settings, entry.name, value)


# Used by more than one dataclass. The ends of a seed are those of torch's generators.
SEED: dict[str, Any] = {
    "meaning": "which windows of text are drawn",
    "low": -(1 << 63),
    "high": (1 << 63) - 1,
}
WINDOW: dict[str, Any] = {"meaning": "tokens in a window", "low": 2}
