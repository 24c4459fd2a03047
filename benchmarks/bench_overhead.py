"""What one call costs before any work: our op and our module beside torch's dense linear.

    python benchmarks/bench_overhead.py [--out benchmarks/results/overhead-cpu.json]

There is one token, one thread, and weights that stay in cache. On such small layers the time of a
call is its overhead: Python arguments, dispatch, checks, the output's memory. All clocks alternate
within a run, the least of 25 averages over 2000 calls counts, and every row is a ratio of one run.
"""

from __future__ import annotations

import argparse
import json
import timeit

import torch

from slab_kernels import SlabLinear
from slab_kernels.bench import machine
from slab_kernels.format import PackedLayout
from slab_kernels.paths import expanded
from slab_kernels.testing import random_packed

SHAPES = ((16, 16), (64, 64), (256, 256))
FORMS = {"fp16": {"values": "fp16"}, "int4": {"values": "int4", "group_size": 32}}
CALLS, REPEATS = 2000, 25


def measure(N: int, K: int, name: str, bias: bool) -> dict:
    """Microseconds per call: torch's functional linear, our op, nn.Linear, our module."""
    layer = SlabLinear.from_packed(
        random_packed(PackedLayout(N, K, rank=1, **FORMS[name])), torch.randn(N) if bias else None
    )
    dense, x = layer.to_linear(), torch.randn(1, K)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)
        prepared = layer.prepare()._linears[torch.float32][0]
        clocks = {
            "linear": lambda: torch.nn.functional.linear(x, dense.weight, dense.bias),
            "op": lambda: prepared.backend.linear(x, prepared.state, layer.bias),
            "nn.Linear": lambda: dense(x),
            "SlabLinear": lambda: layer(x),
        }
        least = {clock: float("inf") for clock in clocks}
        for _ in range(REPEATS):
            for clock, call in clocks.items():
                least[clock] = min(least[clock], timeit.timeit(call, number=CALLS) / CALLS * 1e6)
    row = {
        "N": N,
        "K": K,
        "values": name,
        "bias": bias,
        **{f"{clock} us": round(us, 3) for clock, us in least.items()},
    }
    return {
        **row,
        "op / linear": round(least["op"] / least["linear"], 3),
        "module / nn.Linear": round(least["SlabLinear"] / least["nn.Linear"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=expanded)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measure(N, K, name, bias) for N, K in SHAPES for name in FORMS for bias in (False, True)
    ]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if args.out:
        args.out.write_text(
            json.dumps(
                {"device": machine.one_line(), "commit": machine.commit(), "rows": rows}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
