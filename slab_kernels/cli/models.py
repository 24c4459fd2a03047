"""The commands that open a model folder: eval, generate, inspect, check."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import typer

from . import console, options
from .console import Outcome
from .layers import show_layers
from .options import torch_dtype
from .progress import Progress


class _Opened(NamedTuple):
    """A model, its tokenizer, and what its folder is known to be."""

    model: Any
    tokenizer: Any
    facts: dict[str, Any]


def _open(
    folder: str,
    device: str,
    dtype: str | None,
    backend: str | None,
    prefill: str | None,
    trust: bool,
    no_verify: bool,
) -> _Opened:
    """A packed or dense folder; a CPU computes in fp32 unless told otherwise."""
    import torch

    from ..device import resolve_device
    from ..evaluate.inspect import inspect
    from ..models.folder import hub_folder
    from ..models.load import load
    from ..models.source import open_source
    from ..nn.preparation import dense_copy_bytes
    from ..text.source import open_tokenizer

    _force(backend)
    _skip_checksums(no_verify)
    where = resolve_device(device)
    kind = torch.float32 if where.type == "cpu" else None
    if dtype is not None:
        kind = torch_dtype(dtype)
    path = hub_folder(folder)
    seen = inspect(path)
    if seen["stored"] == "packed":
        model = load(path, device=where, dtype=kind, trust_remote_code=trust, prefill=prefill)
    else:
        model = open_source(path, trust).open_dense().to(device=where, dtype=kind)
    facts = {
        "folder": folder,
        "method": seen["method"] or "dense",
        "stored": seen["stored"],
        "bits_per_weight": seen["bits_per_weight"],
        "bytes": seen["bytes"],
        "dense_copy_bytes": dense_copy_bytes(model),
        "device": str(where),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return _Opened(model, open_tokenizer(path, trust), facts)


def _skip_checksums(wanted: bool) -> None:
    from ..models.folder import VERIFY

    if wanted:
        os.environ[VERIFY] = "0"


def _force(backend: str | None) -> None:
    from ..backends import dispatch

    if backend:
        dispatch.backend(backend)  # an unknown name fails here, before a model is loaded
        os.environ[dispatch.ENVIRONMENT] = backend


def evaluate(
    folder: options.Folder,
    text: options.Text = "stdlib:heldout",
    window: options.EvalWindow = None,
    max_tokens: options.MaxTokens = 0,
    tasks: options.Tasks = None,
    task_files: options.TaskFiles = None,
    limit: options.Limit = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    backend: options.Backend = None,
    prefill: options.Prefill = None,
    trust_remote_code: options.Trust = False,
    no_verify: options.NoVerify = False,
    json: options.Json = False,
) -> Outcome:
    """Perplexity per token of a compressed or dense model on a text, or its scores in tasks of
    lm-eval."""
    from ..evaluate.perplexity import perplexity
    from ..text import source as texts

    if tasks is None and (task_files is not None or limit is not None):
        raise typer.BadParameter("--task-files and --limit are for --tasks, which is not given")
    with Progress("eval", "windows") as progress:
        opened = _open(folder, device, dtype, backend, prefill, trust_remote_code, no_verify)
        if tasks is not None:
            return _tasks(opened, tasks, task_files, limit)
        content = texts.read_text(text, tokenizer=opened.tokenizer)
        if max_tokens > 0:
            content = content[: max_tokens * texts.CHARACTERS_PER_TOKEN]
            tokens = texts.tokenize(opened.tokenizer, content)[:max_tokens]
            content = opened.tokenizer.decode(tokens)
        measured = perplexity(opened.model, opened.tokenizer, content, window, progress=progress)
    data = opened.facts | {"text": text} | measured

    def show() -> None:
        bits = data["bits_per_weight"]
        stored = "" if bits is None else f", {bits:.3f} stored bits per weight"
        print(
            f"{folder}: perplexity {data['perplexity']:.4f} per token on {text} "
            f"({data['tokens']} tokens in {data['windows']} windows of {data['window']}){stored}"
        )

    return Outcome(data, show)


def _tasks(opened: _Opened, tasks: str, task_files: Path | None, limit: int | None) -> Outcome:
    """The scores of a model in the tasks that `tasks` names, separated by commas."""
    from ..evaluate.lm_eval import run_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter("--tasks names no task; for example --tasks arc_easy,piqa")
    found = run_tasks(opened.model, opened.tokenizer, names, task_files, limit)
    rows = [
        (task, metric, f"{value:.4f}")
        for task, metrics in found.items()
        for metric, value in metrics.items()
    ]

    def show() -> None:
        console.print_table(("task", "metric", "value"), rows, opened.facts["folder"])

    return Outcome(opened.facts | {"tasks": found}, show)


def generate(
    folder: options.Folder,
    prompt: options.Prompt = "def main():\n    ",
    chat: options.Chat = False,
    tokens: options.NewTokens = 64,
    temperature: options.Temperature = 0.0,
    seed: options.DrawSeed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    backend: options.Backend = None,
    prefill: options.Prefill = None,
    trust_remote_code: options.Trust = False,
    no_verify: options.NoVerify = False,
    json: options.Json = False,
) -> Outcome:
    """Continue a prompt from packed weights, or answer it as a chat model."""
    from ..evaluate.generation import chat_prompt, continuation

    with Progress("generate", "steps"):
        opened = _open(folder, device, dtype, backend, prefill, trust_remote_code, no_verify)
        given = chat_prompt(opened.tokenizer, prompt) if chat else prompt
        new, seconds = continuation(
            opened.model, opened.tokenizer, given, tokens, temperature, seed
        )
    text = opened.tokenizer.decode(new, skip_special_tokens=True)
    data = opened.facts | {
        "prompt": prompt,
        "chat": chat,
        "text": text,
        "tokens": len(new),
        "tokens_per_second": len(new) / seconds,
    }

    def show() -> None:
        print(text if chat else prompt + text)
        console.say(
            f"[{len(new)} tokens, {len(new) / seconds:.1f} tokens per second, first call included]"
        )

    return Outcome(data, show)


def inspect(folder: options.Folder, json: options.Json = False) -> Outcome:
    """Every layer: shape, method, pattern, rank, error, and bits per weight from the bytes on
    disk."""
    from ..evaluate.inspect import inspect

    data = inspect(folder)

    def show() -> None:
        show_layers(data["layers"], f"{folder}: {data['stored']}")
        if data["weights"]:
            print(
                f"{data['weights'] / 1e6:.2f} million weights in {len(data['layers'])} linears, "
                f"{data['bits_per_weight']:.3f} bits per weight on disk; "
                f"all tensors {data['bytes'] / 1e6:.2f} MB"
            )
        for table in data["embeddings"]:
            shared = f", shared with {table['tied']}" if table["tied"] else ""
            print(
                f"{table['name']} {'×'.join(map(str, table['shape']))} in int8 rows{shared}: "
                f"{table['bytes'] / 1e6:.2f} MB"
            )

    return Outcome(data, show)


def check(
    folder: options.Packed, trust_remote_code: options.Trust = False, json: options.Json = False
) -> Outcome:
    """Whether the transformers installed here opens a packed folder with the weights in it, and not
    with random ones."""
    from ..engines.transformers import compare

    data = compare(folder, trust_remote_code)

    def show() -> None:
        print(
            f"{folder}: transformers {data['transformers']} opens it with its own weights "
            f"({data['tensors']} tensors, bit by bit), in programs that import slab_kernels; "
            "any other opens it with random ones"
        )

    return Outcome(data, show)
