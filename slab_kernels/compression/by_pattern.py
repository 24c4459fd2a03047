"""Settings of their own for the layers whose names match a pattern."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError, BudgetError
from ..methods.config import CommonSettings
from ..settings import rules

# Method and pattern are one for the whole model, which is stored in one way.
NAMES = ("values", "planes", "rank", "group_size", "adapter_rank", "adapter_values")
RULES = {entry.name: rule for entry, rule in rules(CommonSettings) if entry.name in NAMES}
SHOWN = 3  # names of layers in a message


@dataclass(frozen=True)
class ByPattern:
    """Which layers differ from the rest, and in what.

    entries: pairs of a regular expression, which is searched in a layer's full name, and settings
        of `LayerSettings`. Of two that match a layer, the later one wins, setting by setting.
    """

    entries: tuple[tuple[str, dict[str, Any]], ...] = ()

    @classmethod
    def of(cls, given: Any, bits: float | None = None) -> ByPattern:
        """What `compress` was given as `settings_by_pattern`, a dict or pairs.

        bits: the budget of a search, which chooses the settings of every layer itself.

        Raises: ArgumentError for a pattern that is no regular expression and for an unknown
            setting, BudgetError beside `bits`, and what a value's own rule raises.
        """
        if given is None:
            return cls()
        pairs = list(given.items()) if isinstance(given, Mapping) else given
        listed = isinstance(pairs, list | tuple)
        if not listed or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
            raise ArgumentError(
                f"settings_by_pattern={reprlib.repr(given)} must be a dict from a pattern of layer "
                "names to settings, such as {'mlp.down_proj': {'values': 'int8'}}"
            )
        entries = tuple((_pattern(key), _settings(key, value)) for key, value in pairs)
        if entries and bits is not None:
            raise BudgetError(
                f"bits={bits:g} chooses the settings of every layer, so settings_by_pattern "
                f"for {entries[0][0]!r} contradicts it; leave one out"
            )
        return cls(entries)

    def own(self, name: str) -> dict[str, Any]:
        """The settings in which the layer `name` differs; empty if no pattern matches."""
        found: dict[str, Any] = {}
        for pattern, settings in self.entries:
            if re.search(pattern, name):
                found |= settings
        return found

    def check_matches(self, names: Iterable[str]) -> None:
        """Raises: ArgumentError for a pattern that matches none of the layers `names`."""
        names = list(names)
        for pattern, _ in self.entries:
            if not any(re.search(pattern, name) for name in names):
                some = ", ".join(names[:SHOWN])
                raise ArgumentError(
                    f"settings_by_pattern: {pattern!r} matches none of the {len(names)} layers "
                    f"that are compressed; their names are {some} and so on"
                )

    def to_list(self) -> list[list[Any]]:
        """The pairs as JSON holds them."""
        return [[pattern, dict(settings)] for pattern, settings in self.entries]


def _pattern(given: Any) -> str:
    """Raises: ArgumentError for what is no regular expression."""
    if not (isinstance(given, str) and given):
        raise ArgumentError(
            f"settings_by_pattern: {reprlib.repr(given)} must be a regular expression, such as "
            "'mlp.down_proj'"
        )
    try:
        re.compile(given)
    except re.error as error:
        raise ArgumentError(
            f"settings_by_pattern: {given!r} is no regular expression: {error}; for layer names a "
            "part of them is one"
        ) from error
    return given


def _settings(pattern: str, given: Any) -> dict[str, Any]:
    """Settings of a layer, each by itself as plain values. Raises: as `ByPattern.of`."""
    if not (isinstance(given, Mapping) and given):
        raise ArgumentError(
            f"settings_by_pattern: {pattern!r} has {reprlib.repr(given)}, and must have settings, "
            "such as {'values': 'int8'}"
        )
    plain: dict[str, Any] = {}
    for name, value in given.items():
        if name not in RULES:
            raise ArgumentError(
                f"settings_by_pattern: {pattern!r} has the setting {reprlib.repr(name)}, which is "
                f"none of a layer's own: {', '.join(NAMES)}"
            )
        rule, of = RULES[name], f" for the layers {pattern!r}"
        plain[name] = rule.accept(name, value, rule.error or ArgumentError, of)
    return plain
