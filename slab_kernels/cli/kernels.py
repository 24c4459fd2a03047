"""The commands about single linears: bench, tune, explain."""

from __future__ import annotations

import shlex
from typing import Any

from ..paths import expanded
from . import console, options
from .console import Outcome
from .meanings import parse_shape, torch_dtype
from .progress import Progress


def bench(
    shape: options.Shapes = None,
    layers: options.Layers = None,
    fused: options.Fused = True,
    m: options.BenchTokens = None,
    values: options.BenchValues = None,
    dtype: options.BenchDtype = "bf16",
    rank: options.Rank = 1,
    adapter_rank: options.AdapterRank = 0,
    group_size: options.GroupSize = 128,
    backend: options.BenchBackends = None,
    prefill: options.Prefill = None,
    activations: options.BenchActivations = None,
    peers: options.Peers = False,
    seconds: options.RowSeconds = 0.5,
    rounds: options.Rounds = 1,
    device: options.Device = "auto",
    json: options.Json = False,
) -> Outcome:
    """Time linears on this machine: torch's dense one beside ours, same run, same threads, checked
    first."""
    from ..bench import linear, machine
    from ..bench.case import Case
    from ..bench.layer_shapes import layers as known
    from ..device import resolve_device
    from ..report import tables

    torch_dtype(dtype)
    shapes = [parse_shape(text) for text in shape or []]
    shapes += [pair for name in layers or [] for pair in known(name, fused)]
    shapes = list(dict.fromkeys(shapes or [(4096, 4096)]))
    where = str(resolve_device(device))
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    with Progress("bench", "timings") as progress:
        for number, (n, k) in enumerate(shapes):
            progress.say(f"{n}×{k}")
            case = Case(
                n,
                k,
                tokens=tuple(m or [1]),
                values=tuple(values or ["fp16"]),
                dtype=dtype,
                device=where,
                group_size=group_size or None,
                rank=rank,
                backends=backend,
                min_seconds=seconds,
                adapter_rank=adapter_rank,
                peers=peers,
                prefill=prefill,
                activations=tuple(activations or [None]),
            )

            def note(done: int, total: int, before: int = number) -> None:
                progress(before * total + done, len(shapes) * total)

            found = linear.measure(case, progress=note, rounds=rounds)
            rows += found.rows
            absent |= {name: f"{n}×{k}: {reason}" for name, reason in found.absent.items()}
    data = {"device": machine.one_line(), "rows": rows, "absent": absent}

    def show() -> None:
        print(data["device"])
        console.print_table(tables.BENCH_COLUMNS, tables.bench_table(rows))
        if absent:
            console.print_pairs(absent.items(), "not timed")

    return Outcome(data, show)


def tune(
    shape: options.Shapes = None,
    model: options.Models = None,
    m: options.TuneTokens = None,
    values: options.TuneValues = None,
    dtype: options.ActivationDtype = "bf16",
    rank: options.TuneRank = 1,
    group_size: options.GroupSize = 128,
    seconds: options.TileSeconds = 0.1,
    out: options.ConfigFolder = None,
    device: options.Device = "auto",
    json: options.Json = False,
) -> Outcome:
    """Time tiles of the Triton kernels on this GPU and write those that beat the shipped ones to
    your own file."""
    from ..backends.triton import row_files
    from ..bench import machine
    from ..bench import tune as tuning
    from ..bench.layer_shapes import layers
    from ..format import INTEGER_RANGES, PackedLayout

    kind, names = torch_dtype(dtype), model or ([] if shape else ["llama-3-8b"])
    shapes = [parse_shape(text) for text in shape or []]
    shapes += [pair for name in names for fused in (True, False) for pair in layers(name, fused)]
    layouts = [
        PackedLayout(n, k, v, (group_size or None) if v in INTEGER_RANGES else None, rank)
        for n, k in dict.fromkeys(shapes)
        for v in dict.fromkeys(values or ["fp16", "int8", "int4"])
    ]
    gpu, clock, weights = tuning.gpu(device, seconds)
    problems = tuning.problems(layouts, m or [1, 16, 64, 512, 2048], kind, gpu)
    folder = expanded(out or row_files.user_folder())
    path = folder / row_files.file_name(gpu.name)

    def kept() -> str:
        return f"rows that were found are in {path}" if path.is_file() else "nothing was kept"

    with console.interruptible(kept), Progress("tune", "problems") as progress:
        results = tuning.run(problems, gpu, clock, weights, folder, progress.say, progress=progress)
    rows = [row_files.row_to(result.row) for result in results if result.tuned]
    data = {
        "device": machine.one_line(),
        "file": str(path),
        "rows": rows,
        "results": [result.to_dict() for result in results],
    }

    def show() -> None:
        print(data["device"])
        console.print_table(tuning.COLUMNS, tuning.table(results))
        if not rows:
            print("no default was beaten by more than the noise")
            return
        used = ""
        if folder != row_files.user_folder():
            used = f"; {row_files.ENVIRONMENT}={shlex.quote(str(folder))} makes them used"
        print(f"{len(rows)} of {len(results)} defaults beaten; rows in {path}{used}")

    return Outcome(data, show)


