"""Decoder blocks and the linears in them, found by structure, whatever the architecture."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..errors import ArchitectureError

TOKENS_PER_BATCH = (
    4096  # tokens a block sees at once: enough to fill a device, small beside the weights
)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the outermost nn.ModuleList with weights inside every element, of
    `num_hidden_layers` elements where the config says so, and with the most parameters if several remain.

    Raises: ArchitectureError saying what was looked for.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(
            f"{name} is an encoder-decoder model; only decoder-only language models are supported"
        )
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(text_config, "num_hidden_layers", None)
    found = list(_outer_lists(model, ""))
    fitting = [(path, blocks) for path, blocks in found if depth is None or len(blocks) == depth]
    if not fitting:
        wanted = "" if depth is None else f" and num_hidden_layers={depth} elements"
        seen = ", ".join(f"{path} ({len(blocks)})" for path, blocks in found) or "none"
        raise ArchitectureError(
            f"no decoder blocks found in {name}: looked for an nn.ModuleList with weights in every element{wanted}; found {seen}"
        )
    return max(fitting, key=lambda item: sum(t.numel() for t in _tensors(item[1])))


def _outer_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if (
            isinstance(child, nn.ModuleList)
            and len(child)
            and all(any(t.dim() >= 2 for t in _tensors(b)) for b in child)
        ):
            yield path, child
        else:
            yield from _outer_lists(child, path + ".")


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()  # where a compressed block keeps its weights


def block_linears(
    path: str,
    blocks: nn.ModuleList,
    group: int,
    skip: tuple[str, ...] = (),
    tied: Mapping[str, str] = MappingProxyType({}),
) -> list[dict[str, nn.Linear]]:
    """Per block: full name -> nn.Linear to compress.

    skip: fnmatch patterns of full names of modules or parameters.

    tied: parameter that is another one under a second name -> that other name.

    Raises: ArchitectureError for weights that are not in plain nn.Linear modules (GPT-2's Conv1D, stacked experts), for
    a linear that is another one too, for in_features that groups of `group` do not divide, for a skip pattern that
    matches nothing, and if nothing is left.
    """
    result, used = [], set()
    outside: dict[
        str, str
    ] = {}  # skip pattern -> the first weight outside nn.Linear that it leaves dense
    for index, block in enumerate(blocks):
        linears = {}
        for name, module in block.named_modules(remove_duplicate=False):
            full = f"{path}.{index}.{name}" if name else f"{path}.{index}"
            own = [f"{full}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
            used |= {
                pattern for pattern in skip if any(fnmatchcase(n, pattern) for n in (full, *own))
            }
            kind = type(module).__name__
            if kind == "SlabLinear":
                raise ArchitectureError(f"{full} is compressed already; start from the dense model")
            if _is_skipped(full, skip):
                continue
            if type(module) is nn.Linear:
                if module.in_features % group:
                    raise ArchitectureError(
                        f"{full} has in_features={module.in_features}, which groups of {group} do not divide; "
                        f"leave it dense with skip='*.{name}'"
                    )
                linears[full] = module
            elif not type(module).__module__.startswith("torch.nn."):
                holds = any(type(inner) is nn.Linear for inner in module.modules())
                for parameter, value in module.named_parameters(recurse=False):
                    large = value.dim() >= 2 and min(value.shape[-2:]) > 1
                    if large and not _is_skipped(f"{full}.{parameter}", skip):
                        parts = [*name.split("."), *([parameter] if holds or not name else [])]
                        pattern = ".".join(
                            ["*", *("*" if part.isdigit() else part for part in parts if part)]
                        )
                        outside.setdefault(
                            pattern,
                            f"{full} ({kind}) keeps its weight {parameter!r} {list(value.shape)}",
                        )
        result.append(linears)
    unused = [pattern for pattern in skip if pattern not in used]
    if unused:
        raise ArchitectureError(
            f"skip={unused[0]!r} matches no module in {path}; names look like {path}.0.<module>"
        )
    if outside:
        _refuse_outside(outside, any(result))
    if not any(result):
        raise ArchitectureError(f"no nn.Linear is left to compress in {path}")
    _refuse_shared(result, tied)
    return result


def _refuse_outside(outside: dict[str, str], more: bool) -> None:
    """Raises: ArchitectureError with what `skip` has to name, if `more` linears are left then."""
    advice = ", ".join(f"skip='{pattern}'" for pattern in outside)
    leaves = f"{advice} {'leaves it' if len(outside) == 1 else 'together leave them'} dense"
    others = f" (and {len(outside) - 1} more alike)" if len(outside) > 1 else ""
    raise ArchitectureError(
        f"{next(iter(outside.values()))} outside nn.Linear{others}; only nn.Linear is supported (no Conv1D, no stacked "
        f"experts), and {leaves if more else 'these blocks hold no nn.Linear beside it, so there is nothing to compress'}"
    )


def _refuse_shared(linears: list[dict[str, nn.Linear]], tied: Mapping[str, str]) -> None:
    """Refuse a linear or weight that two names stand for: one calibration cannot serve both.

    Raises: ArchitectureError.
    """
    pairs = {**tied, **{other: name for name, other in tied.items()}}
    names: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, linear in ((name, linear) for block in linears for name, linear in block.items()):
        first = names.setdefault(id(linear.weight), name)
        other = (
            pairs.get(f"{name}.weight", first).removesuffix(".weight") if first == name else first
        )
        if other != name:
            shared |= {name: other, other: name}
    if shared:
        name, other = next(iter(shared.items()))
        everything = all(name in shared for block in linears for name in block)
        dense = (
            ""
            if everything
            else ", or leave what is shared dense with skip, as in "
            + f"skip='{other}', skip='{name}'"
        )
        more = f" ({len(shared)} linears are shared in all)" if len(shared) > 2 else ""
        raise ArchitectureError(
            f"{other} and {name} share one weight{more}, and each would be compressed for inputs of its own; give each "
            f"a copy of it before compression{dense}"
        )


def _is_skipped(full: str, skip: tuple[str, ...]) -> bool:
    """A skipped module covers what is below it."""
    parts = full.split(".")
    return any(
        fnmatchcase(".".join(parts[:end]), pattern)
        for end in range(1, len(parts) + 1)
        for pattern in skip
    )


def batch_size(window: int) -> int:
    return max(1, TOKENS_PER_BATCH // window)


def filled_copy(
    block: nn.Module, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype | None
) -> nn.Module:
    """A copy of `block` (which may be on meta) holding `tensors` on `device`, floating parameters cast to `dtype`.

    The copy is all that is ever materialised of a block: dropping it releases the memory.
    """
    filled = copy.deepcopy(block)
    filled.__dict__.pop("forward", None)  # the copy of a block under `catch_stream` computes

    def place(t: Tensor) -> Tensor:
        kind = dtype if dtype and t.is_floating_point() else t.dtype
        return t.to(
            device=device, dtype=kind, copy=True
        )  # matching trains it, and a model in memory must not change

    filled.load_state_dict(
        {name: place(t) for name, t in tensors.items()}, strict=False, assign=True
    )
    for owner in filled.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                owner._buffers[name] = buffer.to(device)
    return filled.eval().requires_grad_(False)
