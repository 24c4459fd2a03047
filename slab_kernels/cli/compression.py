"""The commands that write a model: compress, train, decompress."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..paths import expanded
from . import console, options
from .console import Outcome
from .layers import show_layers
from .meanings import method_options, settings_by_pattern, stored_group, torch_dtype
from .progress import Progress

if TYPE_CHECKING:
    from ..compression.record import RunRecord


def compress(
    model: options.Model,
    out: options.Out,
    preset: options.Preset = None,
    method: options.Method = "slab",
    pattern: options.Pattern = "2:4",
    rank: options.SignRank = 1,
    planes: options.Planes = None,
    values: options.StoredValues = None,
    group_size: options.StoredGroup = "auto",
    adapter_rank: options.StoredAdapter = None,
    adapter_values: options.AdapterValues = "int8",
    embeddings: options.Embeddings = None,
    head: options.Head = None,
    match: options.Match = 0,
    bits: options.Bits = None,
    calibration: options.Text = "stdlib",
    field: options.Field = None,
    heldout: options.Heldout = None,
    samples: options.Samples = 128,
    window: options.Window = 2048,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    resume: options.ResumeInOut = False,
    skip: options.Skip = None,
    permute: options.Permute = False,
    set_: options.SetByPattern = None,
    option: options.MethodOption = None,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    token: options.Token = None,
    trust_remote_code: options.Trust = False,
    json: options.Json = False,
) -> Outcome:
    """Compress MODEL into the folder OUT, one block in memory at a time."""
    from ..compression.events import Lines
    from ..compression.model import compress
    from ..methods import check_options
    from ..models.totals import read_totals

    out, settings = expanded(out), method_options(option or [])
    check_options(method, settings)  # before they could be taken for other arguments of `compress`
    with console.interruptible(
        lambda: _kept(out / "slab_progress.json", f"finished blocks are in {out}")
    ):
        done = compress(
            model,
            out,
            preset=preset,
            method=method,
            pattern=pattern,
            rank=rank,
            values=values,
            group_size=stored_group(group_size),
            planes=planes,
            adapter_rank=adapter_rank,
            adapter_values=adapter_values,
            embeddings=embeddings,
            head=head,
            matching=match,
            bits=bits,
            calibration=calibration,
            heldout=heldout,
            field=field,
            samples=samples,
            window=window,
            skip=skip,
            permute=permute,
            settings_by_pattern=settings_by_pattern(set_ or []),
            device=device,
            seed=seed,
            resume=resume,
            progress=True if sys.stderr.isatty() else Lines(console.say),
            revision=revision,
            subfolder=subfolder,
            token=token,
            trust_remote_code=trust_remote_code,
            **settings,
        )
    totals = read_totals(out)
    data = cast("RunRecord", done).to_dict() | totals.to_dict() | {"folder": str(out)}

    def show() -> None:
        from ..compression.record import named_error

        show_layers(data["layers"], str(out))
        print(totals)
        print(
            f"{data['bits_per_weight']:.3f} stored bits per weight, "
            f"{named_error(data['mean_error'], data['mean_heldout_error'])}, "
            f"{data['seconds']:.0f} s; "
            f"next: slab-kernels eval {shlex.quote(str(out))}"
        )

    return Outcome(data, show)


def _kept(state: Path, what: str) -> str:
    """What an interrupted run leaves: `what` where its file of progress is there."""
    if state.exists():
        return f"{what}, and the same command with --resume goes on"
    return "nothing was kept"


def train(
    folder: options.Packed,
    out: options.Out,
    text: options.Text = "stdlib",
    field: options.Field = None,
    steps: options.Steps = 200,
    batch: options.Batch = 8,
    window: options.Window = 512,
    samples: options.TrainingSamples = 512,
    rate: options.Rate = 3e-4,
    adapter_rank: options.NewAdapters = 0,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    resume: options.Resume = False,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    token: options.Token = None,
    trust_remote_code: options.Trust = False,
    json: options.Json = False,
) -> Outcome:
    """Train the adapters P Qᵀ of a compressed model on a text; everything else stays as it is."""
    from ..compression.training import Training, state_file, train
    from ..device import resolve_device

    settings = Training(steps, batch, window, samples, rate, adapter_rank, seed=seed)
    out = expanded(out)
    kept = f"the training so far is in {state_file(out)}"
    with (
        console.interruptible(lambda: _kept(state_file(out), kept)),
        Progress("train", "steps") as progress,
    ):
        data = train(
            folder,
            out,
            text,
            settings,
            device=resolve_device(device),
            resume=resume,
            say=progress.say,
            progress=progress,
            field=field,
            revision=revision,
            subfolder=subfolder,
            token=token,
            trust_remote_code=trust_remote_code,
        )

    def show() -> None:
        print(
            f"{out}: held-back text {data['before']:.4f} -> {data['after']:.4f} nats per token, "
            f"{data['parameters']} numbers trained; "
            f"next: slab-kernels eval {shlex.quote(str(out))}"
        )

    return Outcome(data, show)


def decompress(
    folder: options.Packed,
    out: options.Out,
    dtype: options.DenseDtype = None,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    token: options.Token = None,
    trust_remote_code: options.Trust = False,
    no_verify: options.NoVerify = False,
    json: options.Json = False,
) -> Outcome:
    """Write a plain dense checkpoint with the same function, which any engine opens."""
    from ..models.decompress import decompress

    out = expanded(out)
    with Progress("decompress", "tensors") as progress:
        skipped = decompress(
            folder,
            out,
            dtype=torch_dtype(dtype) if dtype else None,
            verify=not no_verify,
            revision=revision,
            subfolder=subfolder,
            token=token,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    for name in skipped:
        console.say(f"warning: left out {name}")
    size = sum(file.stat().st_size for file in out.iterdir() if file.suffix == ".safetensors")
    data = {"folder": str(folder), "out": str(out), "bytes": size, "left_out": skipped}
    return Outcome(data, lambda: print(f"{out}: dense checkpoint, {size / 1e6:.1f} MB"))
