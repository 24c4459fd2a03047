"""`replace_linear`: nn.Linear modules become SlabLinear, and nothing that they did is lost."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from ..errors import ArgumentError, ArgumentTypeError, ShapeError, UnknownModuleError
from ..format import PackedWeight
from .linear import SlabLinear

# Hooks of a module's calls. The dicts themselves move, so that removing a hook by its handle works.
HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


def replace_linear(model: nn.Module, packed: dict[str, PackedWeight]) -> nn.Module:
    """Swap the named nn.Linear modules of `model` for SlabLinear, in place.

    A module is replaced under every name that it has. Biases, hooks and the training flag are kept.
    Everything is checked before anything is replaced.

    Raises: UnknownModuleError for a name that is no nn.Linear of the model, ArgumentTypeError for
        one that does more than nn.Linear (`obstacle`) or that its parent never calls, ShapeError
        for a weight of another shape, ArgumentError for two weights of one module.
    """
    names: dict[nn.Module, list[str]] = defaultdict(list)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        names[module].append(name)
    weights: dict[nn.Linear, PackedWeight] = {}
    for name, weight in packed.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            kind = "absent" if linear is None else type(linear).__name__
            where = f"{name!r} is {kind} in {type(model).__name__}"
            raise UnknownModuleError(f"{where}; only nn.Linear modules can be replaced")
        if reason := obstacle(linear):
            raise ArgumentTypeError(f"{name!r} cannot be replaced: {reason}")
        parents = [modules.get(other.rpartition(".")[0]) for other in names[linear]]
        if any(isinstance(parent, nn.MultiheadAttention) for parent in parents):
            reason = "nn.MultiheadAttention reads its weight and never calls it"
            raise ArgumentTypeError(f"{name!r} cannot be replaced: {reason}")
        if (linear.out_features, linear.in_features) != (weight.out_features, weight.in_features):
            raise ShapeError(
                f"{name!r} is {linear.out_features}x{linear.in_features}, the packed weight "
                f"{weight.out_features}x{weight.in_features} (out_features x in_features)"
            )
        if weights.setdefault(linear, weight) is not weight:
            both = " and ".join(map(repr, names[linear]))
            raise ArgumentError(f"{both} are one module, but two packed weights are given for it")
    for linear, weight in weights.items():
        device = linear.weight.device
        moved = weight if device.type == "meta" else weight.to(device)
        layer = SlabLinear.from_packed(moved, linear.bias)
        layer.__dict__.update({hooks: linear.__dict__[hooks] for hooks in HOOKS})
        layer.train(linear.training)
        for name in names[linear]:
            model.set_submodule(name, layer)
    return model


def obstacle(linear: nn.Linear) -> str | None:
    """What this module does and a SlabLinear in its place would not, and the way out; or None."""
    kind = type(linear)
    if kind.forward is not nn.Linear.forward:
        return (
            f"it is a {kind.__name__}, whose forward is not nn.Linear's; merge what it adds into "
            "the weight of an nn.Linear first (LoRA with peft: model = model.merge_and_unload())"
        )
    if "forward" in vars(linear):
        return (
            "its forward was replaced on the instance; undo that first "
            "(accelerate: remove_hook_from_submodules(model))"
        )
    more = [*(linear._parameters.keys() - {"weight", "bias"}), *linear._buffers, *linear._modules]
    if more:
        return (
            f"it holds {', '.join(map(repr, sorted(more)))} beside weight and bias (a "
            "parametrization, weight_norm, pruning or an adapter); fold that into the weight first "
            "(torch.nn.utils.parametrize.remove_parametrizations(module, 'weight'))"
        )
    return None
