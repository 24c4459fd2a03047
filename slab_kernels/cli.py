"""The command line `slab-kernels`. Every command takes --json: then stdout holds one JSON object and nothing else.

A command builds an `Outcome`; `console.run` prints it and turns failures into one sentence and an exit code. torch and
transformers load inside the commands, so that --help is instant.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__, console
from .console import Outcome
from .options import (
    Backend,
    Device,
    Dtype,
    Folder,
    Json,
    Shape,
    Text,
    Values,
    method_options,
    parse_shape,
    torch_dtype,
)

app = typer.Typer(
    name="slab-kernels",
    help="Compress language models to 2:4 sparse values plus low-rank signs, and run them from the packed weights.",
    epilog=console.EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """One command line; returns its exit code."""
    command = typer.main.get_command(app)
    return console.run(
        lambda: command.main(arguments, prog_name="slab-kernels", standalone_mode=False), as_json="--json" in arguments
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"slab-kernels {__version__}")
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command(epilog=console.EXIT_CODES)
def compress(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or the name of one on the Hugging Face hub.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    method: Annotated[str, typer.Option(help="slab (ours), slab-paper, threebasil, hassle-free, sslc, oats, slim, eora, alps, sparsegpt, wanda or magnitude.")] = "slab",
    pattern: Annotated[str, typer.Option(help="Keep n of m (2:4, 4:8) or remove a share (50%); only 2:4 is packed.")] = "2:4",
    rank: Annotated[int, typer.Option(help="Rank of the magnitudes of the sign term (slab methods).")] = 1,
    planes: Annotated[int, typer.Option(help="Signs of a pruned entry, 1 to 3, each half a bit a weight (slab).")] = 1,
    values: Annotated[str, typer.Option(help="How kept values are stored: fp16, bf16, int8, int4 or int3.")] = "fp16",
    group_size: Annotated[int, typer.Option(help="Inputs a scale of an integer type covers: 32, 64, 128; 0 = one a row.")] = 128,
    adapter_rank: Annotated[int | None, typer.Option(help="Rank of the adapter P Qᵀ; default: the method's own, 0 = none.", min=0)] = None,
    adapter_values: Annotated[str, typer.Option(help="How P and Q are stored: int8 (an exponent a row) or fp16.")] = "int8",
    match: Annotated[int, typer.Option(help="Transformer matching: epochs of training each block's numbers towards the dense model.", min=0)] = 0,
    bits: Annotated[float | None, typer.Option(help="Stored bits a weight over the whole model; chooses values, planes and rank by layer.")] = None,
    calibration: Text = "stdlib",
    heldout: Annotated[str | None, typer.Option(help="Also measure every layer's error on this other text.")] = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Which windows are drawn.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in OUT.")] = False,
    skip: Annotated[list[str] | None, typer.Option(help="Leave these modules dense, '*.down_proj'; may be repeated.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="A setting of the method, name=value; may be repeated.")] = None,
    json: Json = False,
) -> Outcome:
    """Compress MODEL into the folder OUT, one block in memory at a time."""
    from .model import compress

    settings = method_options(option or [])
    record = compress(
        model, out, method=method, pattern=pattern, rank=rank, values=values, group_size=group_size or None, planes=planes,
        adapter_rank=adapter_rank, adapter_values=adapter_values, matching=match, bits=bits, calibration=calibration, heldout=heldout,
        samples=samples, window=window, skip=skip or (), device=device, seed=seed, resume=resume, progress=_progress(), **settings,
    )  # fmt: skip
    data = record.to_dict() | {"folder": str(out)}

    def show() -> None:
        _show_layers(data["layers"], str(out))
        bits, error = data["bits_per_weight"], data["mean_error"]
        print(f"{bits:.3f} stored bits per weight, mean error {error:.4f}, {data['seconds']:.0f} s; next: slab-kernels eval {out}")

    return Outcome(data, show)


def _progress() -> Any:
    """A bar on a terminal, one line a layer in a log."""
    return True if sys.stderr.isatty() else lambda event: console.say(str(event)) if str(event) else None


def _show_layers(layers: list[dict[str, Any]], title: str) -> None:
    """One row a layer; a setting that all layers share stands in the title instead."""
    show = lambda value: "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)  # noqa: E731
    settings = ["method", "pattern", "rank", "values", "group_size"]
    differing = [name for name in settings if len({layer.get(name) for layer in layers}) > 1]
    same = [f"{name} {layers[0][name]}" for name in settings if layers and name not in differing and layers[0].get(name) is not None]
    errors = [name for name in ("error", "heldout_error") if any(layer.get(name) is not None for layer in layers)]
    rows = [
        (layer["name"], "×".join(map(str, layer["shape"])), *(show(layer.get(name)) for name in differing),
         f"{layer['bits_per_weight']:.3f}", *(show(layer[name]) for name in errors))
        for layer in layers
    ]  # fmt: skip
    head = ("layer", "shape", *differing, "bits/weight", *(name.replace("heldout_error", "held-out error") for name in errors))
    console.print_table(head, rows, ", ".join([title, *same]))


@app.command("eval", epilog=console.EXIT_CODES)
def evaluate(
    folder: Folder,
    text: Text = "stdlib:heldout",
    window: Annotated[int | None, typer.Option(help="Tokens a window; default 2048, or the model's positions if fewer.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Evaluate only the first so many tokens; 0 = all.")] = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    backend: Backend = None,
    json: Json = False,
) -> Outcome:
    """Perplexity per token of a compressed or dense model on a text."""
    from . import evaluate
    from . import text as texts

    model, tokenizer, facts = _open(folder, device, dtype, backend)
    content = texts.read_text(text)
    if max_tokens > 0:
        content = tokenizer.decode(texts.tokenize(tokenizer, content[: max_tokens * texts.CHARACTERS_PER_TOKEN])[:max_tokens])
    data = facts | {"text": text} | evaluate.perplexity(model, tokenizer, content, window)

    def show() -> None:
        bits = "" if data["bits_per_weight"] is None else f", {data['bits_per_weight']:.3f} stored bits per weight"
        print(
            f"{folder}: perplexity {data['perplexity']:.4f} per token on {text} "
            f"({data['tokens']} tokens in {data['windows']} windows of {data['window']}){bits}"
        )

    return Outcome(data, show)


def _open(folder: str, device: str, dtype: str | None, backend: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer and what is known of a packed or dense folder; a CPU computes in fp32 unless told otherwise."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .inspection import inspect
    from .model import load
    from .pipeline import resolve_device
    from .source import hub_folder, open_source

    _force(backend)
    where = resolve_device(device)
    kind = torch_dtype(dtype) if dtype else torch.float32 if where.type == "cpu" else None
    path = hub_folder(folder)
    seen = inspect(path)
    if seen["stored"] == "packed":
        model = load(path, device=where, dtype=kind)
    else:
        open_source(path)  # our checks first: transformers fills missing tensors with random numbers
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind or "auto").to(where).eval()
    facts = {"folder": folder, "method": seen["method"] or "dense", "stored": seen["stored"], "bits_per_weight": seen["bits_per_weight"]}
    facts |= {"device": str(where), "dtype": str(model.dtype).removeprefix("torch.")}
    return model, AutoTokenizer.from_pretrained(path), facts


def _force(backend: str | None) -> None:
    from . import dispatch

    if backend:
        dispatch.backend(backend)  # an unknown name fails here, before a model is loaded
        os.environ[dispatch.ENVIRONMENT] = backend


@app.command(epilog=console.EXIT_CODES)
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "def main():\n    ",
    tokens: Annotated[int, typer.Option(help="New tokens.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 = always the most probable token.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperature above 0.")] = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    backend: Backend = None,
    json: Json = False,
) -> Outcome:
    """Continue a prompt from packed weights."""
    import time

    import torch

    model, tokenizer, facts = _open(folder, device, dtype, backend)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not inputs["input_ids"].shape[1]:
        raise typer.BadParameter("the prompt is empty and this tokenizer adds no start token; give --prompt some text")
    inputs.pop("token_type_ids", None)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=tokens, **sampling)
    new = out[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    seconds = time.perf_counter() - start
    data = facts | {"prompt": prompt, "text": text, "tokens": len(new), "tokens_per_second": len(new) / seconds}

    def show() -> None:
        print(prompt + text)
        console.say(f"[{len(new)} tokens, {len(new) / seconds:.1f} tokens per second, first call included]")

    return Outcome(data, show)


@app.command(epilog=console.EXIT_CODES)
def bench(
    shape: Annotated[list[str] | None, typer.Option(help="out_features x in_features, 11008x4096; may be repeated.")] = None,
    layers: Annotated[list[str] | None, typer.Option(help="All linears of a well-known model, llama-2-7b; may be repeated.")] = None,
    fused: Annotated[bool, typer.Option("--fused/--separate", help="--layers with q, k, v and gate, up in one, as engines run them.")] = True,
    m: Annotated[list[int] | None, typer.Option(help="Tokens at once; may be repeated. Default 1.", min=1)] = None,
    values: Annotated[list[str] | None, typer.Option(help="fp16, bf16, int8, int4; may be repeated. Default fp16.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the activations and the dense weight: fp32, bf16 or fp16.")] = "bf16",
    rank: Annotated[int, typer.Option(help="Rank of the sign term; 0 = none.", min=0)] = 1,
    adapter_rank: Annotated[int, typer.Option(help="Rank of the adapter P Qᵀ; 0 = none.", min=0)] = 0,
    group_size: Annotated[int, typer.Option(help="Inputs a scale covers; 0 = one a row.")] = 128,
    backend: Annotated[list[str] | None, typer.Option(help="Time these; default: every one that runs it, without the reference.")] = None,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Also other libraries' kernels, where installed.")] = False,
    seconds: Annotated[float, typer.Option(help="Time spent on a row, at least.", min=0.0)] = 0.5,
    device: Device = "auto",
    json: Json = False,
) -> Outcome:
    """Time linears on this machine: torch's dense one beside ours, same run, same threads, checked first."""
    from . import bench, machine, report
    from .layer_shapes import layers as known
    from .pipeline import resolve_device

    torch_dtype(dtype)
    shapes = [parse_shape(text) for text in shape or []] + [pair for name in layers or [] for pair in known(name, fused)]
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


