"""Bytes and parameters of whole folders, against the files and against the dense model."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from safetensors import safe_open

import slab_kernels
from slab_kernels.format import PackedLayout
from slab_kernels.models.shards import TensorEntry
from slab_kernels.models.totals import folder_totals, read_totals


def on_disk(folder) -> dict[str, int]:
    """Bytes of every tensor, read by safetensors."""
    found = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as f:
            for name in f.keys():
                t = f.get_tensor(name)
                found[name] = t.numel() * t.element_size()
    return found


@pytest.mark.parametrize(
    ("name", "changes", "parts"),
    [
        ("llama", {}, {"linears", "embeddings", "norms"}),
        (
            "llama",
            {"tie_word_embeddings": False},
            {"linears", "embeddings", "head", "norms"},
        ),
        ("gpt_neox", {}, {"linears", "embeddings", "head", "norms", "other"}),
        ("opt", {}, {"linears", "embeddings", "norms", "other"}),
    ],
)
def test_every_tensor_of_a_folder_is_counted_once(name, changes, parts, tmp_path):
    model = tiny_models.write(tmp_path / "dense", name, torch.float16, **changes)
    slab_kernels.compress(
        tmp_path / "dense",
        tmp_path / "packed",
        method="magnitude",
        calibration=tiny_models.tokens(),
        skip="*.0.*fc1" if name == "opt" else (),
        progress=False,
    )
    parameters = sum(p.numel() for p in model.parameters())
    for folder in ("dense", "packed"):
        found, stored = read_totals(tmp_path / folder), on_disk(tmp_path / folder)
        assert found.bytes == sum(stored.values())
        assert found.packed_bytes + sum(found.dense.values()) == found.bytes
        assert found.parameters == parameters, folder
        assert found.bits_per_parameter == pytest.approx(8 * found.bytes / parameters)
        assert found.megabytes == found.bytes / 1e6
        if folder == "dense":
            assert set(found.dense) == parts and found.bits_per_weight is None
    assert set(found.dense) == parts - ({"linears"} if name != "opt" else set())
    described = slab_kernels.load(tmp_path / "packed").config.quantization_config
    weights = {n: m["out_features"] * m["in_features"] for n, m in described["modules"].items()}
    inside = {n: b for n, b in stored.items() if n.rpartition(".")[0] in weights}
    size = sum(b for n, b in inside.items() if not n.endswith(".bias"))
    assert found.packed_bytes == size and found.packed_weights == sum(weights.values())
    assert found.bits_per_weight == pytest.approx(8 * size / sum(weights.values()))


def entry(dtype: torch.dtype, *shape: int) -> TensorEntry:
    return TensorEntry("x", dtype, shape, torch.empty(shape, dtype=dtype).nbytes, 0)


def of(layout: PackedLayout, name: str) -> dict[str, TensorEntry]:
    return {f"{name}.{leaf}": entry(dtype, *shape) for leaf, (dtype, shape) in
            layout.tensors().items()}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_int8_embeddings_and_a_packed_head(tied):
    """Of a vocabulary of 96 and a width of 32; the head's stored bytes are among the packed ones,
    and of a tied model its weights are no parameters of their own."""
    layout = PackedLayout(96, 32, "int4", 32, rank=1)
    entries = {
        "model.embed_tokens.codes": entry(torch.int8, 96, 32),
        "model.embed_tokens.scales": entry(torch.float16, 96),
        "model.norm.weight": entry(torch.float16, 32),
        **of(layout, "lm_head"),
    }
    told = {"values": "int8", "tied": "lm_head" if tied else None}
    config = {
        "vocab_size": 96,
        "quantization_config": {"embeddings": {"model.embed_tokens": told}},
    }
    found = folder_totals(entries, {"lm_head": layout}, config)
    assert found.dense == {"embeddings": 96 * 32 + 96 * 2, "norms": 64}
    assert found.packed_bytes == found.head_bytes == sum(e.nbytes for n, e in entries.items()
                                                         if n.startswith("lm_head"))  # fmt: skip
    assert found.packed_weights == 96 * 32
    assert found.parameters == 96 * 32 * (1 if tied else 2) + 32
    assert found.bytes == found.packed_bytes + sum(found.dense.values())
    assert "packed head" in str(found) and "embeddings 0.00 MB" in str(found)


def test_a_tied_model_that_stores_its_matrix_as_the_head_has_embeddings():
    config = {"text_config": {"vocab_size": 96, "tie_word_embeddings": True}}
    found = folder_totals({"lm_head.weight": entry(torch.float16, 96, 32)}, {}, config)
    assert found.dense == {"embeddings": 96 * 64} and found.parameters == 96 * 32


def test_an_empty_folder_has_no_bits():
    found = folder_totals({}, {}, {})
    assert found.bits_per_parameter is None and found.bits_per_weight is None
    assert str(found) == "0.00 MB in all"
