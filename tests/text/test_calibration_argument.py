"""What `calibration=` takes: JSON rows, chats, texts in memory, and token ids in any form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import BatchEncoding

import slab_kernels
from slab_kernels.cli import main as cli
from slab_kernels.errors import CalibrationError
from slab_kernels.evaluate.perplexity import perplexity
from slab_kernels.text.source import read_text
from slab_kernels.text.token_ids import holds_ids, token_ids

TOKENS = tiny_models.tokens()
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def tokenizer():
    made = tiny_models.tokenizer()
    made.chat_template = TEMPLATE
    return made


def lines(path: Path, *rows) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_rows_are_read_by_their_fields(tmp_path, tokenizer):
    rows = [
        {"text": "first"},
        "",
        {"messages": CHAT, "id": 3},
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
    ]
    text = "first\n\n<user>Hi<assistant>Hello\n\n2+2=4\n\n<user>Hi<assistant>Hello"
    assert read_text(lines(tmp_path / "a.jsonl", *rows), tokenizer=tokenizer) == text
    assert read_text(lines(tmp_path / "b.json", *rows), tokenizer=tokenizer) == text, (
        "lines under the shorter name"
    )
    whole = [row for row in rows if row]
    (tmp_path / "c.json").write_text(json.dumps(whole))
    assert read_text(tmp_path / "c.json", tokenizer=tokenizer) == text
    assert read_text(whole, tokenizer=tokenizer) == text and read_text(rows[0]) == "first"
    (tmp_path / "d.ndjson").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows[0]).encode() + b"\r\n")
    assert read_text(tmp_path / "d.ndjson") == "first"
    assert read_text([tmp_path / "d.ndjson", "second"]) == "first\n\nsecond"
    chats = "<user>Hi<assistant>Hello\n\n<user>Hi"
    assert read_text([CHAT, CHAT[:1]], tokenizer=tokenizer) == chats
    assert read_text(CHAT, tokenizer=tokenizer) == "<user>Hi<assistant>Hello"


def test_a_folder_holds_rows_too_and_reading_stops_in_time(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    lines(tmp_path / "b.jsonl", *[{"text": f"row {i}"} for i in range(9)], "never read")
    assert read_text(tmp_path, 20).startswith("plain\n\nrow 0\n\nrow 1")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "x"', "line 2 of .* is no JSON"),
        ("[1]", "line 2 of .* is a list, expected an object"),
        ('"x"', "is a string"),
        (
            {"content": "x", "id": 1},
            "none of the fields input_ids, text, messages, .* it has content, id",
        ),
        ({"text": None}, "text must be a string, not null"),
        ({"text": ["x"]}, "text must be a string, not a list"),
        ({"messages": "Hi"}, "messages must be a list of {role, content}, not a string"),
        ({"messages": []}, "messages must be"),
        ({"messages": [{"content": "x"}]}, "messages must be"),
        ({"prompt": "x"}, "not a string and null"),
        ({"prompt": "x", "completion": CHAT}, "both strings or both lists"),
        ('{"text": "\\ud800"}', "half a character"),
        ("[" * 100_000, "line 2 of .* is no JSON"),
        ({"text": " "}, None),
    ],
)
def test_a_row_that_has_no_text_is_named(tmp_path, tokenizer, row, message):
    file = lines(tmp_path / "a.jsonl", {"text": "fine"}, row)
    if message is None:
        read_text(file)
        return
    with pytest.raises(CalibrationError, match=message):
        read_text(file, tokenizer=tokenizer)


def test_a_json_file_that_nests_too_deep_is_named(tmp_path):
    with pytest.raises(CalibrationError, match="line 1 of .* is no JSON"):
        read_text(lines(tmp_path / "a.json", "[" * 100_000))


def test_a_chat_needs_a_template_that_can_write_it(tmp_path, tokenizer):
    file = lines(tmp_path / "a.jsonl", {"messages": CHAT})
    with pytest.raises(CalibrationError, match="give tokenizer="):
        read_text(file)
    with pytest.raises(CalibrationError, match="has no chat template"):
        read_text(file, tokenizer=tiny_models.tokenizer())
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match="line 1 of .*roles must alternate"):
        read_text(file, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "ids",
    [
        TOKENS,
        TOKENS.int(),
        TOKENS.tolist(),
        TOKENS.numpy(),
        TOKENS.numpy().astype("uint16"),
        list(TOKENS),
        tuple(TOKENS.numpy()),
        {"input_ids": TOKENS, "labels": TOKENS},
        {"input_ids": TOKENS.tolist(), "attention_mask": torch.ones_like(TOKENS).tolist()},
        BatchEncoding({"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}),
        [{"input_ids": row} for row in TOKENS.tolist()],
        [{"input_ids": row[None]} for row in TOKENS],
    ],
    ids=str,
)
def test_ids_in_any_form_are_the_same_ids(ids):
    found = token_ids(ids)
    assert torch.equal(torch.stack(found.rows), TOKENS) and found.rows[0].dtype == torch.long


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (TOKENS.float(), "integer tensor"),
        (TOKENS.bool(), "integer tensor"),
        (TOKENS[0], r"\[samples, window\], got .* \[16\]"),
        (TOKENS[:0], "are empty"),
        (-TOKENS, "none may be negative"),
        ([[1, 2], []], "row 2 of the held-out token ids is empty"),
        ({"input_ids": []}, "are empty"),
        ([[[[[1]]]]], "nested too deep"),
        ([[1], 2], "side by side"),
        ([[TOKENS, TOKENS]], "has 2 tensors without names"),
        (5, "integer tensor"),
        ([[1, "x"]], "cannot be read"),
        ([[1 << 70]], "cannot be read"),
        ({"input_ids": TOKENS, "attention_mask": TOKENS * 0}, "marks everything as padding"),
        ({"input_ids": TOKENS[:2], "attention_mask": [[0] * 16, [1] * 16]}, "marks all of row 1"),
        ({"input_ids": TOKENS, "attention_mask": TOKENS}, "attention_mask .* it may hold 1 for"),
        (
            {"input_ids": TOKENS, "attention_mask": torch.ones(6, 15)},
            "has 6 rows of 15, and input_ids has 6 rows of 16",
        ),
        ({"input_ids": TOKENS, "attention_mask": torch.ones(5, 16)}, "has 5 rows of 16, and"),
        ({"input_ids": TOKENS, "attention_mask": torch.ones(6, 1, 16)}, "cannot be read"),
        ({"input_ids": TOKENS, "attention_mask": TOKENS / 7}, "cannot be read"),
        ({"input_ids": TOKENS, "attention_mask": "x"}, "attention_mask .* cannot be read"),
        ([{"input_ids": [1]}, {"x": 1}], "no input_ids"),
    ],
    ids=str,
)
def test_ids_that_mean_nothing_plain_are_named(ids, message):
    with pytest.raises(CalibrationError, match=message):
        token_ids(ids, "held-out")


@pytest.mark.parametrize(
    "source", [None, 3.5, b"x", {"x", "y"}], ids=lambda source: type(source).__name__
)
def test_what_is_neither_text_nor_ids_is_named(source):
    assert not holds_ids(source)
    with pytest.raises(CalibrationError, match="neither text nor token ids"):
        read_text(source)


def test_a_text_for_its_name_is_named():
    for text in ("several\nlines", "long " * 1000):
        with pytest.raises(CalibrationError, match="put it in a list"):
            read_text(text)
    assert read_text(["several\nlines"]) == "several\nlines"


def test_compress_takes_them_all_and_a_tokenizer_by_its_folder(tmp_path):
    model, settings = tiny_models.write(tmp_path / "m"), {"method": "magnitude", "progress": False}
    made = [
        slab_kernels.compress(tmp_path / "m", calibration=c, **settings)
        for c in (TOKENS, TOKENS.tolist(), {"input_ids": TOKENS.numpy()})
    ]
    digests = {m.slab_record.settings["calibration_sha256"] for m in made}
    assert len(digests) == 1 and {m.slab_record.settings["calibration"] for m in made} == {
        "token ids"
    }
    text = {"calibration": [tiny_models.text(90)], "samples": 2, "window": 16}
    for tokenizer in (str(tmp_path / "m"), tmp_path / "m", tiny_models.tokenizer()):
        made = slab_kernels.compress(model, tokenizer=tokenizer, **text, **settings)
        assert made.slab_record.settings["calibration"] == "texts"
        model = tiny_models.model()
    with pytest.raises(ValueError, match="tokenizer=3 must be"):
        slab_kernels.compress(model, tokenizer=3, **text, **settings)
    with pytest.raises(
        CalibrationError, match="windows of 65, longer than the model's 64 positions"
    ):
        slab_kernels.compress(model, calibration=torch.ones(1, 65, dtype=torch.long), **settings)


def test_a_token_that_the_model_has_no_row_for_is_named_everywhere(tmp_path, capsys):
    tiny_models.write(tmp_path / "m", vocab_size=60)
    (tmp_path / "t.txt").write_text("xyz" * 99)
    for arguments in (
        ["eval", "--text", str(tmp_path / "t.txt")],
        ["generate", "--prompt", "xyz"],
        ["compress", str(tmp_path / "out"), "--calibration", str(tmp_path / "t.txt")],
    ):
        assert (
            cli.run([arguments[0], str(tmp_path / "m"), *arguments[1:]]) == 3
        )  # its own tokenizer
        assert "the model's vocabulary has 60" in capsys.readouterr().err
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<begin>"})  # its id, 96, is beyond the embedding
    with pytest.raises(CalibrationError, match="go up to 96, but the model's vocabulary has 96"):
        perplexity(tiny_models.model(), tokenizer, "abc")


def test_home_is_home_for_what_is_read_and_written(tmp_path, monkeypatch, capsys):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    tiny_models.write(home / "m")
    (home / "t.txt").write_text(tiny_models.text())
    small = [
        "--calibration",
        "~/t.txt",
        "--heldout",
        "~/t.txt",
        "--samples",
        "4",
        "--window",
        "16",
        "--method",
        "oats",
        "--option",
        "rounds=1",
    ]
    few = ["--text", "~/t.txt", "--steps", "1", "--window", "16", "--samples", "4"]
    for arguments in (
        ["compress", "~/m", "~/o", *small],
        ["eval", "~/o", "--text", "~/t.txt", "--max-tokens", "50"],
        ["inspect", "~/o"],
        ["decompress", "~/o", "~/d"],
        ["train", "~/o", "~/trained", *few],
        ["report", "~/o", "--out", "~/r", "--no-plots"],
    ):
        assert cli.run(arguments) == 0, capsys.readouterr().err
    slab_kernels.save(slab_kernels.load("~/o"), "~/s")
    slab_kernels.compress("~/m", "~/p", method="magnitude", calibration=TOKENS, progress=False)
    slab_kernels.decompress("~/p", "~/q")
    assert {"o", "d", "trained", "r", "s", "p", "q"} <= {
        p.name for p in home.iterdir()
    } and not list(elsewhere.iterdir())
    with pytest.raises(ValueError, match="~nosuchuser/x"):
        slab_kernels.load("~nosuchuser/x")
    with pytest.raises(ValueError, match="a path is empty"):
        slab_kernels.load("")
