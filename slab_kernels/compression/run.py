"""One run of `compress`, from its checked arguments to the finished folder or model."""

from __future__ import annotations

import copy
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..device import local_device, resolve_device
from ..models.channels import Moves, digest, put_in_orders
from ..models.experts import unstack_named
from ..models.hub import HubArguments
from ..models.model_config import compute_dtype
from ..models.output import OutputFolder
from ..models.packed_config import PACKED_VERSION, TABLES_VERSION
from ..models.source import FolderSource, ModuleSource, Source, open_source
from ..paths import expanded
from ..text.token_ids import text_config
from .arguments import Arguments
from .blockwise import BlockwiseRun
from .budget import BudgetSearch
from .calibration import Calibration, Tokens, usable_tokenizer
from .events import ProgressEvent, Reporter
from .finish import complete, finish, into
from .job import Job
from .orders import find_orders
from .outside import readable
from .record import RunRecord
from .sinks import FinishedBlock, FolderSink, MemorySink
from .team import Team


@dataclass(frozen=True)
class Options:
    """How a run is carried out, as it was given to `compress`."""

    device: str | torch.device
    resume: bool
    progress: Any
    tokenizer: Any
    hub: HubArguments


def run(
    model_or_path: nn.Module | str | Path,
    out: Path | str | None,
    given: Arguments,
    text: Calibration,
    options: Options,
) -> RunRecord | nn.Module:
    """Compress a model into the folder `out`, or in memory where that is None; see `compress`."""
    began = time.perf_counter()
    folder = None if out is None else expanded(out)
    device = resolve_device(local_device(str(options.device)))
    with ExitStack() as stack:
        team = stack.enter_context(Team(device))
        tokenizer = usable_tokenizer(options.tokenizer, options.hub)
        module: nn.Module | None = None
        if isinstance(model_or_path, nn.Module):
            module = model_or_path
            source = open_source(module, options.hub)
        else:
            source = open_source(model_or_path, options.hub)
            if folder is None and isinstance(source, FolderSource):
                folder_source, module = source, source.open_dense()
                source = open_source(module, options.hub)
                source.origin = folder_source.origin
                source.dequantised = folder_source.dequantised
        job = Job.of(source, given.plan, given.skip, device, given.wanted)
        tokens = text.tokens(source, tokenizer)
        job = readable(job, tokens.calibration)
        settings = _settings(job, given, tokens, writes=folder is not None)
        if folder is not None and options.resume and (record := complete(folder, settings)):
            return record
        report = Reporter(options.progress, team.leads)
        stack.callback(report.close)
        state: OutputFolder | None = None
        if folder is not None:
            if team.leads:
                state = stack.enter_context(OutputFolder(folder, settings, options.resume))
            _know_inputs(source, state, team)
        if given.permute:
            job = _in_new_orders(job, tokens, team, state, report)
        if given.bits is not None:
            job = job.with_layers(_search(job, given.bits, tokens, team, state, report))
        sink: MemorySink | FolderSink = MemorySink()
        if folder is not None:
            finished = team.from_leader(lambda: state.blocks if state else [])
            sink = FolderSink(folder, job, state, list(finished))
        _tell_start(job, given, tokens, folder, report)
        blocks = BlockwiseRun(job, tokens, sink, report, team).run()
        record = _record(job, tokens, settings, blocks, time.perf_counter() - began)
        result: RunRecord | nn.Module = record
        if isinstance(sink, MemorySink):
            assert module is not None
            result = into(module, sink, job, record)
        elif team.leads:
            result = finish(sink, record, tokenizer)
        _tell_end(job, record, report)
        return result


def _settings(job: Job, given: Arguments, tokens: Tokens, writes: bool) -> dict[str, Any]:
    """What decides about the result, as records and progress files hold it."""
    return {
        **given.to_dict(),
        "samples": len(tokens.calibration),
        "window": tokens.calibration.longest,
        "seed": given.sampling.seed,
        "held_back": tokens.windows_held_back,
        "products": str(job.products or job.dtype).removeprefix("torch."),
        "skip": list(given.skip),
        "device": job.device.type,
        **tokens.digests(),
        "model_sha256": job.source.fingerprint() if writes else None,
        "format_version": TABLES_VERSION if job.tables else PACKED_VERSION,
        "library": __version__,
    }


