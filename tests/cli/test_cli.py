"""The command line: pure JSON on stdout, one sentence per failure, exit codes that mean something.

The model is a tiny random Llama.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch

from slab_kernels.cli import console
from slab_kernels.cli import main as cli
from slab_kernels.errors import BUG

SLAB = [sys.executable, "-m", "slab_kernels"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_models.write(folder, dtype=torch.float16)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_models.text())
    return path


@pytest.fixture(scope="module")
def packed(model, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "slab"
    assert cli.run(small(model, out, text, "--preset", "exact")) == 0
    return out


def small(model, out, text, *more: str) -> list[str]:
    return [
        "compress",
        str(model),
        str(out),
        "--calibration",
        str(text),
        "--samples",
        "4",
        "--window",
        "32",
        "--device",
        "cpu",
        *more,
    ]


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def answer(capsys):
    """Runs a command with --json: (exit code, the one object on stdout)."""

    def run(*arguments) -> tuple[int, dict]:
        capsys.readouterr()
        code = cli.run([*map(str, arguments), "--json"])
        out = capsys.readouterr().out
        assert out.endswith("\n") and out.count("\n") == 1, (
            f"stdout holds more than one line: {out!r}"
        )
        return code, json.loads(out)

    return run


@pytest.fixture
def refused(answer, capsys):
    """Runs a command that must fail and returns exit code and message, which is checked to be one
    plain sentence in both modes."""

    def run(*arguments) -> tuple[int, str]:
        code, found = answer(*arguments)
        assert set(found) == {"error"} and set(found["error"]) == {"type", "message"}
        message = found["error"]["message"]
        assert "\n" not in message and "Traceback" not in message and code != BUG
        if (
            arguments[0] == "compress"
            and len(arguments) > 2
            and (Path(arguments[2]) / "slab_progress.json").exists()
        ):
            shutil.rmtree(
                arguments[2]
            )  # the failed run claimed it; the second one shall fail for the same reason
        assert cli.run(list(map(str, arguments))) == code
        shown = capsys.readouterr()
        assert message in shown.err and "Traceback" not in shown.err
        return code, message

    return run


# What works


def test_compress_writes_a_record_and_says_the_same(model, text, tmp_path, answer):
    code, found = answer(
        *small(model, tmp_path / "out", text, "--values", "int4", "--group-size", "32")
    )
    assert code == 0 and found["folder"] == str(tmp_path / "out") and len(found["layers"]) == 14
    layer = found["layers"][0]
    assert layer["values"] == "int4" and 0 < layer["error"] < 1 and layer["bits_per_weight"] > 3.5
    assert json.loads((tmp_path / "out" / "slab_run.json").read_text())["layers"] == found["layers"]


def test_compress_passes_method_options_on(model, text, tmp_path, refused):
    code, message = refused(*small(model, tmp_path / "out", text, "--option", "no_such_option=3"))
    assert code == 2 and "no_such_option" in message


def test_eval_states_window_and_tokens(packed, model, text, answer):
    for folder, stored in ((packed, "packed"), (model, "dense")):
        code, found = answer(
            "eval", folder, "--text", text, "--window", "32", "--max-tokens", "500"
        )
        assert code == 0 and found["stored"] == stored and found["window"] == 32
        assert found["bytes"] > 1000 and found["run"]["command"].startswith("slab-kernels eval ")
        assert (
            found["perplexity"] > 1
            and 490 < found["tokens"] <= 500
            and found["windows"] == -(-found["tokens"] // 31)
        )


def test_eval_compares_with_the_dense_model(packed, model, text, answer, refused, capsys, tmp_path):
    arguments = ("--text", text, "--window", "32", "--max-tokens", "300")
    code, found = answer("eval", packed, *arguments, "--against", model)
    assert code == 0 and found["against"] == str(model) and 0 < found["top1"] <= 1
    assert found["kl_p99"] > found["kl"] > 0 and found["perplexity_ratio_stderr"] > 0
    ratio = found["perplexity"] / found["dense_perplexity"]
    assert found["perplexity_ratio"] == pytest.approx(ratio)
    code, itself = answer("eval", model, *arguments, "--against", model)
    assert code == 0 and itself["kl"] == pytest.approx(0, abs=1e-9) and itself["top1"] == 1
    assert cli.run(["eval", str(packed), *map(str, arguments), "--against", str(model)]) == 0
    out = capsys.readouterr().out
    assert "KL(dense || this)" in out and "bits per parameter (packed linears" in out
    assert "embeddings" in out and "norms" in out and " ± " in out
    (tmp_path / "eval.json").write_text(json.dumps(found))
    code, shown = answer(
        "report", packed, tmp_path / "eval.json", "--no-plots", "--out", tmp_path / "r"
    )
    assert code == 0 and "KL" in shown["headline"] and "smaller (" in shown["headline"]
    code, message = refused("eval", packed, "--against", packed)
    assert code == 3 and "compressed already" in message
    code, message = refused("eval", packed, "--against", tmp_path)
    assert code == 3 and "no config.json" in message
    code, message = refused("eval", packed, "--against", model, "--tasks", "x")
    assert code == 2 and "--against" in message


def test_generate_beside_the_dense_model(packed, model, answer, refused, capsys, tmp_path):
    ask = ("--prompt", "hello", "--tokens", "5", "--batch", "2", "--against")
    code, found = answer("generate", packed, *ask, model)
    dense, ours = found["results"]
    assert code == 0 and dense["method"] == "dense" and ours["method"] == "slab"
    assert [step["batch"] for step in ours["decoding"]] == [1, 2]
    assert found["text"] == ours["continuation"] and found["run"]["seconds"] > 0
    plain = answer("generate", model, "--prompt", "hello", "--tokens", "5")[1]
    assert dense["continuation"] == plain["text"] and dense["bytes"] == plain["bytes"]
    for row in (dense, ours):
        assert row["dense_bytes"] and row["bits_per_parameter"] > 0
        for step in row["decoding"]:
            assert sum(step["split"].values()) == pytest.approx(1)
            assert all(-0.05 < share < 1 for share in step["split"].values())
    assert cli.run(["generate", str(packed), *ask, str(model)]) == 0
    out = capsys.readouterr().out
    assert "part of a decode step" in out and "texts at once" in out and "hello" in out
    (tmp_path / "beside.json").write_text(json.dumps(found))
    code, shown = answer("report", tmp_path / "beside.json", "--out", tmp_path / "r", "--no-plots")
    assert code == 0 and len(shown["results"]) == 2
    for more, said in (
        (("--temperature", "1"), "leave --temperature out"),
        (("--tokens", "2"), "3 new tokens"),
    ):
        code, message = refused("generate", packed, "--against", model, *more)
        assert code == 2 and said in message
    code, message = refused("generate", packed, "--batch", "2")
    assert code == 2 and "--batch is for --against" in message


def test_models_of_other_vocabularies_are_not_compared(packed, text, refused, tmp_path):
    tiny_models.write(tmp_path / "other", vocab_size=128)
    for command in (("eval", packed, "--text", text), ("generate", packed)):
        code, message = refused(*command, "--against", tmp_path / "other")
        assert code == 2 and "a vocabulary of 128 tokens, and this one has 96" in message


def test_generate_continues_the_prompt(packed, model, answer):
    for folder in (packed, model):
        code, found = answer("generate", folder, "--prompt", "hello", "--tokens", "4")
        assert (
            code == 0
            and found["prompt"] == "hello"
            and 0 < found["tokens"] <= 4
            and found["tokens_per_second"] > 0
        )


def test_inspect_counts_the_bytes_on_disk(packed, answer):
    code, found = answer("inspect", packed)
    assert code == 0 and found["stored"] == "packed" and len(found["layers"]) == 14
    from safetensors import safe_open

    stored = {}
    for shard in packed.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as f:
            for name in f.keys():
                t = f.get_tensor(name)
                stored[name] = t.numel() * t.element_size()
    for layer in found["layers"]:
        size = sum(n for name, n in stored.items() if name.rpartition(".")[0] == layer["name"])
        assert layer["bits_per_weight"] == pytest.approx(
            8 * size / (layer["shape"][0] * layer["shape"][1])
        )
        assert layer["bits_per_weight"] - layer["factor_bits_per_weight"] == pytest.approx(10)


def test_inspect_of_a_dense_folder(model, answer):
    code, found = answer("inspect", model)
    assert code == 0 and found["stored"] == "dense" and found["bits_per_weight"] == 16


def test_decompress_is_dense_and_means_the_same(packed, text, tmp_path, answer):
    assert answer("decompress", packed, tmp_path / "dense")[0] == 0
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    arguments = ("--text", text, "--window", "32", "--max-tokens", "300")
    before, after = (
        answer("eval", folder, *arguments)[1]["perplexity"]
        for folder in (packed, tmp_path / "dense")
    )
    assert after == pytest.approx(before, rel=2e-3)  # fp16 instead of the exact product


def test_patterns_that_do_not_pack_are_stored_dense(model, text, tmp_path, answer):
    code, found = answer(
        *small(model, tmp_path / "out", text, "--pattern", "50%", "--method", "wanda")
    )
    assert code == 0 and found["stored"] == "dense"
    code, found = answer("inspect", tmp_path / "out")
    assert found["stored"] == "pruned, dense" and found["layers"][0]["pattern"] == "50%"
    assert answer("eval", tmp_path / "out", "--text", text, "--max-tokens", "200")[0] == 0


def test_explain_names_the_chosen_and_every_reason(answer):
    code, found = answer("explain", "--shape", "64x32", "--dtype", "fp32", "--device", "cpu")
    assert code == 0 and [b["backend"] for b in found["backends"]][-1] == "reference"
    (chosen,) = [b for b in found["backends"] if b["chosen"]]
    assert chosen["backend"] == found["chosen"] and not chosen["reasons"]


def test_explain_names_the_memory_of_a_dense_copy(answer, capsys):
    shape = ("explain", "--shape", "4096x4096", "--device", "cpu", "--values", "int4")
    code, found = answer(*shape)
    assert code == 0 and found["dense_copy"]["from_tokens"] is None
    assert found["dense_copy"]["bytes"] == 2 * 4096 * 4096
    code, found = answer(*shape, "--gpu", "H100", "--m", "4096")
    assert found["dense_copy"]["backend"] == "cuda" and found["dense_copy"]["used"]
    for m, words in ((1, "not used for 1 token, at the earliest from "), (4096, "used for 4096")):
        assert cli.run([*shape, "--gpu", "H100", "--m", str(m)]) == 0
        said = capsys.readouterr().out
        assert f"dense copy of 33.55 MB, 16.00 bits per weight more, {words}" in said
    assert cli.run([*shape]) == 0
    assert "the cpu backend keeps no dense copy of this here" in capsys.readouterr().out


def test_a_word_for_dense_copies_that_cannot_be_is_refused(model, text, tmp_path, answer, refused):
    answer(*small(model, tmp_path / "out", text))
    options = ("--text", text, "--max-tokens", "200", "--device", "cpu")
    code, found = answer("eval", tmp_path / "out", *options, "--prefill", "auto")
    assert code == 0 and found["dense_copy_bytes"] == 0
    assert found["activations"] == "exact", "as the environment of the tests says"
    code, message = refused("eval", tmp_path / "out", *options, "--prefill", "dense")
    assert code == 4 and "use --prefill 'packed', or 'auto'" in message
    code, message = refused("generate", tmp_path / "out", "--prefill", "fast")
    assert code == 2 and "use one of packed, dense, auto" in message
    code, message = refused("bench", "--shape", "64x32", "--device", "cpu", "--prefill", "dense")
    assert code == 4 and "backend keeps none of 64x32" in message


def test_info_says_why_not(answer):
    code, found = answer("info")
    assert found["dense_copies"] == {"prefill": "packed", "bits_per_weight": 16, "auto_bytes": {}}
    assert code == 0 and found["versions"]["torch"] and found["backends"]["reference"]["cpu"] == []
    assert found["devices"][0]["device"] == "cpu" and "SLAB_KERNELS_BACKEND" in found["variables"]


@pytest.mark.parametrize(
    ("variable", "value", "code", "words"),
    [
        ("SLAB_KERNELS_PREFILL", "fast", 2, "use one of packed, dense, auto"),
        ("SLAB_KERNELS_CPU_ACTIVATIONS", "fast", 2, "use one of exact, int8"),
        ("SLAB_KERNELS_BACKEND", "nonsense", 2, "backend 'nonsense' is unknown"),
        ("SLAB_KERNELS_BACKEND", "cuda", 4, "backend 'cuda' cannot run"),
    ],
)
def test_info_shows_everything_and_fails_where_a_variable_stops_every_model(
    variable, value, code, words, answer, monkeypatch, capsys
):
    if value == "cuda" and torch.cuda.is_available():
        pytest.skip("it runs here")
    monkeypatch.setenv(variable, value)
    found_code, found = answer("info")
    assert found_code == code and found["variables"][variable] == value and found["versions"]
    (problem,) = found["problems"]
    assert words in problem
    assert cli.run(["info"]) == code
    shown = capsys.readouterr()
    assert f"{variable} " in shown.out and f"no model runs here: {problem}" in shown.err
    monkeypatch.delenv(variable)
    assert answer("info")[1]["problems"] == []


def test_bench_rows_have_dense_beside_ours(answer):
    code, found = answer(
        "bench",
        "--shape",
        "64x32",
        "--m",
        "1",
        "--values",
        "fp16",
        "--dtype",
        "fp32",
        "--device",
        "cpu",
    )
    assert code == 0
    dense, *ours = found["rows"]
    assert dense["backend"] == "dense" and dense["speedup_vs_dense"] == 1 and ours
    for row in found["rows"]:
        assert {
            "backend",
            "m",
            "n",
            "k",
            "values",
            "dtype",
            "median_us",
            "speedup_vs_dense",
            "gbytes_per_s",
        } <= set(row)
        assert (row["m"], row["n"], row["k"]) == (1, 64, 32) and row["median_us"] > 0


@pytest.mark.slow
def test_report_of_run_and_evaluation(packed, text, tmp_path, answer, capsys):
    code, evaluation = answer("eval", packed, "--text", text, "--max-tokens", "200")
    (tmp_path / "eval.json").write_text(json.dumps(evaluation))
    code, found = answer("report", packed, tmp_path / "eval.json", "--out", tmp_path / "report")
    assert (
        code == 0
        and len(found["results"]) == 1
        and found["results"][0]["perplexity"] == evaluation["perplexity"]
    )
    assert all(Path(path).is_file() for path in found["written"]) and found["written"][-1].endswith(
        "report.html"
    )


def test_tables_for_people(packed, capsys):
    assert cli.run(["inspect", str(packed)]) == 0
    out = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in out and "bits per weight on disk" in out
    assert "MB in all, " in out and "bits per parameter (packed linears " in out


# Bad input: each a sentence that says what to do


def test_unknown_names_list_the_known(model, text, tmp_path, refused):
    cases = [
        (("--method", "slabb"), ("magnitude", "wanda", "sparsegpt", "slab-paper", "slab")),
        (("--values", "int5"), ("fp16", "bf16", "int8", "int4", "int3")),
        (("--pattern", "2by4"), ("2:4",)),
        (("--device", "tpu9"), ("cpu", "cuda")),
        (("--group-size", "48"), ("32", "64", "128")),
    ]
    for more, known in cases:
        more = (*more, "--values", "int4") if "--group-size" in more else more
        code, message = refused(*small(model, tmp_path / "out", text), *more)
        assert code == 2 and all(name in message for name in known), message
        assert not (tmp_path / "out").exists()


def test_unknown_backend_and_dtype_list_the_known(packed, refused):
    code, message = refused("explain", "--backend", "fpga")
    assert code == 2 and "cpu" in message and "reference" in message
    code, message = refused("eval", packed, "--backend", "fpga")
    assert code == 2 and "cpu" in message and "reference" in message
    code, message = refused("explain", "--dtype", "fp8")
    assert code == 2 and all(name in message for name in ("fp32", "bf16", "fp16"))


def test_forced_backend_that_cannot_run_lists_every_reason(monkeypatch, refused):
    from slab_kernels.backends import dispatch

    backend = dispatch.backend("cpu")
    monkeypatch.setattr(
        backend, "not_supported_reasons", lambda problem: ["first reason", "second reason"]
    )
    code, message = refused("explain", "--backend", "cpu", "--device", "cpu")
    assert code == 4 and "first reason" in message and "second reason" in message


@pytest.mark.parametrize("shape", ["5", "0x4", "4096", "axb", "4x4x4"])
def test_bad_shapes(shape, refused):
    code, message = refused("explain", "--shape", shape)
    assert code == 2 and "11008x4096" in message


@pytest.mark.parametrize("given", [["--token", "64"], ["--token=64"]])
def test_a_number_of_tokens_is_no_access_token(packed, refused, given):
    code, message = refused("generate", packed, *given)
    assert code == 2 and "for so many new tokens give --tokens 64" in message


def test_usage_errors_are_json_too(refused):
    assert refused("nosuch")[0] == 2
    assert refused("compress")[0] == 2
    assert refused("eval", "x", "--no-such-option")[0] == 2


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "does not exist"),
        (b"", "empty"),
        (b"  \n ", "empty"),
        (b"\xff\xfe\x00bad", "UTF-8"),
        (b"hi", "longer"),
    ],
)
def test_calibration_text(content, word, model, tmp_path, refused):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    code, message = refused(*small(model, tmp_path / "out", path))
    assert code == 2 and word in message
    assert not (tmp_path / "out" / "config.json").exists()


def test_model_folder_without_config(model, text, tmp_path, refused):
    folder = copy(model, tmp_path / "m")
    (folder / "config.json").unlink()
    code, message = refused(*small(folder, tmp_path / "out", text))
    assert code == 3 and "config.json" in message
    code, message = refused(*small(tmp_path / "nowhere", tmp_path / "out", text))
    assert code == 3 and "nowhere" in message


def test_missing_and_corrupt_shards(packed, text, tmp_path, refused):
    folder = copy(packed, tmp_path / "missing")
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    for command in (
        ("eval", folder, "--text", text),
        ("generate", folder),
        ("inspect", folder),
        ("decompress", folder, tmp_path / "d"),
    ):
        code, message = refused(*command)
        assert code == 3 and shard.name in message
    folder = copy(packed, tmp_path / "corrupt")
    shard = folder / shard.name
    shard.write_bytes(shard.read_bytes()[:-100])
    code, message = refused("generate", folder)
    assert code == 3 and shard.name in message and "corrupt" in message


def test_newer_format_version(packed, tmp_path, refused):
    folder = copy(packed, tmp_path / "new")
    config = json.loads((folder / "config.json").read_text())
    edit(
        folder / "config.json",
        quantization_config=config["quantization_config"] | {"format_version": 99},
    )
    code, message = refused("generate", folder)
    assert code == 3 and "99" in message and "update" in message


def test_in_features_that_groups_of_four_do_not_divide(model, text, tmp_path, refused):
    folder = copy(model, tmp_path / "odd")
    tiny_models.model(intermediate_size=50).save_pretrained(folder)
    code, message = refused(*small(folder, tmp_path / "out", text))
    assert code in (2, 3) and "50" in message and "down_proj" in message


def test_nan_weights(model, text, tmp_path, refused):
    from safetensors.torch import load_file, save_file

    folder = copy(model, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, message = refused(*small(folder, tmp_path / "out", text))
    assert code == 3 and "model.layers.1.mlp.up_proj" in message and "NaN" in message


def test_architecture_without_blocks(model, text, tmp_path, refused):
    folder = copy(model, tmp_path / "t5")
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-architecture"}))
    assert refused(*small(folder, tmp_path / "out", text))[0] == 3
    from transformers import GPT2Config, GPT2LMHeadModel

    shutil.rmtree(folder)
    copy(model, folder)
    (folder / "config.json").unlink()
    GPT2LMHeadModel(
        GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    ).save_pretrained(folder)
    code, message = refused(*small(folder, tmp_path / "out", text))
    assert code == 3 and "Conv1D" in message


def test_folder_that_holds_something_else_is_left_alone(model, text, tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    for more in ((), ("--resume",)):
        code, message = refused(*small(model, tmp_path / "out", text, *more))
        assert code == 3 and "empty" in message
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_output_without_a_name_is_not_the_current_folder(
    model, packed, text, tmp_path, refused, monkeypatch
):
    model, packed, text = (str(Path(path).resolve()) for path in (model, packed, text))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for line in (
        ("compress", model, "", "--calibration", text),
        ("decompress", packed, ""),
        ("report", packed, "--out", ""),
    ):
        code, message = refused(*line)
        assert code == 2 and "the name is empty; give the name of a folder" in message
    assert not list(here.iterdir())


def test_output_that_is_a_file(model, text, tmp_path, refused):
    (tmp_path / "out").write_text("a file")
    assert refused(*small(model, tmp_path / "out", text))[0] in (3, 5)


def test_unwritable_folder(model, text, tmp_path, refused, monkeypatch):
    """Simulated, because root may write everywhere."""

    def mkdir(self, *arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    code, message = refused(*small(model, tmp_path / "locked" / "out", text))
    assert code == 5 and "locked" in message and "Permission denied" in message
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing_that_loads(model, text, tmp_path, refused, monkeypatch):
    """No space at the second shard: exit code 5, and the folder is no checkpoint; with room again
    --resume finishes it."""
    real, state = os.replace, {"left": 6}

    def replace(source, target):
        if str(target).startswith(str(tmp_path)):
            state["left"] -= 1
            if state["left"] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert cli.run(small(model, tmp_path / "out", text)) == 5
    assert not (tmp_path / "out" / "config.json").exists()
    assert refused("generate", tmp_path / "out")[0] == 3
    monkeypatch.setattr(os, "replace", real)
    assert cli.run(small(model, tmp_path / "out", text, "--resume")) == 0


def test_dense_model_is_no_packed_folder(model, tmp_path, refused):
    code, message = refused("decompress", model, tmp_path / "out")
    assert code == 3 and "slab_kernels" in message


# The frame around the commands


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 5),
        (PermissionError(errno.EACCES, "Permission denied"), 5),
        (FileNotFoundError(errno.ENOENT, "No such file"), 3),
        (ValueError("bad"), 2),
        (ImportError("absent"), 4),
        (MemoryError(), 5),
        (KeyboardInterrupt(), 130),
        (RuntimeError("surprise"), 1),
    ],
)
def test_exit_codes(error, code, capsys):
    def command():
        raise error

    assert console.run(command, as_json=True) == code
    assert "message" in json.loads(capsys.readouterr().out)["error"]


def test_the_cause_decides_about_space(capsys):
    def command():
        raise ValueError("cannot write") from OSError(errno.ENOSPC, "full")

    assert console.run(command, as_json=False) == 5


def test_what_libraries_print_goes_to_stderr(capsys):
    def command():
        print("chatter")
        return console.Outcome({"x": float("nan"), "y": [1, float("inf")]}, lambda: None)

    assert console.run(command, as_json=True) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"x": None, "y": [1, None]} and "chatter" in shown.err


def test_debug_shows_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv(console.DEBUG, "1")
    assert cli.run(["explain", "--shape", "64x32", "--values", "int5"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv(console.DEBUG, "0")
    assert cli.run(["explain", "--shape", "64x32", "--values", "int5"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_documents_every_exit_code():
    done = subprocess.run([*SLAB, "--help"], capture_output=True, text=True, check=True)
    assert all(f" {code} " in done.stdout for code in (0, 2, 3, 4, 5, 130))
    for name in (
        "compress",
        "eval",
        "generate",
        "bench",
        "info",
        "explain",
        "inspect",
        "decompress",
        "report",
    ):
        assert name in done.stdout


@pytest.mark.slow
def test_interrupt_is_130_and_resume_finishes(model, text, tmp_path):
    """A real process and a real SIGINT: exit code 130, JSON error, and the same command with
    --resume goes on."""
    command = [
        *SLAB,
        *small(model, tmp_path / "out", text, "--json"),
    ]  # the first block alone takes far longer than the poll
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while (
        not (tmp_path / "out" / "slab_progress.json").exists()
        and child.poll() is None
        and time.time() < deadline
    ):
        time.sleep(0.002)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, (out, err)
    assert json.loads(out)["error"]["type"] == "Interrupted" and "Traceback" not in err
    assert not (tmp_path / "out" / "config.json").exists()
    assert cli.run(small(model, tmp_path / "out", text, "--resume")) == 0
