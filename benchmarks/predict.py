"""What the cost model of the CUDA kernels predicts beside a dense fp16 linear.

    python benchmarks/predict.py [--gpu H200 A100 ...] [--models llama-3-8b ...] [--out FILE]

These are predictions from bytes, tensor and issue rates: nothing is measured, and no GPU is needed.
One table per GPU is printed, with the least and the greatest ratio over the models' fused shapes.
With --out benchmarks/results/prediction.json every row is kept.

`predicted_us` is the time by which the plan was chosen, with z = x Q where there is an adapter.
For kernels that were never timed it is the pessimistic end of a range, and `best_us` is the other
end; for the others both are equal. `ratio` and `best_ratio` are a dense linear's time over them.
`overlapped_us` is `predicted_us` less its launches, for devices with dependent launches (9.0 and
newer): what is assumed of a linear behind another linear, whose weights it asks for before that one
ends.
"""

from __future__ import annotations

import argparse
import json

from figure_kernel_tables import predicted_cell

from slab_kernels.backends.cuda.cost import LAUNCH_US, Rebuild, dense_microseconds
from slab_kernels.backends.cuda.gpus import GPUS, Gpu, gpu_named
from slab_kernels.backends.cuda.layout import INT4, INT8, W16
from slab_kernels.backends.cuda.plan import choose, weighed
from slab_kernels.backends.cuda.prefill import Prefill
from slab_kernels.backends.cuda.tiles import CudaSizes
from slab_kernels.bench import machine
from slab_kernels.bench.layer_shapes import layers
from slab_kernels.paths import expanded

TOKENS = (1, 4, 8, 16, 17, 32, 64, 128, 256, 512, 1024, 2048, 4096)
DEPENDENT_SINCE = (9, 0)  # the first compute capability with programmatic dependent launch
# Name -> values, rank of the sign term, rank of the adapter.
KINDS = {
    "fp16 / bf16": (W16, 1, 0),
    "int8": (INT8, 1, 0),
    "int4": (INT4, 1, 0),
    "S + P Qᵀ, rank 64, fp16": (W16, 0, 64),
    "S + P Qᵀ, rank 64, int8": (INT8, 0, 64),
    "S + P Qᵀ, rank 64, int4": (INT4, 0, 64),
}


def rows(gpu_name: str, models: list[str]) -> list[dict]:
    """One row per shape, kind and token count."""
    gpu, found = gpu_named(gpu_name), []
    for N, K in dict.fromkeys(shape for model in models for shape in layers(model)):
        for kind, (values, rank, adapter_rank) in KINDS.items():
            sizes = CudaSizes(K, (N,), values, 4, rank, adapter_rank // 16)
            for M in TOKENS:
                place = {"gpu": gpu.name, "n": N, "k": K, "m": M, "kind": kind}
                found.append(place | predicted(sizes, M, gpu))
    return found


def predicted(sizes: CudaSizes, M: int, gpu: Gpu) -> dict:
    """What is predicted of one linear."""
    plan, dense = choose(sizes, M, gpu), dense_microseconds(sizes.N, sizes.K, M, gpu)
    row: dict[str, object] = {"route": "rebuilt"}
    took = best = plan.microseconds
    if not isinstance(plan, Rebuild):
        chosen = next(weighed(sizes, M, gpu))
        took = best = chosen.microseconds
        if plan.measured is None:
            best -= plan.microseconds - plan.range_us[0]
        launches = 2 if chosen.adapter_us else 1
        overlap = launches * LAUNCH_US if gpu.capability >= DEPENDENT_SINCE else 0.0
        loop = plan.loop if isinstance(plan, Prefill) else plan.tile.loop
        row = {"route": "fused", "loop": loop, "overlapped_us": round(took - overlap, 3)}
    times = {"predicted_us": took, "best_us": best, "dense_us": dense}
    ratios = {"ratio": dense / took, "best_ratio": dense / best}
    return row | {name: round(number, 3) for name, number in (times | ratios).items()}


def table(found: list[dict]) -> str:
    """The ratios by kind and token count, in Markdown."""
    lines = [
        "| S | " + " | ".join(f"M = {M}" for M in TOKENS) + " |",
        "|---" * (len(TOKENS) + 1) + "|",
    ]
    for kind in KINDS:
        cells = [
            predicted_cell([row for row in found if row["kind"] == kind and row["m"] == M])
            for M in TOKENS
        ]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", nargs="+", default=[gpu.name for gpu in GPUS])
    parser.add_argument("--models", nargs="+", default=["llama-3-8b", "llama-3-70b"])
    parser.add_argument("--out", type=expanded, help="also write the rows as JSON, into this file")
    arguments = parser.parse_args()
    try:
        names = list(dict.fromkeys(gpu_named(name).name for name in arguments.gpu))
        for model in arguments.models:
            layers(model)
    except ValueError as error:
        parser.error(str(error).partition("; or give")[0])
    record = {
        "commit": machine.commit(),
        "models": arguments.models,
        "what": "predictions of the cost model, not measurements",
        "rows": [],
    }
    for name in names:
        found = rows(name, arguments.models)
        record["rows"] += found
        print(f"\n{name}\n\n{table(found)}")
    print("\nx to y: by the pessimistic and by the optimistic end of the prediction")
    print("* the weight is rebuilt dense and multiplied by cuBLAS")
    if arguments.out is None:
        return
    fresh = arguments.out.with_suffix(".tmp")
    fresh.write_text(
        json.dumps(record, ensure_ascii=False).replace("}, {", "},\n{") + "\n", encoding="utf-8"
    )
    fresh.replace(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
