"""KL, agreement and perplexities of two models, against the same in fp64 from all logits at once;
the dense model in memory and block by block."""

from __future__ import annotations

import gc
import json
import math
import weakref

import pytest
import tiny_models
import torch

import slab_kernels
from slab_kernels.errors import (
    ArchitectureError,
    ArgumentError,
    CalibrationError,
    CheckpointError,
)
from slab_kernels.evaluate import against
from slab_kernels.evaluate.against import compare
from slab_kernels.evaluate.generation import continuation
from slab_kernels.evaluate.perplexity import perplexity
from slab_kernels.models import blocks, endings
from slab_kernels.models.source import open_source
from slab_kernels.text.tokenizer import open_tokenizer

TEXT = tiny_models.text(120)


def folder(tmp_path, name: str = "llama", **changes):
    """A dense model folder and a packed one."""
    dense, out = tmp_path / "dense", tmp_path / "packed"
    tiny_models.write(dense, name, **changes)
    slab_kernels.compress(
        dense, out, method="magnitude", calibration=tiny_models.tokens(), progress=False
    )
    return dense, slab_kernels.load(out)


def noting(steps: list):
    return lambda *step: steps.append(step)


def oracle(model, dense, tokenizer, text: str, window: int) -> dict:
    """The definition: whole logits of one window at a time in fp64, windows cut here."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    step = window - 1
    cut = [ids[i : i + step] for i in range(0, len(ids), step)]
    cut = [piece for piece in cut if len(piece) == step] or cut
    kl, ours, theirs, same, by_window = [], [], [], [], []
    for piece in cut:
        row = torch.tensor([[tokenizer.bos_token_id, *piece]])
        with torch.no_grad():
            p, q = (m(input_ids=row).logits[0, :-1].double().log_softmax(1) for m in (dense, model))
        target = row[0, 1:, None]
        kl += (p.exp() * (p - q)).sum(1).tolist()
        theirs += (-p.gather(1, target))[:, 0].tolist()
        ours += (-q.gather(1, target))[:, 0].tolist()
        same += (p.argmax(1) == q.argmax(1)).tolist()
        by_window.append(float((p - q).gather(1, target).mean()))
    kl_, ours_, theirs_ = (torch.tensor(x, dtype=torch.float64) for x in (kl, ours, theirs))
    ratio = math.exp(float((ours_ - theirs_).mean()))
    spread = torch.tensor(by_window, dtype=torch.float64)
    return {
        "kl": float(kl_.mean()),
        "kl_p99": float(kl_.quantile(0.99)),
        "top1": sum(same) / len(same),
        "perplexity": math.exp(float(ours_.mean())),
        "dense_perplexity": math.exp(float(theirs_.mean())),
        "perplexity_ratio": ratio,
        "perplexity_ratio_stderr": ratio * float(spread.std()) / len(cut) ** 0.5
        if len(cut) > 1
        else None,
        "tokens": len(kl),
        "windows": len(cut),
        "window": window,
    }


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2", "cohere", "gpt_neox"])
def test_the_numbers_are_those_of_whole_logits_in_fp64(name, tmp_path, monkeypatch):
    """Models with a tied head, a head of its own, capped and scaled logits; 96 tokens a batch, and
    7 tokens a slice, which divides nothing."""
    dense, model = folder(tmp_path, name)
    monkeypatch.setattr(against, "LOGITS_AT_ONCE", 7 * 96 * against.COPIES)
    monkeypatch.setattr(blocks, "TOKENS_PER_BATCH", 96)
    whole, tokenizer = open_source(dense).open_dense(), open_tokenizer(dense)
    right = oracle(model, whole, tokenizer, TEXT, 24)
    assert right["kl"] > 1e-4 and right["windows"] > 20
    for given, streamed in ((whole, None), (dense, False), (str(dense), True)):
        steps: list[tuple[int, int]] = []
        found = compare(model, given, tokenizer, TEXT, 24, noting(steps), streamed=streamed)
        assert found.keys() == right.keys()
        for key, value in right.items():
            assert found[key] == pytest.approx(value, rel=5e-5, abs=2e-8), (key, streamed)
        assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]
        assert steps[-1][1] == right["windows"] + (2 if streamed else 0)
    assert found["perplexity"] == pytest.approx(
        perplexity(model, tokenizer, TEXT, 24)["perplexity"], rel=1e-6
    )


def test_a_text_shorter_than_a_window_is_one_window(tmp_path):
    dense, model = folder(tmp_path)
    tokenizer = open_tokenizer(dense)
    right = oracle(model, open_source(dense).open_dense(), tokenizer, "a short text", 64)
    for streamed in (False, True):
        found = compare(model, dense, tokenizer, "a short text", 64, streamed=streamed)
        assert found == {
            k: v if v is None else pytest.approx(v, rel=2e-5) for k, v in right.items()
        }
    assert found["perplexity_ratio_stderr"] is None and found["tokens"] == 12


@pytest.mark.parametrize("positions", [(32, 64), (64, 32)], ids=str)
def test_windows_are_those_of_the_model_with_fewer_positions(tmp_path, positions):
    model, dense = (tiny_models.model(max_position_embeddings=most) for most in positions)
    found = compare(model, dense, tiny_models.tokenizer(), TEXT)
    assert found["window"] == 32 and found["windows"] > 1


def test_a_model_does_not_differ_from_itself(tmp_path):
    tiny_models.write(tmp_path / "dense")
    tokenizer = open_tokenizer(tmp_path / "dense")
    model = open_source(tmp_path / "dense").open_dense()
    for streamed in (False, True):
        found = compare(model, tmp_path / "dense", tokenizer, TEXT, 24, streamed=streamed)
        assert abs(found["kl"]) < 1e-9 and found["top1"] == 1
        assert found["perplexity_ratio"] == pytest.approx(1, abs=1e-9)


def test_block_by_block_no_whole_model_is_in_memory(tmp_path, monkeypatch):
    """Three portions of the text, four blocks: at most two blocks are alive, and of the embedding
    and the head at most one."""
    dense, model = folder(tmp_path, num_hidden_layers=4, tie_word_embeddings=False)
    tokenizer = open_tokenizer(dense)
    alive: list[weakref.ref] = []
    most, made = 0, 0
    plain = blocks.filled_copy

    def counted(*args):
        nonlocal most, made
        block = plain(*args)
        gc.collect()
        alive.append(weakref.ref(block))
        most, made = max(most, sum(ref() is not None for ref in alive)), made + 1
        return block

    outside: list[set[str]] = []
    read: list[tuple[int, int]] = []
    logits = endings._Behind.logits

    def watched(self, states):
        named = self.ending.model.named_parameters()
        outside.append({name for name, p in named if not p.is_meta})
        found = logits(self, states)
        read.append(tuple(found.shape))
        return found

    monkeypatch.setattr(blocks, "filled_copy", counted)
    monkeypatch.setattr(endings._Behind, "logits", watched)
    monkeypatch.setattr(endings, "HIDDEN_AT_ONCE", 10 * 24 * 32 * 4)
    monkeypatch.setattr(against, "LOGITS_AT_ONCE", 50 * 96 * against.COPIES)
    found = compare(model, dense, tokenizer, TEXT, 24, streamed=True)
    portions = math.ceil(found["windows"] / 10)
    assert portions > 2 and made == portions * (4 + 1), "one of the kind is seen, then each is run"
    assert most <= 2
    assert all(names == {"model.norm.weight", "lm_head.weight"} for names in outside)
    assert max(tokens for tokens, _ in read) == 50 < found["tokens"]
    assert found["kl"] == pytest.approx(
        compare(model, dense, tokenizer, TEXT, 24, streamed=False)["kl"], rel=1e-5
    )


def test_memory_decides_how_the_dense_model_is_read(tmp_path, monkeypatch):
    tiny_models.write(tmp_path / "dense")
    source = open_source(tmp_path / "dense")
    numbers = sum(p.numel() for p in source.model.parameters())
    cpu, kind = torch.device("cpu"), torch.float32
    for free, road in (
        (None, endings.BlockwiseModel),
        (numbers * 4, endings.BlockwiseModel),
        (numbers * 8, endings.WholeModel),
    ):
        monkeypatch.setattr(against, "free_memory", lambda _, free=free: free)
        assert isinstance(against._dense(source, cpu, kind, None), road)


def test_free_memory_is_a_number_of_bytes():
    from slab_kernels.device import free_memory

    found = free_memory(torch.device("cpu"))
    assert found is None or found > 1 << 20


def test_another_model_is_refused_in_a_sentence(tmp_path):
    dense, model = folder(tmp_path)
    tokenizer = open_tokenizer(dense)
    tiny_models.write(tmp_path / "larger", vocab_size=128)
    with pytest.raises(ArgumentError, match="vocabulary of 128 tokens, and this one has 96"):
        compare(model, tmp_path / "larger", tokenizer, TEXT)
    with pytest.raises(CheckpointError, match="does not exist"):
        compare(model, str(tmp_path / "nowhere"), tokenizer, TEXT)
    with pytest.raises(CheckpointError, match="is compressed already"):
        compare(model, tmp_path / "packed", tokenizer, TEXT)
    with pytest.raises(CalibrationError, match="longer than the model's 64 positions"):
        compare(model, dense, tokenizer, TEXT, 65)
    file = dense / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(ArgumentError, match="makes other tokens of this text, from token"):
        compare(model, dense, tokenizer, "xyz a b")


def test_a_model_that_computes_nan_is_refused_in_a_sentence(tmp_path):
    dense, model = folder(tmp_path)
    tokenizer, broken = open_tokenizer(dense), tiny_models.model()
    broken.lm_head.weight.data[5, 0] = torch.nan
    for attempt in (
        lambda: compare(model, broken, tokenizer, TEXT),
        lambda: compare(broken, dense, tokenizer, TEXT),
        lambda: perplexity(broken, tokenizer, TEXT),
        lambda: continuation(broken, tokenizer, TEXT[:9], 3),
    ):
        with pytest.raises(CheckpointError, match="the model of .* computes NaN: a weight of it"):
            attempt()


def test_a_model_that_does_not_call_its_head_is_refused_in_a_sentence():
    model = tiny_models.model()
    model.get_output_embeddings = lambda: torch.nn.Linear(32, 96)
    ids = tiny_models.tokens()
    with endings.WholeModel(model).reading(ids, lambda: None) as reader:
        with pytest.raises(ArchitectureError, match="does not call its output head, a Linear"):
            reader.states(0)
