"""A small corner of a real weight and its decomposition: the matrices that the README draws.

    python benchmarks/example_matrix.py [--out benchmarks/results/example-matrix.json]

The corner is that of the first down projection of the model in benchmarks/model. Its inputs
are taken to be independent and equally strong.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import safetensors.torch
import torch

import slab_kernels
from slab_kernels.bench import machine
from slab_kernels.paths import expanded

ROOT = Path(__file__).resolve().parent
WEIGHT = "model.layers.0.mlp.down_proj.weight"
ROWS, COLUMNS = 12, 16


def matrices() -> dict[str, list[list[float]]]:
    """W and the parts whose sum is nearest to it; `signs` is 0 where S keeps the entry."""
    weight = safetensors.torch.load_file(ROOT / "model" / "model.safetensors")[WEIGHT].float()
    W = weight[:ROWS, :COLUMNS]
    stats = slab_kernels.InputStats(COLUMNS, needs="gram")
    stats.update(torch.eye(COLUMNS))
    parts = slab_kernels.decompose(W, stats, method="slab", rank=1, adapter_rank=1).folded()
    found = {
        "W": W,
        "S": parts.S,
        "signs": parts.B.float(),
        "magnitudes": parts.U @ parts.V.T,
        "adapter": parts.P @ parts.Q.T,
        "left": W - parts.dense(),
    }
    return {name: [[round(x, 5) for x in row] for row in m.tolist()] for name, m in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=expanded, default=ROOT / "results" / "example-matrix.json", help="the file"
    )
    out = parser.parse_args().out
    record = {"weight": WEIGHT, "commit": machine.commit(), **matrices()}
    out.write_text(json.dumps(record).replace("]], ", "]],\n ") + "\n", encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
