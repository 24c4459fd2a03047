"""generate --chat: the tokenizer's own template, or a sentence that says that there is none."""

from __future__ import annotations

import json

import pytest
import tiny_models
from tokenizers.processors import TemplateProcessing

from slab_kernels.cli import main as cli
from slab_kernels.errors import ArgumentError
from slab_kernels.evaluate.generation import chat_prompt

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_a_question_stands_in_the_template_and_the_start_token_once():
    """Also with a tokenizer that begins every plain text with a start token, as Llama's does."""
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("Why?")["input_ids"][0] == tokenizer.bos_token_id
    ids = chat_prompt(tokenizer, "Why?")[0]
    assert ids.tolist().count(tokenizer.bos_token_id) == 1
    written = "<s>[user] Why?\n[assistant] "
    assert ids.tolist() == tokenizer(written, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_without_a_template_is_told_of():
    with pytest.raises(ArgumentError, match="no chat template; give the prompt as plain text"):
        chat_prompt(tiny_models.tokenizer(), "Why?")


def test_a_template_that_fails_is_told_of():
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('two messages, please') }}"
    with pytest.raises(ArgumentError, match="two messages, please"):
        chat_prompt(tokenizer, "Why?")


def test_generate_answers_in_the_template(tmp_path, capsys):
    tiny_models.write(tmp_path / "plain")
    command = ["--prompt", "hello", "--tokens", "3", "--device", "cpu", "--chat"]
    assert cli.run(["generate", str(tmp_path / "plain"), *command]) == 2
    shown = capsys.readouterr()
    assert "no chat template" in shown.err and "Traceback" not in shown.err and not shown.out
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "plain")
    assert cli.run(["generate", str(tmp_path / "plain"), *command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chat"] is True and found["prompt"] == "hello" and found["tokens"] <= 3