def explain(
    shape: options.Shape = "4096x4096",
    m: options.Tokens = 1,
    values: options.Values = "fp16",
    dtype: options.ActivationDtype = "bf16",
    rank: options.Rank = 1,
    group_size: options.GroupSize = 128,
    adapter_rank: options.AdapterRank = 0,
    device: options.Device = "auto",
    backend: options.Backend = None,
    activations: options.Activations = None,
    gpu: options.PlannedGpu = None,
    json: options.Json = False,
) -> Outcome:
    """Which backend runs a problem and how, and why each other one does not."""
    from dataclasses import replace

    from ..backends import activations as accuracy
    from ..backends import dense_copy, dispatch
    from ..backends.base import LinearProblem
    from ..device import resolve_device
    from ..errors import ArgumentError
    from ..format import INTEGER_RANGES, PackedLayout

    (n, k), kind = parse_shape(shape), torch_dtype(dtype)
    group = (group_size or None) if values in INTEGER_RANGES else None
    if rank > min(n, k):
        raise ArgumentError(
            f"rank={rank} is larger than a weight of {n}x{k} has; give {min(n, k)} at most"
        )
    layout = PackedLayout(n, k, values, group, rank, adapter_rank)
    problem = LinearProblem.of(layout, m, kind, resolve_device(device).type)
    problem = replace(problem, activations=accuracy.named(activations))
    reasons = dispatch.explain(problem)
    gpu_plan = dispatch.backend("cuda").describe(problem, gpu) if gpu is not None else ""
    able = dispatch.select(problem, backend)
    chosen, plan = able.name, able.describe(problem)
    copying = dispatch.backend("cuda") if gpu is not None else able
    copy = {
        "backend": copying.name,
        "bytes": dense_copy.size_of([layout]),
        "bits_per_weight": dense_copy.BITS,
        "from_tokens": copying.dense_from(problem, gpu),
        "used": copying.takes_dense(problem, gpu),
    }
    data = {
        "problem": {
            "m": m,
            "n": n,
            "k": k,
            "values": values,
            "group_size": layout.group_size,
            "rank": rank,
            "adapter_rank": adapter_rank,
            "dtype": dtype,
            "device": problem.device,
            "activations": problem.activations,
        },
        "chosen": chosen,
        "plan": plan,
        "gpu_plan": gpu_plan,
        "dense_copy": copy,
        "backends": [
            {"backend": name, "chosen": name == chosen, "reasons": why}
            for name, why in reasons.items()
        ],
    }

    def show() -> None:
        print(
            f"{n}×{k}, m={m}, values {values}, rank {rank}, {dtype} activations "
            f"on {problem.device}: {chosen}"
        )
        for name, why in reasons.items():
            status = "; ".join(why) or "can run it, stands later in the order"
            print(f"  {name:<10} {'chosen' if name == chosen else status}")
        for text in filter(None, (plan, gpu_plan, _of_copy(copy, n * k, m))):
            print(text)

    return Outcome(data, show)


def _of_copy(copy: dict[str, Any], weights: int, m: int) -> str:
    """What prefill="dense" would do with m tokens, in words."""
    from ..backends.dense_copy import NEVER, described

    first, name = copy["from_tokens"], copy["backend"]
    if first is None:
        return f"prefill='dense': the {name} backend keeps no dense copy of this here"
    used = f"{'used' if copy['used'] else 'not used'} for {m} token{'s' * (m > 1)}"
    if first >= NEVER:
        used = "used for no number of tokens"
    elif not copy["used"] and m < first:
        used += f", at the earliest from {first} on"
    return f"prefill='dense': {described(copy['bytes'], weights)} more, {used} ({name})"
