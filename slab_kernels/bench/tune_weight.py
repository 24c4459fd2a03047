"""What `slab-kernels tune` times: a random weight on the GPU, run by any configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..backends.triton import BACKEND, State, configs, launch, stream
from ..backends.triton.launch import TritonState
from ..backends.triton.rows import DECODE, TileConfig, TritonDevice
from ..errors import BenchError
from ..testing import random_packed
from .clocks import Call, copied, size_of
from .correctness import gate
from .tune_problems import Problem


class Weight:
    """A random weight on the GPU with copies that caches do not hold, run by any configuration."""

    def __init__(
        self,
        problem: Problem,
        device: TritonDevice,
        where: torch.device | str,
        copies: Callable[[int], int],
    ):
        self.device, self.dtype = device, problem.dtype
        self.packed = random_packed(problem.layout).to(where)
        self.state: State = BACKEND.prepare(self.packed, problem.dtype)
        self.streamed = not isinstance(self.state, TritonState)
        self.sizes = problem.sizes
        more = copies(size_of(self.state)) - 1
        self.copies = [self.state, *(copied(self.state) for _ in range(more))]
        self.inputs: dict[int, Tensor] = {}

    def run(self, config: TileConfig, x: Tensor, state: State) -> Tensor:
        """x [m, K] -> [m, N] as `config` says."""
        if not isinstance(state, TritonState):
            if config.rebuild:
                return stream.rebuilt(x, state, None)
            return stream.decoded(x, state, None, self.device.multiprocessors)
        if config.rebuild:
            return torch.nn.functional.linear(x, launch.dense(state, x.dtype))
        shares = configs.splits(self.sizes, x.shape[0], config, self.device)
        return launch.linear(x, state, None, config, shares, configs.z_splits(self.sizes))

    def x(self, m: int) -> Tensor:
        """The same m x K activations every time."""
        if m not in self.inputs:
            x = torch.randn(m, self.sizes.K, generator=torch.Generator().manual_seed(m))
            self.inputs[m] = x.to(self.packed.values.device, self.dtype)
        return self.inputs[m]

    def check(self, config: TileConfig, m: int) -> None:
        """Raises: BenchError if the result is wrong, or that of a decoded token depends on the
        tokens beside it."""
        configured = _Configured(self, config)
        self.poison(config, m)
        gate(configured, self.x(m), self.state, self.packed)
        if 1 < m <= DECODE:
            together = configured.linear(self.x(m), self.state)[0]
            alone = configured.linear(self.x(m)[:1], self.state)[0]
            if not torch.equal(together, alone):
                raise BenchError("a token's result depends on the tokens beside it")

    def poison(self, config: TileConfig, m: int) -> None:
        """Leaves NaN where `run` is about to allocate.

        torch gives out the same blocks again, which may hold the last right result.
        """
        N, K, where = self.sizes.N, self.sizes.K, self.packed.values.device
        single = config.rebuild or self.streamed
        shares = 1 if single else configs.splits(self.sizes, m, config, self.device)
        blocks = [torch.full((m, N), math.nan, dtype=self.dtype, device=where)]
        if shares > 1:
            blocks.append(torch.full((shares, m, N), math.nan, device=where))
        if config.rebuild:
            rows = min(N, stream.REBUILT_ROWS) if self.streamed else N
            blocks.append(torch.full((rows, K), math.nan, dtype=self.dtype, device=where))
        del blocks  # They go all at once, or they would be one block.

    def calls(self, config: TileConfig, m: int) -> list[Call]:
        """One call on each copy."""
        return [partial(self.run, config, self.x(m), state) for state in self.copies]


@dataclass(frozen=True)
class _Configured:
    """A weight run by one configuration, as the gate wants a backend."""

    weight: Weight
    config: TileConfig
    name: str = "triton"

    def linear(self, x: Tensor, state: State) -> Tensor:
        return self.weight.run(self.config, x, state)
