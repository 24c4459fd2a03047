"""The table of methods: those of this library, and those that other packages add."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .. import plugins
from ..errors import MethodError
from ..format import Decomposition
from ..settings import Rule, rules
from .config import COMMON, Config
from .eora import EoraConfig, eora
from .hassle_free import HassleFreeConfig, hassle_free
from .magnitude import magnitude
from .oats import OatsConfig, SslcConfig, oats, sslc
from .slab import SlabConfig, slab
from .slab_paper import SlabPaperConfig, slab_paper
from .slim import SlimConfig, slim
from .sparsegpt import SparseGPTConfig, sparsegpt
from .threebasil import ThreeBasilConfig, alps, threebasil
from .wanda import wanda


@dataclass(frozen=True)
class Method:
    """One row of METHODS. A package adds its own by the entry-point group `slab_kernels.methods`.

    name: what `method=` and `--method` take; of an entry point, the entry point's name too.
    function: (weight [N,K] fp32, InputStats or None, an instance of `config`) -> Decomposition of
        fp32 tensors on the weight's device. It changes neither of the first two.
    config: `Config`, or a frozen dataclass that extends it; each further field is made by
        `settings.setting` and becomes a keyword of `decompose` and an `--option`.
    statistics: "none", "diagonal" or "gram", what `function` reads of InputStats.
    description: one line, for `slab-kernels info --methods`.
    signs: whether it has the term (U V^T) * B, so that `rank` and `planes` mean something.
    adapter: its adapter's rank where none is given, as a share of min(N, K); None: it has no P Q^T.
    """

    name: str
    function: Callable[..., Decomposition]
    config: type[Config]
    statistics: str
    description: str
    signs: bool = False
    adapter: float | None = None

    def adapter_rank(self, shape: tuple[int, int], wanted: int | None) -> int:
        """The rank of P Q^T for a weight of `shape` (N, K): `wanted`, else the method's own."""
        if self.adapter is None or wanted is not None:
            return wanted or 0
        return max(1, round(self.adapter * min(shape))) if self.adapter else 0

    def options(self) -> dict[str, tuple[Any, Rule]]:
        """What only this method has: name -> default and rule."""
        return {
            entry.name: (entry.default, rule)
            for entry, rule in rules(self.config)
            if entry.name not in COMMON
        }


TENTH = 0.1  # of min(N, K): SLiM, section 4
SIXTY_FOURTH = 1 / 64  # 64 for a layer of 4096: 3BASiL, section 5
OURS = "S + (U V^T) * B + P Q^T solved together in the Gram metric (ours, the default)"
PAPER = "SLaB as published (arXiv 2604.04493)"
THREEBASIL = "3BASiL (arXiv 2603.01376)"
HASSLE_FREE = "HASSLE-free (arXiv 2502.00899)"
EORA = "EoRA on a pruner (arXiv 2410.21271)"
BUILT_IN = (
    Method("slab", slab, SlabConfig, "gram", OURS, signs=True, adapter=0.0),
    Method("slab-paper", slab_paper, SlabPaperConfig, "diagonal", PAPER, signs=True),
    Method("threebasil", threebasil, ThreeBasilConfig, "gram", THREEBASIL, adapter=SIXTY_FOURTH),
    Method("hassle-free", hassle_free, HassleFreeConfig, "gram", HASSLE_FREE, adapter=SIXTY_FOURTH),
    Method("sslc", sslc, SslcConfig, "gram", "SSLC (arXiv 2510.26446)", adapter=SIXTY_FOURTH),
    Method("oats", oats, OatsConfig, "gram", "OATS (arXiv 2409.13652)", adapter=SIXTY_FOURTH),
    Method("slim", slim, SlimConfig, "gram", "SLiM (arXiv 2410.09615)", adapter=TENTH),
    Method("eora", eora, EoraConfig, "gram", EORA, adapter=SIXTY_FOURTH),
    Method("alps", alps, ThreeBasilConfig, "gram", "ALPS (arXiv 2406.07831)"),
    Method("sparsegpt", sparsegpt, SparseGPTConfig, "gram", "SparseGPT (arXiv 2301.00774)"),
    Method("wanda", wanda, Config, "diagonal", "Wanda (arXiv 2306.11695)"),
    Method("magnitude", magnitude, Config, "none", "largest absolute values"),
)
METHODS: dict[str, Method] = {method.name: method for method in BUILT_IN}
_NAMES = frozenset(METHODS)


def _plugins() -> tuple[plugins.Plugin, ...]:
    return plugins.load(plugins.METHODS, Method, _NAMES)


def all_methods() -> dict[str, Method]:
    """METHODS and the usable methods of other packages, by name."""
    added = {plugin.name: plugin.value for plugin in _plugins() if plugin.problem is None}
    return METHODS | added


def origins() -> dict[str, str]:
    """Whose every method is: "slab_kernels", or the package that adds it with its version."""
    added = {plugin.name: plugin.origin for plugin in _plugins() if plugin.problem is None}
    return dict.fromkeys(METHODS, "slab_kernels") | added


def problems() -> list[str]:
    """A sentence for every method of another package that cannot be used."""
    return [plugin.problem for plugin in _plugins() if plugin.problem is not None]


def find_method(name: str) -> Method:
    """The method of that name; other packages are looked at only for a name not in METHODS.

    Raises: MethodError, which says so if a package offers the method and cannot be used.
    """
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    for plugin in _plugins():
        if plugin.name == name and plugin.problem is not None:
            raise MethodError(f"method={name!r} is not usable: {plugin.problem}")
        if plugin.name == name:
            return plugin.value
    unusable = "".join(f"; {problem}" for problem in problems())
    known = ", ".join(all_methods())
    raise MethodError(f"method={name!r} is unknown; choose one of {known}{unusable}")


def check_options(method: str, options: dict[str, Any], arguments: Iterable[str] = ()) -> Method:
    """The method of that name.

    arguments: what else could have been meant by a name, those of the function that was called.

    Raises: MethodError for a method that is not there, or an option that it does not have.
    """
    found = find_method(method)
    own = found.options()
    if unknown := [name for name in options if name not in own]:
        meant = difflib.get_close_matches(unknown[0], [*own, *arguments], n=1)
        raise MethodError(
            f"method {method!r} has no option {unknown[0]!r}; "
            + (f"did you mean {meant[0]!r}? " if meant else "")
            + f"it has {', '.join(own) if own else 'none'}"
        )
    return found
