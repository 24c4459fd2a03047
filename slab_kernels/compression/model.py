"""The model level: compress a Hugging Face decoder, load it, save it, turn it back into a dense checkpoint."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import __version__
from ..device import local_device, resolve_device, usual_torch
from ..errors import ArgumentError
from ..format import FORMAT_VERSION
from ..models.blocks import block_linears, find_blocks
from ..models.folder import hub_folder
from ..models.model_config import compute_dtype
from ..models.output import OutputFolder
from ..models.source import FolderSource, ModuleSource, open_source
from ..models.ties import tied_names
from ..paths import expanded
from ..text.source import (
    CHARACTERS_PER_TOKEN,
    READ_AHEAD,
    Sampling,
    open_tokenizer,
    read_text,
    sample_windows,
)
from ..text.token_ids import check_fits, text_config, token_ids
from .arguments import Arguments
from .blockwise import compress_blocks
from .budget import search
from .finish import complete, finish, into
from .matching import Matching
from .plan import Plan
from .record import ProgressEvent, RunRecord, listener
from .sinks import FolderSink, MemorySink
from .team import Team


@usual_torch()
def compress(
    model_or_path: nn.Module | str | Path,
    out: Path | str | None = None,
    *,
    method: str = "slab",
    pattern: str = "2:4",
    rank: int = 1,
    values: str = "fp16",
    group_size: int | None = 128,
    planes: int = 1,
    adapter_rank: int | None = None,
    adapter_values: str = "int8",
    matching: Matching | int | bool | None = None,
    bits: float | None = None,
    calibration: str | Path | Tensor | list | dict = "stdlib",
    heldout: str | Path | Tensor | list | dict | None = None,
    samples: int = 128,
    window: int = 2048,
    skip: tuple[str, ...] | list[str] | str | None = (),
    tokenizer=None,
    device: str | torch.device = "auto",
    resume: bool = False,
    seed: int = 0,
    progress=None,
    trust_remote_code: bool = False,
    **method_options,
) -> RunRecord | nn.Module:
    """Compress every nn.Linear inside the decoder blocks; embeddings, norms and the output head stay as they are.

    One block is in memory at a time, beside everything outside the blocks and the hidden states of the calibration
    samples (samples * window * hidden_size * 4 bytes on a CPU; `RunRecord.hidden_state_bytes`). Methods with a
    setting `drift` that is not 0 (slab) hold both twice: the block as it was and as it becomes, and what the dense
    model makes of the text. Layers that receive the same tensor (q/k/v, gate/up) share their statistics and are
    compressed together; statistics come from the compressed prefix (earlier blocks, and earlier groups of the block).

    Args:
        model_or_path: a transformers causal language model, its folder, or its name on the Hugging Face hub.
        out: the folder to write. With None the result is a model in memory: a module given is changed in place and
            returned, its record as `model.slab_record`.
        method, pattern, rank, values, group_size, planes, adapter_rank, adapter_values: see `methods.decompose`; other keywords go to the
            method. Patterns other than 2:4 cannot be packed and are written as a dense checkpoint.
        bits: stored bits a weight over the whole model, spent layer by layer on value types, planes and ranks where the
            measured loss says they help most (see `budget`); the dense model is then held in memory while it is searched.
        matching: transformer matching after each block (see `matching`): its settings, just the
            epochs, or True; 0 or None: none.
        calibration, heldout: text (see `text.read_text`) or token ids [samples, window] (see `token_ids`). With `heldout` each layer's
            error is measured on that text too, with at most a quarter of `samples`.
        samples, window: calibration windows and their length in tokens, cut to the model's maximum positions.
        skip: fnmatch patterns of module or parameter names to leave dense, such as "*.down_proj".
        tokenizer: one of transformers or its folder; needed for a model in memory that does not
            know its folder, unless token ids are given.
        device: where blocks run. "auto" is a GPU if there is one; a CPU computes in fp32.
        resume: go on with an interrupted run in `out`: same settings, same bytes as without the
            interruption. What is finished and every tensor of the model are compared with what they
            were.
        progress: a function called with every ProgressEvent, True for a bar on stderr, None for a bar on a terminal.
        trust_remote_code: run the Python code in the model's folder, which some models are made of;
            without it they are refused before anything runs.

    Returns: the RunRecord that also lies in slab_run.json; with out=None the model.
    Raises: CalibrationError, CheckpointError, ArchitectureError, FormatError, ValueError, one sentence each.
    """
    began = time.perf_counter()
    given = Arguments.of(
        method=method, pattern=pattern, rank=rank, values=values, group_size=group_size, planes=planes, adapter_rank=adapter_rank,
        adapter_values=adapter_values, matching=matching, bits=bits, samples=samples, window=window, seed=seed, skip=skip, **method_options,
    )  # fmt: skip
    plan, bits, skip = given.plan, given.bits, given.skip
    out = None if out is None else expanded(out)
    device = resolve_device(local_device(str(device)))
    with ExitStack() as stack:
        team = stack.enter_context(Team(device))
        if isinstance(tokenizer, str | Path):
            tokenizer = open_tokenizer(hub_folder(tokenizer), trust_remote_code)
        if not (tokenizer is None or callable(tokenizer)):
            raise ArgumentError(
                f"tokenizer={tokenizer!r} must be one of transformers, or its folder"
            )
        if out is None and not isinstance(model_or_path, nn.Module):
            model_or_path = open_source(model_or_path, trust_remote_code).open_dense()
        source = open_source(model_or_path, trust_remote_code)
        path, blocks = find_blocks(source.model)
        group = (
            plan.group if plan.packed else 1
        )  # a layer that no 2:4 fits is the model's matter, another pattern the user's
        found = block_linears(path, blocks, group, skip, tied_names(source.model))
        shapes = {
            name: tuple(linear.weight.shape) for block in found for name, linear in block.items()
        }
        plan.check_shapes(shapes)
        texts = _texts(source, calibration, heldout, given.sampling, tokenizer)
        settings = {
            "method": plan.method, "pattern": plan.pattern, "rank": plan.rank, "values": plan.values,
            "group_size": plan.stored_group_size, "planes": plan.planes, "adapter_rank": plan.adapter_rank,
            "adapter_values": plan.adapter_values, "matching": None if plan.matching is None else asdict(plan.matching),
            "bits": bits, "options": {key: repr(value) for key, value in sorted(plan.options.items())},
            "samples": len(texts[0]), "window": texts[0].shape[1], "seed": given.sampling.seed, "skip": list(skip),
            "device": device.type, "calibration_sha256": _digest(texts[0]),
            "heldout_sha256": _digest(texts[1]) if len(texts) > 1 else None,
            "model_sha256": None if out is None else source.fingerprint(), "format_version": FORMAT_VERSION,
            "library": __version__,
        }  # fmt: skip
        if out is not None and resume and (record := complete(out, settings)):
            return record
        report = listener(progress if team.leads else False)
        stack.callback(getattr(report, "close", lambda: None))
        state = None
        if out is not None and team.leads:
            state = stack.enter_context(OutputFolder(out, settings, resume))
        if out is not None:
            _know_inputs(source, state, team)
        if bits is not None:
            plan = replace(
                plan,
                layers=_spend(source, plan, shapes, bits, texts[0], device, team, state, report),
            )
        done = team.from_leader(lambda: state.blocks if state else [])
        sink = (
            MemorySink()
            if out is None
            else FolderSink(out, source, path, len(blocks), plan, state, list(done))
        )
        message = (
            f"compressing {source.name}: {len(blocks)} blocks, {texts[0].numel()} calibration tokens in windows of "
            f"{settings['window']}"
        )
        report(ProgressEvent("start", blocks=len(blocks), message=message))
        for message in source.left_out(out):
            report(ProgressEvent("warning", blocks=len(blocks), message=f"warning: {message}"))
        layers, matched = compress_blocks(source, plan, skip, texts, device, sink, report, team)
        width = getattr(text_config(source.model), "hidden_size", 0) or 0
        record = RunRecord(
            model=source.name,
            settings=settings
            | {"layers": plan.layers, "calibration": _name(calibration), "heldout": _name(heldout)},
            stored="packed" if plan.packed else "dense",
            layers=layers,
            tokens=texts[0].numel(),
            hidden_state_bytes=sum(t.numel() for t in [*texts, *texts[: plan.dense_stream]])
            * width
            * compute_dtype(source.config, device).itemsize,
            seconds=time.perf_counter() - began,
            versions=_versions(),
            ignored_tensors=source.ignored,
            matching=matched,
        )
        if out is None:
            result = into(model_or_path, sink, record)
        else:
            result = finish(out, sink, record, plan, tokenizer) if team.leads else record
        message = f"done: {record.bits_per_weight:.3f} bits per weight, mean error {record.mean_error:.4f}, {record.seconds:.0f} s"
        report(
            ProgressEvent(
                "done", len(blocks), len(blocks), len(layers), len(layers), message=message
            )
        )
        return result


def _know_inputs(source: FolderSource | ModuleSource, state: OutputFolder | None, team: Team) -> None:
    """Let a run that goes on read the tensors that it began with: `state` keeps their hashes."""

    def hashes() -> dict[str, str]:
        before = dict(state.inputs)
        if not before:
            state.note_inputs(source.hashes())
        return before

    source.expect(team.from_leader(hashes))


def _spend(
    source: FolderSource | ModuleSource, plan: Plan, shapes: dict[str, tuple[int, int]], bits: float, tokens: Tensor,
    device: torch.device, team: Team, state: OutputFolder | None, report: Callable[[ProgressEvent], None],
) -> dict[str, dict]:  # fmt: skip
    """The settings of every layer under the budget, searched by one process for all.

    What is found on the way is kept in `state`.
    """

    def dense() -> nn.Module:
        in_memory = isinstance(source, ModuleSource)
        model = copy.deepcopy(source.dense) if in_memory else source.open_dense()
        return model.to(device=device, dtype=compute_dtype(source.config, device)).eval()

    def find() -> dict[str, dict]:
        known, note = (
            ({}, lambda name, losses: None) if state is None else (state.search, state.note_search)
        )
        tell = lambda text: report(ProgressEvent("budget", message=text))  # noqa: E731
        return search(dense, shapes, plan, bits, tokens, device, known, note, tell)

    return team.from_leader(find)


def _texts(source, calibration, heldout, sampling: Sampling, tokenizer) -> list[Tensor]:
    """Token windows [samples, window] of the calibration text and, if asked for, of the held-out text."""
    limit = getattr(text_config(source.model), "max_position_embeddings", None)
    window = min(sampling.window, limit or sampling.window)
    wanted = [("calibration", calibration, sampling.samples)]
    if heldout is not None:
        wanted.append(("held-out", heldout, max(1, sampling.samples // 4)))
    texts = []
    for name, text, count in wanted:
        ids, made = token_ids(text, name), None
        if ids is None:
            made = tokenizer = source.tokenizer() if tokenizer is None else tokenizer
            content = read_text(text, READ_AHEAD * count * window * CHARACTERS_PER_TOKEN, tokenizer)
            ids = sample_windows(tokenizer, content, count, window, sampling.seed, name)
        check_fits(ids, source.model, name, made)
        texts.append(ids)
    return texts


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(
        str(tuple(tokens.shape)).encode() + tokens.contiguous().numpy().tobytes()
    ).hexdigest()


def _name(text) -> str | None:
    """How a record calls a text: the name that was given, or what kind of thing was."""
    if text is None or isinstance(text, str | Path):
        return None if text is None else str(text)
    return "texts" if token_ids(text) is None else "token ids"


def _versions() -> dict[str, str]:
    import transformers

    return {
        "slab_kernels": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
