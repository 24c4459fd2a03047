"""Adapters to other people's engines. `import slab_kernels` hooks transformers and PEFT here, and
imports nothing for it.

transformers    the quantizer by which from_pretrained and save_pretrained treat packed folders
peft            LoRA around packed layers, trained, saved and merged by PEFT
vllm            the quantization plugin; vLLM finds `register_with_vllm` through an entry point
vllm_linear     linears of vLLM, and packed heads, from packed weights
vllm_vocabulary embeddings of int8 rows in vLLM, and the heads that share them
vllm_probe      stand-ins sent through the loader of a model of vLLM
sharding        which slice of each packed tensor a tensor-parallel rank keeps
engine_options  what an engine hands on with settings of its own
probe           what an engine's loader does to a weight, found out with stand-ins

Neither transformers nor PEFT has a plugin entry point: a quantizer has to be registered in a
running process, after `transformers.quantizers.auto` exists, and LoRA layers after `peft` does.
`watch` waits for these modules with a finder on sys.meta_path. The finder stays there, since a
reload empties the registries.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ..errors import UnsupportedError

WATCHED = "transformers.quantizers.auto"
WATCHED_OF_PEFT = "peft"
METHOD = "slab_kernels"  # quant_method of packed folders; models.packed_config would import torch


class _Loader:
    """Another loader, which may not let itself be changed, with the registration behind it."""

    def __init__(self, loader: Any, register: Callable[[], None]):
        self._loader, self._register = loader, register

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        # Nothing of this library stays on the module.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._register()


class _Watcher:
    """A finder that lets the others find a watched module, and registers once that is imported."""

    asking = False  # True while the other finders are asked; prevents recursion

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        register = registrations().get(name)
        if register is None or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            loader: Any = _Loader(spec.loader, register)
            spec.loader = loader
        return spec


def registrations() -> dict[str, Callable[[], None]]:
    """What is to be done once a module has been imported, by its name."""
    return {WATCHED: register_with_transformers, WATCHED_OF_PEFT: register_with_peft}


def watch() -> None:
    """Register with transformers and PEFT: now where they are there already, and whenever they are
    imported later."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    for name, register in registrations().items():
        if name in sys.modules:
            register()


def register_with_transformers() -> None:
    """Register the quantizer; a transformers that it does not fit lives on and refuses our folders.

    Nothing is raised: importing transformers must not fail because of this library.
    """
    name = f"{__name__}.transformers"
    try:
        module = sys.modules.get(name) or importlib.import_module(name)
        if hasattr(module, "register"):
            module.register()
        else:  # it is being imported now, maybe by another thread, and ends with registering
            _refuse("slab_kernels is still being imported; open its folders once that is done")
    except Exception as error:  # whatever has moved inside transformers
        reason = (
            "slab_kernels could not register with transformers, so from_pretrained cannot open "
            "its folders: use slab_kernels.load(folder). "
            f"The reason: {type(error).__name__}: {error}"
        )
        logging.getLogger(__package__).warning(reason)
        _refuse(reason)


def _refuse(reason: str) -> None:
    """Let transformers raise UnsupportedError where it would open a folder with random weights."""

    class Refused:
        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> None:
            raise UnsupportedError(reason)

    registry = getattr(sys.modules.get(WATCHED), "AUTO_QUANTIZATION_CONFIG_MAPPING", None)
    if isinstance(registry, dict):
        registry[METHOD] = Refused


def register_with_peft() -> None:
    """Let LoRA of PEFT go around packed layers; a PEFT that has changed refuses them as before.

    Nothing is raised: importing PEFT must not fail because of this library.
    """
    try:
        importlib.import_module(f"{__name__}.peft").register()
    except Exception as error:  # whatever has moved inside PEFT
        logging.getLogger(__package__).warning(
            "slab_kernels could not register with PEFT, whose LoRA cannot take packed layers now. "
            f"The reason: {type(error).__name__}: {error}"
        )


def register_with_vllm() -> None:
    """The entry point of `vllm.general_plugins`, called in every process; again does no harm."""
    from . import vllm  # noqa: F401  registers on import
