"""Continuations, chats and speeds; how far perplexity and decompression have come."""

from __future__ import annotations

import pytest
import tiny_models
import torch

import slab_kernels
from slab_kernels.errors import ArgumentError, CalibrationError
from slab_kernels.evaluate.generation import chat_prompt, continuation, tokens_per_second
from slab_kernels.evaluate.perplexity import perplexity

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture
def tokenizer():
    return tiny_models.tokenizer()


def test_a_continuation_begins_behind_the_prompt(tokenizer):
    model = tiny_models.model()
    found = continuation(model, tokenizer, "abc", 5)
    prompt = tokenizer("abc", return_tensors="pt")["input_ids"]
    assert 0 < len(found.ids) <= 5 and found.seconds > 0
    assert torch.equal(found.ids, continuation(model, tokenizer, prompt, 5).ids)
    drawn = [continuation(model, tokenizer, "abc", 9, 2.0, seed).ids.tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generation_ends_at_the_last_position(tokenizer):
    model = tiny_models.model("opt")  # its positions are a table
    assert 0 < len(continuation(model, tokenizer, "abc", 500).ids) <= 61
    said = "70 tokens, which leaves none of the model's 64 positions"
    with pytest.raises(CalibrationError, match=said):
        continuation(model, tokenizer, "a" * 70, 5)


def test_a_chat_is_written_by_the_tokenizers_template(tokenizer):
    tokenizer.chat_template = TEMPLATE
    ids = chat_prompt(tokenizer, "hello")
    assert ids.dtype == torch.long and ids.shape[0] == 1
    assert ids[0, 0] == tokenizer.bos_token_id and ids[0, 1] != tokenizer.bos_token_id
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "u: hello|a: "
    assert len(continuation(tiny_models.model(), tokenizer, ids, 4).ids) == 4


def test_a_tokenizer_without_a_working_template_is_named(tokenizer):
    with pytest.raises(ArgumentError, match="has no chat template; give the prompt as plain text"):
        chat_prompt(tokenizer, "hello")
    tokenizer.chat_template = "{{ raise_exception('only pictures') }}"
    with pytest.raises(ArgumentError, match="cannot write this prompt: only pictures"):
        chat_prompt(tokenizer, "hello")
    with pytest.raises(CalibrationError, match="is no text in UTF-8"):
        chat_prompt(tokenizer, "\ud800")


def test_tokens_per_second(tokenizer):
    assert tokens_per_second(tiny_models.model(), tokenizer, "abc", 8) > 0
    with pytest.raises(ArgumentError, match="new_tokens=1"):
        tokens_per_second(tiny_models.model(), tokenizer, "abc", 1)
    with pytest.raises(CalibrationError, match="prompt is empty"):
        tokens_per_second(tiny_models.model(), tokenizer, "", 8)


def test_perplexity_tells_how_far_it_is(tokenizer, monkeypatch):
    monkeypatch.setattr("slab_kernels.evaluate.perplexity.LOGITS_AT_ONCE", 2 * 16 * 96)
    steps: list[tuple[int, int]] = []
    model, text = tiny_models.model(), tiny_models.text(40)
    found = perplexity(model, tokenizer, text, 16, lambda *step: steps.append(step))
    count = found["windows"]
    assert steps == [(min(done, count), count) for done in range(2, count + 2, 2)]


def test_decompression_tells_how_far_it_is(tmp_path):
    tiny_models.write(tmp_path / "dense")
    settings = {"method": "magnitude", "calibration": tiny_models.tokens(), "progress": False}
    slab_kernels.compress(tmp_path / "dense", tmp_path / "packed", **settings)
    steps: list[tuple[int, int]] = []
    slab_kernels.decompress(
        tmp_path / "packed", tmp_path / "out", progress=lambda *step: steps.append(step)
    )
    total = len(tiny_models.model().state_dict()) - 1  # the head is the embedding
    assert steps == [(done, total) for done in range(1, total + 1)]
