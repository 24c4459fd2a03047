"""A dense folder from a packed one: weights in a dtype that holds them, or one sentence and
nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

import slab_kernels
from slab_kernels import decompress, load
from slab_kernels.cli import main as cli
from slab_kernels.compression import training
from slab_kernels.errors import CheckpointError, DtypeError, RangeError
from slab_kernels.models.model_config import compute_dtype, config_dtype

LARGE = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """bf16 values, one of them 1e5, which fp16 does not hold."""
    folder = tmp_path_factory.mktemp("packed")
    model = tiny_models.model(dtype=torch.bfloat16)
    model.get_submodule(LARGE).weight.data[3, 5] = 1e5
    model.save_pretrained(folder / "dense")
    slab_kernels.compress(
        folder / "dense",
        folder / "out",
        method="magnitude",
        values="bf16",
        calibration=tiny_models.tokens(),
        progress=False,
    )
    return folder / "out"


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    return shutil.copytree(packed, tmp_path / "copy")


def name_dtype(folder: Path, **entries) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config | entries))


def dense(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("named", "given", "want"),
    [
        ({}, None, torch.bfloat16),  # as the embedding and the norms
        ({"torch_dtype": "float32"}, None, torch.float32),
        ({"dtype": "float64"}, None, torch.float64),
        ({"dtype": "float16"}, torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_dtype_is_named_or_given_and_written_down(copy, tmp_path, named, given, want):
    name_dtype(copy, **named)
    slab_kernels.decompress(copy, tmp_path / "d", given)
    weights, config = (
        dense(tmp_path / "d"),
        json.loads((tmp_path / "d" / "config.json").read_text()),
    )
    assert weights[f"{LARGE}.weight"].dtype == want and all(
        t.isfinite().all() for t in weights.values()
    )
    assert {config.get(key, config["dtype"]) for key in ("dtype", "torch_dtype")} == {
        str(want).removeprefix("torch.")
    }


def test_a_weight_that_does_not_fit_is_named_and_nothing_stays(copy, tmp_path, capsys):
    name_dtype(copy, dtype="float16")
    message = (
        rf"{LARGE}\.weight reaches 9\.98\d?e\+04, which float16 does not hold; "
        "dtype bfloat16 or float32"
    )
    with pytest.raises(RangeError, match=message) as caught:
        slab_kernels.decompress(copy, tmp_path / "d")
    assert isinstance(caught.value, CheckpointError) and not (tmp_path / "d").exists()
    assert cli.run(["decompress", str(copy), str(tmp_path / "d")]) == 3
    assert cli.run(["decompress", str(copy), str(tmp_path / "d"), "--dtype", "bf16"]) == 0
    with pytest.raises(RangeError, match="the weight reaches"):
        slab_kernels.load(copy).get_submodule(LARGE).to_linear(torch.float16)


@pytest.mark.parametrize(
    "name", ["int8", "bool", "complex64", "load", "float8_e4m3fn", "torch.half", 7, ["float16"]]
)
def test_a_dtype_that_weights_do_not_have_is_named(copy, tmp_path, name):
    name_dtype(copy, dtype=name)
    with pytest.raises(
        CheckpointError,
        match="names the dtype .* weights are one of float16, bfloat16, float32, float64",
    ):
        slab_kernels.decompress(copy, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    with pytest.raises(CheckpointError, match="names the dtype"):
        compute_dtype({"dtype": name}, torch.device("cuda"))
    assert config_dtype({}) is None


def test_what_is_stored_dense_must_fit_too(tmp_path):
    """A pattern that is not packed is written in the source's dtype."""
    tiny_models.write(tmp_path / "m", dtype=torch.float16)
    weight = torch.full((32, 48), 65504.0)
    from slab_kernels.compression.plan import store
    from slab_kernels.format import Decomposition
    from slab_kernels.methods import LayerSettings

    whole = Decomposition(
        weight, torch.ones(32, 48, dtype=torch.bool), P=torch.ones(32, 1) * 100, Q=torch.ones(48, 1)
    )
    with pytest.raises(
        RangeError, match=r"m\.weight reaches 6\.56e\+04, which float16 does not hold"
    ):
        store("m", whole, LayerSettings(method="magnitude", pattern="50%"), torch.float16)


@pytest.mark.parametrize(
    "write",
    [
        lambda packed, out: slab_kernels.decompress(packed, out),
        lambda packed, out: slab_kernels.save(slab_kernels.load(packed), out),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_a_failed_writer_leaves_nothing_and_promises_no_resumption(
    packed, tmp_path, monkeypatch, write, before
):
    calls, real = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        real(descriptor)

    if before:
        (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        write(packed, tmp_path / "out")
    assert "resume" not in str(caught.value) and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "slab_progress.json").write_text(
        "{}"
    )  # of a compression, which these writers cannot go on with
    with pytest.raises(CheckpointError, match="is not empty .*; choose an empty folder$"):
        write(packed, tmp_path / "out")


def test_training_that_cannot_write_keeps_its_state_alone(packed, tmp_path, monkeypatch):
    settings = training.Training(steps=2, batch=1, adapter_rank=1, every=1)
    tiny_models.tokenizer().save_pretrained(copied := shutil.copytree(packed, tmp_path / "copy"))
    monkeypatch.setattr(
        training, "save", lambda *a: (_ for _ in ()).throw(CheckpointError("no room"))
    )
    with pytest.raises(CheckpointError, match="no room"):
        training.train(copied, tmp_path / "out", tiny_models.tokens(), settings)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == [
        "out.training.safetensors"
    ]


UNFIT = [torch.int8, torch.complex64, torch.bool, torch.float8_e4m3fn, "int8", 16]


@pytest.mark.parametrize("dtype", UNFIT)
def test_a_given_dtype_that_weights_do_not_have_is_named(packed, tmp_path, dtype):
    layer = load(packed).model.layers[0].mlp.up_proj
    for attempt in (
        lambda: decompress(packed, tmp_path / "dense", dtype=dtype),
        lambda: load(packed, dtype=dtype),
        lambda: layer.to_linear(dtype),
    ):
        with pytest.raises(DtypeError, match="is none of weights; use float16, bfloat16, float32"):
            attempt()
    assert not (tmp_path / "dense").exists()
    for name in ("bfloat16", "bf16"):
        assert load(packed, dtype=name).dtype == torch.bfloat16
    assert layer.to_linear("fp16").weight.dtype == torch.float16
    assert layer.to_linear("fp32").weight.dtype == torch.float32


@pytest.mark.parametrize("base", [None, "# The base model\n"])
def test_the_card_of_a_packed_folder_is_set_aside(copy, tmp_path, base):
    """A dense copy is not opened as its card says; the base model's card takes the name back."""
    card = (copy / "README.md").read_text()
    if base is not None:
        (copy / "README.base.md").write_text(base)
        link = "The card of the base model is [README.base.md](README.base.md)."
        card = card.replace("The base model came without a card.", link)
        (copy / "README.md").write_text(card)
    decompress(copy, tmp_path / "dense")
    assert (tmp_path / "dense" / "README.packed.md").read_text() == card
    if base is None:
        assert not (tmp_path / "dense" / "README.md").exists()
    else:
        assert (tmp_path / "dense" / "README.md").read_text() == base
        assert not (tmp_path / "dense" / "README.base.md").exists()


def test_a_card_of_the_users_own_stays(copy, tmp_path):
    (copy / "README.md").write_text("# Mine\n")
    decompress(copy, tmp_path / "dense")
    assert (tmp_path / "dense" / "README.md").read_text() == "# Mine\n"
