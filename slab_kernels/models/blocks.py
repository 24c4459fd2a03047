"""Decoder blocks and the linears in them, found by structure, whatever the architecture.

Weights are filled in block by block, and into what lies outside the blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import ArchitectureError, ArgumentError
from ..text.windows import Windows
from .experts import STACKS, is_stacked, routers, stacked_weights
from .skeleton import place
from .ties import all_names, tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .source import Source

# Tokens that a block sees at once: enough to fill a device, small beside the weights.
TOKENS_PER_BATCH = 4096


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks.

    They are the outermost nn.ModuleList with weights inside every element, of `num_hidden_layers`
    elements where the config says so, and with the most parameters if several remain.

    Raises: ArchitectureError saying what was looked for.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(
            f"{name} is an encoder-decoder model; only decoder-only language models are supported"
        )
    text = getattr(config, "get_text_config", None)
    depth = getattr(config if text is None else text(), "num_hidden_layers", None)
    found = list(_outer_lists(model, ""))
    fitting = [(path, blocks) for path, blocks in found if depth is None or len(blocks) == depth]
    if not fitting:
        wanted = "" if depth is None else f" and num_hidden_layers={depth} elements"
        seen = ", ".join(f"{path} ({len(blocks)})" for path, blocks in found) or "none"
        raise ArchitectureError(
            f"no decoder blocks found in {name}: looked for an nn.ModuleList with weights in every "
            f"element{wanted}; found {seen}"
        )
    return max(fitting, key=lambda item: sum(t.numel() for t in _tensors(item[1])))


def _outer_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """Name and list of every nn.ModuleList with weights in all elements, outermost ones only."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList) and len(child) and all(map(_has_weight, child)):
            yield path, child
        else:
            yield from _outer_lists(child, path + ".")


def _has_weight(block: nn.Module) -> bool:
    return any(t.dim() >= 2 for t in _tensors(block))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()  # where a compressed block keeps its weights


def packable_experts(
    path: str, blocks: nn.ModuleList, group: int, skip: tuple[str, ...] = ()
) -> list[str]:
    """The names of stacked experts in `blocks` whose matrices can be packed and are not skipped.

    path, group, skip: as for `block_linears`.

    Raises: ArchitectureError for a skip pattern that names only a part of a block's experts, and
        for a width that `group` does not divide.
    """
    found: list[str] = []
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            full = f"{path}.{index}.{name}"
            if not is_stacked(module) or _is_skipped(full, skip):
                continue
            stacks = stacked_weights(module)
            if all(_is_skipped(f"{full}.{stack}", skip) for stack in stacks):
                continue
            for pattern in skip:
                if any(_is_skipped(part, (pattern,)) for part in _parts_of(full, module)):
                    raise ArchitectureError(
                        f"skip={pattern!r} names a part of the experts {full}, which are packed "
                        f"all or none; leave all of them dense with skip='*.{name}'"
                    )
            for stack, value in stacks.items():
                if value.shape[2] % group:
                    raise ArchitectureError(
                        f"{full}.{stack} has in_features={value.shape[2]}, which groups of "
                        f"{group} do not divide; leave it dense with skip='*.{name}'"
                    )
            found.append(full)
    return found


def _parts_of(full: str, module: nn.Module) -> Iterator[str]:
    """The names of the parameters of stacked experts, and of the linears that they become."""
    for parameter, _ in module.named_parameters(recurse=False):
        yield f"{full}.{parameter}"
    for stack, value in stacked_weights(module).items():
        for number in range(len(value)):
            for linear in STACKS.get(stack, (stack,)):
                yield f"{full}.{number}.{linear}"


