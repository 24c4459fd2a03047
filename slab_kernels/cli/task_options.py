"""The options of `eval --tasks`, named as those of lm-eval's own command line.

Those of two words are also taken in its spelling, with underscores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .meanings import finite

Tasks = Annotated[
    str | None,
    typer.Option(
        help="Instead of a text: tasks of the lm-evaluation-harness, separated by commas."
    ),
]
TaskFiles = Annotated[
    Path | None,
    typer.Option(
        "--task-files", "--include_path", help="For --tasks: a folder with task files of your own."
    ),
]
Limit = Annotated[
    float | None,
    typer.Option(
        help="For --tasks: so many documents of each, or below 1 that share of them.",
        callback=finite,
    ),
]
Fewshot = Annotated[
    int | None,
    typer.Option(
        "--num-fewshot",
        "--num_fewshot",
        help="For --tasks: worked examples ahead of each question; default: as the task has it.",
        min=0,
    ),
]
ChatTemplate = Annotated[
    bool,
    typer.Option(
        "--apply-chat-template",
        "--apply_chat_template",
        help="For --tasks: put questions into the tokenizer's chat template, examples as turns.",
    ),
]
BatchSize = Annotated[
    str | None,
    typer.Option(
        "--batch-size",
        "--batch_size",
        help="For --tasks: sequences that run together, or auto; default 8.",
    ),
]
OutputPath = Annotated[
    Path | None,
    typer.Option(
        "--output-path",
        "--output_path",
        help="For --tasks: where lm-eval writes its results file: a folder, or a name that ends in "
        ".json, to which it adds the date.",
    ),
]
