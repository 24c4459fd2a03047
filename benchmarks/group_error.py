"""Where the next bit of a 2:4 group belongs: the variance that is lost by value type and planes.

    python benchmarks/group_error.py [--out benchmarks/results/group-error.json]

Weights are independent draws of variance 1, and every input counts the same, so that the loss of
a group is the sum of its entries' squared errors. Of each group of four the two positions whose
pruning costs least are pruned and get the nearest level; integers have the best step for each 128
inputs. Dense integers, rounded to nearest with such steps, stand beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from torch import Tensor

from slab_kernels.bench import machine
from slab_kernels.format.layout import INTEGER_RANGES
from slab_kernels.paths import expanded

RESULTS = Path(__file__).resolve().parent / "results"
BLOCKS, GROUPS = 2000, 32  # blocks of 128 inputs, groups of four in a block
FREEDOM = 5  # degrees of freedom of the heavy-tailed weights
CASES = (("fp16", 1), ("fp16", 2), ("fp16", 3), ("int4", 1), ("int4", 2), ("int4", 3),
         ("int3", 1), ("int3", 2))  # fmt: skip
VALUE_BITS = {"fp16": 8.0, "int4": 2.0, "int3": 1.5}  # of kept values, per weight
PAIRS = torch.tensor(list(itertools.combinations(range(4), 2)))


def weights(name: str) -> Tensor:
    """[blocks, groups, 4] of variance 1."""
    torch.manual_seed(0)
    shape = (BLOCKS, GROUPS, 4)
    if name == "Gaussian":
        return torch.randn(shape)
    drawn = torch.distributions.StudentT(FREEDOM).sample(shape)
    return drawn / (FREEDOM / (FREEDOM - 2)) ** 0.5


def rounding_errors(w: Tensor, values: str, steps: Tensor) -> Tensor:
    """Squared errors of rounding to the grid, [steps, *w.shape].

    A step is a share of the one that reaches the block's largest weight.
    """
    if values == "fp16":
        return torch.zeros(1, *w.shape)
    low, high = INTEGER_RANGES[values]
    step = steps[:, None, None, None] * w.abs().amax((1, 2), keepdim=True) / high
    return (w - step * (w / step).round().clamp(low, high)).square()


def pruned_loss(w: Tensor, values: str, planes: int, magnitude: float, steps: Tensor) -> float:
    """Share of the variance that is lost with this magnitude of the pruned entries."""
    levels = magnitude * 2.0 ** (1 - planes) * torch.arange(1, 2**planes, 2)
    level_errors = (w.abs()[..., None] - levels).square().amin(-1)
    kept_errors = rounding_errors(w, values, steps)
    gain = level_errors - kept_errors  # what pruning costs more than keeping
    pair_gain = gain[..., PAIRS].sum(-1).amin(-1)
    return float((kept_errors.sum(-1) + pair_gain).sum(-1).amin(0).mean() / (4 * GROUPS))


def best(w: Tensor, values: str, planes: int, steps: Tensor) -> float:
    """The least loss over magnitudes, by golden section: it has one minimum."""
    low, high, ratio = 0.1, 2.0, (5**0.5 - 1) / 2
    while high - low > 0.005:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if pruned_loss(w, values, planes, left, steps) < pruned_loss(
            w, values, planes, right, steps
        ):
            high = right
        else:
            low = left
    return pruned_loss(w, values, planes, (low + high) / 2, steps)


def rows() -> list[dict]:
    """One row for each kind of weight, value type and number of planes; 0 is dense integers."""
    found = []
    steps = torch.linspace(0.3, 1.05, 31)
    for name in ("Gaussian", "Student-t"):
        w = weights(name)
        for values, planes in CASES:
            bits = VALUE_BITS[values] + 1 + planes / 2
            loss = best(w, values, planes, steps)
            found.append(
                {"weights": name, "values": values, "planes": planes, "bits": bits, "lost": loss}
            )
        for values, bits in (("int4", 4.0), ("int3", 3.0)):
            loss = float(rounding_errors(w, values, steps).mean((-1, -2)).amin(0).mean())
            found.append(
                {"weights": name, "values": values, "planes": 0, "bits": bits, "lost": loss}
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=expanded, default=RESULTS / "group-error.json", help="the file to write"
    )
    out = parser.parse_args().out
    found = {"commit": machine.commit(), "freedom": FREEDOM, "rows": rows()}
    out.write_text(json.dumps(found).replace("}, {", "},\n {") + "\n", encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
