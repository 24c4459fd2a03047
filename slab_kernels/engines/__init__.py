"""Adapters to other people's engines, one file each. `import slab_kernels` hooks transformers here
and imports nothing for it.

vLLM finds `register_with_vllm` through an entry point.

transformers has no plugin entry point: a quantizer has to be registered in a running process, after
`transformers.quantizers.auto` exists. `watch` waits for that module with a finder on sys.meta_path.
The finder stays there, since a reload empties the registry.
"""

from __future__ import annotations

import importlib.util
import logging
import sys

from ..errors import UnsupportedError

WATCHED = "transformers.quantizers.auto"
METHOD = "slab_kernels"  # quant_method of our folders; packed_config would import torch for it


class _Loader:
    """Another loader, which may not let itself be changed, with the registration behind it."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:
        self._loader.exec_module(module)
        # Nothing of ours stays on the module.
        module.__spec__.loader = module.__loader__ = self._loader
        register_with_transformers()


class _Watcher:
    """A meta-path finder that finds nothing itself: the other finders do, and we register then."""

    asking = False  # whether it is asking all finders, of which it is one

    def find_spec(self, name, path=None, target=None):
        if name != WATCHED or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def watch() -> None:
    """Register with transformers now if it is there already, and whenever it is imported later."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    if WATCHED in sys.modules:
        register_with_transformers()


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
    except Exception as error:  # whatever moved inside transformers
        reason = (
            "slab_kernels could not register with transformers, so from_pretrained cannot open "
            "its folders: use slab_kernels.load(folder). "
            f"The reason: {type(error).__name__}: {error}"
        )
        logging.getLogger(__package__).warning(reason)
        _refuse(reason)


def _refuse(reason: str) -> None:
    """Say so wherever transformers would open a folder with random weights."""

    class Refused:
        @classmethod
        def from_dict(cls, *args, **kwargs):
            raise UnsupportedError(reason)

    registry = getattr(sys.modules.get(WATCHED), "AUTO_QUANTIZATION_CONFIG_MAPPING", None)
    if isinstance(registry, dict):
        registry[METHOD] = Refused


def register_with_vllm() -> None:
    """The entry point of `vllm.general_plugins`, called in every process; again does no harm."""
    from . import vllm  # noqa: F401  registers on import
