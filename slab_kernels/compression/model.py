"""`compress`: a Hugging Face decoder in, a packed folder or a packed model out."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..device import usual_torch
from ..format import AUTO
from ..methods import check_options
from ..models.hub import HubArguments
from ..text.source import Text
from .arguments import Arguments
from .calibration import Calibration
from .matching import Matching
from .record import RunRecord
from .run import Options, run


@usual_torch()
def compress(
    model_or_path: nn.Module | str | Path,
    out: Path | str | None = None,
    *,
    preset: str | None = None,
    method: str = "slab",
    pattern: str = "2:4",
    rank: int = 1,
    values: str | None = None,
    group_size: int | str | None = AUTO,
    planes: int | None = None,
    adapter_rank: int | None = None,
    adapter_values: str = "int8",
    embeddings: str | None = None,
    head: bool | None = None,
    matching: Matching | int | bool | None = None,
    bits: float | None = None,
    calibration: Text = "stdlib",
    heldout: Text | None = None,
    field: str | None = None,
    samples: int = 128,
    window: int = 2048,
    skip: tuple[str, ...] | list[str] | str | None = (),
    permute: bool = False,
    settings_by_pattern: Any = None,
    tokenizer: Any = None,
    device: str | torch.device = "auto",
    resume: bool = False,
    seed: int = 0,
    progress: Any = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    **method_options: Any,
) -> RunRecord | nn.Module:
    """Compress every nn.Linear in the decoder blocks, and embedding and output head where asked.

    Experts that transformers stacks are taken apart into linears first. A token counts for the
    experts that its router picks; an expert that gets too few is shown all of them
    (`compression.routing`). Routers and norms stay dense, and so does an output head unless `head`
    is true. The embedding is stored as the preset has it, in int8 rows by default.

    One block is in memory at a time, beside everything outside the blocks and the hidden states of
    the calibration text: samples * window * hidden_size numbers, of 4 bytes on a CPU
    (`RunRecord.hidden_state_bytes`). Methods with a setting `drift` that is not 0 (slab) hold both
    twice: the block as it was and as it becomes, and what the dense model makes of the text. Beside
    each block in memory, at most 1 GiB on a CPU and a tenth of a GPU's free memory hold what would
    have to be computed again otherwise.
    Statistics of several experts are gathered at once, as far as they take no more than that again.
    Layers that receive the same tensor (q/k/v, gate/up) share their statistics. Statistics come
    from the compressed prefix: earlier blocks, and earlier groups of the same block.

    Args:
        model_or_path: a transformers causal language model, its folder, or its name on the Hugging
            Face hub.
        out: the folder to write, with a model card. With None the result is a model in memory: a
            module given is changed in place and returned, its record as `model.slab_record`.
        preset: a goal by name, "small", "balanced" or "exact" (`compression.presets.PRESETS`): it
            stands for `values`, `planes`, `embeddings` and `head`, of method "slab". Without a
            name, each of the four that is None is what "balanced" says. Another method or pattern,
            or `bits`, takes no preset; what is None is then fp16, one plane, and dense.
        method, pattern, rank, values, group_size, planes, adapter_rank, adapter_values: see
            `slab_kernels.decompose`. Patterns other than 2:4 cannot be packed and are written as a
            dense checkpoint.
        embeddings: "dense", or "int8": the input embedding as int8 codes with one scale a row,
            dequantised at look-up. An output head that is the same tensor, and is not packed, then
            computes from the same rows, and nothing is stored twice.
        head: whether the output head is packed, with the settings of the other linears and fitted
            to the last hidden states behind the final norm. Matching and `bits` leave it alone.
            A head that was the embedding is stored beside it then.
        matching: transformer matching after each block: a `Matching`, just its epochs, or True;
            0, False or None for none.
        bits: stored bits per weight over the whole model, spent layer by layer on value types,
            planes and ranks where the expected loss says they help most (see `budget`). The dense
            model is held in memory during the search.
        calibration, heldout: a text, chats, rows, token ids or batches with masks, by the name of a
            file or in memory; see `text.source.read`. Every eighth window of `calibration` is held
            back: no weight is fitted to it, and each layer's held-out error is measured there. With
            a text `heldout` it is measured on that, with at most a quarter of `samples`.
        field: of the rows of these texts (.jsonl, .parquet, a dataset), the one to read: a string,
            a chat or token ids. None: the first there of "input_ids", "text", "messages", and
            "prompt" with "completion".
        samples, window: windows of calibration text, and their length in tokens, which is cut to
            the model's positions.
        skip: fnmatch patterns of module or parameter names to leave dense, such as "*.down_proj".
        settings_by_pattern: settings of their own for some layers: a regular expression, which is
            searched in a layer's full name -> some of values, planes, rank, group_size,
            adapter_rank and adapter_values, as in {"mlp.down_proj": {"values": "int8"}}, or pairs
            of the two. Where several match, later ones win. With `bits`, which chooses them, it is
            refused.
        permute: put the channels of the model into orders that suit the groups of the pattern;
            what it computes stays the same (see `compression.orders`).
        tokenizer: one of transformers, or its folder. A model in memory needs it if it does not
            know its folder, unless token ids are given.
        device: where blocks run. "auto" is a GPU if there is one; a CPU computes in fp32,
            but for operands of matrix products, which are bf16 where it has instructions for that.
        resume: go on with an interrupted run in `out`. With the same settings it ends with the same
            bytes as without the interruption; what is finished and every tensor of the model are
            compared with what they were.
        seed: which windows of text are drawn.
        progress: a function called with every ProgressEvent; True for a bar on stderr, or lines
            where that is no terminal; None for a bar on a terminal only; False for nothing. Where
            nothing is shown, what did not go as asked is a RuntimeWarning.
        trust_remote_code: run the Python code in the model's folder, of which some models are made.
            Without it they are refused before anything runs.
        revision, subfolder, token: of a model on the hub: a branch, tag or commit; the folder in
            its repository (or in a folder here); what opens private ones
            (`models.hub.HubArguments`).
        method_options: what only this method has; see `Method.options`.

    Returns: the RunRecord that also lies in slab_run.json; with out=None the model.

    Raises: ArgumentError, MethodError, BudgetError, CalibrationError, CheckpointError,
        ArchitectureError, TeamError or a FormatError, in one sentence.
    """
    check_options(method, method_options, inspect.signature(compress).parameters)
    given = Arguments.of(
        preset=preset,
        method=method,
        pattern=pattern,
        rank=rank,
        values=values,
        group_size=group_size,
        planes=planes,
        adapter_rank=adapter_rank,
        adapter_values=adapter_values,
        embeddings=embeddings,
        head=head,
        matching=matching,
        bits=bits,
        samples=samples,
        window=window,
        seed=seed,
        skip=skip,
        permute=permute,
        settings_by_pattern=settings_by_pattern,
        **method_options,
    )
    text = Calibration(calibration, heldout, given.sampling, field)
    hub = HubArguments(revision, subfolder, token, trust_remote_code)
    options = Options(device, resume, progress, tokenizer, hub)
    return run(model_or_path, out, given, text, options)
