"""The command line `slab-kernels`. Every command takes --json: then stdout holds one JSON object and nothing else.

A command builds an `Outcome`; `console.run` prints it and turns failures into one sentence and an exit code. torch and
transformers load inside the commands, so that --help is instant.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..paths import expanded
from . import console
from . import kernels as kernel_commands
from .console import Outcome
from .options import (
    Backend,
    Device,
    Dtype,
    Folder,
    Json,
    NoVerify,
    Packed,
    Text,
    Trust,
    finite,
    method_options,
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


MOST_ROWS = 20  # of a plain table that are printed


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """One command line; returns its exit code."""
    command = typer.main.get_command(app)
    return console.run(
        lambda: command.main(arguments, prog_name="slab-kernels", standalone_mode=False),
        as_json="--json" in arguments,
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"slab-kernels {__version__}")
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@app.command(epilog=console.EXIT_CODES)
def compress(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model folder or the name of one on the Hugging Face hub."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    method: Annotated[
        str,
        typer.Option(
            help="slab (ours), slab-paper, threebasil, hassle-free, sslc, oats, slim, eora, alps, sparsegpt, wanda or magnitude."
        ),
    ] = "slab",
    pattern: Annotated[
        str,
        typer.Option(help="Keep n of m (2:4, 4:8) or remove a share (50%); only 2:4 is packed."),
    ] = "2:4",
    rank: Annotated[
        int, typer.Option(help="Rank of the magnitudes of the sign term (slab methods).")
    ] = 1,
    planes: Annotated[
        int, typer.Option(help="Signs of a pruned entry, 1 to 3, each half a bit a weight (slab).")
    ] = 1,
    values: Annotated[
        str, typer.Option(help="How kept values are stored: fp16, bf16, int8, int4 or int3.")
    ] = "fp16",
    group_size: Annotated[
        int,
        typer.Option(help="Inputs a scale of an integer type covers: 32, 64, 128; 0 = one a row."),
    ] = 128,
    adapter_rank: Annotated[
        int | None,
        typer.Option(help="Rank of the adapter P Qᵀ; default: the method's own, 0 = none.", min=0),
    ] = None,
    adapter_values: Annotated[
        str, typer.Option(help="How P and Q are stored: int8 (an exponent a row) or fp16.")
    ] = "int8",
    match: Annotated[
        int,
        typer.Option(
            help="Transformer matching: epochs of training each block's numbers towards the dense model.",
            min=0,
        ),
    ] = 0,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Stored bits a weight over the whole model; chooses values, planes and rank by layer."
        ),
    ] = None,
    calibration: Text = "stdlib",
    heldout: Annotated[
        str | None, typer.Option(help="Also measure every layer's error on this other text.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Which windows are drawn.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run in OUT.")
    ] = False,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Leave these modules dense, '*.down_proj'; may be repeated."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="A setting of the method, name=value; may be repeated. `slab-kernels info --methods` lists them."
        ),
    ] = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> Outcome:
    """Compress MODEL into the folder OUT, one block in memory at a time."""
    from ..compression.model import compress
    from ..methods import check_options

    out, settings = expanded(out), method_options(option or [])
    check_options(method, settings)  # before they could be taken for other arguments of `compress`
    with console.interruptible(
        lambda: _kept(out / "slab_progress.json", f"finished blocks are in {out}")
    ):
        record = compress(
            model, out, method=method, pattern=pattern, rank=rank, values=values, group_size=group_size or None, planes=planes,
            adapter_rank=adapter_rank, adapter_values=adapter_values, matching=match, bits=bits, calibration=calibration,
            heldout=heldout, samples=samples, window=window, skip=skip, device=device, seed=seed, resume=resume,
            progress=_progress(), trust_remote_code=trust_remote_code, **settings,
        )  # fmt: skip
    data = record.to_dict() | {"folder": str(out)}

    def show() -> None:
        _show_layers(data["layers"], str(out))
        bits, error = data["bits_per_weight"], data["mean_error"]
        print(
            f"{bits:.3f} stored bits per weight, mean error {error:.4f}, {data['seconds']:.0f} s; next: slab-kernels eval {out}"
        )

    return Outcome(data, show)


def _kept(state: Path, what: str) -> str:
    """For an interruption: what a run leaves where its file of progress is there."""
    return (
        f"{what}, and the same command with --resume goes on"
        if state.exists()
        else "nothing was kept"
    )


def _progress() -> Any:
    """A bar on a terminal, one line a layer in a log."""
    return (
        True
        if sys.stderr.isatty()
        else lambda event: console.say(str(event)) if str(event) else None
    )


def _show_layers(layers: list[dict[str, Any]], title: str) -> None:
    """One row a layer; a setting that all layers share stands in the title instead."""
    show = lambda value: (
        "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
    )
    settings = ["method", "pattern", "rank", "values", "group_size"]
    differing = [name for name in settings if len({layer.get(name) for layer in layers}) > 1]
    same = [
        f"{name} {layers[0][name]}"
        for name in settings
        if layers and name not in differing and layers[0].get(name) is not None
    ]
    errors = [
        name
        for name in ("error", "heldout_error")
        if any(layer.get(name) is not None for layer in layers)
    ]
    rows = [
        (layer["name"], "×".join(map(str, layer["shape"])), *(show(layer.get(name)) for name in differing),
         f"{layer['bits_per_weight']:.3f}", *(show(layer[name]) for name in errors))
        for layer in layers
    ]  # fmt: skip
    head = (
        "layer",
        "shape",
        *differing,
        "bits/weight",
        *(name.replace("heldout_error", "held-out error") for name in errors),
    )
    console.print_table(head, rows, ", ".join([title, *same]))


@app.command("eval", epilog=console.EXIT_CODES)
def evaluate(
    folder: Folder,
    text: Text = "stdlib:heldout",
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens a window; default 2048, or the model's positions if fewer.", min=2
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Evaluate only the first so many tokens; 0 = all.", min=0)
    ] = 0,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Instead of a text: tasks of the lm-evaluation-harness, separated by commas."
        ),
    ] = None,
    task_files: Annotated[
        Path | None, typer.Option(help="A folder with task files of your own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="So many documents of each task.", min=1)
    ] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    backend: Backend = None,
    trust_remote_code: Trust = False,
    no_verify: NoVerify = False,
    json: Json = False,
) -> Outcome:
    """Perplexity per token of a compressed or dense model on a text, or its scores in tasks of lm-eval."""
    from ..evaluate import perplexity as evaluate
    from ..text import source as texts

    if tasks is None and (task_files is not None or limit is not None):
        raise typer.BadParameter("--task-files and --limit are for --tasks, which is not given")
    model, tokenizer, facts = _open(folder, device, dtype, backend, trust_remote_code, no_verify)
    if tasks is not None:
        return _tasks(
            model,
            tokenizer,
            facts,
            [name.strip() for name in tasks.split(",") if name.strip()],
            task_files,
            limit,
        )
    content = texts.read_text(text, tokenizer=tokenizer)
    if max_tokens > 0:
        content = tokenizer.decode(
            texts.tokenize(tokenizer, content[: max_tokens * texts.CHARACTERS_PER_TOKEN])[
                :max_tokens
            ]
        )
    data = facts | {"text": text} | evaluate.perplexity(model, tokenizer, content, window)

    def show() -> None:
        bits = (
            ""
            if data["bits_per_weight"] is None
            else f", {data['bits_per_weight']:.3f} stored bits per weight"
        )
        print(
            f"{folder}: perplexity {data['perplexity']:.4f} per token on {text} "
            f"({data['tokens']} tokens in {data['windows']} windows of {data['window']}){bits}"
        )

    return Outcome(data, show)


def _tasks(
    model: Any,
    tokenizer: Any,
    facts: dict[str, Any],
    names: list[str],
    task_files: Path | None,
    limit: int | None,
) -> Outcome:
    from ..evaluate.lm_eval import run_tasks

    if not names:
        raise typer.BadParameter("--tasks names no task; for example --tasks arc_easy,piqa")
    found = run_tasks(model, tokenizer, names, task_files, limit)
    rows = [
        (task, metric, f"{value:.4f}")
        for task, metrics in found.items()
        for metric, value in metrics.items()
    ]
    return Outcome(
        facts | {"tasks": found},
        lambda: console.print_table(("task", "metric", "value"), rows, facts["folder"]),
    )


def _open(
    folder: str, device: str, dtype: str | None, backend: str | None, trust: bool, no_verify: bool
) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer and what is known of a packed or dense folder; a CPU computes in fp32 unless told otherwise."""
    import torch

    from ..device import resolve_device
    from ..evaluate.inspect import inspect
    from ..models.folder import hub_folder
    from ..models.load import load
    from ..models.source import open_source
    from ..text.source import open_tokenizer

    _force(backend)
    _skip_checksums(no_verify)
    where = resolve_device(device)
    kind = (
        torch_dtype(dtype) if dtype is not None else torch.float32 if where.type == "cpu" else None
    )
    path = hub_folder(folder)
    seen = inspect(path)
    if seen["stored"] == "packed":
        model = load(path, device=where, dtype=kind, trust_remote_code=trust)
    else:
        model = open_source(path, trust).open_dense().to(device=where, dtype=kind)
    facts = {
        "folder": folder,
        "method": seen["method"] or "dense",
        "stored": seen["stored"],
        "bits_per_weight": seen["bits_per_weight"],
    }
    facts |= {"device": str(where), "dtype": str(model.dtype).removeprefix("torch.")}
    return model, open_tokenizer(path, trust), facts


