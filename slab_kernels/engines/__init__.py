"""Adapters to other people's engines, one file each; `import slab_kernels` hooks transformers here without importing anything.

vLLM finds `register_with_vllm` through an entry point.

transformers has no plugin entry point: a quantizer has to be registered in a running process, after `transformers.quantizers.auto`
exists. `watch` waits for that module with a finder on sys.meta_path, which takes itself off once the module is there.
"""

from __future__ import annotations

import sys

WATCHED = "transformers.quantizers.auto"


class _Watcher:
    """A meta-path finder that finds nothing itself: it lets the module be imported as ever and registers behind it."""

    asking = False  # the other finders, which means itself too

    def find_spec(self, name, path=None, target=None):
        if name != WATCHED or self.asking:
            return None
        from importlib.util import find_spec

        self.asking = True
        try:
            spec = find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                if self in sys.meta_path:  # not before: an import that fails is tried again
                    sys.meta_path.remove(self)
                register_with_transformers()

            spec.loader.exec_module = exec_module
        return spec


def watch() -> None:
    """Register with transformers now if it is there already, else as soon as it is imported."""
    if WATCHED in sys.modules:
        register_with_transformers()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def register_with_transformers() -> None:
    """Register the quantizer; a transformers that it does not fit gets a warning and stays usable."""
    try:
        from .transformers import register

        register()
    except Exception as error:  # whatever moved inside transformers, importing it must not fail because of this library
        import warnings

        warnings.warn(
            f"slab_kernels could not register with transformers, so from_pretrained would open its folders with random weights: "
            f"use slab_kernels.load(folder). The reason: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


def register_with_vllm() -> None:
    """The entry point of `vllm.general_plugins`, called in every process of vLLM; again does no harm."""
    from . import vllm  # noqa: F401  registers on import