def block_linears(
    path: str,
    blocks: nn.ModuleList,
    group: int,
    skip: tuple[str, ...] = (),
    tied: Mapping[str, str] = MappingProxyType({}),
) -> list[dict[str, nn.Linear]]:
    """The linears to compress, a dict for each block: full name -> nn.Linear.

    Args:
        path: name of `blocks` in the model.
        group: what in_features must be a multiple of.
        skip: fnmatch patterns of full names of modules or parameters.
        tied: parameter that is another one under a second name -> that other name.

    Routers of experts stay dense.

    Raises: ArchitectureError for weights that are not in plain nn.Linear modules (GPT-2's Conv1D,
        experts that are still stacked), for a linear that is another one too, for in_features that
        `group` does not divide, for a skip pattern that matches nothing, and if nothing is left.
    """
    result: list[dict[str, nn.Linear]] = []
    used: set[str] = set()
    outside: dict[str, str] = {}  # skip pattern -> the first weight outside nn.Linear it leaves
    for index, block in enumerate(blocks):
        linears: dict[str, nn.Linear] = {}
        dense = tuple(f"{path}.{index}.{name}" for name in routers(block))
        for name, module in block.named_modules(remove_duplicate=False):
            full = f"{path}.{index}.{name}" if name else f"{path}.{index}"
            own = [f"{full}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
            used |= {p for p in skip if any(fnmatchcase(n, p) for n in (full, *own))}
            if type(module).__name__ == "SlabLinear":
                raise ArchitectureError(f"{full} is compressed already; start from the dense model")
            if _is_skipped(full, (*skip, *dense)):
                continue
            if type(module) is nn.Linear:
                _check_divides(full, name, module, group)
                linears[full] = module
            elif not type(module).__module__.startswith("torch.nn."):
                for pattern, weight in _weights_of_its_own(module, name, full, skip):
                    outside.setdefault(pattern, weight)
        result.append(linears)
    unused = [pattern for pattern in skip if pattern not in used]
    if unused:
        raise ArgumentError(
            f"skip={unused[0]!r} matches no module in {path}; names look like {path}.0.<module>"
        )
    if outside:
        _refuse_outside(outside, any(result))
    if not any(result):
        raise ArchitectureError(f"no nn.Linear is left to compress in {path}")
    _refuse_shared(result, tied)
    return result


def _check_divides(full: str, name: str, linear: nn.Linear, group: int) -> None:
    """Refuse in_features that groups of `group` do not divide. Raises: ArchitectureError."""
    if linear.in_features % group:
        raise ArchitectureError(
            f"{full} has in_features={linear.in_features}, which groups of {group} do not divide; "
            f"leave it dense with skip='*.{name}'"
        )


def _weights_of_its_own(
    module: nn.Module, name: str, full: str, skip: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """The matrices of a module that is no nn.Linear: a skip pattern for each, and what it is.

    name, full: of the module in its block and in the model. Vectors are no matter.
    """
    holds_linears = any(type(inner) is nn.Linear for inner in module.modules())
    for parameter, value in module.named_parameters(recurse=False):
        large = value.dim() >= 2 and min(value.shape[-2:]) > 1
        if large and not _is_skipped(f"{full}.{parameter}", skip):
            # The module itself is named where that leaves out no linear.
            parts = [*name.split("."), *([parameter] if holds_linears or not name else [])]
            starred = ["*" if part.isdigit() else part for part in parts if part]
            what = f"{full} ({type(module).__name__}) keeps its weight {parameter!r}"
            yield ".".join(["*", *starred]), f"{what} {list(value.shape)}"


def _refuse_outside(outside: dict[str, str], more: bool) -> None:
    """Raises: ArchitectureError with what `skip` has to name, if `more` linears are left then."""
    if more:
        advice = ", ".join(f"skip='{pattern}'" for pattern in outside)
        leaves = f"{advice} {'leaves it' if len(outside) == 1 else 'together leave them'} dense"
    else:
        leaves = "these blocks hold no nn.Linear beside it, so there is nothing to compress"
    others = f" (and {len(outside) - 1} more alike)" if len(outside) > 1 else ""
    raise ArchitectureError(
        f"{next(iter(outside.values()))} outside nn.Linear{others}; only nn.Linear, "
        f"and experts of the usual form, are supported, and {leaves}"
    )


def _refuse_shared(linears: list[dict[str, nn.Linear]], tied: Mapping[str, str]) -> None:
    """Refuse a linear or weight that two names stand for: one calibration cannot serve both.

    Raises: ArchitectureError.
    """
    pairs = {**tied, **{other: name for name, other in tied.items()}}
    names: dict[int, str] = {}  # id of a weight -> the first name that it was met under
    shared: dict[str, str] = {}
    for name, linear in ((name, linear) for block in linears for name, linear in block.items()):
        other = names.setdefault(id(linear.weight), name)
        if other == name:
            other = pairs.get(f"{name}.weight", name).removesuffix(".weight")
        if other != name:
            shared |= {name: other, other: name}
    if not shared:
        return
    name, other = next(iter(shared.items()))
    more = f" ({len(shared)} linears are shared in all)" if len(shared) > 2 else ""
    dense = ""
    if any(name not in shared for block in linears for name in block):
        dense = f", or leave what is shared dense with skip, as in skip='{other}', skip='{name}'"
    raise ArchitectureError(
        f"{other} and {name} share one weight{more}, and each would be compressed for inputs of "
        f"its own; give each a copy of it before compression{dense}"
    )


def _is_skipped(full: str, skip: tuple[str, ...]) -> bool:
    """Whether a pattern names the module or parameter `full`, or a module that it lies in."""
    parts = full.split(".")
    return any(
        fnmatchcase(".".join(parts[:end]), pattern)
        for end in range(1, len(parts) + 1)
        for pattern in skip
    )


def batch_size(window: int) -> int:
    """Windows of so many tokens that run together."""
    return max(1, TOKENS_PER_BATCH // window)


def batches(windows: Windows) -> list[Tensor]:
    """Ids [windows, length] that run together, see `Windows.batches`."""
    return windows.batches(TOKENS_PER_BATCH)


def filled_copy(
    block: nn.Module, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype | None
) -> nn.Module:
    """A copy of `block` (which may be on meta) that holds `tensors` on `device`.

    The copy is all that is ever materialised of a block: dropping it releases the memory.

    tensors: by their names in the block. dtype: of floating-point tensors; None: their own.
    """
    filled = copy.deepcopy(block)
    filled.__dict__.pop("forward", None)  # the copy of a block under `catch_stream` computes

    def moved(t: Tensor) -> Tensor:
        # A copy even where nothing changes: matching trains it, and a model in memory must stay.
        # Transposed stacks give views whose rows are not contiguous.
        kind = dtype if dtype and t.is_floating_point() else t.dtype
        rows = torch.contiguous_format
        return t.to(device=device, dtype=kind, copy=True, memory_format=rows)

    state = {name: moved(t) for name, t in tensors.items()}
    filled.load_state_dict(state, strict=False, assign=True)
    _move_buffers(filled.modules(), device)
    return filled.eval().requires_grad_(False)


def load_block(
    source: Source,
    path: str,
    blocks: nn.ModuleList,
    index: int,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """Block `index` of `blocks`, which `path` names, with the weights of `source`."""
    prefix, tied = f"{path}.{index}.", tied_names(source.model)
    names = [name for name in (*source.names, *tied) if name.startswith(prefix)]
    found = source.get_all(tied.get(name, name) for name in names)
    tensors = {name.removeprefix(prefix): found[tied.get(name, name)] for name in names}
    del found
    return filled_copy(blocks[index], tensors, device, dtype)


def _move_buffers(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Put the computed buffers of these modules on `device`."""
    for owner in modules:
        for name, buffer in owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                owner._buffers[name] = buffer.to(device)


def _head(model: PreTrainedModel) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


@contextmanager
def outside_filled(
    source: Source, path: str, device: torch.device, dtype: torch.dtype, behind: bool = False
) -> Iterator[PreTrainedModel]:
    """The skeleton with real weights everywhere outside the blocks; back on meta afterwards.

    Of the two largest matrices there only one is needed at a time. The output head stays on meta,
    since no block needs it, unless it is tied to the embedding. With `behind` the embedding stays
    on meta instead, unless it is tied: then the model is ready for what comes behind the blocks.

    path: name of the blocks. dtype: of floating-point tensors.
    """
    model, tied = source.model, tied_names(source.model)
    unused = model.get_input_embeddings() if behind else _head(model)
    empty = tuple(f"{name}." for name, module in model.named_modules() if module is unused)
    names = [
        name
        for name in source.names
        if not name.startswith(f"{path}.")
        and (name in tied.values() or not name.startswith(empty or "."))
    ]
    for name in names:
        t = source.get(name)
        t = t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype)
        for alias in all_names(name, tied):
            place(model, alias, t)
    outside = (m for n, m in model.named_modules() if not f"{n}.".startswith(f"{path}."))
    _move_buffers(outside, device)
    try:
        yield model
    finally:
        for name in names:
            for alias in all_names(name, tied):
                owner, _, leaf = alias.rpartition(".")
                place(model, alias, getattr(model.get_submodule(owner), leaf).to("meta"))