@app.command(epilog=console.EXIT_CODES)
def tune(
    shape: Annotated[list[str] | None, typer.Option(help="out_features x in_features, 11008x4096; may be repeated.")] = None,
    model: Annotated[list[str] | None, typer.Option("--model", "--layers", help="Linears of a well-known model, fused and not; may be repeated. Default llama-3-8b.")] = None,
    m: Annotated[list[int] | None, typer.Option(help="Tokens at once; may be repeated. Default 1, 16, 64, 512, 2048.", min=1)] = None,
    values: Annotated[list[str] | None, typer.Option(help="fp16, bf16, int8, int4; may be repeated. Default fp16, int8, int4.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the activations: fp32, bf16 or fp16.")] = "bf16",
    rank: Annotated[int, typer.Option(help="Rank of the sign term, and lower ones; 0 = none.", min=0)] = 1,
    group_size: Annotated[int, typer.Option(help="Inputs a scale covers; 0 = one a row.")] = 128,
    seconds: Annotated[float, typer.Option(help="Time spent on a configuration, at least.", min=0.0)] = 0.1,
    out: Annotated[Path | None, typer.Option(help="The folder to write; default $SLAB_KERNELS_CONFIGS or ~/.config/slab_kernels.")] = None,
    device: Device = "auto",
    json: Json = False,
) -> Outcome:
    """Time tiles of the Triton kernels on this GPU and write those that beat the shipped ones to your own file."""
    from . import machine, tuning
    from .backends.triton import configs
    from .format import INTEGER_RANGES, PackedLayout
    from .layer_shapes import layers

    kind, names = torch_dtype(dtype), model or ([] if shape else ["llama-3-8b"])
    shapes = [parse_shape(text) for text in shape or []] + [pair for name in names for fused in (True, False) for pair in layers(name, fused)]
    layouts = [
        PackedLayout(n, k, v, (group_size or None) if v in INTEGER_RANGES else None, rank)
        for n, k in dict.fromkeys(shapes) for v in dict.fromkeys(values or ["fp16", "int8", "int4"])
    ]  # fmt: skip
    gpu, clock, weights = tuning.gpu(device, seconds)
    problems = tuning.problems(layouts, m or [1, 16, 64, 512, 2048], kind, gpu)
    folder = out or configs.user_folder()
    results = tuning.run(problems, gpu, clock, weights, folder, console.say)
    path = folder / configs.file_name(gpu.name)
    rows = [configs.row_to(result.row) for result in results if result.tuned]
    data = {"device": machine.one_line(), "file": str(path), "rows": rows, "results": [result.to_dict() for result in results]}

    def show() -> None:
        print(data["device"])
        console.print_table(tuning.COLUMNS, tuning.table(results))
        used = "" if folder == configs.user_folder() else f"; {configs.ENVIRONMENT}={folder} makes them used"
        print(f"{len(rows)} of {len(results)} defaults beaten; rows in {path}{used}" if rows else "no default was beaten by more than the noise")

    return Outcome(data, show)


