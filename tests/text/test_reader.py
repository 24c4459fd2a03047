"""The reader: fields of rows, batches with padding, iterables, and what a record says of them."""

from __future__ import annotations

import json
import random
import re
import sys
import types

import numpy
import pytest
import tiny_models
import torch
from torch.utils.data import DataLoader, TensorDataset

from slab_kernels.errors import ArgumentError, CalibrationError, MissingPackageError
from slab_kernels.text.rows import RowReader
from slab_kernels.text.source import read, read_text, read_windows
from slab_kernels.text.windows import Sampling, Windows

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
MODEL = tiny_models.model()


def ragged(count: int = 9, seed: int = 3) -> list[torch.Tensor]:
    """Rows of ids of different lengths."""
    draw = random.Random(seed)
    return [tiny_models.tokens(1, draw.randint(2, 20), n)[0] for n in range(count)]


def padded(rows: list[torch.Tensor], side: str, to: int | None = None) -> dict[str, torch.Tensor]:
    """A batch as a tokenizer makes it, whose padding is a token that the model knows."""
    width = to or max(map(len, rows))
    ids = torch.full((len(rows), width), 5)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for n, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[n, place], mask[n, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def opened() -> None:
    pytest.fail("a tokenizer was asked for where there is no text")


def windows_of(source, samples=128, **more) -> tuple[Windows, dict]:
    windows, found = read_windows(source, MODEL, opened, Sampling(samples, 16), **more)
    return windows, found.facts(windows)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["tensor", "bool", "float", "numpy", "lists"])
def test_padding_is_left_out_of_a_batch(side, kind):
    rows = ragged()
    batch = padded(rows, side)
    mask = batch["attention_mask"]
    made = {
        "tensor": mask,
        "bool": mask.bool(),
        "float": mask.float(),
        "numpy": mask.numpy(),
        "lists": mask.tolist(),
    }[kind]
    batch["attention_mask"] = made
    if kind == "lists":
        batch["input_ids"] = batch["input_ids"].tolist()
    windows, facts = windows_of(batch)
    assert [row.tolist() for row in windows.rows] == [row.tolist() for row in rows]
    assert facts["tokens"] == sum(map(len, rows)) and facts["kind"] == "token ids"
    assert facts["rows"] == facts["windows"] == len(rows) and facts["file"] is None


def test_a_hole_in_a_mask_is_no_token_either():
    batch = {"input_ids": torch.arange(3, 11)[None], "attention_mask": [[0, 1, 1, 0, 1, 1, 1, 0]]}
    windows, _ = windows_of(batch)
    assert windows.rows[0].tolist() == [4, 5, 7, 8, 9]


def every_form(rows: list[torch.Tensor]) -> dict[str, object]:
    """The same rows of ids as people hold them."""
    halves = [padded(rows[:4], "left"), padded(rows[4:], "right", 30)]
    single = [{k: v[0].tolist() for k, v in padded([row], "right", 25).items()} for row in rows]
    return {
        "lists": [row.tolist() for row in rows],
        "tensors": rows,
        "arrays": [row.numpy() for row in rows],
        "batches": halves,
        "a generator": (half for half in halves),
        "rows": single,
        "a loader": DataLoader(single, batch_size=4, collate_fn=_collate),
        "a sequence": _Sequence(single),
    }


def _collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


