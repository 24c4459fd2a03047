"""Folders that other libraries quantised: read as their dense twins, or refused by name."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import quantisers
import tiny_models
import torch
from matrix.configs import tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slab_kernels
from slab_kernels.cli import main as cli
from slab_kernels.errors import CheckpointError
from slab_kernels.evaluate.inspect import inspect
from slab_kernels.models.source import open_source

SETTINGS = dict(method="wanda", values="int4", calibration=tiny_models.tokens(), progress=False)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "w1", "w2", "w3")
Q = "model.layers.1.self_attn.q_proj"


def groups(kind: str, bits: int, strategy: str, **more) -> dict:
    """quantization_config of compressed-tensors."""
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, **more}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*down_proj"], "quantization_status": "compressed",
    }  # fmt: skip


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "weight_block_size": [10, 12], "activation_scheme": "dynamic"}
# name -> what quantises a linear, quantization_config, and what the record says.
FORMATS = {
    "gptq": (quantisers.gptq, GPTQ, "gptq, 4 bits, groups of 16"),
    "gptq 8 bits": (
        partial(quantisers.gptq, bits=8), {**GPTQ, "bits": 8}, "gptq, 8 bits, groups of 16",
    ),
    "gptq in the order of activations": (
        partial(quantisers.gptq, act_order=True), {**GPTQ, "desc_act": True},
        "gptq, 4 bits, groups of 16",
    ),
    "gptq v2": (
        partial(quantisers.gptq, v2=True), {**GPTQ, "checkpoint_format": "gptq_v2"},
        "gptq, 4 bits, groups of 16",
    ),
    "awq": (quantisers.awq, AWQ, "awq, 4 bits, groups of 16"),
    "fp8": (quantisers.fp8, FP8, "fp8, blocks of 10x12"),
    "fp8 with exponents": (
        partial(quantisers.fp8, scale_dtype=torch.float8_e8m0fnu), {**FP8, "scale_fmt": "ue8m0"},
        "fp8, blocks of 10x12",
    ),
    "fp8 as AutoFP8 stores it": (
        partial(quantisers.fp8, block=None, suffix="_scale"),
        {"quant_method": "fp8", "activation_scheme": "static"},
        "fp8, one scale per weight",
    ),
    "fp8 with one scale": (
        partial(quantisers.fp8, block=None), {**FP8, "weight_block_size": None},
        "fp8, one scale per weight",
    ),
    "packed": (
        quantisers.packed_int,
        groups("pack-quantized", 4, "group", group_size=16, symmetric=False),
        "compressed-tensors pack-quantized, 4 bits, groups of 16",
    ),
    "packed in the order of activations": (
        partial(quantisers.packed_int, symmetric=True, act_order=True),
        groups("pack-quantized", 4, "group", group_size=16, actorder="group"),
        "compressed-tensors pack-quantized, 4 bits, groups of 16",
    ),
    "packed 8 bits by rows": (
        partial(quantisers.packed_int, bits=8, channel=True),
        groups("pack-quantized", 8, "channel", symmetric=False),
        "compressed-tensors pack-quantized, 8 bits, one scale per row",
    ),
    "int8": (
        quantisers.int8_rows, groups("int-quantized", 8, "channel"),
        "compressed-tensors int-quantized, 8 bits, one scale per row",
    ),
    "fp8 rows": (
        quantisers.fp8_rows, groups("float-quantized", 8, "channel"),
        "compressed-tensors float-quantized, 8 bits, one scale per row",
    ),
    "fp8 blocks": (
        quantisers.fp8_blocks,
        groups("float-quantized", 8, "block", block_structure=[16, 24]),
        "compressed-tensors float-quantized, 8 bits, blocks of 16x24",
    ),
}  # fmt: skip


def write_twins(top, make, entry, name="llama", linears=LINEARS) -> None:
    """The folders "quantised" and "dense" of the same model; other linears are dense in both.

    make: of `quantisers`, for every linear whose name ends so.
    """
    tiny_models.write(top / "dense", name)
    shutil.copytree(top / "dense", top / "quantised")
    file, generator = "model.safetensors", torch.Generator().manual_seed(1)
    dense = load_file(top / "dense" / file)
    quantised = dict(dense)
    for key, weight in dense.items():
        prefix = key.removesuffix("weight")
        if prefix.rstrip(".").endswith(linears) and weight.dim() == 2:
            tensors, dense[key] = make(*weight.shape, generator)
            del quantised[key]
            quantised |= {f"{prefix}{leaf}": tensor for leaf, tensor in tensors.items()}
    for folder, tensors in (("dense", dense), ("quantised", quantised)):
        save_file(tensors, top / folder / file, metadata={"format": "pt"})
    configure(top / "quantised", entry)


def configure(folder, entry) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))


def change(folder, **tensors) -> None:
    """Replace stored tensors; None removes one."""
    stored = load_file(folder / "model.safetensors")
    stored |= tensors
    kept = {name: tensor for name, tensor in stored.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def shards(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_folder_gives_the_bytes_of_its_dense_twin(tmp_path, name):
    make, entry, said = FORMATS[name]
    write_twins(tmp_path, make, entry)
    source = open_source(tmp_path / "quantised")
    for key, weight in load_file(tmp_path / "dense" / "model.safetensors").items():
        assert torch.equal(source.get(key), weight), key
    assert not source.ignored
    for folder in ("dense", "quantised"):
        slab_kernels.compress(tmp_path / folder, tmp_path / f"{folder}-out", **SETTINGS)
    found, want = tmp_path / "quantised-out", tmp_path / "dense-out"
    assert shards(found) == shards(want)
    for file in ("config.json", "model.safetensors.index.json"):
        assert (found / file).read_bytes() == (want / file).read_bytes()
    record = json.loads((found / "slab_run.json").read_text())
    assert record["dequantised"] == said and said in (found / "README.md").read_text()
    assert json.loads((want / "slab_run.json").read_text())["dequantised"] == ""
    assert "dequantised" not in (want / "README.md").read_text()
    assert inspect(found)["bits_per_weight"] == inspect(want)["bits_per_weight"]


def test_experts_stored_one_by_one_in_fp8(tmp_path):
    write_twins_of_mixture(tmp_path)
    for folder in ("dense", "quantised"):
        slab_kernels.compress(tmp_path / folder, tmp_path / f"{folder}-out", **SETTINGS)
    assert shards(tmp_path / "quantised-out") == shards(tmp_path / "dense-out")


def write_twins_of_mixture(top) -> None:
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    tiny_models.CONFIGS["mixtral"] = tiny_models._GATED | changes
    try:
        write_twins(top, quantisers.fp8, FP8, "mixtral")
    finally:
        del tiny_models.CONFIGS["mixtral"]


@pytest.mark.parametrize("skip", [(), ("*.mlp.experts", "*.mlp.router")])
def test_mxfp4_experts_are_packed_or_left_dense(tmp_path, skip):
    config = tiny("gpt_oss")
    config.intermediate_size = 64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    generator, stored = torch.Generator().manual_seed(2), {}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("gate_up_proj", "down_proj")):
                tensors, dense = quantisers.mxfp4(*parameter.shape, generator)
                parameter.copy_(dense)
                stored |= {f"{key}{end}": tensor for end, tensor in tensors.items()} | {key: None}
    model.save_pretrained(tmp_path / "dense")
    tiny_models.tokenizer().save_pretrained(tmp_path / "dense")
    shutil.copytree(tmp_path / "dense", tmp_path / "quantised")
    change(tmp_path / "quantised", **stored)
    configure(
        tmp_path / "quantised", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    )
    for folder in ("dense", "quantised"):
        slab_kernels.compress(tmp_path / folder, tmp_path / f"{folder}-out", **SETTINGS, skip=skip)
    assert shards(tmp_path / "quantised-out") == shards(tmp_path / "dense-out")
    record = json.loads((tmp_path / "quantised-out" / "slab_run.json").read_text())
    assert record["dequantised"] == "mxfp4, groups of 32"
    packed = slab_kernels.load(tmp_path / "quantised-out")
    experts = [name for name, m in packed.named_modules() if isinstance(m, slab_kernels.SlabLinear)]
    assert sum(".experts." in name for name in experts) == (0 if skip else 2 * 4 * 3)
    slab_kernels.decompress(tmp_path / "quantised-out", tmp_path / "out")
    twin, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ids = tiny_models.tokens()
    with torch.no_grad():
        want, found = (model.eval()(input_ids=ids).logits for model in (twin, packed))
    assert torch.allclose(found, want, atol=1e-5)


def test_every_road_reads_the_dequantised_model(tmp_path, capsys):
    """In memory, `eval`, `eval --against`, `generate --against` and `inspect`."""
    write_twins(tmp_path, quantisers.gptq, GPTQ)
    dense, quantised = str(tmp_path / "dense"), str(tmp_path / "quantised")
    in_memory = slab_kernels.compress(quantised, **SETTINGS)
    twin = slab_kernels.compress(dense, **SETTINGS)
    for (name, a), b in zip(
        in_memory.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert in_memory.slab_record.dequantised == "gptq, 4 bits, groups of 16"
    out = str(tmp_path / "out")
    slab_kernels.compress(quantised, out, **SETTINGS)
    (tmp_path / "text.txt").write_text(tiny_models.text(60))
    text = ["--text", str(tmp_path / "text.txt"), "--window", "16", "--json"]

    def said(*command: str) -> dict:
        assert cli.run([*command]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    by_twin, found = (said("eval", out, "--against", other, *text) for other in (dense, quantised))
    assert found["kl"] == by_twin["kl"]
    assert said("eval", quantised, *text)["perplexity"] == said("eval", dense, *text)["perplexity"]
    written = said(
        "generate", out, "--against", quantised, "--tokens", "4", "--batch", "1", "--json"
    )
    assert len(written["results"]) == 2
    layers = {layer["name"]: layer for layer in said("inspect", quantised, "--json")["layers"]}
    q = layers[Q]
    # Codes of 4 bits, and for every 16 of them a scale of 16 bits and a zero point of 4; g_idx.
    assert q["shape"] == [32, 32] and q["bits_per_weight"] == 4 + 20 / 16 + 32 / 32
    assert (
        q["values"] == "gptq"
        and layers[Q.replace("self_attn.q", "mlp.down")]["values"] == "float32"
    )


NOT_READ = {
    "bitsandbytes (nf4)": {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    },
    "bitsandbytes (int8)": {"load_in_8bit": True},
    "hqq": {"quant_method": "hqq"},
    "eetq": {"quant_method": "eetq"},
    "aqlm": {"quant_method": "aqlm"},
    "torchao": {"quant_method": "torchao"},
    "'a format'": "a format",
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_READ)
def test_a_format_that_is_not_read_is_named(tmp_path, name):
    tiny_models.write(tmp_path / "dense")
    configure(tmp_path / "dense", NOT_READ[name])
    with pytest.raises(CheckpointError, match=r"call dequantize\(\) on the model, save") as raised:
        slab_kernels.compress(tmp_path / "dense", tmp_path / "out", **SETTINGS)
    assert f"in the format {name}, " in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    for command in (["eval"], ["generate"], ["inspect"]):
        assert cli.run([*command, str(tmp_path / "dense")]) == 3


REFUSED = {
    "gptq marlin": (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
    "gptq 3 bits": (GPTQ | {"bits": 3}, "bits=3, and one of 2, 4, 8 can be read"),
    "gptq rotated": (GPTQ | {"rotation": "hadamard"}, "rotation='hadamard': inputs are rotated"),
    "gptq by modules": (
        GPTQ | {"dynamic": {"+:.*up": {"bits": 8}}},
        "settings of their own",
    ),
    "awq gemv": (AWQ | {"version": "gemv"}, "in the order 'gemv', and only 'gemm'"),
    "awq 8 bits": (AWQ | {"bits": 8}, "bits=8"),
    "fp4 experts": (FP8 | {"expert_dtype": "fp4"}, "experts in 'fp4'"),
    "marlin-24": (groups("marlin-24", 4, "group", group_size=16), "not read here .'marlin-24'."),
    "nvfp4": (groups("nvfp4-pack-quantized", 4, "tensor_group"), "'nvfp4-pack-quantized'"),
    "sparse": (
        groups("float-quantized", 8, "channel")
        | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "'sparse-24-bitmask'",
    ),
    "rotated": (
        groups("float-quantized", 8, "channel")
        | {"transform_config": {"config_groups": {"R4": {"type": "hadamard"}}}},
        "transform_config",
    ),
    "no groups": (GPTQ | {"group_size": 0}, "group_size=0"),
    "no weights": (FP8, "stored as fp8, and the files hold none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_variant_that_is_not_read_is_named(tmp_path, name):
    entry, message = REFUSED[name]
    write_twins(tmp_path, quantisers.gptq, entry)
    with pytest.raises(CheckpointError, match=message) as raised:
        slab_kernels.compress(tmp_path / "quantised", tmp_path / "out", **SETTINGS)
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


PACKED = groups("pack-quantized", 4, "group", group_size=16, symmetric=False)
DAMAGED = {
    "a scale that is missing": (
        quantisers.fp8, FP8, {f"{Q}.weight_scale_inv": None},
        rf"'{Q}\.weight' is quantised, and '{Q}\.weight_scale_inv' .* missing",
    ),
    "scales of other blocks": (
        quantisers.fp8, FP8, {f"{Q}.weight_scale_inv": torch.ones(3, 4)},
        r"weight_scale_inv' has shape \[3, 4\], .* needs \[4, 3\]",
    ),
    "zero points that are missing": (
        quantisers.awq, AWQ, {f"{Q}.qzeros": None}, r"qzeros' that belongs to it is missing",
    ),
    "outputs of an activation that are scaled": (
        quantisers.awq, AWQ, {"model.layers.0.mlp.act.scales": torch.ones(48)},
        r"scales the outputs of an activation \(model.layers.0.mlp.act.scales\)",
    ),
    "codes of another size": (
        quantisers.gptq, GPTQ, {f"{Q}.qweight": torch.zeros(4, 24, dtype=torch.int32)},
        r"qzeros' has shape \[2, 4\], .* needs \[2, 3\]",
    ),
    "a weight of another shape": (
        quantisers.fp8, FP8,
        {f"{Q}.weight": torch.zeros(16, 32).to(torch.float8_e4m3fn),
         f"{Q}.weight_scale_inv": torch.ones(2, 3)},
        r"has shape \[16, 32\], the config asks for \[32, 32\]",
    ),
    "an index out of range": (
        quantisers.gptq, GPTQ, {f"{Q}.g_idx": torch.arange(32, dtype=torch.int32) // 10},
        r"g_idx' puts inputs into groups 0 to 3, and the weight has 2",
    ),
    "a packed index out of range": (
        partial(quantisers.packed_int, act_order=True), PACKED,
        {f"{Q}.weight_g_idx": -torch.arange(32, dtype=torch.int32)},
        r"weight_g_idx' puts inputs into groups -31 to 0",
    ),
    "no order of activations": (
        quantisers.gptq, GPTQ | {"desc_act": True}, {f"{Q}.g_idx": None}, r"g_idx'.* is missing",
    ),
    "a shape that is missing": (
        quantisers.packed_int, PACKED, {f"{Q}.weight_shape": None}, r"weight_shape'.* is missing",
    ),
    "a shape of another weight": (
        quantisers.packed_int, PACKED, {f"{Q}.weight_shape": torch.tensor([32, 48])},
        r"weight_packed' has shape \[32, 4\], .* needs \[32, 6\]",
    ),
    "packed zero points that are missing": (
        quantisers.packed_int, PACKED, {f"{Q}.weight_zero_point": None},
        r"weight_zero_point'.* is missing",
    ),
    "bytes in an order of their own": (
        quantisers.int8_rows, groups("int-quantized", 8, "channel"),
        {f"{Q}.weight_g_idx": torch.arange(32)}, r"weight_g_idx' puts the inputs of a int-quant",
    ),
    "codes of another type": (
        quantisers.awq, AWQ, {f"{Q}.qweight": torch.zeros(32, 4)},
        r"qweight' is torch\.float32, .* has int32 there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_told_in_one_sentence(tmp_path, name):
    make, entry, changes, message = DAMAGED[name]
    write_twins(tmp_path, make, entry)
    change(tmp_path / "quantised", **changes)
    with pytest.raises(CheckpointError, match=message) as raised:
        slab_kernels.compress(tmp_path / "quantised", tmp_path / "out", **SETTINGS)
    assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointError):
        open_source(tmp_path / "quantised").open_dense()


def test_an_fp8_weight_without_a_config_entry_is_told(tmp_path):
    write_twins(tmp_path, quantisers.fp8, FP8)
    configure(tmp_path / "quantised", None)
    with pytest.raises(CheckpointError, match="is torch.float8_e4m3fn; only fp16, bf16"):
        open_source(tmp_path / "quantised")


def test_a_run_that_goes_on_knows_the_folder_again(tmp_path):
    write_twins(tmp_path, quantisers.awq, AWQ)
    source = open_source(tmp_path / "quantised")
    hashes, before = source.hashes(), source.fingerprint()
    source.expect(hashes)
    source.get(f"{Q}.weight")
    change(tmp_path / "quantised", **{f"{Q}.scales": torch.ones(2, 32).half()})
    later = open_source(tmp_path / "quantised")
    assert later.fingerprint() != before
    later.expect(hashes)
    with pytest.raises(CheckpointError, match="is not what it was when this run began"):
        later.get(f"{Q}.weight")


@pytest.mark.parametrize("config", [True, False])
def test_gguf_weights_are_named(tmp_path, config):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    if config:
        (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(CheckpointError, match=r"GGUF weights, which are not read .*gguf_file="):
            slab_kernels.compress(path, tmp_path / "out", **SETTINGS)
