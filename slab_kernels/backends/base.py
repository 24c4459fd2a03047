"""What a backend is: reasons why it cannot run a problem, a one-time `prepare`, and `linear`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..format import PackedLayout, PackedWeight


@dataclass(frozen=True)
class LinearProblem:
    """y[M,N] = x[M,K] W^T: all that decides which backend can run it.

    values, group_size, rank, adapter_rank, planes: as in PackedLayout.
    dtype: of the activations. device: "cpu", "cuda", or another type of torch's.
    """

    M: int
    N: int
    K: int
    values: str = "fp16"
    group_size: int | None = None
    rank: int = 1
    adapter_rank: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    planes: int = 1
    activations: str | None = None  # the accuracy mode (activations.py); None: the environment's

    def describe(self) -> str:
        """The problem in words, for messages."""
        terms = f"rank {self.rank}, adapter rank {self.adapter_rank}"
        if self.planes > 1:
            terms += f", {self.planes} sign planes"
        activations = f"{str(self.dtype).removeprefix('torch.')} activations on {self.device}"
        return f"{self.N}x{self.K} with {self.values} values, {terms}, {activations}"

    @classmethod
    def of(cls, layout: PackedLayout, M: int, dtype: torch.dtype, device: str) -> LinearProblem:
        """The problem of M tokens and a weight of `layout`."""
        return cls(
            M,
            layout.out_features,
            layout.in_features,
            layout.values,
            layout.group_size,
            layout.rank,
            layout.adapter_rank,
            dtype,
            device,
            layout.planes,
        )


MAX_PARTS = 4  # weights of one launch: q, k, v and one more


def differences(parts: Sequence[PackedWeight]) -> str | None:
    """Why these weights cannot share one launch, in a sentence, or None."""
    if not 1 <= len(parts) <= MAX_PARTS:
        return f"one launch takes 1 to {MAX_PARTS} weights, not {len(parts)}"
    for part in parts[1:]:
        for name in ("in_features", "values", "group_size", "rank", "adapter_rank", "planes"):
            mine, first = getattr(part.layout, name), getattr(parts[0].layout, name)
            if mine != first:
                return (
                    f"weights of one launch must agree in {name}, but these have {first} and {mine}"
                )
    return None


def capability_here(device: str) -> tuple[int, int] | None:
    """The CUDA compute capability of torch's current GPU.

    None for another device, and where torch has no CUDA or finds no GPU.
    """
    if device != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability()


@contextlib.contextmanager
def preparing(device: torch.device) -> Iterator[None]:
    """Around `prepare`: the caller's inference mode, gradients and autocast do not apply inside.

    A first call inside inference_mode must not leave inference tensors behind, since autograd could
    not save them, and autocast would change the types of what is prepared.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def wait_until_written(tensors: Iterable[Tensor]) -> None:
    """Waits, for those of the tensors on GPUs, until all that was queued on the current streams to
    write them has been done."""
    for device in {t.device for t in tensors if t.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


class Backend:
    """A way to run the linear.

    `prepare` may permute the packed tensors once; what it returns is never saved.
    priority: of a backend from another package. Above 0 it is asked before the built-in ones, the
        largest first; otherwise after them and before the reference.
    one_dtype: whether what `prepare` returns serves only the activations' dtype it was made for.
    """

    name: str
    priority: float = 0
    one_dtype = False

    def refusals(
        self, problem: LinearProblem, capability: tuple[int, int] | None = None
    ) -> list[str]:
        """Every reason that no installation and no driver would change; none if some machine runs
        it.

        capability: the CUDA compute capability of the GPU, where it is known. The support table
            (support.py) asks this too, so the answer depends on nothing that is only so here.
        """
        raise NotImplementedError

    def missing(self, device: str) -> str | None:
        """What this machine lacks to run anything on such a device and what to do about it, or
        None."""
        return None

    def not_supported_reasons(self, problem: LinearProblem) -> list[str]:
        """Every reason why this problem cannot run here; empty means it can."""
        missing = self.missing(problem.device)
        return [
            *self.refusals(problem, capability_here(problem.device)),
            *([missing] if missing else []),
        ]

    def prepare(self, packed: PackedWeight, dtype: torch.dtype | None = None) -> Any:
        """The tensors and sizes that `linear` wants, for activations of `dtype`; made once."""
        raise NotImplementedError

    def adopt(self, state: Any, dtype: torch.dtype) -> Any:
        """What another backend prepared for activations of `dtype`, if `linear` (or `linear_fused`)
        takes it as it is; else None.

        A layer that changes its backend then holds one copy of its weight, not two.
        """
        return None

    def linear(self, x: Tensor, state: Any, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        raise NotImplementedError

    def prepare_fused(self, parts: Sequence[PackedWeight], dtype: torch.dtype | None = None) -> Any:
        """Several weights that read the same x (q, k, v; gate, up), for `linear_fused`."""
        return tuple((self.prepare(part, dtype), part.out_features) for part in parts)

    def linear_fused(self, x: Tensor, state: Any, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., sum of the parts' N], the parts' outputs side by side.

        This one makes one call per part.
        """
        sizes = [size for _, size in state]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        outputs = [self.linear(x, part, b) for (part, _), b in zip(state, biases, strict=True)]
        return torch.cat(outputs, -1)

    # The accuracy mode of activations, an option (activations.py): most backends have one alone.

    def with_activations(self, state: Any, parts: Sequence[PackedWeight], told: str) -> Any:
        """The state whose `linear` takes x as the word says; the same state where that is all it
        can.

        parts: the weights that the state was prepared from. told: "exact" or "int8".
        """
        return state

    def activations(self, state: Any) -> str:
        """The word of a state."""
        return "exact"

    # The dense copy, an option (dense_copy.py): most backends keep none.

    def dense_device(self, state: Any) -> torch.device | None:
        """Where a dense copy can be kept beside what `prepare` returned; None: nowhere."""
        return None

    def dense_bytes(self, state: Any) -> int:
        """The bytes of the dense copy in a state; 0 without one."""
        return 0

    def dense_from(self, problem: LinearProblem, gpu: str | None = None) -> int | None:
        """The fewest tokens for which a copy would be used; None if none can be kept.

        The problem's own M does not matter. gpu: as in `describe`.
        """
        return None

    def takes_dense(self, problem: LinearProblem, gpu: str | None = None) -> bool:
        """Whether a copy would be used for the problem's M tokens."""
        first = self.dense_from(problem, gpu)
        return first is not None and problem.M >= first

    def with_dense(self, state: Any, parts: Sequence[PackedWeight]) -> Any:
        """The state with a dense copy of `parts`, the weights that it was prepared from."""
        raise NotImplementedError

    def without_dense(self, state: Any) -> Any:
        """The state without its dense copy."""
        return state

    def prefetch_next(self, state: Any, following: Any, most_bytes: int) -> None:
        """From now on `linear` of `state` may bring the first `most_bytes` of `following` near.

        Both are what `prepare` returned. This one does nothing.
        """

    def describe(self, problem: LinearProblem, gpu: str | None = None) -> str:
        """How it would run the problem (on a GPU of that name), for `explain`; empty without a
        choice."""
        return ""
