"""The commands about kernels and this machine: bench, tune, info, explain. `cli` puts them on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..paths import expanded
from . import console
from .console import Outcome
from .options import Backend, Device, Json, Shape, Values, finite, parse_shape, torch_dtype


def bench(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="out_features x in_features, 11008x4096; may be repeated."),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(help="All linears of a well-known model, llama-2-7b; may be repeated."),
    ] = None,
    fused: Annotated[
        bool,
        typer.Option(
            "--fused/--separate",
            help="--layers with q, k, v and gate, up in one, as engines run them.",
        ),
    ] = True,
    m: Annotated[
        list[int] | None, typer.Option(help="Tokens at once; may be repeated. Default 1.", min=1)
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option(help="fp16, bf16, int8, int4; may be repeated. Default fp16."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the activations and the dense weight: fp32, bf16 or fp16.")
    ] = "bf16",
    rank: Annotated[int, typer.Option(help="Rank of the sign term; 0 = none.", min=0)] = 1,
    adapter_rank: Annotated[
        int, typer.Option(help="Rank of the adapter P Qᵀ; 0 = none.", min=0)
    ] = 0,
    group_size: Annotated[int, typer.Option(help="Inputs a scale covers; 0 = one a row.")] = 128,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Time these; default: every one that runs it, without the reference."),
    ] = None,
    peers: Annotated[
        bool,
        typer.Option("--peers/--no-peers", help="Also other libraries' kernels, where installed."),
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="Time spent on a row, at least.", min=0.0, callback=finite)
    ] = 0.5,
    device: Device = "auto",
    json: Json = False,
) -> Outcome:
    """Time linears on this machine: torch's dense one beside ours, same run, same threads, checked first."""
    from ..bench import linear as bench
    from ..bench import machine
    from ..bench.layer_shapes import layers as known
    from ..device import resolve_device
    from ..report import tables as report

    torch_dtype(dtype)
    shapes = [parse_shape(text) for text in shape or []] + [
        pair for name in layers or [] for pair in known(name, fused)
    ]
    where, rows, absent = str(resolve_device(device)), [], {}
    for n, k in dict.fromkeys(shapes or [(4096, 4096)]):
        console.say(f"{n}×{k}")
        case = bench.Case(
            n, k, tuple(m or [1]), tuple(values or ["fp16"]), dtype, where, group_size or None, rank, backend, seconds,
            adapter_rank, peers,
        )  # fmt: skip
        found = bench.measure(case)
        rows += found.rows
        absent |= {name: f"{n}×{k}: {reason}" for name, reason in found.absent.items()}
    data = {"device": machine.one_line(), "rows": rows, "absent": absent}

    def show() -> None:
        print(data["device"])
        console.print_table(report.BENCH_COLUMNS, report.bench_table(data["rows"]))
        if data["absent"]:
            console.print_pairs(data["absent"].items(), "not timed")

    return Outcome(data, show)


