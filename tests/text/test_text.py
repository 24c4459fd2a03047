"""Calibration and evaluation text, and the figures measured on it."""

from __future__ import annotations

import math
import sys
import types

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from slab_kernels.errors import CalibrationError
from slab_kernels.evaluate.perplexity import perplexity
from slab_kernels.text.source import read_text
from slab_kernels.text.tokenizer import tokenize
from slab_kernels.text.windows import sample_windows, windows


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


def test_a_file_and_a_folder(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.raw").write_text("third")
    (tmp_path / "image.png").write_bytes(b"\xff\xd8")
    assert read_text(tmp_path / "b.txt") == "second"
    assert read_text(tmp_path) == "first\n\nsecond\n\nthird"
    assert read_text(tmp_path, max_characters=7) == "first\n\n"


def test_the_standard_library_has_two_sides():
    assert len(read_text("stdlib", 10_000)) == 10_000
    assert read_text("stdlib", 10_000) != read_text("stdlib:heldout", 10_000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "absent.txt", "does not exist"),
        (lambda p: _write(p / "empty.txt", b" \n"), "is empty"),
        (lambda p: _write(p / "latin.txt", b"caf\xe9 au lait"), r"not UTF-8 text \(byte 3\)"),
        (lambda p: p, "holds no text file"),
    ],
)
def test_unusable_text_is_named(tmp_path, make, message):
    with pytest.raises(CalibrationError, match=message):
        read_text(make(tmp_path))


def _write(path, content: bytes):
    path.write_bytes(content)
    return path


def test_a_dataset_name_needs_the_optional_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="pip install datasets"):
        read_text("allenai/c4:en")


def test_a_dataset_is_streamed_only_as_far_as_needed(monkeypatch):
    seen = []

    def load_dataset(path, config, split, streaming):
        seen.append((path, config, split, streaming))
        return ({"text": f"row {i} " + "x" * 10} for i in iter(int, 1))  # endless

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert len(read_text("allenai/c4:en:validation", 100)) == 100
    assert seen == [("allenai/c4", "en", "validation", True)]


def test_a_dataset_that_fails_is_one_sentence(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network\nlong trace")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(CalibrationError, match=r"cannot read dataset 'wikitext': no network$"):
        read_text("wikitext")
    rows = types.SimpleNamespace(load_dataset=lambda *a, **k: [{"content": "x"}])
    monkeypatch.setitem(sys.modules, "datasets", rows)
    with pytest.raises(
        CalibrationError, match="row 1 of dataset 'wikitext' has none of .* it has content"
    ):
        read_text("wikitext")


@given(st.integers(1, 60), st.integers(2, 12), st.sampled_from([None, 1]))
def test_windows_hold_every_token_once(count, window, bos):
    tokens = torch.arange(100, 100 + count)
    cut = windows(tokens, window, bos)
    assert torch.equal(torch.cat([w if bos is None else w[1:] for w in cut]), tokens)
    assert all(len(w) == window for w in cut[:-1]) and 0 < len(cut[-1]) <= window
    assert bos is None or all(w[0] == bos for w in cut)


def test_samples_are_drawn_by_seed_without_repetition(tokenizer):
    text = tiny_models.text()
    first = sample_windows(tokenizer, text, 8, 16, seed=1)
    assert first.shape == (8, 16) and first.dtype == torch.long and bool((first[:, 0] == 1).all())
    assert torch.equal(first, sample_windows(tokenizer, text, 8, 16, seed=1))
    assert not torch.equal(first, sample_windows(tokenizer, text, 8, 16, seed=2))
    everything = sample_windows(tokenizer, text, 10_000, 16)
    assert len(everything) == len(tokenize(tokenizer, text)) // 15 == len(everything.unique(dim=0))


def test_too_little_text_says_how_much_there_is(tokenizer):
    with pytest.raises(
        CalibrationError, match="the calibration text has 5 tokens, fewer than one window of 16"
    ):
        sample_windows(tokenizer, "abcde", 4, 16)
    with pytest.raises(CalibrationError, match="samples=0"):
        sample_windows(tokenizer, "abcde", 0, 16)


def test_perplexity_is_the_mean_over_whole_windows(tokenizer):
    model, text = tiny_models.model(), tiny_models.text(40)
    found = perplexity(model, tokenizer, text, window=16)
    ids = tokenize(tokenizer, text)
    count = len(ids) // 15
    losses = []
    for i in range(count):
        piece = torch.cat([torch.tensor([1]), ids[15 * i : 15 * i + 15]])
        with torch.no_grad():
            logits = model(piece[None]).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
    assert found == {
        "perplexity": pytest.approx(math.exp(sum(losses) / (15 * count)), rel=1e-5),
        "tokens": 15 * count,
        "windows": count,
        "window": 16,
    }


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary(tokenizer):
    model = tiny_models.model(tie_word_embeddings=False)
    model.lm_head.weight.data.zero_()
    found = perplexity(model, tokenizer, "abc")  # shorter than one window: the tail is all there is
    assert (
        found["perplexity"] == pytest.approx(tiny_models.VOCABULARY)
        and found["tokens"] == 3
        and found["window"] == 64
    )


def test_perplexity_refuses_what_it_cannot_measure(tokenizer):
    model = tiny_models.model()
    with pytest.raises(CalibrationError, match="3 is no text"):
        perplexity(model, tokenizer, 3)
    with pytest.raises(CalibrationError, match="window='4' must be"):
        perplexity(model, tokenizer, "abc", window="4")
    with pytest.raises(CalibrationError, match="has 0 tokens"):
        perplexity(model, tokenizer, "")
    with pytest.raises(CalibrationError, match="window=65 is longer than the model's 64 positions"):
        perplexity(model, tokenizer, "abc", window=65)
    with pytest.raises(CalibrationError, match="but the model's vocabulary has 40"):
        perplexity(tiny_models.model(vocab_size=40), tokenizer, "xyz")
