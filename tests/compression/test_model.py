"""A whole model: compress, kill, resume, load, save, decompress; and all that is refused."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import tiny_models
import torch
from layer_errors import layer_errors
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import slab_kernels
from slab_kernels.compression.events import ProgressEvent
from slab_kernels.compression.model import compress
from slab_kernels.compression.record import RunRecord
from slab_kernels.errors import (
    ArchitectureError,
    CalibrationError,
    CheckpointError,
    FormatError,
    VersionError,
)
from slab_kernels.models import blocks
from slab_kernels.models.decompress import decompress
from slab_kernels.models.folder import PROGRESS_NAME
from slab_kernels.models.load import load
from slab_kernels.models.save import save
from slab_kernels.nn import SlabLinear

TOKENS = tiny_models.tokens()
QUICK = dict(method="magnitude", calibration=TOKENS, progress=False)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny_models.write(folder, shards=True)
    return folder


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    compress(dense, out, calibration=TOKENS, progress=False)
    return out


@pytest.fixture(scope="module")
def exact(dense, tmp_path_factory) -> Path:
    """Packed with fp16 values."""
    out = tmp_path_factory.mktemp("exact") / "out"
    compress(dense, out, preset="exact", calibration=TOKENS, progress=False)
    return out


def logits(m: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return m(input_ids=TOKENS).logits


def digests(folder: Path) -> dict[str, str]:
    """Every file but the record, in which the seconds differ."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.name != "slab_run.json"
    }


# what a run writes


def test_the_folder(dense, packed):
    files = {p.name for p in packed.iterdir()}
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert (
        shards | {"config.json", "slab_run.json", "model.safetensors.index.json", "tokenizer.json"}
        <= files
    )
    assert PROGRESS_NAME not in files and not [f for f in files if f.endswith(".partial")]
    config = json.loads((packed / "config.json").read_text())
    described = config.pop("quantization_config")
    # Embedding and head share int8 rows, which transformers does not tie.
    before = json.loads((dense / "config.json").read_text())
    assert config == before | {"tie_word_embeddings": False}
    rows = {"model.embed_tokens": {"values": "int8", "tied": "lm_head"}}
    assert described.pop("embeddings") == rows
    assert described.pop("modules")["model.layers.1.mlp.down_proj"] == {
        "out_features": 32,
        "in_features": 48,
        "values": "int4",
        "group_size": 64,
        "rank": 1,
        "adapter_rank": 0,
        "factors": "fp16",
        "planes": 2,
        "adapter_values": None,
        "signs": True,
    }
    assert described == {
        "quant_method": "slab_kernels",
        "format_version": 3,
        "method": "slab",
        "pattern": "2:4",
        "rank": 1,
        "values": "int4",
        "group_size": "auto",
    }


def test_everything_else_is_as_it_was(dense, packed):
    before = {n: t for f in dense.glob("*.safetensors") for n, t in load_file(f).items()}
    after = {n: t for f in packed.glob("*.safetensors") for n, t in load_file(f).items()}
    kept = before.keys() & after.keys()
    assert kept == {n for n in before if "_proj" not in n and "embed" not in n}
    assert all(torch.equal(before[n], after[n]) for n in kept)


@pytest.mark.parametrize(
    ("values", "group_size"), [("fp16", None), ("bf16", None), ("int8", None), ("int4", 32)]
)
def test_the_record_counts_the_bytes_on_disk(dense, tmp_path, values, group_size):
    record = compress(
        dense,
        tmp_path / "o",
        values=values,
        group_size=group_size,
        calibration=TOKENS,
        progress=False,
        rounds=1,
    )
    tensors = {
        n: t for f in (tmp_path / "o").glob("*.safetensors") for n, t in load_file(f).items()
    }
    loaded = load(tmp_path / "o")
    total = 0
    for layer in record.layers:
        size = sum(t.nbytes for n, t in tensors.items() if n.startswith(layer.name + "."))
        assert layer.bits_per_weight == 8 * size / math.prod(layer.shape)
        assert layer.bits_per_weight == loaded.get_submodule(layer.name).layout.bits_per_weight()
        total += 8 * size
    assert record.bits_per_weight == pytest.approx(
        total / sum(math.prod(layer.shape) for layer in record.layers)
    )
    assert RunRecord.from_dict(json.loads((tmp_path / "o" / "slab_run.json").read_text())) == record


