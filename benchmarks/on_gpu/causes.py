"""What a launch for one token is made of, each piece timed apart beside the cost model's figure.

    python -m on_gpu.causes FILE

start    a weight so small that only the launch is left
loop     weights of one row tile a multiprocessor and growing K, from cache and from memory: the
         line through the times tells what a K block costs and what every launch pays
warps    the same linear by CTAs of 4, 8 and 16 warps
overlap  linears that follow each other, each reading the result of the one before it, launched as
         dependent kernels and one after another
prefetch the same with another kernel between them, with and without a prefetch of the next weight

All but the last two are launched one after another, as the model assumes.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from on_gpu import machine, plans, verdicts
from on_gpu.parts import begins_anew, deadline, exit_code
from on_gpu.rows import RESULTS, Row, Rows
from slab_kernels.backends import cuda
from slab_kernels.backends.cuda.cost import LAUNCH_US, OVERLAP, Plan
from slab_kernels.backends.cuda.launch import CudaDevice
from slab_kernels.backends.cuda.layout import CudaState
from slab_kernels.backends.cuda.plan import choose
from slab_kernels.backends.cuda.prefetch import link
from slab_kernels.backends.cuda.tiles import CudaSizes, sizes_of
from slab_kernels.bench.clocks import FEWEST_COPIES, Clock, clock_of, copied, size_of
from slab_kernels.format import PackedLayout
from slab_kernels.testing import random_packed

GROUP = {"int4": 128, "int8": 128, "fp16": None}  # value type -> inputs that a scale covers
VALUES = tuple(GROUP)
TINY = (32, 128)  # one block of the stream
# A line is fitted through the times of weights of so many K blocks, which fit an H100's L2 cache.
K_BLOCKS = (8, 16, 32, 48)
WARP_SHAPES = ((4096, 4096), (6144, 4096))
WARPS = (4, 8, 16)
CHAIN_SHAPE = (4096, 4096)
MOST_PREFETCHED = 8 << 20  # bytes of the next weight
# Bounds of the cost model that do not hold for a weight that is in the cache.
FROM_MEMORY = ("memory", "bytes in flight")


class Stand(NamedTuple):
    """Where launches are timed."""

    device: CudaDevice
    clock: Clock
    where: str  # of tensors: "cuda:0"

    def weight(self, N: int, K: int, values: str, rank: int = 1) -> CudaState:
        layout = PackedLayout(N, K, values, GROUP[values], rank)
        packed = random_packed(layout, device=self.where)
        return cuda.layout.prepare((packed,), torch.float16)

    def tokens(self, M: int, K: int) -> Tensor:
        return torch.randn(M, K, dtype=torch.float16, device=self.where)

    def in_turn(self) -> Stand:
        """The same, where no kernel starts before its predecessor ends: what the model assumes."""
        return self._replace(device=plans.in_turn(self.device))

    def call(self, state: CudaState, x: Tensor) -> Callable[[], Tensor]:
        return partial(plans.linear_on(self.device), x, state)

    def copies(self, state: CudaState) -> list[CudaState]:
        """The weight and copies of it that together exceed the cache."""
        more = self.clock.copies(size_of(state)) - 1
        return [state, *(copied(state) for _ in range(more))]

    def time(self, calls: Sequence[Callable[[], object]]) -> Row:
        took = self.clock.time(calls)
        columns = {"timing": took.timing, "calls": len(took.samples)}
        return {"measured_us": took.median * 1e6, "iqr_us": took.iqr * 1e6, **columns}


def stand_here(seconds: float) -> Stand:
    """This machine's. seconds: that a row is timed at least."""
    where, device = machine.here()
    return Stand(device, clock_of(where, seconds), where)


def from_cache(plan: Plan) -> float:
    """The predicted microseconds of a plan whose weight is in cache."""
    met = [us for name, us in plan.bounds.items() if name not in FROM_MEMORY]
    return sum(us**OVERLAP for us in met) ** (1 / OVERLAP) + plan.fixed_us()


def columns(
    point: str, sizes: CudaSizes, values: str, plan: Plan, cache: str, how: str = "in turn"
) -> Row:
    """What names a row, and its prediction. how: the launches follow each other."""
    return {
        "case": f"{point} {sizes.N}x{sizes.K} {values} {cache} {plans.in_words(plan)}, {how}",
        "how": how,
        "point": point,
        "n": sizes.N,
        "k": sizes.K,
        "values": values,
        "m": 1,
        "cache": cache,
        "plan": plans.in_words(plan),
        "predicted_us": from_cache(plan) if cache == "warm" else plan.microseconds,
    }


def start(stand: Stand, values: str) -> Iterator[Row]:
    state, x = stand.weight(*TINY, values), stand.tokens(1, TINY[1])
    sizes = sizes_of(state)
    plan = chosen(sizes, stand)
    took = stand.time([stand.in_turn().call(state, x)] * FEWEST_COPIES)
    yield columns("start", sizes, values, plan, "warm") | took


