"""Stand-ins sent through the loader of a model of vLLM, before its weights come.

Every model of vLLM has a loader of its own. One that reorders, splits or leaves out a packed layer
is refused (`probe.Probe`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.models.utils import is_pp_missing_parameter
from vllm.model_executor.utils import set_weight_attrs

from ..errors import ArchitectureError
from ..models.packed_config import QUANT_METHOD
from .probe import DENSE, Probe, TableLayout
from .vllm_linear import SlabHeadMethod, SlabLinearMethod
from .vllm_vocabulary import SharedHeadMethod, TableMethod, swap_vocabulary


def probe_before_loading() -> None:
    """Let the model that vLLM is building probe its loader before its weights come first.

    Its embedding and head get their methods at the same time (`swap_vocabulary`).
    """
    building = get_current_vllm_config_or_none()
    if building is None or building.model_config is None:
        return
    from vllm.model_executor.model_loader import get_model_cls  # imports every loader

    model_class = get_model_cls(building.model_config)
    load = model_class.load_weights
    if hasattr(load, "slab_probes"):
        return

    @functools.wraps(load)
    def load_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "slab_probed"):
            self.slab_probed = True
            probe_model(self, functools.partial(load, self))
        return load(self, *args, **kwargs)

    load_weights.slab_probes = True  # type: ignore[attr-defined]  # a mark on the function
    model_class.load_weights = load_weights


def probe_model(
    model: nn.Module, load: Callable[[Iterable[tuple[str, torch.Tensor]]], Any]
) -> None:
    """Send stand-ins for every packed layer through `load`, the model's.

    Raises: ArchitectureError if a weight would not arrive as it is stored.
    """
    configs = [getattr(module, "quant_config", None) for module in model.modules()]
    config: Any = next((c for c in configs if c and c.get_name() == QUANT_METHOD), None)
    if config is None:
        return
    if any(getattr(module, "slab_dummy", False) for module in model.modules()):
        raise ArchitectureError(
            "a packed model that started with load_format='dummy' takes no weights later; start it "
            "with load_format='auto'"
        )
    swap_vocabulary(model, config)
    methods = [(module, getattr(module, "quant_method", None)) for module in model.modules()]
    ours = (SlabLinearMethod, TableMethod, SharedHeadMethod)
    layers: list[Any] = [module for module, method in methods if isinstance(method, ours)]
    names = {config.stored[name]: name for name in config.layouts}
    layouts: dict[str, Any] = {stored: config.layouts[name] for stored, name in names.items()}
    heads = set()
    for layer in layers:
        method = layer.quant_method
        if isinstance(method, TableMethod):
            layouts[method.stored] = TableLayout(layer.org_vocab_size, layer.embedding_dim)
        elif isinstance(method, SlabHeadMethod):
            heads.update(method.stored)
    probe = Probe(layouts, f"vLLM's {type(model).__name__}", heads)
    for layer in layers:
        weight = layer.weight
        del layer.weight
        stand_in = nn.Parameter(weight.to(torch.int32), requires_grad=False)  # the type that comes
        layer.register_parameter(DENSE, stand_in)
        set_weight_attrs(layer.weight, vars(weight))
        if weight.weight_loader is not weight.slab_loader:
            layer.weight.weight_loader = _landing(weight.weight_loader, weight.slab_loader)
        layer.quant_method.probe = probe
    try:
        load(probe.stand_ins())
    except ArchitectureError:
        raise
    except Exception as error:  # whatever a loader does with an unknown name or shape
        raise probe.refuse(probe.layer) from error
    for layer in layers:
        del layer.weight
        layer.quant_method.probe = None
        layer.slab_probed = True
    for stored in probe.missing():
        if stored not in names or not is_pp_missing_parameter(f"{names[stored]}.", model):
            raise probe.refuse(stored)


def _landing(foreign: Callable, then: Callable) -> Callable:
    """A loader that runs a model's own loader of a weight, and gives what that wrote to `then`."""

    def load(param: nn.Parameter, tensor: torch.Tensor, *part: Any) -> None:
        landed = nn.Parameter(torch.full(param.shape, -1, dtype=torch.int32), requires_grad=False)
        foreign(landed, tensor, *part)
        then(param, landed.data, *part)

    return load