def test_errors_are_those_of_the_compressed_prefix(dense, tmp_path):
    """The records take them from Gram matrices; here the finished model runs on the same tokens.

    Of six calibration windows the last is held back; without a held-out text it is what judges.
    """
    original, other = AutoModelForCausalLM.from_pretrained(dense).eval(), tiny_models.tokens(seed=7)
    for heldout, judging in ((None, TOKENS[5:]), (other, other)):
        out = tmp_path / str(heldout is None)
        record = compress(dense, out, heldout=heldout, **QUICK)
        assert record.held_back == record.settings["held_back"] == 1
        for field, tokens in (("error", TOKENS[:5]), ("heldout_error", judging)):
            measured = layer_errors(original, load(out), tokens)
            assert list(measured) == [layer.name for layer in record.layers]
            for layer in record.layers:
                assert measured[layer.name] == pytest.approx(getattr(layer, field), rel=2e-3)
        assert record.mean_error == pytest.approx(sum(layer.error for layer in record.layers) / 14)


def test_text_calibration_end_to_end(dense, tmp_path):
    (tmp_path / "text.txt").write_text(tiny_models.text())
    record = compress(
        dense,
        tmp_path / "o",
        method="wanda",
        calibration=tmp_path / "text.txt",
        heldout=tmp_path / "text.txt",
        samples=8,
        progress=False,
    )
    assert record.settings["window"] == 64  # cut to the model's positions
    assert record.tokens == 8 * 64 and record.hidden_state_bytes == (8 + 2) * 64 * 32 * 4
    assert all(layer.heldout_error is not None for layer in record.layers)


def test_the_default_method_beats_magnitude(dense, packed, tmp_path):
    plain = compress(dense, tmp_path / "o", **QUICK)
    ours = json.loads((packed / "slab_run.json").read_text())
    assert ours["mean_error"] < 0.6 * plain.mean_error


def test_drift_is_seen_by_methods_that_ask_for_it(dense, tmp_path):
    # An embedding of int8 rows would make the first layers' inputs differ too.
    asked = {"calibration": TOKENS, "progress": False, "rounds": 1, "embeddings": "dense"}
    with_drift = compress(dense, tmp_path / "a", drift=1.0, **asked)
    without = compress(dense, tmp_path / "b", drift=0.0, **asked)
    # The window of six that is held back is not led through the dense model.
    assert 6 * with_drift.hidden_state_bytes == 11 * without.hidden_state_bytes
    first = [[layer.error for layer in r.layers[:3]] for r in (with_drift, without)]
    assert first[0] == first[1] and with_drift.layers[-1].error != without.layers[-1].error


@pytest.mark.parametrize(("settings", "most"), [({"method": "wanda"}, 1), ({"rounds": 1}, 2)])
def test_one_block_in_memory_at_a_time(tmp_path, monkeypatch, settings, most):
    """Two with a method that looks at the drift: the block as it was and as it becomes."""
    tiny_models.write(tmp_path / "d", num_hidden_layers=4)
    alive, counts, real = weakref.WeakSet(), [], blocks.filled_copy

    def counted(*args):
        counts.append(len(alive) + 1)
        alive.add(block := real(*args))
        return block

    monkeypatch.setattr(blocks, "filled_copy", counted)
    compress(tmp_path / "d", tmp_path / "o", calibration=TOKENS, progress=False, **settings)
    assert len(counts) >= 4 * most and max(counts) <= most


@pytest.mark.parametrize("pattern", ["4:8", "50%"])
def test_what_cannot_be_packed_is_stored_dense(dense, tmp_path, pattern):
    record = compress(dense, tmp_path / "o", pattern=pattern, **QUICK)
    assert record.stored == "dense" and {layer.bits_per_weight for layer in record.layers} == {32.0}
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    weight = opened.get_submodule(record.layers[0].name).weight
    assert int((weight == 0).sum()) == weight.numel() // 2
    with pytest.raises(
        CheckpointError,
        match=r"was not written by slab_kernels .it holds a dense model.; compress it first",
    ):
        load(tmp_path / "o")
    measured = layer_errors(AutoModelForCausalLM.from_pretrained(dense), opened, TOKENS[:5])
    assert measured[record.layers[-1].name] == pytest.approx(record.layers[-1].error, rel=2e-3)


