"""The two matrices with a row for every token: the input embedding and the output head.

Both are found by what transformers' own functions return. What stands in their place later has no
`weight`, so a model whose code reads one is refused before any work is done.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ArchitectureError
from ..nn.replacement import obstacle
from .ties import tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_embedding(model: PreTrainedModel) -> str:
    """The name of the input embedding, which int8 rows can replace.

    Raises: ArchitectureError if there is none, it does more than nn.Embedding, or it is shared with
        something else than the output head.
    """
    kind, module = type(model).__name__, _of(model, "get_input_embeddings")
    if not isinstance(module, nn.Embedding):
        found = "none" if module is None else f"a {type(module).__name__}"
        raise ArchitectureError(
            f"the input embedding of {kind} is {found} and no nn.Embedding; "
            "leave it with embeddings='dense'"
        )
    name = _only_name(model, module, "embeddings='dense'")
    own = type(module).forward is not nn.Embedding.forward or "forward" in vars(module)
    if own and multiplier_of(module) is None:
        raise ArchitectureError(
            f"{name} is a {type(module).__name__}, which does more than look up a row and multiply "
            "it with a number; leave it with embeddings='dense'"
        )
    more = type(module) is not nn.Embedding or _more(module)
    if module.max_norm is not None or (more and not own):
        raise ArchitectureError(
            f"{name} is a {type(module).__name__} with more than a weight (max_norm or a "
            "parametrization); leave it with embeddings='dense'"
        )
    head = _of(model, "get_output_embeddings")
    allowed = {f"{n}.weight" for n, m in model.named_modules() if m is head}
    _refuse_shared(model, f"{name}.weight", allowed, "embeddings='dense'")
    return name


def multiplier_of(module: nn.Embedding) -> float | None:
    """With what an embedding of a class of its own multiplies its rows; None if it does not.

    Such classes of transformers keep the number as `embed_scale`. Whether that is all they do is
    tried on a few rows.
    """
    number = getattr(module, "embed_scale", None)
    if type(module) is nn.Embedding or number is None or getattr(number, "is_meta", False):
        return None
    try:
        multiplier = float(number)
        probe = copy.deepcopy(module).float()
        probe.padding_idx = None
        rows = torch.arange(1.0, 4 * module.embedding_dim + 1).sin().view(4, -1)
        probe.weight = nn.Parameter(rows, requires_grad=False)
        found = probe(torch.tensor([[2, 0, 3, 1]]))
    except Exception:  # a class that is built otherwise
        return None
    right = rows[[2, 0, 3, 1]][None] * multiplier
    same = found.shape == right.shape and torch.allclose(found, right, rtol=1e-6, atol=0)
    return multiplier if same and multiplier not in (0.0, 1.0) else None


def find_head(model: PreTrainedModel) -> str:
    """The name of the output head, an nn.Linear.

    Raises: ArchitectureError if there is none, it is no plain nn.Linear, or its weight is shared
        with something else than the input embedding.
    """
    kind, module = type(model).__name__, _of(model, "get_output_embeddings")
    if module is None:
        raise ArchitectureError(f"{kind} has no output head to pack; leave out head (--no-head)")
    name = _only_name(model, module, "head=False (--no-head)")
    if type(module) is not nn.Linear:
        raise ArchitectureError(
            f"the output head {name} of {kind} is a {type(module).__name__}, and only an nn.Linear "
            "can be packed; leave it dense with head=False (--no-head)"
        )
    if reason := obstacle(module):
        raise ArchitectureError(f"the output head {name} cannot be packed: {reason}")
    embedding = _of(model, "get_input_embeddings")
    allowed = {f"{n}.weight" for n, m in model.named_modules() if m is embedding}
    _refuse_shared(model, f"{name}.weight", allowed, "head=False (--no-head)")
    return name


def head_tied_to(model: PreTrainedModel, embedding: str) -> str | None:
    """The name of the output head whose weight is that of the module `embedding`, if it is."""
    weight = f"{embedding}.weight"
    for name, other in tied_names(model).items():
        if weight in (name, other):
            return (other if weight == name else name).removesuffix(".weight")
    return None


def _of(model: PreTrainedModel, function: str) -> nn.Module | None:
    """What a function of transformers finds; None where a model has not even the function."""
    try:
        return getattr(model, function)()
    except (AttributeError, NotImplementedError):
        return None


def _only_name(model: nn.Module, module: nn.Module, way_out: str) -> str:
    """The name of a module that has one. Raises: ArchitectureError for one under several names."""
    names = [n for n, m in model.named_modules(remove_duplicate=False) if m is module]
    if len(names) != 1:
        raise ArchitectureError(
            f"{' and '.join(names[:3]) or type(module).__name__} are one module of "
            f"{type(model).__name__}, and cannot be replaced; leave it with {way_out}"
        )
    return names[0]


def _more(module: nn.Module) -> bool:
    return bool(module._parameters.keys() - {"weight"} or module._buffers or module._modules)


def _refuse_shared(model: PreTrainedModel, weight: str, allowed: set[str], way_out: str) -> None:
    """Refuse a weight that is another one too, and a model in which other weights are shared.

    Replacing it makes the model say that nothing is tied, so nothing else may be.

    Raises: ArchitectureError.
    """
    for name, other in tied_names(model).items():
        if not {name, other} <= {weight, *allowed}:
            raise ArchitectureError(
                f"{name} and {other} are one tensor, and beside shared weights other than those "
                f"of embedding and head {weight.removesuffix('.weight')} cannot be replaced; "
                f"leave it with {way_out}"
            )


class WeightRead(ArchitectureError, AttributeError):
    """The model's code asked for a weight that it will not find later, that of `module`."""

    module: str


def _refusing(kind: type[nn.Module], module_name: str, way_out: str) -> type[nn.Module]:
    """A class like `kind` whose `weight` only its own forward finds."""

    def get(module: nn.Module, name: str) -> Any:
        if name == "weight" and not inside:
            error = WeightRead(
                f"the model's own code reads the weight of {module_name}, which it then has not; "
                f"leave it with {way_out}"
            )
            error.module = module_name
            raise error
        return kind.__getattr__(module, name)

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        inside.append(True)
        try:
            return kind.forward(module, *args, **kwargs)
        finally:
            inside.pop()

    inside: list[bool] = []
    return type(kind.__name__, (kind,), {"__getattr__": get, "forward": forward})


@contextmanager
def hidden_weights(model: nn.Module, ways_out: dict[str, str]) -> Iterator[None]:
    """Inside, the modules that `ways_out` names compute and have no `weight`.

    ways_out: name -> how the user leaves that module as it is, for the message.

    Code that reads one gets an ArchitectureError, which is an AttributeError too.
    """
    modules = {name: model.get_submodule(name) for name in ways_out}
    before = {name: type(module) for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.__class__ = _refusing(before[name], name, ways_out[name])
        yield
    finally:
        for name, module in modules.items():
            module.__class__ = before[name]