class _Sequence:
    """What torch calls a map-style dataset: a length and places, and no end that it tells."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return self.rows[number % len(self.rows)]


@pytest.mark.parametrize("form", every_form(ragged()))
def test_ids_of_any_form_are_the_same_windows(form):
    rows = ragged()
    windows, facts = windows_of(every_form(rows)[form])
    assert [row.tolist() for row in windows.rows] == [row.tolist() for row in rows]
    assert facts["sha256"] == windows_of(rows)[1]["sha256"]
    moved = [torch.cat((rows[0], rows[1][:1])), rows[1][1:], *rows[2:]]
    assert facts["sha256"] != windows_of(moved)[1]["sha256"], "where windows begin counts too"


def test_a_loader_of_bare_tensors_is_read_and_one_of_pairs_refused():
    ids = tiny_models.tokens(6, 12)
    windows, _ = windows_of(DataLoader(TensorDataset(ids), batch_size=4))
    assert torch.equal(torch.stack(windows.rows), ids)
    pairs = DataLoader(TensorDataset(ids, torch.ones_like(ids)), batch_size=4)
    with pytest.raises(CalibrationError, match="has 2 tensors without names; give {'input_ids'"):
        windows_of(pairs)


def test_an_iterable_is_read_no_further_than_needed_and_a_list_whole():
    def endless():
        while True:
            yield {"input_ids": tiny_models.tokens(4, 9)}

    assert len(windows_of(endless(), samples=6)[0]) == 6
    assert len(windows_of([next(endless())] * 3, samples=6)[0]) == 12
    texts = (f"text {number}" for number in iter(int, 1))
    assert len(read_text(texts, 100)) == 100


def test_windows_of_one_length_stand_together_and_every_token_once():
    rows = ragged(40)
    batches = Windows(tuple(rows)).batches(30)
    assert all(batch.numel() <= 30 or len(batch) == 1 for batch in batches)
    given = sorted(map(torch.Tensor.tolist, rows))
    assert sorted(row for batch in batches for row in batch.tolist()) == given
    same = tiny_models.tokens(7, 12)
    parts = Windows.of(same).batches(30)
    assert all(map(torch.equal, parts, same.split(2))) and len(parts) == 4


@pytest.mark.parametrize(
    ("content", "field", "text", "kind"),
    [
        ("plain", "body", "plain", "texts"),
        (CHAT, "conversation", "<user>Hi<assistant>Hello", "chats"),
        ("from messages", "messages", "from messages", "texts"),
    ],
)
def test_a_field_is_read_by_its_name(content, field, text, kind, tmp_path):
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    rows = [{"text": "another", "id": n, field: content} for n in range(2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for source in (tmp_path / "a.jsonl", str(tmp_path), rows, iter(rows)):
        found = read(source, RowReader(field, lambda: tokenizer))
        assert found.content == f"{text}\n\n{text}"
        assert (found.kind, found.field, found.rows) == (kind, field, 2)
    assert read(str(tmp_path), RowReader(field, lambda: tokenizer)).name == str(tmp_path)
    assert read_text(rows) == "another\n\nanother"


def test_a_field_may_hold_token_ids(tmp_path):
    rows = [{"tokens": row.tolist(), "text": "x"} for row in ragged(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    windows, facts = windows_of(tmp_path / "a.jsonl", field="tokens", samples=3)
    assert [row.tolist() for row in windows.rows] == [row["tokens"] for row in rows[:3]]
    assert (facts["field"], facts["rows"], facts["file"]) == (
        "tokens",
        3,
        str(tmp_path / "a.jsonl"),
    )
    batch = padded(ragged(5), "left")
    lines = [
        {key: value[n].tolist() for key, value in batch.items()} | {"text": "x"} for n in range(5)
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for more in ({}, {"field": "input_ids"}):
        windows, facts = windows_of(tmp_path / "b.jsonl", **more)
        assert [row.tolist() for row in windows.rows] == [row.tolist() for row in ragged(5)]
        assert facts["field"] == "input_ids"


@pytest.mark.parametrize(
    ("source", "field", "message"),
    [
        ([{"a": 1, "b": 2}], "c", "entry 1 of the given list has no field 'c'; it has a, b"),
        ([{"a": 1}], "a", "a must be a string, a list of .* or token ids, not a number|integer"),
        ([{"a": None}], "a", "or token ids, not null or absent"),
        ([{"a": []}], "a", "or token ids, not a list"),
        ([{"a": CHAT}], "a", "entry 1 of the given list is a chat"),
        (["x"], "a", "field='a' says which field of rows to read, and .* has no rows"),
        (tiny_models.tokens(), "a", "has no rows; leave it out"),
        ("stdlib", "a", "has no rows; leave it out"),
        ([{"text": "x"}, [1, 2]], None, "holds both texts and token ids"),
        ([[1, 2], {"text": "x"}], None, "has no input_ids"),
        ([], None, "is empty; give at least one"),
        (iter([]), None, "is empty; give at least one"),
        (iter([tiny_models.tokens(), "x"]), None, "holds both texts and token ids"),
        (iter([{"input_ids": [[7, -1]]}]), None, "entry 1 of the given list_iterator: .*negative"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),  # the same in every process
)
def test_what_cannot_be_read_is_said_in_a_sentence(source, field, message):
    with pytest.raises(CalibrationError, match=message):
        read(source, RowReader(field))


@pytest.mark.parametrize("field", ["", 3, ["text"]])
def test_a_field_is_a_name(field):
    with pytest.raises(ArgumentError, match="must be the name of a field"):
        read_text([{"text": "x"}], field=field)


def test_ids_are_no_text_where_a_text_is_needed():
    for source in (tiny_models.tokens(), [{"input_ids": [3, 4]}]):
        with pytest.raises(CalibrationError, match="holds token ids, and a text is needed"):
            read_text(source)


def test_ids_beyond_the_vocabulary_and_the_positions_are_named():
    for rows, message in (
        ([[5], [5, 96, 7]], "go up to 96, but the model's vocabulary has 96"),
        ([[5], [5] * 65], "windows of 65, longer than the model's 64 positions"),
    ):
        with pytest.raises(CalibrationError, match=message):
            windows_of(rows)


# Parquet is read by pyarrow, which the suite does not have; a module stands in its place.


class _Parquet:
    """A Parquet file of the columns in a JSON file, as `pyarrow.parquet` shows one."""

    read: list = []  # noqa: RUF012

    def __init__(self, path):
        self.columns = json.loads(path.read_text())
        self.schema_arrow = types.SimpleNamespace(names=list(self.columns))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def iter_batches(self, size, columns):
        self.read.append(columns)
        names = columns or list(self.columns)
        columns = zip(*(self.columns[name] for name in names), strict=True)
        rows = [dict(zip(names, row, strict=True)) for row in columns]
        for start in range(0, len(rows), size):
            yield types.SimpleNamespace(to_pylist=lambda at=start: rows[at : at + size])


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    module = types.SimpleNamespace(ParquetFile=_Parquet)
    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(parquet=module))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    _Parquet.read.clear()
    file = tmp_path / "a.parquet"
    count = 300
    columns = {
        "id": list(range(count)),
        "text": [f"row {n}" for n in range(count)],
        "ids": [[3, 4, 5 + n % 9] for n in range(count)],
    }
    file.write_text(json.dumps(columns))
    return file


def test_a_parquet_file_is_read_by_field_and_no_further_than_needed(parquet):
    assert read_text(parquet, 15) == "row 0\n\nrow 1\n\nr" and _Parquet.read == [["text"]]
    assert len(read_text(parquet).split("\n\n")) == 300
    assert len(read_text(parquet.parent).split("\n\n")) == 300, "a folder of them too"
    windows, facts = windows_of(parquet, samples=260, field="ids")
    assert len(windows) == 260 and windows.rows[259].tolist() == [3, 4, 5 + 259 % 9]
    assert facts["kind"] == "token ids" and facts["field"] == "ids"
    with pytest.raises(
        CalibrationError, match="row 1 of .* has no field 'b'; it has id, text, ids"
    ):
        read_text(parquet, field="b")
    parquet.write_text("no columns")
    with pytest.raises(CalibrationError, match="a.parquet cannot be read as Parquet: "):
        read_text(parquet)


def test_a_parquet_file_needs_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingPackageError, match="needs the optional package pyarrow"):
        read_text(tmp_path / "a.parquet")


class _Frame:
    """What pandas and polars have in common."""

    columns = ("text",)

    def __iter__(self):
        return iter(self.columns)

    def to_dict(self, orient):
        return [{"text": "a row"}]


def test_tables_that_do_not_give_rows_are_refused_with_what_gives_them():
    with pytest.raises(CalibrationError, match=r"is a _Frame; give its rows, as in .*'records'"):
        read_text(_Frame())
    split = types.SimpleNamespace(column_names=["text"])
    with pytest.raises(CalibrationError, match=r"splits train, test; give one .*=data\['train'\]"):
        read_text({"train": split, "test": split})


def test_numpy_takes_part():
    talk = numpy.array(CHAT, dtype=object)
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = "{{ messages[1].content }}"
    assert read_text([{"talk": talk}], field="talk", tokenizer=tokenizer) == "Hello"
    ids = numpy.random.default_rng(0).integers(3, 90, (3, 8), dtype="uint8")
    assert torch.equal(torch.stack(windows_of(ids)[0].rows), torch.from_numpy(ids).long())


@pytest.mark.parametrize("kind", ["pairs", "lists", "dataset"])
def test_a_mask_without_its_name_is_no_row_of_ids(kind):
    batch = padded(ragged(), "left")
    pairs = list(zip(batch["input_ids"], batch["attention_mask"], strict=True))
    source = {
        "pairs": pairs,
        "lists": [list(pair) for pair in pairs],
        "dataset": torch.utils.data.TensorDataset(batch["input_ids"], batch["attention_mask"]),
    }[kind]
    with pytest.raises(CalibrationError, match="2 tensors without names; give"):
        windows_of(source)


def test_the_mask_beside_a_field_of_ids_holds(tmp_path):
    batch = padded(ragged(5), "right")
    rows = [
        {"tokens": ids.tolist(), "attention_mask": mask.tolist()}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for source in (rows, tmp_path / "a.jsonl"):
        windows, _ = windows_of(source, field="tokens")
        assert [row.tolist() for row in windows.rows] == [row.tolist() for row in ragged(5)]
