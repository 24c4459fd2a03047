"""Plans of the CUDA kernels, and a way to run one that nobody chose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from slab_kernels.backends.cuda import launch, plan, prefill
from slab_kernels.backends.cuda.cost import Plan, Rebuild
from slab_kernels.backends.cuda.gpus import Gpu
from slab_kernels.backends.cuda.launch import CudaDevice
from slab_kernels.backends.cuda.layout import DENSE, CudaState
from slab_kernels.backends.cuda.prefill import Prefill
from slab_kernels.backends.cuda.tiles import (
    FEW,
    MANY,
    NARROW_TILES,
    REBUILD,
    WIDE_TILES,
    CudaSizes,
    Tile,
)

AnyPlan = Plan | Prefill


def every(sizes: CudaSizes, M: int, gpu: Gpu, splits: Iterable[int] = (1, 2)) -> list[Plan]:
    """The plans of the narrow and the wide loop for M tokens: for every tile, and every number of
    CTAs that share K, the fastest one by the model. Those that fit no device memory are left out.
    """
    tiles: list[tuple[Tile, int]] = [(tile, sizes.wide_tokens) for tile in WIDE_TILES]
    if M <= sizes.most_narrow_tokens:
        tiles += [(tile, M) for tile in NARROW_TILES]
    found = (
        plan.evaluate(sizes, M, gpu, tile, tokens, share)
        for share in splits
        for tile, tokens in tiles
        if share == 1 or sizes.k_blocks >= share * tile.warp_inputs
    )
    return [each for each in found if each is not None]


def many(sizes: CudaSizes, M: int, gpu: Gpu) -> list[AnyPlan]:
    """The plans for M tokens, M above 16: for every tile of the loops for many tokens and of the
    one that rebuilds the weight, with K whole and shared by two CTAs, the fastest one by the model;
    and every plan of Hopper's kernels.

    The loop that rebuilds runs on Hopper too, where nobody chooses it.
    """
    best: dict[tuple, Plan] = {}
    for loop in (MANY, REBUILD) if sizes.rank else (MANY,):
        for groups in (1, 2, 4, 8) if M <= FEW else (1,):
            for share in (1, 2):
                for each in plan.plans(sizes, M, gpu, groups, share, loop):
                    key = each.tile, each.tokens, share
                    if key not in best or each.microseconds < best[key].microseconds:
                        best[key] = each
    return [*best.values(), *prefill.plans(sizes, M, gpu)]


@contextmanager
def forced(chosen: AnyPlan | Rebuild) -> Iterator[None]:
    """Linears run by this plan meanwhile, whatever the model says; adapters keep theirs."""
    choose = launch.choose

    def instead(sizes: CudaSizes, M: int, gpu: Gpu) -> AnyPlan | Rebuild:
        return choose(sizes, M, gpu) if sizes.values == DENSE else chosen

    launch.choose = instead
    launch.launches.cache_clear()
    try:
        yield
    finally:
        launch.choose = choose
        launch.launches.cache_clear()


def way(chosen: AnyPlan) -> str:
    """The kernel and how K is shared, in words that are the same for all tokens that it serves."""
    if isinstance(chosen, Prefill):
        return f"{chosen.loop} tiles of {chosen.tokens} tokens, share {chosen.share}"
    tile = chosen.tile
    warps = f"{tile.warp_rows}x{tile.warp_inputs}"
    if tile.loop in (MANY, REBUILD):
        warps = f"{tile.warp_rows}x{tile.warp_tokens}x{tile.warp_inputs}"
        return f"{tile.loop} {warps} warps of {chosen.tokens} tokens, {chosen.splits} splits"
    return f"{tile.loop} {warps} warps, {chosen.splits} splits"


def in_words(chosen: AnyPlan) -> str:
    if isinstance(chosen, Prefill):
        return (
            f"{way(chosen)}, {chosen.weight_stages} and {chosen.token_stages} stages, "
            f"{chosen.resident} CTAs an SM"
        )
    tile = chosen.tile
    return (
        f"{tile.loop} {tile.warp_rows}x{tile.warp_inputs} warps, {chosen.tokens} tokens, "
        f"{chosen.splits} splits, {chosen.stages} stages, {chosen.resident} CTAs an SM"
    )


def recorded(device: CudaDevice, seen: list[str]) -> CudaDevice:
    """The same device, whose launches also put their kernel's name into `seen`."""

    def queue(name: str, *arguments: object) -> None:
        seen.append(name)
        device.queue(name, *arguments)

    return device._replace(queue=queue)


def in_turn(device: CudaDevice) -> CudaDevice:
    """The same device, on which no kernel starts before its predecessor ends."""

    def queue(*arguments: object) -> None:
        *rest, _ = arguments
        device.queue(*rest, False)

    return device._replace(queue=queue)


def linear_on(device: CudaDevice) -> Callable[[Tensor, CudaState, Tensor | None], Tensor]:
    """`launch.linear` on that device."""
    return lambda x, state, bias=None: launch.linear(x, state, bias, device)
