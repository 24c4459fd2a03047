"""Packed folders through transformers' own functions, against `slab_kernels.load`."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import quantizers

import slab_kernels
from slab_kernels.cli import main as cli
from slab_kernels.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    CheckpointError,
    FormatError,
    VersionError,
)
from slab_kernels.evaluate.perplexity import perplexity
from slab_kernels.models.packed import packed_names
from slab_kernels.nn import SlabLinear, preparation

transformers = pytest.importorskip("transformers")
AutoModel = transformers.AutoModelForCausalLM

SETTINGS = {
    "preset": "small",
    "adapter_rank": 2,
    "calibration": tiny_models.tokens(),
}


@pytest.fixture(scope="module", params=["llama", "qwen2"])  # tied embeddings; biases in attention
def folders(request, tmp_path_factory):
    """A dense folder and the packed one made from it."""
    top = tmp_path_factory.mktemp(request.param)
    tiny_models.write(top / "dense", request.param)
    slab_kernels.compress(top / "dense", top / "packed", progress=False, **SETTINGS)
    return top / "dense", top / "packed"


def assert_same(first: nn.Module, second: nn.Module) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]), name


def test_opens_with_the_same_bits_and_generates_the_same_tokens(folders):
    ours = slab_kernels.load(folders[1])
    theirs, report = AutoModel.from_pretrained(folders[1], output_loading_info=True)
    assert not any(report.values())
    assert_same(ours, theirs)
    layers = [m for m in theirs.modules() if isinstance(m, SlabLinear)]
    assert len(layers) == 14 and not any(
        p.requires_grad for layer in layers for p in layer.parameters()
    )
    prompt = tiny_models.tokens(2, 5)
    generated = [m.generate(prompt, max_new_tokens=8, do_sample=False) for m in (ours, theirs)]
    assert torch.equal(*generated)


def test_a_cast_leaves_packed_tensors_alone(folders):
    stored, cast = (
        slab_kernels.load(folders[1]).state_dict(),
        AutoModel.from_pretrained(folders[1], dtype=torch.bfloat16),
    )
    packed = packed_names(cast)
    for name, tensor in cast.state_dict().items():
        if name in packed:
            assert torch.equal(tensor, stored[name]) and tensor.dtype == stored[name].dtype
        else:
            assert tensor.dtype == torch.bfloat16
    assert cast(tiny_models.tokens(1, 5)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("where", ["cpu", "auto", {"": "cpu"}])
def test_saved_in_shards_and_opened_again(folders, tmp_path, where):
    opened = AutoModel.from_pretrained(folders[1], device_map=where)
    opened.save_pretrained(tmp_path / "again", max_shard_size="8KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) >= 3
    assert_same(opened, AutoModel.from_pretrained(tmp_path / "again", device_map=where))
    assert_same(opened, slab_kernels.load(tmp_path / "again"))
    first, again = (
        json.loads((f / "config.json").read_text())["quantization_config"]
        for f in (folders[1], tmp_path / "again")
    )
    assert first == again


def test_what_load_gave_is_saved_too(folders, tmp_path):
    ours = slab_kernels.load(folders[1])
    ours.save_pretrained(tmp_path / "again")
    assert_same(ours, AutoModel.from_pretrained(tmp_path / "again"))


def test_compressed_while_loading(folders, tmp_path):
    made = AutoModel.from_pretrained(
        folders[0], quantization_config=slab_kernels.SlabConfig(**SETTINGS)
    )
    assert_same(made, slab_kernels.load(folders[1]))
    made.save_pretrained(tmp_path / "saved")
    assert_same(made, AutoModel.from_pretrained(tmp_path / "saved"))
    first, again = (
        json.loads((f / "config.json").read_text())["quantization_config"]
        for f in (folders[1], tmp_path / "saved")
    )
    assert first == again


def test_dequantized(folders):
    opened, ids = AutoModel.from_pretrained(folders[1]), tiny_models.tokens(2, 7)
    with torch.no_grad():
        before = opened(ids).logits
        dense = opened.dequantize()
        torch.testing.assert_close(dense(ids).logits, before, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, SlabLinear) for m in dense.modules()) and not hasattr(
        dense.config, "quantization_config"
    )


@pytest.mark.slow
def test_static_cache_and_compile(tmp_path):
    """One graph without breaks serves every decoded token.

    Inductor compiles it too, but its C++ would take this test a minute.
    """
    tiny_models.write(tmp_path / "dense", num_hidden_layers=1)
    slab_kernels.compress(tmp_path / "dense", tmp_path / "packed", progress=False, **SETTINGS)
    opened, ids = AutoModel.from_pretrained(tmp_path / "packed"), tiny_models.tokens(1, 6)
    want = opened.generate(ids, max_new_tokens=6, do_sample=False)
    cache = transformers.StaticCache(config=opened.config, max_cache_len=16)
    torch._dynamo.reset()  # Other tests of this process compile the same code.
    compiled = torch.compile(opened.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        logits = opened(
            ids, past_key_values=cache, use_cache=True, cache_position=torch.arange(6)
        ).logits
        found = [ids]
        for position in range(6, 12):
            token = logits[:, -1].argmax(-1, keepdim=True)
            found.append(token)
            step = {
                "past_key_values": cache,
                "use_cache": True,
                "cache_position": torch.tensor([position]),
            }
            logits = compiled(token, position_ids=torch.tensor([[position]]), **step).logits
    assert torch.equal(torch.cat(found, 1), want)


@pytest.fixture
def opened_without_us(folders, monkeypatch):
    from transformers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "slab_kernels")
    return AutoModel.from_pretrained(folders[1])


def test_random_weights_are_refused(folders, opened_without_us, tmp_path):
    assert (
        type(opened_without_us.model.layers[0].mlp.up_proj) is nn.Linear
    )  # the silent load that all this is about
    with pytest.raises(
        CheckpointError, match=r"q_proj and 14 more should be packed and is Linear.*random numbers"
    ):
        slab_kernels.check(opened_without_us)
    with pytest.raises(CheckpointError, match="random numbers"):
        perplexity(opened_without_us, tiny_models.tokenizer(), tiny_models.text(), 16)
    with pytest.raises(CheckpointError, match="random numbers"):
        slab_kernels.save(opened_without_us, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    right = AutoModel.from_pretrained(folders[0])
    assert slab_kernels.check(right) is right
    for other in (str(folders[0]), None):
        with pytest.raises(ArgumentTypeError, match="takes an opened model, not (str|NoneType)"):
            slab_kernels.check(other)


def test_command_line_check(folders, capsys, monkeypatch):
    assert cli.run(["check", str(folders[1]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == len(
        slab_kernels.load(folders[1]).state_dict()
    )
    from transformers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "slab_kernels")
    assert cli.run(["check", str(folders[1])]) == 3
    assert "random numbers" in capsys.readouterr().err
    assert cli.run(["check", str(folders[0])]) == 3
    assert "was not written by slab_kernels" in capsys.readouterr().err


def edit(folder, tmp_path, **changes):
    """A copy of a packed folder with another quantization_config."""
    copy = shutil.copytree(folder, tmp_path / "edited")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"].update(changes)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_unknown_keys_are_ignored_and_newer_formats_refused(folders, tmp_path):
    assert_same(
        AutoModel.from_pretrained(edit(folders[1], tmp_path, colour="blue")),
        slab_kernels.load(folders[1]),
    )
    shutil.rmtree(tmp_path / "edited")
    with pytest.raises(VersionError, match="format_version 99"):
        AutoModel.from_pretrained(edit(folders[1], tmp_path, format_version=99))


def damage(folder, tmp_path, tensor, change):
    """A copy in one file, with tensors replaced by what `changes` make of them.

    A change is None for a tensor that is left out, and gets None for one that is new.
    """
    slab_kernels.load(folder).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    before = state.pop(tensor, None)
    if change is not None:
        state[tensor] = change(before)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("metadata", lambda t: torch.zeros_like(t), FormatError),
        ("scales", lambda t: torch.full_like(t, float("nan")), FormatError),
        ("signs", lambda t: t[:, :-1].contiguous(), CheckpointError),
        ("V", None, CheckpointError),
        ("bias", lambda _: torch.zeros(176), CheckpointError),  # which no module of that name has
    ],
)
def test_damaged_tensors_are_refused(folders, tmp_path, name, change, error):
    damage(folders[1], tmp_path, f"model.layers.1.mlp.up_proj.{name}", change)
    with pytest.raises(error, match=r"model\.layers\.1\.mlp\.up_proj"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"), [(None, "lacks tensor"), (lambda t: t / 0, "holds NaN or infinite")]
)
@pytest.mark.parametrize("folders", ["qwen2"], indirect=True)
def test_biases_of_packed_layers_are_checked(folders, tmp_path, change, message):
    damage(folders[1], tmp_path, "model.layers.1.self_attn.k_proj.bias", change)
    with pytest.raises(
        CheckpointError, match=rf"{message}|model\.layers\.1\.self_attn\.k_proj\.bias' {message}"
    ):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "50%"}, "only 2:4 can be packed"),
        ({"values": "int5"}, "int5"),
        ({"method": "guess"}, "guess"),
        ({"roundz": 3}, "roundz"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        slab_kernels.SlabConfig(**settings)


def test_offloading_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"cpu, disk.*one device"):
        AutoModel.from_pretrained(
            folders[1], device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path
        )


def test_the_word_for_dense_copies_reaches_the_layers(folders, monkeypatch):
    """By `load`, by a config that compresses, and by one beside a packed folder, of which
    transformers 5.0 takes nothing; never stored."""
    dense, packed = folders
    layers = lambda model: [m for m in model.modules() if isinstance(m, SlabLinear)]  # noqa: E731
    assert all(layer._prefill is None for layer in layers(slab_kernels.load(packed)))
    beside = slab_kernels.SlabConfig(prefill="auto")
    taken = hasattr(quantizers.auto, "LOADING_ATTRIBUTES_CONFIG_TYPES")
    compressing = slab_kernels.SlabConfig(prefill="auto", **SETTINGS)
    for model, word in (
        (slab_kernels.load(packed, prefill="auto"), "auto"),
        (AutoModel.from_pretrained(packed, quantization_config=beside), "auto" if taken else None),
        (AutoModel.from_pretrained(dense, quantization_config=compressing), "auto"),
    ):
        assert {layer._prefill for layer in layers(model)} == {word}
        assert {layer.backend for layer in layers(model)} == {None}  # on a CPU the first call does
        assert "prefill" not in dict(model.config.quantization_config)
    with pytest.raises(BackendError, match="the cpu backend keeps none of"):
        slab_kernels.load(packed, prefill="dense")
    with pytest.raises(ArgumentError, match="prefill='fast' is unknown"):
        slab_kernels.load(packed, prefill="fast")
    with pytest.raises(ArgumentError, match="prefill='fast' is unknown"):
        slab_kernels.SlabConfig(prefill="fast")
    monkeypatch.setattr(preparation, "_place", lambda layer: torch.device("cuda", 0))
    for open_folder in (slab_kernels.load, AutoModel.from_pretrained):
        assert {layer.backend for layer in layers(open_folder(packed))} == {"cpu"}
