"""The command that lets a model write: generate, alone or beside the dense model."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import typer

from ..errors import ArgumentError
from . import console, options
from .console import Outcome
from .opening import Opened, Opening, of_against, open_model
from .progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.hub import HubArguments
    from ..models.source import FolderSource

BATCH = 8  # texts that are generated together, where nothing else is said


def generate(
    folder: options.Folder,
    prompt: options.Prompt = "def main():\n    ",
    chat: options.Chat = False,
    tokens: options.NewTokens = 64,
    against: options.Beside = None,
    against_revision: options.AgainstRevision = None,
    against_subfolder: options.AgainstSubfolder = None,
    batch: options.Together = None,
    temperature: options.Temperature = 0.0,
    seed: options.DrawSeed = 0,
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
    """Continue a prompt from packed weights, or answer it as a chat model; beside the dense model,
    with the speed of both."""
    from ..evaluate.generation import continuation
    from ..models.hub import HubArguments

    hub = HubArguments(revision, subfolder, token, trust_remote_code)
    beside = of_against(hub, against, against_revision, against_subfolder)
    how = Opening(device, dtype, backend, prefill, activations, hub, no_verify)
    if against is not None:
        if temperature:
            raise typer.BadParameter("--against compares greedy texts; leave --temperature out")
        return _Beside(prompt, chat, tokens, batch or BATCH, how, beside).compare(folder, against)
    if batch is not None:
        raise typer.BadParameter("--batch is for --against, which is not given")
    with Progress("generate", "steps"):
        opened = open_model(folder, how)
        given = _given(opened, prompt, chat)
        new, seconds = continuation(
            opened.model, opened.tokenizer, given, tokens, temperature, seed
        )
    text = opened.tokenizer.decode(new, skip_special_tokens=True)
    data = opened.facts_of_the_run() | {
        "prompt": prompt,
        "chat": chat,
        "text": text,
        "tokens": len(new),
        "tokens_per_second": len(new) / seconds,
    }

    def show() -> None:
        print(text if chat else prompt + text)
        console.say(
            f"[{len(new)} tokens, {len(new) / seconds:.1f} tokens per second, first call included; "
            f"{opened.totals}]"
        )

    return Outcome(data, show)


def _given(opened: Opened, prompt: str, chat: bool) -> str | Tensor:
    from ..evaluate.generation import chat_prompt

    return chat_prompt(opened.tokenizer, prompt) if chat else prompt


class _Beside:
    """Two models that answer the same prompt one after the other: one at a time is in memory."""

    def __init__(
        self, prompt: str, chat: bool, tokens: int, batch: int, how: Opening, hub: HubArguments
    ):
        if tokens < 3:
            raise typer.BadParameter(
                f"--tokens {tokens}: --against times decoding, which needs 3 new tokens at least"
            )
        self.prompt, self.chat, self.tokens, self.how = prompt, chat, tokens, how
        self.beside = how._replace(hub=hub)
        self.batches = sorted({1, batch})
        self.runs = 2 * (1 + len(self.batches))

    def compare(self, folder: str, against: str) -> Outcome:
        """Let the compressed model write and be timed, then the dense one."""
        from ..models.source import open_source

        with Progress("generate", "runs") as progress:
            # What is no dense model is refused here.
            source = open_source(against, self.beside.hub)
            opened = open_model(folder, self.how)
            self._check_same(opened, source)
            totals = [opened.totals]
            ours = self._row(opened, progress, 0)
            facts = opened.facts_of_the_run()
            del opened
            gc.collect()
            other = open_model(against, self.beside)
            totals.insert(0, other.totals)
            dense = self._row(other, progress, self.runs // 2)
        data = facts | {
            "prompt": self.prompt,
            "chat": self.chat,
            "against": against,
            "text": ours["continuation"],
            "tokens": ours["new_tokens"],
            "tokens_per_second": ours["tokens_per_second"],
            "results": [dense, ours],
        }

        def show() -> None:
            names = [
                f"{row['folder']} ({size})" for row, size in zip((dense, ours), totals, strict=True)
            ]
            before = "" if self.chat else self.prompt
            console.print_beside(names, [before + row["continuation"] for row in (dense, ours)])
            console.print_table(*_speeds(dense, ours))
            console.print_table(*_splits(dense, ours))

        return Outcome(data, show)

    def _check_same(self, opened: Opened, source: FolderSource) -> None:
        """Raises: ArgumentError for a dense model of another vocabulary or tokenizer."""
        from ..evaluate.against import check_vocabulary

        check_vocabulary(opened.model, source.model)
        theirs = source.tokenizer()
        texts = [self.prompt]
        if opened.tokenizer(texts)["input_ids"] != theirs(texts)["input_ids"]:
            raise ArgumentError(
                f"the tokenizer in {source.checkpoint.folder} makes other tokens of this prompt; "
                "give the dense model that this one was compressed from"
            )

    def _row(self, opened: Opened, progress: Progress, done: int) -> dict[str, Any]:
        """What one model wrote, and how fast: a row as `report` reads it."""
        from ..evaluate.decoding import decoding
        from ..evaluate.generation import continuation

        given = _given(opened, self.prompt, self.chat)
        new, _ = continuation(opened.model, opened.tokenizer, given, self.tokens)
        progress(done + 1, self.runs)
        timed = []
        for batch in self.batches:
            timed.append(decoding(opened.model, opened.tokenizer, given, self.tokens, batch))
            progress(done + 1 + len(timed), self.runs)
        return opened.facts_of_the_run() | {
            "continuation": opened.tokenizer.decode(new, skip_special_tokens=True),
            "new_tokens": len(new),
            "tokens_per_second": timed[0]["tokens_per_second"],
            "decoding": timed,
        }


def _speeds(dense: dict[str, Any], ours: dict[str, Any]) -> tuple[tuple, list[tuple]]:
    """The table of speeds: a row for each number of texts."""
    rows = [
        (
            str(theirs["batch"]),
            f"{theirs['tokens_per_second']:.1f}",
            f"{own['tokens_per_second']:.1f}",
            f"{own['tokens_per_second'] / theirs['tokens_per_second']:.2f}×",
            f"{theirs['prompt_seconds']:.3f}",
            f"{own['prompt_seconds']:.3f}",
        )
        for theirs, own in zip(dense["decoding"], ours["decoding"], strict=True)
    ]
    head = ("texts at once", "dense tokens/s", "this tokens/s", "ratio", "dense prompt s", "this s")
    return head, rows


def _splits(dense: dict[str, Any], ours: dict[str, Any]) -> tuple[tuple, list[tuple]]:
    """The table of where the time of a step goes, in milliseconds and shares."""
    from ..evaluate.decoding import PARTS

    pairs = zip(dense["decoding"], ours["decoding"], strict=True)
    measured = [
        (f"{name}, {timed['batch']}", timed)
        for pair in pairs
        for name, timed in zip(("dense", "this"), pair, strict=True)
    ]
    rows = [
        (
            name,
            *(
                f"{1e3 * timed['seconds_per_step'] * timed['split'][part]:.2f} ms "
                f"{timed['split'][part]:.0%}"
                for _, timed in measured
            ),
        )
        for part, name in PARTS.items()
    ]
    whole = (f"{1e3 * timed['seconds_per_step']:.2f} ms" for _, timed in measured)
    return ("part of a decode step", *(name for name, _ in measured)), [*rows, ("all", *whole)]