@app.command(epilog=console.EXIT_CODES)
def info(
    support: Annotated[bool, typer.Option("--support", help="Instead: what every backend runs, on whatever machine.")] = False,
    json: Json = False,
) -> Outcome:
    """Versions, devices, and which backends work here and why the others do not."""
    from . import machine

    if support:
        from .support import answers, markdown

        return Outcome({"support": [answer.to_dict() for answer in answers()]}, lambda: print(markdown(), end=""))
    data = machine.information()

    def show() -> None:
        console.print_pairs([(name, version or "not installed") for name, version in data["versions"].items()], "versions")
        devices = ((d["device"], ", ".join(f"{v}" if k == "name" else f"{k} {v}" for k, v in d.items() if k != "device")) for d in data["devices"])
        console.print_pairs(devices, "devices")
        rows = [
            (f"{name} on {kind}", "works" if not reasons else "no: " + "; ".join(reasons))
            for name, table in data["backends"].items()
            for kind, reasons in table.items()
        ]
        console.print_pairs([*rows, ("CUDA kernels", data["cuda_kernels"])], "backends, in order of preference")
        console.print_pairs(
            [(name, f"{data['variables'][name] or 'not set'} ({what})") for name, what in machine.VARIABLES.items()], "environment"
        )

    return Outcome(data, show)