def chosen(sizes: CudaSizes, stand: Stand) -> Plan:
    plan = choose(sizes, 1, stand.device.gpu)
    assert isinstance(plan, Plan)  # One token is never multiplied by a rebuilt weight.
    return plan


def loop(stand: Stand, values: str) -> Iterator[Row]:
    """One row tile of one row pair for each multiprocessor, eight K groups, no split."""
    gpu = stand.device.gpu
    for k_blocks in K_BLOCKS:
        state = stand.weight(32 * gpu.multiprocessors, 128 * k_blocks, values)
        sizes, x = sizes_of(state), stand.tokens(1, 128 * k_blocks)
        alike = [
            plan
            for plan in plans.every(sizes, 1, gpu, splits=(1,))
            if plan.tile.loop == "narrow" and (plan.tile.warp_rows, plan.tile.warp_inputs) == (1, 8)
        ]
        for plan in alike[:1]:
            cold = [stand.in_turn().call(each, x) for each in stand.copies(state)]
            for cache, calls in (("warm", cold[:1] * FEWEST_COPIES), ("cold", cold)):
                with plans.forced(plan):
                    took = stand.time(calls)
                row = columns("loop", sizes, values, plan, cache)
                yield row | {"k_blocks": k_blocks} | took


def warps(stand: Stand, values: str) -> Iterator[Row]:
    """For each number of warps the plan that the model likes best."""
    for N, K in WARP_SHAPES:
        state, x = stand.weight(N, K, values), stand.tokens(1, K)
        sizes, copies = sizes_of(state), stand.copies(state)
        every = plans.every(sizes, 1, stand.device.gpu, splits=(1,))
        for count in WARPS:
            some = [plan for plan in every if plan.tile.warps == count]
            if not some:
                continue
            plan = min(some, key=lambda plan: plan.microseconds)
            with plans.forced(plan):
                took = stand.time([stand.in_turn().call(each, x) for each in copies])
            yield columns("warps", sizes, values, plan, "cold") | {"warps": count} | took


def overlap(stand: Stand, values: str) -> Iterator[Row]:
    """A chain over copies of a square weight: each linear reads what the one before it wrote.

    The cost model knows no overlap. Its prediction less the time that it takes for the start of a
    launch is what is expected where launches overlap.
    """
    state = stand.weight(*CHAIN_SHAPE, values)
    first, sizes, copies = stand.tokens(1, CHAIN_SHAPE[1]), sizes_of(state), stand.copies(state)
    for cache, links in (("cold", copies), ("warm", copies[:1] * FEWEST_COPIES)):
        for how, each in (("overlapping", stand), ("in turn", stand.in_turn())):
            took = stand.time(chain(each, links, first))
            row = columns("overlap", sizes, values, chosen(sizes, stand), cache, how)
            if how == "overlapping":
                row["predicted_us"] -= LAUNCH_US
            yield row | took


def prefetch(stand: Stand, values: str) -> Iterator[Row]:
    """The same chain with a small kernel of torch's between linears, with and without a prefetch of
    the next weight into L2. A row's time is that of both kernels."""
    state = stand.weight(*CHAIN_SHAPE, values)
    first, sizes, states = stand.tokens(1, CHAIN_SHAPE[1]), sizes_of(state), stand.copies(state)
    for how, most_bytes in (("with a prefetch", MOST_PREFETCHED), ("without one", 0)):
        for one, following in zip(states, [*states[1:], states[0]], strict=True):
            link(one, following, most_bytes)
        took = stand.time(chain(stand, states, first, torch.nn.functional.silu))
        row = columns("prefetch", sizes, values, chosen(sizes, stand), "cold", how)
        yield row | {"predicted_us": None} | took


def chain(
    stand: Stand,
    states: Sequence[CudaState],
    first: Tensor,
    between: Callable[[Tensor], Tensor] = lambda y: y,
) -> list[Callable[[], None]]:
    """Calls of which each multiplies the result of the one before it; the first begins anew.

    between: what is done with a result before the next call has it.
    """
    linear, held = plans.linear_on(stand.device), [first]

    def call(state: CudaState, begins: bool) -> None:
        held[0] = between(linear(first if begins else held[0], state))

    return [partial(call, state, at == 0) for at, state in enumerate(states)]


POINTS = (overlap, warps, loop, start, prefetch)


def measure(stand: Stand, rows: Rows, end: float) -> bool:
    """All points of a value type before the next; those that the file has are left out.

    Returns whether all were measured until `end`, a time.monotonic().
    """
    with torch.inference_mode():
        for values, point in itertools.product(VALUES, POINTS):
            name, done = f"{point.__name__} {values}", rows.more.get("measured", [])
            if name in done:
                continue
            if time.monotonic() > end:
                return False
            print(name)
            rows.add(*point(stand, values))
            rows.save(measured=[*done, name])
    return True


def main(file: str) -> int:
    end, rows, whole = deadline(), Rows(Path(file), machine.head(), (RESULTS,)), False
    if begins_anew():
        rows.forget()
    try:
        whole = measure(stand_here(0.01), rows, end)
    finally:
        verdict = verdicts.causes(rows.rows)
        verdict.say()
    return exit_code(whole, verdict.good)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
