"""Times one linear: torch's dense `F.linear` beside our backends, same run, same threads, after a correctness gate.

Weights are rotated over copies that together exceed the private caches, as decoding a model reads them; every row says
over how many bytes. (A large last-level cache may still hold them: compare rows of one run, not absolute times.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import dispatch, reference
from .backends.base import Backend, LinearProblem
from .format import INTEGER_RANGES, PackedLayout
from .testing import error_bound, random_packed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROTATED_BYTES = 256 << 20  # together the copies of a weight reach this, unless there are MOST_COPIES of them
MOST_COPIES = 64
GATE_ROWS = 256  # output rows compared with the reference before anything is timed


class BenchError(RuntimeError):
    """A kernel failed its correctness gate; nothing was timed."""


def bench_layer(
    n: int,
    k: int,
    m: int,
    values: str = "fp16",
    dtype: torch.dtype | str = torch.float32,
    group_size: int | None = 128,
    rank: int = 1,
    backends: Sequence[str] | None = None,
    min_seconds: float = 0.5,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """`layer_rows` for one token count and one value type."""
    return layer_rows(n, k, (m,), (values,), dtype, device, group_size, rank, backends, min_seconds)


def layer_rows(
    n: int,
    k: int,
    tokens: Sequence[int] = (1,),
    values: Sequence[str] = ("fp16",),
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
    group_size: int | None = 128,
    rank: int = 1,
    backends: Sequence[str] | None = None,
    min_seconds: float = 0.5,
) -> list[dict[str, Any]]:
    """Rows for y[m,n] = x[m,k] W.T: for each m torch's dense linear ("dense"), then every backend and value type.

    Args:
        dtype: of the activations and the dense weight, a torch dtype or "fp32", "bf16", "fp16".
        group_size: inputs a scale; ignored for fp16 and bf16 values.
        backends: names to time; default: all that can run it, the reference left out.
        min_seconds: each row is timed at least this long.

    Returns one dict a row: backend, m, n, k, values, dtype, rank, group_size, device, threads, median_us, iqr_us,
    calls, speedup_vs_dense, weight_bytes, gbytes_per_s (weight bytes as that backend holds them / median),
    bandwidth_share (of the read bandwidth measured in this run), bits_per_weight, copies, rotated_bytes.

    Raises: BenchError if a kernel disagrees with the reference, BackendError if a named backend cannot run it,
    ValueTypeError for an unknown value type, ValueError for an unknown dtype.
    """
    dtype = _dtype(dtype)
    layouts = [PackedLayout(n, k, v, group_size if v in INTEGER_RANGES else None, rank) for v in values]
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(m, k, generator=generator).to(device, dtype) for m in tokens]
    timer = _Timer(device, min_seconds, read_bandwidth(device=device))
    facts = {"n": n, "k": k, "dtype": next(name for name, kind in DTYPES.items() if kind == dtype), "device": str(device)}
    facts["threads"] = torch.get_num_threads()
    rows: dict[int, list[dict[str, Any]]] = {}
    with torch.inference_mode():
        weights = _rotated(torch.randn(n, k, generator=generator).to(device, dtype))
        dense = {"backend": "dense", **facts, "values": "", "rank": 0, "group_size": None}
        dense["bits_per_weight"] = 8.0 * dtype.itemsize
        for m, x in zip(tokens, inputs, strict=True):
            rows[m] = [dense | {"m": m} | timer.row([partial(torch.nn.functional.linear, x, W) for W in weights], weights)]
        del weights
        for layout in layouts:
            packed = random_packed(layout).to(device)
            for backend in _backends(LinearProblem.of(layout, 1, dtype, torch.device(device).type), backends):
                states = _rotated(state := backend.prepare(packed))
                ours = {"backend": backend.name, **facts, "values": layout.values, "rank": rank}
                ours |= {"group_size": layout.group_size, "bits_per_weight": 8 * _bytes(state) / (n * k)}
                for m, x in zip(tokens, inputs, strict=True):
                    _gate(backend, x, state, packed)
                    row = timer.row([partial(backend.linear, x, s) for s in states], states)
                    row["speedup_vs_dense"] = rows[m][0]["median_us"] / row["median_us"]
                    rows[m].append(ours | {"m": m} | row)
    return [row for m in tokens for row in rows[m]]


def read_bandwidth(size: int = 256 << 20, device: str = "cpu") -> float:
    """Bytes per second of summing `size` bytes on torch's threads, the best of five."""
    data = torch.ones(size // 4, device=device)
    timer = _Timer(device)
    return size / min(timer.seconds(data.sum) for _ in range(6))


class _Timer:
    def __init__(self, device: str, min_seconds: float = 0.0, bandwidth: float = 1.0):
        self.wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else None
        self.min_seconds, self.bandwidth = min_seconds, bandwidth

    def seconds(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        if self.wait:
            self.wait()
        return time.perf_counter() - start

    def row(self, calls: list[Callable[[], Any]], states: list[Any]) -> dict[str, Any]:
        """Median and spread over at least `min_seconds` and ten calls, after one warm-up of each."""
        for call in calls:
            self.seconds(call)
        samples: list[float] = []
        end = time.perf_counter() + self.min_seconds
        while len(samples) < 10 or time.perf_counter() < end:
            samples.extend(self.seconds(call) for call in calls)
        quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        low, median, high = torch.tensor(samples, dtype=torch.float64).quantile(quartiles).tolist()
        size = _bytes(states[0])
        return {
            "median_us": median * 1e6,
            "iqr_us": (high - low) * 1e6,
            "calls": len(samples),
            "speedup_vs_dense": 1.0,
            "weight_bytes": size,
            "gbytes_per_s": size / median / 1e9,
            "bandwidth_share": size / median / self.bandwidth,
            "copies": len(states),
            "rotated_bytes": size * len(states),
        }


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if dtype not in DTYPES and dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    return DTYPES.get(dtype, dtype)


def _backends(problem: LinearProblem, names: Sequence[str] | None) -> list[Backend]:
    if names is not None:
        return [dispatch.select(problem, name) for name in names]
    able = [name for name, reasons in dispatch.explain(problem).items() if not reasons and name != "reference"]
    return [dispatch.backend(name) for name in able]


def _gate(backend: Backend, x: Tensor, state: Any, packed) -> None:
    rows = min(GATE_ROWS, packed.out_features)
    start = packed.out_features - rows
    part = packed.narrow_out(start, rows)
    y = backend.linear(x, state)[:, start:]
    exact = reference.linear(x.double(), part)
    magnitude = x.double().abs() @ part.dense().double().abs().T
    excess = (y.double() - exact).abs() - error_bound(magnitude, exact, x.dtype, packed.in_features)
    if bool((excess > 0).any()) or not bool(y.isfinite().all()):
        raise BenchError(f"backend {backend.name!r} disagrees with the reference on {packed.layout}; nothing was timed")


def _rotated(state: Any) -> list[Any]:
    """The state and as many copies as together exceed ROTATED_BYTES, between 2 and MOST_COPIES."""
    copies = max(2, min(MOST_COPIES, -(-ROTATED_BYTES // _bytes(state))))
    return [state, *(_clone(state) for _ in range(copies - 1))]


def _bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.nbytes
    return sum(map(_bytes, state)) if isinstance(state, (tuple, list)) else 0


def _clone(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, tuple):
        parts = [_clone(part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state