@app.command(epilog=console.EXIT_CODES)
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
    gpu: Annotated[str | None, typer.Option(help="Also the CUDA kernels' plan on a GPU that need not be here: A100, H200.")] = None,
    json: Json = False,
) -> Outcome:
    """Which backend runs a problem and how, and why each other one does not."""
    from . import dispatch
    from .backends.base import LinearProblem
    from .format import INTEGER_RANGES, PackedLayout
    from .pipeline import resolve_device

    (n, k), kind = parse_shape(shape), torch_dtype(dtype)
    layout = PackedLayout(n, k, values, (group_size or None) if values in INTEGER_RANGES else None, rank, adapter_rank)
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
        print(f"{n}×{k}, m={m}, values {values}, rank {rank}, {dtype} activations on {problem.device}: {chosen}")
        for name, why in reasons.items():
            status = "chosen" if name == chosen else "; ".join(why) if why else "can run it, stands later in the order"
            print(f"  {name:<10} {status}")
        for text in filter(None, (plan, elsewhere)):
            print(text)

    return Outcome(data, show)


@app.command(epilog=console.EXIT_CODES)
def train(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder written by compress.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    text: Text = "stdlib",
    steps: Annotated[int, typer.Option(help="Steps of Adam.")] = 200,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 8,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    samples: Annotated[int, typer.Option(help="Windows of text, one in sixteen held back to judge by.")] = 512,
    rate: Annotated[float, typer.Option(help="Largest step.")] = 3e-4,
    adapter_rank: Annotated[int, typer.Option(help="Add adapters P Qᵀ of this rank to layers that have none.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Which windows are drawn.")] = 0,
    device: Device = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    json: Json = False,
) -> Outcome:
    """Train the adapters P Qᵀ of a compressed model on a text; everything else stays as it is."""
    from .pipeline import resolve_device
    from .training import Training, train

    settings = Training(steps, batch, window, samples, rate, adapter_rank, seed=seed)
    data = train(folder, out, text, settings, device=resolve_device(device), resume=resume, say=console.say)

    def show() -> None:
        print(f"{out}: held-back text {data['before']:.4f} -> {data['after']:.4f} nats a token, {data['parameters']} numbers trained")

    return Outcome(data, show)


@app.command(epilog=console.EXIT_CODES)
def inspect(folder: Folder, json: Json = False) -> Outcome:
    """Every layer: shape, method, pattern, rank, error, and bits per weight from the bytes on disk."""
    from .inspection import inspect

    data = inspect(folder)

    def show() -> None:
        _show_layers(data["layers"], f"{folder}: {data['stored']}")
        if data["weights"]:
            print(
                f"{data['weights'] / 1e6:.2f} million weights in {len(data['layers'])} linears, "
                f"{data['bits_per_weight']:.3f} bits per weight on disk; all tensors {data['bytes'] / 1e6:.2f} MB"
            )

    return Outcome(data, show)


@app.command(epilog=console.EXIT_CODES)
def decompress(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder written by compress.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    json: Json = False,
) -> Outcome:
    """Write a plain dense checkpoint with the same function, which any engine opens."""
    from .model import decompress

    decompress(folder, out)
    size = sum(file.stat().st_size for file in out.iterdir() if file.suffix == ".safetensors")
    return Outcome(
        {"folder": str(folder), "out": str(out), "bytes": size}, lambda: print(f"{out}: dense checkpoint, {size / 1e6:.1f} MB")
    )


@app.command(epilog=console.EXIT_CODES)
def report(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Run folders, or JSON of eval, bench or the demo.")],
    out: Annotated[Path, typer.Option(help="Where the PNG files and report.html go.")] = Path("report"),
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Without plots matplotlib is not needed.")] = True,
    json: Json = False,
) -> Outcome:
    """Tables and plots of runs: error by layer, perplexity against bits per weight, speed; PNG and one HTML page."""
    from . import report

    found = report.read(paths)
    written = [str(path) for path in report.write(found, out, plots)]
    data = {"headline": report.headline(found), "results": report.rows(found), "bench": list(found.bench), "written": written}

    def show() -> None:
        if found.results:
            console.print_table(report.COLUMNS, report.table(found), found.model)
        print(data["headline"])
        console.print_pairs([(path, "") for path in written], "written")

    return Outcome(data, show)
