"""The model level: compress a Hugging Face decoder, load it, save it, turn it back into a dense checkpoint."""

from __future__ import annotations

import copy
import hashlib
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from . import __version__
from .blocks import ArchitectureError, find_blocks
from .budget import check_bits, search
from .checkpoint import PROGRESS_NAME, RECORD_NAME, CheckpointError, read_json, write_index, write_json
from .format import FORMAT_VERSION, PackedWeight, VersionError
from .matching import Matching
from .nn import replace_linear
from .packed_checkpoint import check, load, quantization_config, save
from .pipeline import compress_blocks, resolve_device
from .plan import Plan
from .progress import Progress, check_same_settings
from .record import ProgressEvent, RunRecord, listener
from .side_files import read_tokenizer
from .sinks import FolderSink, MemorySink, layout_on_disk
from .source import FolderSource, ModuleSource, compute_dtype, hub_folder, open_source, text_config
from .team import Team, local_device
from .text import CHARACTERS_PER_TOKEN, READ_AHEAD, CalibrationError, read_text, sample_windows
from .unpacking import decompress

__all__ = [
    "ArchitectureError", "CalibrationError", "CheckpointError", "ProgressEvent", "RunRecord", "VersionError",
    "check", "compress", "decompress", "load", "save",
]  # fmt: skip


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
    matching: Matching | int | None = None,
    bits: float | None = None,
    calibration: str | Path | Tensor = "stdlib",
    heldout: str | Path | Tensor | None = None,
    samples: int = 128,
    window: int = 2048,
    skip: tuple[str, ...] | list[str] | str = (),
    tokenizer=None,
    device: str | torch.device = "auto",
    resume: bool = False,
    seed: int = 0,
    progress=None,
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
        matching: transformer matching after each block (see `matching`), its settings or just the epochs; 0 or None: none.
        calibration, heldout: text (see `text.read_text`) or token ids [samples, window]. With `heldout` each layer's
            error is measured on that text too, with at most a quarter of `samples`.
        samples, window: calibration windows and their length in tokens, cut to the model's maximum positions.
        skip: fnmatch patterns of module names to leave dense, such as "*.down_proj".
        tokenizer: needed for a model in memory that does not know its folder, unless token ids are given.
        device: where blocks run. "auto" is a GPU if there is one; a CPU computes in fp32.
        resume: go on with an interrupted run in `out`: same settings, same bytes as without the interruption.
        progress: a function called with every ProgressEvent, True for a bar on stderr, None for a bar on a terminal.

    Returns: the RunRecord that also lies in slab_run.json; with out=None the model.
    Raises: CalibrationError, CheckpointError, ArchitectureError, FormatError, ValueError, one sentence each.
    """
    began = time.perf_counter()
    matching = Matching(epochs=matching) if type(matching) is int and matching else matching or None
    plan = Plan(method, pattern, rank, values, group_size, planes, adapter_rank, adapter_values, method_options, matching)
    team = Team()
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    device = resolve_device(local_device(str(device)))
    if out is None and not isinstance(model_or_path, nn.Module):
        tokenizer = tokenizer or _tokenizer(str(hub_folder(str(model_or_path))))
        model_or_path = _dense_model(model_or_path)
    if bits is not None:
        check_bits(bits, plan)
    source = open_source(model_or_path)
    path, blocks = find_blocks(source.model)
    texts = _texts(source, calibration, heldout, samples, window, seed, tokenizer)
    if bits is not None:
        plan = replace(plan, layers=_spend(source, plan, bits, skip, texts[0], device, team, progress))
    settings = {
        "method": method, "pattern": pattern, "rank": rank, "values": values, "group_size": plan.stored_group_size,
        "planes": planes, "adapter_rank": adapter_rank, "adapter_values": adapter_values,
        "matching": None if matching is None else asdict(matching),
        "bits": bits, "layers": plan.layers,
        "options": {key: repr(value) for key, value in sorted(method_options.items())}, "samples": len(texts[0]),
        "window": texts[0].shape[1], "seed": seed, "skip": list(skip), "device": device.type,
        "calibration_sha256": _digest(texts[0]), "heldout_sha256": _digest(texts[1]) if len(texts) > 1 else None,
        "model_sha256": None if out is None else source.fingerprint(), "format_version": FORMAT_VERSION, "library": __version__,
    }  # fmt: skip
    if out is not None:
        out = Path(out)
        if resume and (record := _complete(out, settings)):
            return record
    report, sink = listener(progress if team.leads else False), MemorySink()
    try:
        if out is not None:
            state = Progress(out, settings, resume) if team.leads else None
            done = team.from_leader(lambda: state.blocks if state else None)
            sink = FolderSink(out, source, path, len(blocks), plan, state, list(done))
        tokens = texts[0].numel()
        message = f"compressing {source.name}: {len(blocks)} blocks, {tokens} calibration tokens in windows of {settings['window']}"
        report(ProgressEvent("start", blocks=len(blocks), message=message))
        for message in source.left_out(out):
            report(ProgressEvent("warning", blocks=len(blocks), message=f"warning: {message}"))
        layers, matched = compress_blocks(source, plan, skip, texts, device, sink, report, team)
        width = getattr(text_config(source.model), "hidden_size", 0) or 0
        record = RunRecord(
            model=source.name,
            settings=settings | {"calibration": _name(calibration), "heldout": _name(heldout)},
            stored="packed" if plan.packed else "dense",
            layers=layers,
            tokens=tokens,
            hidden_state_bytes=sum(t.numel() for t in [*texts, *texts[: plan.dense_stream]])
            * width
            * compute_dtype(source.config, device).itemsize,
            seconds=time.perf_counter() - began,
            versions=_versions(),
            ignored_tensors=source.ignored,
            matching=matched,
        )
        if out is None:
            result = _into(model_or_path, sink, record)
        elif team.leads:
            result = _finish(out, sink, record, plan, tokenizer)
        else:
            result = record
        message = f"done: {record.bits_per_weight:.3f} bits per weight, mean error {record.mean_error:.4f}, {record.seconds:.0f} s"
        report(ProgressEvent("done", len(blocks), len(blocks), len(layers), len(layers), message=message))
        return result
    except BaseException:
        if isinstance(sink, FolderSink) and sink.progress is not None:
            sink.progress.abandon()
        raise
    finally:
        if hasattr(report, "close"):
            report.close()


def _spend(
    source: FolderSource | ModuleSource, plan: Plan, bits: float, skip: tuple[str, ...], tokens: Tensor, device: torch.device,
    team: Team, progress,
) -> dict[str, dict]:  # fmt: skip
    """The settings of every layer under the budget, searched by one process for all."""
    say = listener(progress if team.leads else False)

    def find() -> dict[str, dict]:
        dense = copy.deepcopy(source.dense) if isinstance(source, ModuleSource) else _dense_model(source.checkpoint.folder)
        dense = dense.to(device=device, dtype=compute_dtype(source.config, device)).eval()
        return search(dense, plan, bits, skip, tokens, device, lambda text: say(ProgressEvent("budget", message=text)))

    try:
        return team.from_leader(find)
    finally:
        if hasattr(say, "close"):
            say.close()


def _finish(out: Path, sink: FolderSink, record: RunRecord, plan: Plan, tokenizer) -> RunRecord:
    """Everything after the last block; config.json, without which nothing loads the folder, comes last."""
    sink.store_rest()
    tables = sink.tables()
    write_index(out, tables)
    sink.source.write_side_files(out, tokenizer)
    write_json(out / RECORD_NAME, record.to_dict())
    config = dict(sink.source.config)
    if plan.packed:
        layouts = {
            layer.name: layout_on_disk(
                tables[layer.block], layer.name, layer.shape, layer.values, plan.layer(layer.name).stored_group_size, layer.planes
            )
            for layer in record.layers
        }
        config["quantization_config"] = quantization_config(layouts, record.settings)
    write_json(out / "config.json", config)
    sink.progress.close()
    return record


def _into(model: nn.Module, sink: MemorySink, record: RunRecord) -> nn.Module:
    """Put what was compressed into the module that was given."""
    stored = sink.stored
    packed = {name: weight for name, weight in stored.items() if isinstance(weight, PackedWeight)}
    with torch.no_grad():
        for name, value in sink.other.items():
            model.get_parameter(name).copy_(value)
    replace_linear(model, packed)
    for name, weight in stored.items():
        if name not in packed:
            model.get_submodule(name).weight.data.copy_(weight)
    if packed:
        layouts = {name: weight.layout for name, weight in packed.items()}
        model.config.quantization_config = quantization_config(layouts, record.settings)
    model.slab_record = record
    return model


def _complete(out: Path, settings: dict) -> RunRecord | None:
    """The record of a run that finished in `out`, if its settings are the same."""
    if (
        (out / PROGRESS_NAME).exists()
        or not (out / "config.json").exists()
        or not (out / RECORD_NAME).exists()
    ):
        return None
    record = RunRecord.from_dict(read_json(out / RECORD_NAME))
    before = {k: v for k, v in record.settings.items() if k not in ("calibration", "heldout")}
    check_same_settings(out, before, settings)
    return record


def _texts(source, calibration, heldout, samples: int, window: int, seed: int, tokenizer) -> list[Tensor]:
    """Token windows [samples, window] of the calibration text and, if asked for, of the held-out text."""
    if samples < 1 or window < 2:
        raise CalibrationError(
            f"samples={samples} and window={window}: at least 1 sample of 2 tokens is needed"
        )
    limit = getattr(text_config(source.model), "max_position_embeddings", None)
    window = min(window, limit or window)
    wanted = [("calibration", calibration, samples)]
    if heldout is not None:
        wanted.append(("held-out", heldout, max(1, samples // 4)))
    texts = []
    for name, text, count in wanted:
        if isinstance(text, Tensor):
            texts.append(_check_ids(text, name))
        else:
            tokenizer = tokenizer or _tokenizer(source.tokenizer_path)
            content = read_text(text, READ_AHEAD * count * window * CHARACTERS_PER_TOKEN)
            texts.append(sample_windows(tokenizer, content, count, window, seed, name))
        vocabulary = source.model.get_input_embeddings().weight.shape[0]
        if int(texts[-1].max()) >= vocabulary:
            raise CalibrationError(
                f"the {name} tokens go up to {int(texts[-1].max())}, but the model's vocabulary has {vocabulary}; "
                "give the model's own tokenizer"
            )
    return texts


def _check_ids(ids: Tensor, name: str) -> Tensor:
    if ids.dim() != 2 or ids.dtype != torch.long or not ids.numel() or int(ids.min()) < 0:
        raise CalibrationError(
            f"{name} token ids must be a non-empty int64 tensor [samples, window], got {ids.dtype} {list(ids.shape)}"
        )
    return ids.cpu()


def _tokenizer(path: str):
    if not path:
        raise CalibrationError(
            "a model in memory needs tokenizer=..., or token ids [samples, window] as calibration="
        )
    return read_tokenizer(path)


def _dense_model(path: str | Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    folder = hub_folder(str(path))
    open_source(
        folder
    )  # our checks and messages first: transformers fills missing tensors with random numbers
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(
        str(tuple(tokens.shape)).encode() + tokens.contiguous().numpy().tobytes()
    ).hexdigest()


def _name(text) -> str | None:
    return "token ids" if isinstance(text, Tensor) else None if text is None else str(text)


def _versions() -> dict[str, str]:
    import transformers

    return {"slab_kernels": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
