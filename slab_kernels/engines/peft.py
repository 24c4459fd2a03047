"""LoRA of PEFT around packed layers: trained, saved and loaded by PEFT, and merged into P Q^T.

A LoRA of rank r adds s B A to a weight, with A [r,K], B [N,r] and the scaling s (arXiv 2106.09685),
which is what the adapter P Q^T of a packed weight is. Merging makes P = [P, s B] and Q = [Q, A^T],
so the rank grows by r; taking it out again restores the tensors of before, bit for bit.

PEFT asks a LoraConfig which layer goes around a class that it does not know. The config is told
when LoRA is put into a model with packed layers (`LoraModel.inject_adapter`), so it does not matter
where the config came from, or which library was imported first. There everything is checked, too,
before any layer is replaced, since PEFT replaces them one by one.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, PeftType
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn

from ..errors import ArgumentError, RangeError, SlabError, UnsupportedError
from ..format import PackedLayout, PackedWeight, with_adapter
from ..models.packed import note_layouts
from ..nn import FusedSlabLinear, Int8Embedding, Int8Head, SlabLinear
from ..nn.experts import Experts

LoraModel = lora_model.LoraModel
Packed = FusedSlabLinear | Int8Embedding | Int8Head | SlabLinear
MARK = "slab_kernels_registered"
STARTS = (
    True,
    False,
    "gaussian",
    "eva",
)  # of A and B, that do not ask for the weight (init_lora_weights)
REFUSED = {  # settings of a LoraConfig, and the reason
    "lora_bias": "P Q^T holds no bias",
    "use_qalora": "P Q^T has one row for each input",
    "fan_in_fan_out": "that is for transformers' Conv1D",
}
INSTEAD = {
    FusedSlabLinear: "name its parts, such as 'parts.0', instead",
    Int8Embedding: "its rows are frozen int8 codes; compress with embeddings='dense' to adapt it",
    Int8Head: "it shares int8 rows; compress with head=True, or embeddings='dense', to adapt it",
}


class SlabLoraLinear(Linear):
    """LoRA around a `SlabLinear`: y = x W^T + bias + s (x A^T) B^T, differentiable in x, A and B.

    PEFT's own layer for nn.Linear, of which only what touches the weight is another. The packed
    weight stays frozen; the gradient of x rebuilds it dense, [N,K] fp32, one layer at a time.
    """

    _before: PackedWeight | None = None  # what the layer held before adapters were merged into it

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}  # plain LoRA; `_refuse_layer` says so in words

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def folded(self, adapters: list[str]) -> PackedWeight:
        """The packed weight with these adapters in P Q^T. Raises: RangeError."""
        packed = self.get_base_layer().packed()
        for name in adapters:
            B, A = self.lora_B[name].weight, self.lora_A[name].weight
            packed = with_adapter(packed, self.scaling[name] * B.float(), A.T)
        return packed

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters, by default the active ones, into P Q^T.

        safe_merge: PEFT's word for a check of the numbers, which is always made.

        Raises: RangeError for numbers that are not finite or do not fit; nothing is changed then.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if names := [name for name in names if name in self.lora_A]:
            layer, folded = self.get_base_layer(), self.folded(names)
            self._before = self._before or layer.packed()
            layer.hold(folded)
            self.merged_adapters += names

    def unmerge(self) -> None:
        """Hold the tensors of before the first merge again."""
        if self._before is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        layer = self.get_base_layer()
        layer.hold(self._before.to(layer.values.device))
        self._before = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s B A, [N,K]."""
        return self.scaling[adapter] * (self.lora_B[adapter].weight @ self.lora_A[adapter].weight)


def register() -> None:
    """Teach PEFT's LoRA about packed layers. Calling it again does no harm."""
    if not hasattr(LoraModel, MARK):
        setattr(LoraModel, MARK, True)
        _around("inject_adapter", _injecting)
        _around("merge_adapter", _merging)
        _around("_unload_and_optionally_merge", _merging)