def _skip_checksums(wanted: bool) -> None:
    from ..models.folder import VERIFY

    if wanted:
        os.environ[VERIFY] = "0"


def _force(backend: str | None) -> None:
    from ..backends import dispatch

    if backend:
        dispatch.backend(backend)  # an unknown name fails here, before a model is loaded
        os.environ[dispatch.ENVIRONMENT] = backend


@app.command(epilog=console.EXIT_CODES)
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "def main():\n    ",
    tokens: Annotated[int, typer.Option(help="New tokens.", min=1)] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 = always the most probable token.", min=0.0, callback=finite)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperature above 0.")] = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    backend: Backend = None,
    trust_remote_code: Trust = False,
    no_verify: NoVerify = False,
    json: Json = False,
) -> Outcome:
    """Continue a prompt from packed weights."""
    from ..evaluate.generation import continuation

    model, tokenizer, facts = _open(folder, device, dtype, backend, trust_remote_code, no_verify)
    new, seconds = continuation(model, tokenizer, prompt, tokens, temperature, seed)
    text = tokenizer.decode(new, skip_special_tokens=True)
    data = facts | {
        "prompt": prompt,
        "text": text,
        "tokens": len(new),
        "tokens_per_second": len(new) / seconds,
    }

    def show() -> None:
        print(prompt + text)
        console.say(
            f"[{len(new)} tokens, {len(new) / seconds:.1f} tokens per second, first call included]"
        )

    return Outcome(data, show)