def _know_inputs(source: Source, state: OutputFolder | None, team: Team) -> None:
    """Let a run that goes on read the tensors that it began with: `state` keeps their hashes."""

    def hashes() -> dict[str, str]:
        assert state is not None  # The leader has it, and only the leader calls this.
        before = dict(state.inputs)
        if not before:
            state.note_inputs(source.hashes())
        return before

    source.expect(team.from_leader(hashes))


def _in_new_orders(
    job: Job, tokens: Tokens, team: Team, state: OutputFolder | None, report: Reporter
) -> Job:
    """The same job on the model with its channels in new orders, found by one process for all.

    Blocks that are finished must have the same, or the model would be noise: `state` knows theirs.
    """

    def say(sentence: str) -> None:
        report(ProgressEvent("warning", blocks=len(job.blocks), message=f"warning: {sentence}"))

    def find() -> Moves:
        found = find_orders(job, tokens.fitted, say)
        if state is not None:
            state.note_orders(digest(found))
        return found

    found = team.from_leader(find)
    return replace(job, source=job.source.in_orders(found))


def _search(
    job: Job, bits: float, tokens: Tokens, team: Team, state: OutputFolder | None, report: Reporter
) -> dict[str, dict]:
    """The settings of every layer under the budget, searched by one process for all.

    What is found on the way is kept in `state`, and an interrupted search goes on from there.
    """

    def open_model() -> nn.Module:
        source = job.source
        if isinstance(source, ModuleSource):
            model = copy.deepcopy(source.dense)
        else:
            assert isinstance(source, FolderSource)
            model = source.open_dense()
        put_in_orders(model, source.moves)
        unstack_named(model, job.shapes)
        dtype = compute_dtype(source.config, job.device)
        return model.to(device=job.device, dtype=dtype).eval()

    def tell(message: str) -> None:
        report(ProgressEvent("budget", message=message))

    def find() -> dict[str, dict]:
        found = BudgetSearch(open_model, job.shapes, job.plan.usual, tokens.fitted, tell)
        if state is not None:
            found.known, found.note = state.search, state.note_search
        return found.best(bits)

    return team.from_leader(find)


def _tell_start(
    job: Job, given: Arguments, tokens: Tokens, folder: Path | None, report: Reporter
) -> None:
    text = tokens.calibration
    spread = "" if text.shortest == text.longest else f"{text.shortest} to "
    blocks, judging = len(job.blocks), tokens.windows_held_back
    preset = f"preset {given.preset}, " if given.preset else ""
    message = (
        f"compressing {job.source.name}: {preset}{blocks} blocks, {text.tokens} calibration tokens "
        f"in {len(text)} windows of {spread}{text.longest}, {judging or 'none'} of them held back "
        "to judge by"
    )
    report(ProgressEvent("start", blocks=blocks, message=message))
    for left_out in (*job.notes, *job.source.left_out(folder)):
        report(ProgressEvent("warning", blocks=blocks, message=f"warning: {left_out}"))


def _tell_end(job: Job, record: RunRecord, report: Reporter) -> None:
    message = (
        f"done: {record.bits_per_weight:.3f} bits per weight, {record.named_error}, "
        f"{record.seconds:.0f} s"
    )
    blocks, layers = len(job.blocks), len(record.layers)
    report(ProgressEvent("done", blocks, blocks, layers, layers, message=message))


def _record(
    job: Job,
    tokens: Tokens,
    settings: dict[str, Any],
    blocks: list[FinishedBlock],
    seconds: float,
) -> RunRecord:
    """The record of the run, as slab_run.json will hold it."""
    import transformers

    texts = [tokens.calibration, tokens.heldout]
    texts += [tokens.fitted] if job.plan.dense_stream else []
    texts += [tokens.held_back] if job.plan.dense_target else []
    numbers = sum(text.tokens for text in texts if text is not None)
    width = getattr(text_config(job.source.model), "hidden_size", 0) or 0
    layers = {name: own for name in job.names if (own := job.plan.own(name))}
    return RunRecord(
        model=job.source.name,
        origin=dict(job.source.origin),
        dequantised=job.source.dequantised,
        settings=settings | {"layers": layers} | tokens.names(),
        stored="packed" if job.plan.usual.packed else "dense",
        layers=[layer for block in blocks for layer in block.layers],
        tokens=tokens.calibration.tokens,
        texts=tokens.read,
        hidden_state_bytes=numbers * width * job.dtype.itemsize,
        seconds=seconds,
        versions={
            "slab_kernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        matching=[block.match for block in blocks if block.match is not None],
        experts=[record for block in blocks for record in block.experts],
        ignored_tensors=job.source.ignored,
        held_back=tokens.windows_held_back,
    )
