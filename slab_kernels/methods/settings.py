"""The settings of a layer, checked once, from which everything that treats the layer works."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import MethodError, ShapeError
from ..format import (
    AUTO,
    GROUP_SIZES,
    INTEGER_RANGES,
    MAX_PLANES,
    PackedLayout,
    fitting_group_size,
)
from ..settings import rules
from .config import COMMON, CommonSettings, Config
from .table import METHODS, Method, check_options, find_method

PACKABLE = ("2:4",)  # patterns that the packed format stores
GROUP_SIZE = {entry.name: rule for entry, rule in rules(CommonSettings)}["group_size"]


@dataclass(frozen=True)
class LayerSettings(CommonSettings):
    """How one linear layer is decomposed and stored.

    On construction every setting is checked, alone and beside the others, and takes its plain
    Python type.

    method: a name of `methods.all_methods()`.
    options: settings that only this method has, by name.

    Raises on construction: MethodError, or a FormatError for the settings that all methods share.
    """

    method: str = "slab"
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_keywords(cls, **keywords: Any) -> LayerSettings:
        """The settings that the keywords of `decompose` stand for.

        A keyword that is no field is an option of the method.
        """
        given = {name: keywords.pop(name) for name in ("method", *COMMON) if name in keywords}
        return cls(**given, options=keywords)

    def __post_init__(self):
        chosen = check_options(self.method, self.options)
        given = 0 if self.adapter_rank is None else self.adapter_rank
        size = GROUP_SIZE.accept("group_size", self.group_size, ShapeError)
        object.__setattr__(self, "group_size", size)
        fixed = None if isinstance(size, str) else size
        config = chosen.config(**self._common(given, fixed), **self.options)
        _check_together(chosen, config, self.adapter_rank)
        if isinstance(size, str):
            self._fitting_group_size(GROUP_SIZES[-1])
        plain: dict[str, Any] = {name: getattr(config, name) for name in COMMON}
        del plain["group_size"]
        if self.adapter_rank is None:
            del plain["adapter_rank"]
        plain["options"] = {name: getattr(config, name) for name in self.options}
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def _common(self, adapter_rank: int, group_size: int | None) -> dict[str, Any]:
        """The settings that all methods share, with the adapter's rank and the group size."""
        common = {name: getattr(self, name) for name in COMMON}
        return common | {"adapter_rank": adapter_rank, "group_size": group_size}

    def for_shape(self, shape: tuple[int, int]) -> LayerSettings:
        """The settings with the group size that a weight of `shape` (N, K) gets for "auto"."""
        if self.group_size != AUTO:
            return self
        return replace(self, group_size=self._fitting_group_size(shape[1]))

    def _fitting_group_size(self, in_features: int) -> int | None:
        """What "auto" is for K inputs; None for values without scales.

        Raises: ShapeError where no size suits the pattern.
        """
        if self.values not in INTEGER_RANGES:
            return None
        group = self.parsed.group if self.parsed.structured else 1
        if (size := fitting_group_size(in_features, group)) is None:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise ShapeError(
                f"group_size={AUTO!r}: none of {sizes} is a multiple of {group} for pattern "
                f"{self.pattern!r}; give group_size=None (one scale per row)"
            )
        return size

    @property
    def stored_group_size(self) -> int | None:
        """The group size where the kept values are integers; other types have no scales.

        Settings with "auto" have none before `for_shape`.
        """
        if self.values not in INTEGER_RANGES:
            return None
        assert not isinstance(self.group_size, str), "for_shape gives the number"
        return self.group_size

    @property
    def chosen(self) -> Method:
        return find_method(self.method)

    @property
    def needs_gram(self) -> bool:
        return self.chosen.statistics == "gram"

    @property
    def drift(self) -> bool:
        """Whether the method weighs how far its inputs are from the dense model's."""
        return bool(self.options.get("drift", getattr(self.chosen.config, "drift", 0)))

    @property
    def packed(self) -> bool:
        """Whether the result is stored in the packed format; else it is written dense."""
        return self.pattern in PACKABLE

    def config(self, shape: tuple[int, int]) -> Config:
        """What the method's function is called with for a weight of `shape` (N, K).

        The adapter's rank is a number there, and the sign term's is 0 for a method without one.

        Raises: ShapeError for a pattern that does not divide K, or a rank above min(N, K).
        """
        N, K = shape
        settings, pattern = self.for_shape(shape), self.parsed
        if pattern.structured and K % pattern.group:
            raise ShapeError(
                f"in_features={K} must be a multiple of {pattern.group} for pattern "
                f"{self.pattern!r}; leave this layer dense or choose an unstructured pattern such "
                "as '50%'"
            )
        chosen = self.chosen
        rank = chosen.adapter_rank(shape, self.adapter_rank)
        common = self._common(rank, settings.stored_group_size)
        common["rank"] = self.rank if chosen.signs else 0
        for name in ("rank", "adapter_rank"):
            if common[name] > min(N, K):
                raise ShapeError(
                    f"{name}={common[name]} must lie in 0 .. {min(N, K)} for a weight of {N} x {K}"
                )
        return chosen.config(**common, **self.options)

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        """The layout of the packed weight that a weight of `shape` (N, K) becomes.

        Raises: a FormatError.
        """
        config = self.config(shape)
        return PackedLayout(
            *shape,
            self.values,
            config.group_size,
            config.rank,
            config.adapter_rank,
            planes=self.planes,
            adapter_values=self.stored_adapter,
        )

    def to_dict(self) -> dict[str, Any]:
        """What records call the settings, without `options`; fp16 and bf16 have no group size."""
        plain = {name: getattr(self, name) for name in ("method", *COMMON)}
        if self.values not in INTEGER_RANGES:
            plain["group_size"] = None
        return plain


def _check_together(method: Method, config: Config, adapter_rank: int | None) -> None:
    """Raises: MethodError or ShapeError for settings that contradict each other or the method."""
    if method.signs and method.adapter is None and not config.rank:
        raise ShapeError(
            f"rank=0: method {method.name!r} is nothing without its sign term; give at least 1"
        )
    if adapter_rank and method.adapter is None:
        able = ", ".join(m.name for m in METHODS.values() if m.adapter is not None)
        raise MethodError(
            f"method {method.name!r} has no adapter P Q^T, so adapter_rank={adapter_rank} has no "
            f"meaning; {able} have one"
        )
    most = MAX_PLANES if method.signs and method.adapter is not None and config.rank else 1
    if config.planes > most:
        raise MethodError(
            f"planes={config.planes}: only 'slab' with a rank of at least 1 has several sign "
            f"planes, 1 to {MAX_PLANES}"
        )
    if config.values not in INTEGER_RANGES or config.group_size is None:
        return
    if config.group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ShapeError(
            f"group_size={config.group_size} must be one of {sizes}, {AUTO!r} or None (one scale "
            "per row)"
        )
    if config.parsed.structured and config.group_size % config.parsed.group:
        raise ShapeError(
            f"group_size={config.group_size} must be a multiple of {config.parsed.group} for "
            f"pattern {config.pattern!r}"
        )