for command in (
    kernel_commands.bench,
    kernel_commands.tune,
    kernel_commands.info,
    kernel_commands.explain,
):
    app.command(epilog=console.EXIT_CODES)(command)


@app.command(epilog=console.EXIT_CODES)
def train(
    folder: Packed,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    text: Text = "stdlib",
    steps: Annotated[int, typer.Option(help="Steps of Adam.")] = 200,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 8,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    samples: Annotated[
        int, typer.Option(help="Windows of text, one in sixteen held back to judge by.")
    ] = 512,
    rate: Annotated[float, typer.Option(help="Largest step.")] = 3e-4,
    adapter_rank: Annotated[
        int, typer.Option(help="Add adapters P Qᵀ of this rank to layers that have none.", min=0)
    ] = 0,
    seed: Annotated[int, typer.Option(help="Which windows are drawn.")] = 0,
    device: Device = "cpu",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> Outcome:
    """Train the adapters P Qᵀ of a compressed model on a text; everything else stays as it is."""
    from ..compression.training import Training, state_file, train
    from ..device import resolve_device

    settings = Training(steps, batch, window, samples, rate, adapter_rank, seed=seed)
    out = expanded(out)
    with console.interruptible(
        lambda: _kept(state_file(out), f"the training so far is in {state_file(out)}")
    ):
        data = train(
            folder,
            out,
            text,
            settings,
            device=resolve_device(device),
            resume=resume,
            say=console.say,
            trust_remote_code=trust_remote_code,
        )

    def show() -> None:
        print(
            f"{out}: held-back text {data['before']:.4f} -> {data['after']:.4f} nats a token, {data['parameters']} numbers trained"
        )

    return Outcome(data, show)


@app.command(epilog=console.EXIT_CODES)
def inspect(folder: Folder, json: Json = False) -> Outcome:
    """Every layer: shape, method, pattern, rank, error, and bits per weight from the bytes on disk."""
    from ..evaluate.inspect import inspect

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
def check(folder: Packed, trust_remote_code: Trust = False, json: Json = False) -> Outcome:
    """Whether the transformers installed here opens a packed folder with the weights in it, and not with random ones."""
    from ..engines.transformers import compare

    data = compare(folder, trust_remote_code)

    def show() -> None:
        print(
            f"{folder}: transformers {data['transformers']} opens it with its own weights ({data['tensors']} tensors, bit by bit), "
            "in programs that import slab_kernels; any other opens it with random ones"
        )

    return Outcome(data, show)


@app.command(epilog=console.EXIT_CODES)
def decompress(
    folder: Packed,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the weights: fp32, bf16 or fp16; default: what config.json names."),
    ] = None,
    trust_remote_code: Trust = False,
    no_verify: NoVerify = False,
    json: Json = False,
) -> Outcome:
    """Write a plain dense checkpoint with the same function, which any engine opens."""
    from ..models.decompress import decompress

    out = expanded(out)
    kind = torch_dtype(dtype) if dtype else None
    skipped = decompress(
        folder, out, dtype=kind, verify=not no_verify, trust_remote_code=trust_remote_code
    )
    for name in skipped:
        console.say(f"warning: left out {name}")
    size = sum(file.stat().st_size for file in out.iterdir() if file.suffix == ".safetensors")
    data = {"folder": str(folder), "out": str(out), "bytes": size, "left_out": skipped}
    return Outcome(data, lambda: print(f"{out}: dense checkpoint, {size / 1e6:.1f} MB"))


@app.command(epilog=console.EXIT_CODES)
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Run folders, or JSON of eval, bench, the demo or another benchmark.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the PNG files and report.html go.")] = Path(
        "report"
    ),
    plots: Annotated[
        bool, typer.Option("--plots/--no-plots", help="Without plots matplotlib is not needed.")
    ] = True,
    json: Json = False,
) -> Outcome:
    """Tables and plots of runs: error by layer, perplexity against bits per weight, speed; PNG and one HTML page."""
    from ..report import tables as report

    out = expanded(out)
    found = report.read(paths)
    written = [str(path) for path in report.write(found, out, plots)]
    data = {"headline": report.headline(found), "results": report.rows(found), "bench": list(found.bench), "written": written,
            "tables": [asdict(table) for table in found.tables]}  # fmt: skip

    def show() -> None:
        if found.results:
            console.print_table(report.COLUMNS, report.table(found), found.model)
        for table in found.tables:
            console.print_table(table.columns, table.rows[:MOST_ROWS], table.title)
            if len(table.rows) > MOST_ROWS:
                print(f"and {len(table.rows) - MOST_ROWS} more rows on the page\n")
        print(data["headline"])
        console.print_pairs([(path, "") for path in written], "written")

    return Outcome(data, show)