def test_events_tell_every_layer(dense, tmp_path):
    events: list[ProgressEvent] = []
    compress(dense, tmp_path / "o", **QUICK | {"progress": events.append})
    assert [e.kind for e in events] == ["start", *(["layer"] * 7 + ["block"]) * 2, "done"]
    layers = [e for e in events if e.kind == "layer"]
    assert [e.done for e in layers] == list(range(1, 15)) and {e.layers for e in layers} == {14}
    line = str(layers[0])
    assert "model.layers.0.self_attn.q_proj held-out error 0." in line
    assert ", calibration error 0." in line and "bits per weight" in line
    assert "mean held-out error 0." in str(events[-1])
    assert "windows of 16, 1 of them held back to judge by" in str(events[0])


def test_the_bar_writes_to_stderr(dense, tmp_path, capsys):
    compress(dense, tmp_path / "o", **QUICK | {"progress": True})
    out, err = capsys.readouterr()
    assert not out and "model.layers.1.mlp.down_proj held-out error" in err and "[14/14]" in err


# kill and resume


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [3, 8, 12, 16])
def test_a_resumed_run_ends_with_the_same_bytes(dense, packed, tmp_path, at):
    events = []

    def stop(event):
        events.append(event)
        if len(events) == at + 1:
            raise Killed

    with pytest.raises(Killed):
        compress(dense, tmp_path / "o", calibration=TOKENS, progress=stop)
    compress(dense, tmp_path / "o", calibration=TOKENS, progress=events.append, resume=True)
    assert digests(tmp_path / "o") == digests(packed)
    assert any(e.kind == "resumed" for e in events) == (9 <= at < 17)
    record, want = (json.loads((f / "slab_run.json").read_text()) for f in (tmp_path / "o", packed))
    for r in (record, want):
        for layer in (r, *r["layers"]):
            layer.pop("seconds"), layer.pop("peak_bytes", None)
    assert record == want


KILL = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
import tiny_models
from slab_kernels.compression.model import compress
def progress(event):
    if event.kind == "layer" and event.done == 9:
        os.kill(os.getpid(), signal.SIGKILL)