def tune(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="out_features x in_features, 11008x4096; may be repeated."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "--layers",
            help="Linears of a well-known model, fused and not; may be repeated. Default llama-3-8b.",
        ),
    ] = None,
    m: Annotated[
        list[int] | None,
        typer.Option(help="Tokens at once; may be repeated. Default 1, 16, 64, 512, 2048.", min=1),
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option(help="fp16, bf16, int8, int4; may be repeated. Default fp16, int8, int4."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the activations: fp32, bf16 or fp16.")] = "bf16",
    rank: Annotated[
        int, typer.Option(help="Rank of the sign term, and lower ones; 0 = none.", min=0)
    ] = 1,
    group_size: Annotated[int, typer.Option(help="Inputs a scale covers; 0 = one a row.")] = 128,
    seconds: Annotated[
        float,
        typer.Option(help="Time spent on a configuration, at least.", min=0.0, callback=finite),
    ] = 0.1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The folder to write; default $SLAB_KERNELS_CONFIGS or ~/.config/slab_kernels."
        ),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> Outcome:
    """Time tiles of the Triton kernels on this GPU and write those that beat the shipped ones to your own file."""
    from ..backends.triton import configs
    from ..bench import machine
    from ..bench import tune as tuning
    from ..bench.layer_shapes import layers
    from ..format import INTEGER_RANGES, PackedLayout

    kind, names = torch_dtype(dtype), model or ([] if shape else ["llama-3-8b"])
    shapes = [parse_shape(text) for text in shape or []] + [
        pair for name in names for fused in (True, False) for pair in layers(name, fused)
    ]
    layouts = [
        PackedLayout(n, k, v, (group_size or None) if v in INTEGER_RANGES else None, rank)
        for n, k in dict.fromkeys(shapes) for v in dict.fromkeys(values or ["fp16", "int8", "int4"])
    ]  # fmt: skip
    gpu, clock, weights = tuning.gpu(device, seconds)
    problems = tuning.problems(layouts, m or [1, 16, 64, 512, 2048], kind, gpu)
    folder = expanded(out or configs.user_folder())
    path = folder / configs.file_name(gpu.name)
    with console.interruptible(
        lambda: f"rows that were found are in {path}" if path.is_file() else "nothing was kept"
    ):
        results = tuning.run(problems, gpu, clock, weights, folder, console.say)
    rows = [configs.row_to(result.row) for result in results if result.tuned]
    data = {
        "device": machine.one_line(),
        "file": str(path),
        "rows": rows,
        "results": [result.to_dict() for result in results],
    }

    def show() -> None:
        print(data["device"])
        console.print_table(tuning.COLUMNS, tuning.table(results))
        used = (
            ""
            if folder == configs.user_folder()
            else f"; {configs.ENVIRONMENT}={folder} makes them used"
        )
        print(
            f"{len(rows)} of {len(results)} defaults beaten; rows in {path}{used}"
            if rows
            else "no default was beaten by more than the noise"
        )

    return Outcome(data, show)


def info(
    support: Annotated[
        bool,
        typer.Option("--support", help="Instead: what every backend runs, on whatever machine."),
    ] = False,
    methods: Annotated[
        bool,
        typer.Option(
            "--methods",
            help="Instead: every method and its settings, as compress --option takes them.",
        ),
    ] = False,
    json: Json = False,
) -> Outcome:
    """Versions, devices, and which backends work here and why the others do not."""
    from ..bench import machine

    if methods:
        return _methods()
    if support:
        from ..backends.support import answers, markdown

        return Outcome(
            {"support": [answer.to_dict() for answer in answers()]},
            lambda: print(markdown(), end=""),
        )
    data = machine.information()

    def show() -> None:
        console.print_pairs(
            [(name, version or "not installed") for name, version in data["versions"].items()],
            "versions",
        )
        devices = (
            (
                d["device"],
                ", ".join(
                    f"{v}" if k == "name" else f"{k} {v}" for k, v in d.items() if k != "device"
                ),
            )
            for d in data["devices"]
        )
        console.print_pairs(devices, "devices")
        rows = [
            (f"{name} on {kind}", "works" if not reasons else "no: " + "; ".join(reasons))
            for name, table in data["backends"].items()
            for kind, reasons in table.items()
        ]
        console.print_pairs(
            [*rows, ("CUDA kernels", data["cuda_kernels"])], "backends, in order of preference"
        )
        console.print_pairs(
            [
                (name, f"{data['variables'][name] or 'not set'} ({what})")
                for name, what in machine.VARIABLES.items()
            ],
            "environment",
        )

    return Outcome(data, show)


def _methods() -> Outcome:
    """The table of methods, and default, range and meaning of every setting that is their own."""
    from ..methods import METHODS

    data = [
        {"method": name, "description": method.description,
         "options": [
             {"name": option, "default": default, "range": rule.range(), "meaning": rule.meaning}
             for option, (default, rule) in method.options().items()
         ]}
        for name, method in METHODS.items()
    ]  # fmt: skip

    def show() -> None:
        for row in data:
            pairs = [
                (f"{o['name']}={o['default']}", f"{o['range']}: {o['meaning']}")
                for o in row["options"]
            ]
            console.print_pairs(
                pairs or [("no settings of its own", "")], f"{row['method']}: {row['description']}"
            )

    return Outcome({"methods": data}, show)


def explain(
    shape: Shape = "4096x4096",
    m: Annotated[int, typer.Option(help="Tokens at once.", min=1)] = 1,
    values: Values = "fp16",
    dtype: Annotated[str, typer.Option(help="Of the activations: fp32, bf16 or fp16.")] = "bf16",
    rank: Annotated[int, typer.Option(help="Rank of the sign term; 0 = none.")] = 1,
    group_size: Annotated[int, typer.Option(help="Inputs a scale covers; 0 = one a row.")] = 128,
    adapter_rank: Annotated[int, typer.Option(help="Rank of the adapter P Qᵀ; 0 = none.")] = 0,
    device: Device = "auto",
    backend: Backend = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Also the CUDA kernels' plan on a GPU that need not be here: A100, H200."
        ),
    ] = None,
    json: Json = False,
) -> Outcome:
    """Which backend runs a problem and how, and why each other one does not."""
    from ..backends import dispatch
    from ..backends.base import LinearProblem
    from ..device import resolve_device
    from ..format import INTEGER_RANGES, PackedLayout

    (n, k), kind = parse_shape(shape), torch_dtype(dtype)
    layout = PackedLayout(
        n, k, values, (group_size or None) if values in INTEGER_RANGES else None, rank, adapter_rank
    )
    problem = LinearProblem.of(layout, m, kind, resolve_device(device).type)
    reasons = dispatch.explain(problem)
    elsewhere = dispatch.backend("cuda").describe(problem, gpu) if gpu is not None else ""
    able = dispatch.select(problem, backend)
    chosen, plan = able.name, able.describe(problem)
    data = {
        "problem": {"m": m, "n": n, "k": k, "values": values, "group_size": layout.group_size, "rank": rank,
                    "adapter_rank": adapter_rank, "dtype": dtype, "device": problem.device},
        "chosen": chosen, "plan": plan, "gpu_plan": elsewhere,
        "backends": [{"backend": name, "chosen": name == chosen, "reasons": why} for name, why in reasons.items()],
    }  # fmt: skip

    def show() -> None:
        print(
            f"{n}×{k}, m={m}, values {values}, rank {rank}, {dtype} activations on {problem.device}: {chosen}"
        )
        for name, why in reasons.items():
            status = (
                "chosen"
                if name == chosen
                else "; ".join(why)
                if why
                else "can run it, stands later in the order"
            )
            print(f"  {name:<10} {status}")
        for text in filter(None, (plan, elsewhere)):
            print(text)

    return Outcome(data, show)