def _around(name: str, steps: Callable[[Any, dict[str, Any]], Iterator[None]]) -> None:
    """Let LoraModel's method run between the steps before and after `yield` of a generator, which
    gets the model and the arguments."""
    theirs = getattr(LoraModel, name)
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def method(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        asked = dict(given.arguments)
        run = steps(asked.pop("self"), asked)
        next(run)
        try:
            return theirs(*args, **kwargs)
        finally:
            next(run, None)

    setattr(LoraModel, name, method)


def _injecting(tuner: Any, asked: dict[str, Any]) -> Iterator[None]:
    """Refuse what packed layers cannot take while nothing is replaced yet.

    Raises: UnsupportedError, ArgumentError.
    """
    model, config = asked["model"], tuner.peft_config[asked["adapter_name"]]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Packed)}
    if layers:
        asked_for = config.target_modules
        try:
            _check(tuner, config, asked, layers)
        except SlabError:
            config.target_modules = asked_for
            if not _has(model, asked["adapter_name"]):  # else PEFT would take it for an adapter
                tuner.peft_config.pop(asked["adapter_name"])
            raise
        config._register_custom_module({SlabLinear: SlabLoraLinear})
    yield
    for layer in layers.values():
        if isinstance(layer, FusedSlabLinear):
            layer.forget()


def _has(model: nn.Module, adapter: str) -> bool:
    """Whether an adapter of this name is around any layer."""
    around = (m for m in model.modules() if isinstance(m, BaseTunerLayer))
    return any(adapter in getattr(m, "lora_A", ()) for m in around)


def _check(tuner: Any, config: Any, asked: dict[str, Any], layers: dict[str, Packed]) -> None:
    """Name the layers of "all-linear" in the config, and refuse what cannot be."""
    _include_all_linear(config, asked["model"], layers)
    targets = _targets(tuner, config, asked)
    for name, layer in layers.items():
        name = name.removesuffix(".base_layer")  # another adapter is around it and has its name
        _refuse_saving(config, name, layer)
        if name in targets:
            _refuse_layer(config, name, layer)
    _refuse_stacked(config, asked["model"])


def _include_all_linear(config: Any, model: nn.Module, layers: dict[str, Packed]) -> None:
    """Let target_modules="all-linear" mean packed layers too, but for the head, as PEFT has it."""
    if str(config.target_modules).lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    _maybe_include_all_linear_layers(config, model)  # puts the names of dense ones there
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    around = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    config.target_modules |= {
        name
        for name, layer in layers.items()
        if isinstance(layer, SlabLinear)
        and layer is not head
        and name.removesuffix(".base_layer") not in around
    }


def _targets(tuner: Any, config: Any, asked: dict[str, Any]) -> set[str]:
    """The names of the modules that PEFT is going to replace."""
    model, state = asked["model"], asked["state_dict"]
    if state is not None:
        return {key.rsplit(f".{tuner.prefix}", 1)[0] for key in state}
    tuner._prepare_adapter_config(config, tuner.get_model_config(model))
    names = (name for name, _ in model.named_modules())
    return {name for name in names if tuner._check_target_module_exists(config, name)}


def _refuse_saving(config: Any, name: str, layer: Packed) -> None:
    """What would train a layer itself and not an adapter. Raises: UnsupportedError."""
    if config.trainable_token_indices and isinstance(layer, Int8Embedding):
        raise UnsupportedError(
            f"trainable_token_indices would train rows of {name}, which are frozen int8 codes; "
            "compress with embeddings='dense' to train them"
        )
    steps = name.split(".")
    around = [".".join(steps[:end]) for end in range(1, len(steps) + 1)]
    for wanted in config.modules_to_save or ():
        if any(module.endswith(wanted) for module in around):  # as PEFT looks for it
            raise UnsupportedError(
                f"modules_to_save={wanted!r} would train {name}, a frozen {type(layer).__name__}; "
                "put LoRA around it (target_modules), or leave it dense when you compress"
            )