compress({dense!r}, {out!r}, calibration=tiny_models.tokens(), progress=progress)
"""


@pytest.mark.slow
def test_sigkill_and_resume(dense, packed, tmp_path):
    code = KILL.format(
        tests=str(Path(__file__).parents[1]), dense=str(dense), out=str(tmp_path / "o")
    )
    root = str(Path(slab_kernels.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, capture_output=True
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    with pytest.raises(CheckpointError, match="finish it with resume=True"):
        load(tmp_path / "o")
    compress(dense, tmp_path / "o", calibration=TOKENS, progress=False, resume=True)
    assert digests(tmp_path / "o") == digests(packed)


def test_resuming_a_finished_run_does_nothing(dense, packed):
    before = {p: p.stat().st_mtime_ns for p in packed.iterdir()}
    record = compress(dense, packed, calibration=TOKENS, progress=False, resume=True)
    assert (
        len(record.layers) == 14 and {p: p.stat().st_mtime_ns for p in packed.iterdir()} == before
    )
    with pytest.raises(CheckpointError, match=r"cannot resume .*: rank was 1 and is now 2"):
        compress(dense, packed, calibration=TOKENS, progress=False, resume=True, rank=2)
    with pytest.raises(CheckpointError, match="is not empty"):
        compress(dense, packed, calibration=TOKENS, progress=False)


def test_resume_refuses_other_settings_text_and_model(dense, tmp_path):
    def stop(event):
        if event.kind == "block":
            raise Killed

    with pytest.raises(Killed):
        compress(dense, tmp_path / "o", **QUICK | {"progress": stop})
    tiny_models.write(tmp_path / "other", seed=3)
    for changes, source, message in (
        ({"method": "wanda"}, dense, "method was 'magnitude' and is now 'wanda'"),
        ({"calibration": tiny_models.tokens(seed=1)}, dense, "calibration_sha256 was"),
        ({"skip": "*.q_proj"}, dense, r"skip was \[\] and is now \['\*\.q_proj'\]"),
        ({}, tmp_path / "other", "model_sha256 was"),
    ):
        with pytest.raises(CheckpointError, match=message):
            compress(source, tmp_path / "o", resume=True, **QUICK | changes)


# in memory


def test_a_run_that_fails_before_its_first_block_gives_the_folder_back(
    dense, tmp_path, monkeypatch
):
    monkeypatch.setattr("slab_kernels.compression.run.BlockwiseRun", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress(dense, tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ZeroDivisionError):
        compress(dense, tmp_path / "mine", **QUICK)


def test_in_memory_in_place_and_equal_to_the_folder(dense, packed, tmp_path):
    given = AutoModelForCausalLM.from_pretrained(dense).eval()
    result = compress(given, calibration=TOKENS, progress=False)
    assert result is given and isinstance(given.model.layers[0].mlp.up_proj, SlabLinear)
    assert torch.equal(logits(result), logits(load(packed)))
    assert len(result.slab_record.layers) == 14
    save(result, tmp_path / "saved", tiny_models.tokenizer())
    assert torch.equal(logits(load(tmp_path / "saved")), logits(result))
    saved, written = (
        json.loads((f / "config.json").read_text())["quantization_config"]
        for f in (tmp_path / "saved", packed)
    )
    assert saved == written


def test_a_module_written_to_a_folder_stays_dense(dense, packed, tmp_path):
    given = AutoModelForCausalLM.from_pretrained(dense).eval()
    before = logits(given)
    compress(
        given, tmp_path / "o", calibration=TOKENS, progress=False, tokenizer=tiny_models.tokenizer()
    )
    assert torch.equal(logits(given), before) and not any(p.is_meta for p in given.parameters())
    assert torch.equal(logits(load(tmp_path / "o")), logits(load(packed)))
    assert (tmp_path / "o" / "tokenizer.json").is_file()


def test_a_folder_into_memory(dense, packed):
    assert torch.equal(
        logits(compress(dense, calibration=TOKENS, progress=False)), logits(load(packed))
    )


def test_dense_patterns_in_memory():
    result = compress(tiny_models.model(), pattern="50%", **QUICK)
    weight = result.model.layers[0].mlp.up_proj.weight
    assert (
        type(result.model.layers[0].mlp.up_proj) is nn.Linear
        and int((weight == 0).sum()) == weight.numel() // 2
    )


def test_adapters_of_peft_are_refused_with_the_way_out(tmp_path):
    """A stand-in for PEFT, which is told by where its classes come from."""
    tuner = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    model = tiny_models.model()
    model.model.layers[1].self_attn.q_proj = tuner(32, 32, bias=False)
    with pytest.raises(
        ArchitectureError,
        match=r"layers\.1\.self_attn\.q_proj is Linear, an adapter of PEFT.*merge_and_unload",
    ):
        compress(model, tmp_path / "out", method="magnitude", calibration=TOKENS, progress=False)
    tiny_models.write(tmp_path / "m")
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    with pytest.raises(ArchitectureError, match=r"holds an adapter of PEFT.*merge_and_unload"):
        compress(
            tmp_path / "m", tmp_path / "out", method="magnitude", calibration=TOKENS, progress=False
        )
    assert not (tmp_path / "out").exists()


def test_a_module_needs_a_tokenizer_for_text():
    with pytest.raises(CalibrationError, match="a model in memory needs tokenizer="):
        compress(tiny_models.model(), method="magnitude", progress=False)


# load, save, decompress


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_save_decompress(tmp_path, tied, dtype):
    tiny_models.write(tmp_path / "d", dtype=dtype, tie_word_embeddings=tied)
    compress(tmp_path / "d", tmp_path / "p", **QUICK)
    loaded = load(tmp_path / "p")
    assert (
        loaded.dtype == dtype
        and (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    )
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    save(loaded, tmp_path / "s")
    assert torch.equal(logits(load(tmp_path / "s")), logits(loaded))
    decompress(tmp_path / "p", tmp_path / "q")
    assert "quantization_config" not in json.loads((tmp_path / "q" / "config.json").read_text())
    plain, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "q", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and plain.dtype == dtype
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(
        plain.get_submodule(name).weight, loaded.get_submodule(name).packed().dense().to(dtype)
    )
    assert torch.allclose(
        logits(plain).float(), logits(loaded).float(), atol=1e-4 if dtype == torch.float32 else 0.1
    )


def test_load_with_another_activation_dtype(packed):
    loaded = load(packed, dtype=torch.bfloat16)
    assert (
        logits(loaded).dtype == torch.bfloat16
        and loaded.model.layers[0].mlp.up_proj.values.dtype == torch.uint8
        and loaded.model.layers[0].mlp.up_proj.U.dtype == torch.float16
    )
    assert torch.allclose(logits(loaded).float(), logits(load(packed)), atol=0.3)


def test_generate_from_packed_weights(packed, tmp_path):
    decompress(packed, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    texts = [
        m.generate(TOKENS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
        for m in (load(packed), plain)
    ]
    assert torch.equal(*texts)


def test_save_and_decompress_want_an_empty_folder_and_packed_weights(dense, packed, tmp_path):
    with pytest.raises(CheckpointError, match="holds no SlabLinear module"):
        save(tiny_models.model(), tmp_path / "s")
    for write in (lambda: save(load(packed), dense), lambda: decompress(packed, dense)):
        with pytest.raises(CheckpointError, match="is not empty"):
            write()
    with pytest.raises(CheckpointError, match="was not written by slab_kernels"):
        decompress(dense, tmp_path / "q")


def damaged(packed: Path, folder: Path, config=None, module=None, **tensors) -> Path:
    """A copy of `packed` in one shard, with changes.

    They are entries of the config, entries of one module, and tensors, which None removes.
    """
    folder.mkdir()
    content = json.loads((packed / "config.json").read_text())
    content["quantization_config"] |= config or {}
    content["quantization_config"]["modules"].get(NAME, {}).update(module or {})
    (folder / "config.json").write_text(json.dumps(content))
    kept = {n: t for f in sorted(packed.glob("*.safetensors")) for n, t in load_file(f).items()}
    for name, change in tensors.items():
        full = (
            f"{NAME}.{name}"
            if name in ("values", "metadata", "signs", "U", "V", "bias", "P")
            else name
        )
        kept[full] = change(kept.get(full)) if callable(change) else change
    save_file(
        {n: t.contiguous() for n, t in kept.items() if t is not None},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


NAME = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"values": None},
            CheckpointError,
            r"lacks tensor 'model\.layers\.1\.self_attn\.k_proj\.values'",
        ),
        ({"model.norm.weight": None}, CheckpointError, r"lacks tensor 'model\.norm\.weight'"),
        (
            {"bias": torch.ones(16)},
            CheckpointError,
            r"holds the unexpected tensor '.*k_proj\.bias'",
        ),
        ({f"{NAME}.weight": torch.ones(16, 32)}, CheckpointError, "holds the unexpected tensor"),
        (
            {"values": lambda t: t[:, :-1]},
            CheckpointError,
            r"has shape \[16, 15\], expected \[16, 16\]",
        ),
        (
            {"values": lambda t: t.float()},
            CheckpointError,
            "is torch.float32, expected torch.float16",
        ),
        (
            {"model.norm.weight": lambda t: t.to(torch.int32)},
            CheckpointError,
            "is torch.int32, expected torch.float32",
        ),
        (
            {"metadata": lambda t: t.fill_(0)},
            FormatError,
            r"k_proj: metadata holds 128 nibbles that are not",
        ),
        ({"values": lambda t: t.fill_(math.nan)}, FormatError, "k_proj: values holds NaN"),
        (
            {"model.norm.weight": lambda t: t.fill_(math.inf)},
            CheckpointError,
            r"'model\.norm\.weight' holds NaN or infinite",
        ),
        (
            {"config": {"format_version": 4}},
            VersionError,
            "format_version 4, this library reads up to 3; update",
        ),
        (
            {"config": {"format_version": "one"}},
            CheckpointError,
            "format_version 'one', expected a positive integer",
        ),
        (
            {"config": {"quant_method": "gptq"}},
            CheckpointError,
            "was not written by slab_kernels .it holds quant_method 'gptq'",
        ),
        ({"config": {"modules": {}}}, CheckpointError, "lists no compressed modules"),
        (
            {"config": {"modules": {"model.nothing": {"out_features": 4, "in_features": 4}}}},
            CheckpointError,
            "'model.nothing', which",
        ),
        (
            {"module": {"out_features": 8}},
            CheckpointError,
            r"k_proj\.values' has shape \[16, 16\], expected \[8, 16\] by quantization_config",
        ),
        ({"module": {"values": "fp7"}}, FormatError, "k_proj': values='fp7' is unknown"),
        ({"module": {"rank": 0}}, CheckpointError, "holds the unexpected tensor"),
        ({"module": {"rank": -1}}, FormatError, "rank=-1 must be an integer between 0"),
        ({"module": {"out_features": 1 << 40}}, FormatError, "out_features=1099511627776 must be"),
    ],
)
def test_a_damaged_checkpoint_is_refused(exact, tmp_path, changes, kind, message):
    folder = damaged(exact, tmp_path / "x", **changes)
    with pytest.raises(kind, match=message):
        load(folder)
    if (
        "model.norm.weight" not in changes or "infinite" not in message
    ):  # decompress copies what is dense unseen
        with pytest.raises(kind, match=message):
            decompress(folder, tmp_path / "q")
    assert not (tmp_path / "q" / "config.json").exists()


def test_an_unharmed_copy_loads(packed, tmp_path):
    assert torch.equal(logits(load(damaged(packed, tmp_path / "x"))), logits(load(packed)))


# refused before anything is written


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"method": "magic"}, ValueError, "method='magic' is unknown; choose one of .*slab"),
        (
            {"values": "fp7"},
            FormatError,
            "values='fp7' is unknown; choose one of fp16, bf16, int8, int4",
        ),
        ({"values": "int4", "group_size": 48}, FormatError, "group_size=48"),
        ({"pattern": "two of four"}, FormatError, "pattern='two of four' is not a pattern"),
        ({"pattern": "4:4"}, FormatError, "pattern='4:4' is not a pattern"),
        ({"pattern": "100%"}, FormatError, "pattern='100%' is not a pattern"),
        ({"rank": -1}, ValueError, "rank=-1 must be"),
        ({"no_such_option": 3}, ValueError, "no_such_option"),
        ({"device": "quantum"}, ValueError, "device='quantum' is unknown"),
        ({"device": "cuda:99"}, ValueError, "is not on this machine"),
        ({"samples": 0, "calibration": "stdlib"}, CalibrationError, "samples=0"),
        ({"calibration": "absent.txt"}, CalibrationError, "does not exist"),
        (
            {"calibration": TOKENS[0]},
            CalibrationError,
            r"must be a non-empty integer tensor \[samples, window\]",
        ),
        (
            {"calibration": TOKENS + 50},
            CalibrationError,
            "the calibration tokens go up to .*vocabulary has 96",
        ),
        ({"heldout": TOKENS.float()}, CalibrationError, "held-out token ids must be"),
    ],
)
def test_bad_settings(dense, tmp_path, settings, kind, message):
    with pytest.raises(kind, match=message):
        compress(dense, tmp_path / "o", **QUICK | settings)
    assert not (tmp_path / "o" / "config.json").exists()


def test_too_short_a_text(dense, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(
        CalibrationError, match="the calibration text has 9 tokens, fewer than one window of 64"
    ):
        compress(dense, tmp_path / "o", **QUICK | {"calibration": tmp_path / "short.txt"})


def test_a_folder_without_tokenizer(tmp_path):
    tiny_models.model().save_pretrained(tmp_path / "d")
    with pytest.raises(CheckpointError, match="no tokenizer can be loaded from"):
        compress(
            tmp_path / "d", tmp_path / "o", method="magnitude", calibration="stdlib", progress=False
        )


# numbers that are not numbers, inputs that are dead


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(bad):
    given = tiny_models.model()
    given.model.layers[1].mlp.up_proj.weight.data[0, :2] = bad
    with pytest.raises(
        CheckpointError,
        match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 2 NaN or infinite numbers",
    ):
        compress(given, **QUICK)


def test_activations_that_are_not_finite_are_named():
    given = tiny_models.model()
    given.model.layers[1].post_attention_layernorm.weight.data[3] = math.nan
    with pytest.raises(
        CalibrationError,
        match=r"the inputs of model\.layers\.1\.mlp\.gate_proj hold NaN or infinite",
    ):
        compress(given, **QUICK)


@pytest.mark.parametrize("method", ["slab", "slab-paper", "sparsegpt", "wanda", "magnitude"])
def test_dead_channels_and_dead_layers(method):
    given = tiny_models.model()
    given.model.layers[0].input_layernorm.weight.data[:5] = 0  # channels that no token reaches
    given.model.layers[1].input_layernorm.weight.data[:] = 0  # q, k and v see zeros only
    result = compress(given, **QUICK | {"method": method})
    assert bool(logits(result).isfinite().all())
    assert all(
        math.isfinite(layer.error) and 0 <= layer.error < 1 for layer in result.slab_record.layers
    )


def test_one_window_of_two_tokens():
    result = compress(
        tiny_models.model(), **QUICK | {"calibration": TOKENS[:1, :2], "method": "wanda"}
    )
    assert bool(logits(result).isfinite().all())


def test_fewer_tokens_than_inputs_is_a_warning():
    """The Gram matrix is singular then: what a Gram method fits is the sample."""
    events = []
    for method in ("sparsegpt", "wanda"):
        settings = QUICK | {"calibration": TOKENS[:1], "method": method, "progress": events.append}
        compress(tiny_models.model(), **settings)
    (warning,) = [e for e in events if e.kind == "warning"]
    assert (
        "16 calibration tokens are fewer than the 48 inputs of model.layers.0.mlp.down_proj"
        in str(warning)
    )
