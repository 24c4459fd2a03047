"""The commands that look at a model folder: eval, inspect, check."""

from __future__ import annotations

from typing import Any

import typer

from . import console, options, task_options
from .console import Outcome
from .layers import show_layers
from .opening import Opening, of_against, open_model
from .progress import Progress


def evaluate(
    folder: options.Folder,
    text: options.Text = "stdlib:heldout",
    field: options.Field = None,
    window: options.EvalWindow = None,
    max_tokens: options.MaxTokens = 0,
    against: options.Against = None,
    against_revision: options.AgainstRevision = None,
    against_subfolder: options.AgainstSubfolder = None,
    tasks: task_options.Tasks = None,
    task_files: task_options.TaskFiles = None,
    limit: task_options.Limit = None,
    num_fewshot: task_options.Fewshot = None,
    apply_chat_template: task_options.ChatTemplate = False,
    batch_size: task_options.BatchSize = None,
    output_path: task_options.OutputPath = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    backend: options.Backend = None,
    prefill: options.Prefill = None,
    activations: options.Activations = None,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    token: options.Token = None,
    trust_remote_code: options.Trust = False,
    no_verify: options.NoVerify = False,
    json: options.Json = False,
) -> Outcome:
    """Perplexity per token of a compressed or dense model on a text, its distance from the dense
    model's predictions, or its scores in tasks of lm-eval."""
    from ..evaluate.against import compare
    from ..evaluate.perplexity import perplexity
    from ..models.hub import HubArguments
    from ..models.source import open_source
    from ..text.source import read_text
    from ..text.tokenizer import tokenize
    from ..text.windows import CHARACTERS_PER_TOKEN

    for_tasks = {
        "task_files": task_files,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template or None,
        "batch_size": batch_size,
        "output_path": output_path,
    }
    given = {name: value for name, value in for_tasks.items() if value is not None}
    if tasks is None and given:
        named = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise typer.BadParameter(f"for --tasks, which is not given: {named}")
    if tasks is not None and against is not None:
        raise typer.BadParameter("--against compares on a text, and --tasks takes none; give one")
    hub = HubArguments(revision, subfolder, token, trust_remote_code)
    beside = of_against(hub, against, against_revision, against_subfolder)
    with Progress("eval", "windows" if against is None else "steps") as progress:
        # What cannot be the dense model is refused before anything is opened.
        dense = None if against is None else open_source(against, beside)
        how = Opening(device, dtype, backend, prefill, activations, hub, no_verify)
        if tasks is not None:
            return _tasks(folder, how, tasks, given)
        opened = open_model(folder, how)
        content = read_text(text, tokenizer=opened.tokenizer, field=field)
        if max_tokens > 0:
            content = content[: max_tokens * CHARACTERS_PER_TOKEN]
            tokens = tokenize(opened.tokenizer, content)[:max_tokens]
            content = opened.tokenizer.decode(tokens)
        read = (opened.tokenizer, content, window, progress)
        if dense is None:
            measured = perplexity(opened.model, *read)
        else:
            measured = {"against": against} | compare(opened.model, dense, *read)
    data = opened.facts_of_the_run() | {"text": text} | measured

    def show() -> None:
        print(
            f"{folder}: perplexity {data['perplexity']:.4f} per token on {text} "
            f"({data['tokens']} tokens in {data['windows']} windows of {data['window']})"
        )
        if dense is not None:
            print(_distance(data))
        bits = data["bits_per_weight"]
        print(f"{'' if bits is None else f'{bits:.3f} stored bits per weight; '}{opened.totals}")

    return Outcome(data, show)


def _distance(data: dict[str, Any]) -> str:
    """What `compare` found, as lines for people."""
    ratio, error = data["perplexity_ratio"], data["perplexity_ratio_stderr"]
    spread = "" if error is None else f" ± {error:.4f} (standard error)"
    return (
        f"against {data['against']}, perplexity {data['dense_perplexity']:.4f}: "
        f"ratio {ratio:.4f}{spread}\n"
        f"KL(dense || this) {data['kl']:.5f} nats per token, 99th percentile {data['kl_p99']:.4f}; "
        f"same most probable token {100 * data['top1']:.2f} %"
    )


def _tasks(folder: str, how: Opening, tasks: str, given: dict[str, Any]) -> Outcome:
    """The scores of a model in the tasks that `tasks` names, separated by commas.

    given: the other settings of a `TaskRun`. What can be wrong with them is said before the model
    is loaded.
    """
    from ..evaluate.lm_eval import TaskRun, run_tasks
    from ..models.folder import hub_folder
    from ..text.tokenizer import open_tokenizer

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise typer.BadParameter("--tasks names no task; for example --tasks arc_easy,piqa")
    wanted = TaskRun(names, **given)
    tokenizer = open_tokenizer(hub_folder(folder, how.hub), how.hub.trust_remote_code)
    manager = wanted.check(tokenizer)
    opened = open_model(folder, how)
    scores = run_tasks(opened.model, tokenizer, wanted, folder, manager)
    rows = [
        (task, metric, f"{value:.4f}")
        for task, metrics in scores.tasks.items()
        for metric, value in metrics.items()
    ]
    if wanted.output_path is not None and scores.file is None:
        console.say(f"warning: lm-eval wrote no results file to {wanted.output_path}")

    def show() -> None:
        console.print_table(("task", "metric", "value"), rows, opened.facts["folder"])
        if scores.file is not None:
            print(f"results of lm-eval: {scores.file}")

    file = None if scores.file is None else str(scores.file)
    return Outcome(opened.facts_of_the_run() | {"tasks": scores.tasks, "results_file": file}, show)


def inspect(
    folder: options.Folder,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    token: options.Token = None,
    json: options.Json = False,
) -> Outcome:
    """Every layer: shape, method, pattern, rank, error, and bits per weight from the bytes on
    disk; what the whole folder stores."""
    from ..evaluate.inspect import inspect
    from ..format import Padding
    from ..models.folder import hub_folder
    from ..models.hub import HubArguments
    from ..models.totals import read_totals

    path = hub_folder(folder, HubArguments(revision, subfolder, token))
    data, totals = inspect(path) | {"folder": folder}, read_totals(path)

    def show() -> None:
        preset = f", preset {data['preset']}" if data["preset"] else ""
        show_layers(data["layers"], f"{folder}: {data['stored']}{preset}")
        if data["weights"]:
            print(
                f"{data['weights'] / 1e6:.2f} million weights in {len(data['layers'])} linears, "
                f"{data['bits_per_weight']:.3f} bits per weight on disk"
            )
        for padding in data["padding"]:
            print(f"padded inputs: {Padding(**padding)}")
        for table in data["embeddings"]:
            shared = f", shared with {table['tied']}" if table["tied"] else ""
            print(
                f"{table['name']} {'×'.join(map(str, table['shape']))} in int8 rows{shared}: "
                f"{table['bytes'] / 1e6:.2f} MB"
            )
        print(totals)

    return Outcome(data, show)


def check(
    folder: options.Packed,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    token: options.Token = None,
    trust_remote_code: options.Trust = False,
    json: options.Json = False,
) -> Outcome:
    """Whether the transformers installed here opens a packed folder with the weights in it, and not
    with random ones."""
    from ..engines.transformers import compare

    data = compare(folder, trust_remote_code, revision, subfolder, token)

    def show() -> None:
        print(
            f"{folder}: transformers {data['transformers']} opens it with its own weights "
            f"({data['tensors']} tensors, bit by bit), in programs that import slab_kernels; "
            "any other opens it with random ones"
        )

    return Outcome(data, show)