def _refuse_layer(config: Any, name: str, layer: Packed) -> None:
    """Raises: UnsupportedError, ArgumentError."""
    kind = type(layer).__name__
    if not isinstance(layer, SlabLinear):
        raise UnsupportedError(f"{name} is a {kind}, which takes no LoRA: {INSTEAD[type(layer)]}")
    if config.peft_type != PeftType.LORA:
        raise UnsupportedError(
            f"{name} is a {kind}, which takes LoRA and no {config.peft_type.value}: use LoraConfig"
        )
    start = config.init_lora_weights
    if (start.lower() if isinstance(start, str) else start) not in STARTS:
        raise UnsupportedError(
            f"init_lora_weights={config.init_lora_weights!r} reads or changes the dense weight, "
            f"which {name} has not; use True or 'gaussian'"
        )
    variants = [f.name for f in fields(config) if f.metadata.get("is_lora_variant")]
    for setting, reason in {**dict.fromkeys(variants, "P Q^T holds plain B A"), **REFUSED}.items():
        if getattr(config, setting, None):
            raise UnsupportedError(
                f"{setting}={getattr(config, setting)!r} does not go with {name}, a {kind}: "
                f"{reason}; leave it out"
            )
    _refuse_rank(config, name, layer)


def _refuse_rank(config: Any, name: str, layer: SlabLinear) -> None:
    """Raises: ArgumentError."""
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    most = min(layer.out_features, layer.in_features)
    if rank > most:
        raise ArgumentError(
            f"LoRA of rank {rank} is more than {name} can use: it is {layer.out_features}x"
            f"{layer.in_features} (out_features x in_features); set r, or rank_pattern for this "
            f"layer, to at most {most}"
        )


def _refuse_stacked(config: Any, model: nn.Module) -> None:
    """PEFT takes the names of some mixtures' experts for stacked weights, which packed ones have
    not, and would leave them out. Raises: UnsupportedError."""
    experts = next((name for name, m in model.named_modules() if isinstance(m, Experts)), None)
    if experts is None:
        return
    theirs = copy.deepcopy(config)
    convert_peft_config_for_transformers(theirs, model, None)
    if theirs.target_parameters and theirs.target_parameters != config.target_parameters:
        raise UnsupportedError(
            f"{experts} holds experts that are packed one by one, and PEFT would look for stacked "
            f"ones ({', '.join(sorted(theirs.target_parameters))}); name modules of the attention "
            "only, such as target_modules=['q_proj', 'v_proj']"
        )


def _merging(tuner: Any, asked: dict[str, Any]) -> Iterator[None]:
    """Refuse what cannot be merged while nothing is, and say what it did to the size.

    Raises: RangeError.
    """
    modules = dict(tuner.model.named_modules())
    layers = {name: m for name, m in modules.items() if isinstance(m, SlabLoraLinear)}
    if asked.get("merge", True):
        for name, layer in layers.items():
            names = asked["adapter_names"] or layer.active_adapters
            new = [n for n in names if n in layer.lora_A and n not in layer.merged_adapters]
            try:
                layer.folded(new)
            except RangeError as error:
                raise RangeError(f"LoRA cannot be merged into {name}: {error}") from error
    bases = [layer.get_base_layer() for layer in layers.values()]
    before = [base.layout for base in bases]
    yield
    note_layouts(tuner.model)  # of layers under their own names, once PEFT is off them
    for module in modules.values():
        if isinstance(module, FusedSlabLinear):
            module.forget()
    now = [base.layout for base in bases]
    if now != before:
        logging.getLogger(__package__).info(
            f"LoRA is merged into {len(layers)} packed layers, which have {_bits(now):.3f} bits "
            f"per weight now, {_bits(before):.3f} before"
        )


def _bits(layouts: list[PackedLayout]) -> float:
    """Stored bits per weight of all of them together."""
    sizes = [layout.out_features * layout.in_features for layout in layouts]
    stored = [layout.bits_per_weight() * n for layout, n in zip(layouts, sizes, strict=True)]
    return sum(stored) / sum(sizes)
