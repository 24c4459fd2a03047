"""The small Llama in benchmarks/model: it loads, fits in git, has learned, and 2:4 hurts it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from slab_kernels.text import stdlib as stdlib_text

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "model"
WINDOW = 512
WINDOWS = 8  # 4088 predicted tokens, spread over the held-out text: about 2 s on one thread


@pytest.fixture(scope="module")
def heldout() -> str:
    try:
        return stdlib_text.heldout_text()
    except stdlib_text.StdlibSourceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer():
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def windows(tokenizer, heldout) -> torch.Tensor:
    """[WINDOWS, WINDOW] int64, BOS first."""
    tokens = torch.tensor(tokenizer(heldout, add_special_tokens=False, verbose=False)["input_ids"])
    starts = torch.linspace(0, len(tokens) - WINDOW, WINDOWS).long()
    stretches = tokens[starts[:, None] + torch.arange(WINDOW - 1)]
    return torch.cat([torch.full((WINDOWS, 1), tokenizer.bos_token_id), stretches], dim=1)


def load_model():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@torch.inference_mode()
def perplexity(model, windows: torch.Tensor) -> float:
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    return math.exp(functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item())


def training_run() -> dict:
    return json.loads((FOLDER / "training_run.json").read_text())


def test_files_stay_small_enough_for_git():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) <= 12_000_000


def test_split_is_disjoint_and_neither_side_is_empty(heldout):
    training, held = stdlib_text.training_modules(), stdlib_text.heldout_modules()
    assert training.keys().isdisjoint(held)
    assert {name.split("/")[0].removesuffix(".py") for name in held} == stdlib_text.HELD_OUT
    assert not set(training.values()) & {text for text in held.values() if text.strip()}
    assert 0.05 < len(heldout) / (len(heldout) + len(stdlib_text.training_text())) < 0.09


def test_missing_sources_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(stdlib_text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(stdlib_text.StdlibSourceError, match="not on this machine"):
        stdlib_text.training_text()


def test_importing_reads_nothing(monkeypatch):
    import importlib.util

    monkeypatch.setattr(
        stdlib_text.sysconfig, "get_path", lambda name: pytest.fail("read at import")
    )
    spec = importlib.util.spec_from_file_location("slab_kernels.text.again", stdlib_text.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_tokenizer_round_trips_source(tokenizer, heldout):
    for text in (
        heldout,
        "\tif x:\r\n\t\treturn  'é→😀'   \n\n\n",
        " a",
        "",
        "__init__(self, *, a=1)\n        ",
    ):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_tokenizer_puts_bos_first_and_indentation_in_one_token(tokenizer):
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id == 0
    assert len(tokenizer("\n        ", add_special_tokens=False)["input_ids"]) == 1


def test_config_is_the_documented_architecture():
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    shape = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    assert [config[name] for name in shape] == [2048, 384, 1024, 3, 6]
    assert config["num_key_value_heads"] == 2 and config["tie_word_embeddings"] is True


def test_dense_model_predicts_heldout_source_and_2_4_magnitude_pruning_hurts(windows):
    model = load_model()
    dense = perplexity(model, windows)
    assert dense < training_run()["unigram_heldout_perplexity"] / 10
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            groups = module.weight.detach().view(-1, 4)
            groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0.0)
    # It is 1.12 over all held-out text: 3.2 M training tokens leave the model undertrained, and so
    # tolerant of pruning.
    assert perplexity(model, windows) > 1.25 * dense
