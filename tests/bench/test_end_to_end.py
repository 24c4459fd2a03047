"""benchmarks/bench_end_to_end.py: a tiny model by every contestant, and what llama.cpp is given."""

from __future__ import annotations

import json
import sys
import types

import bench_end_to_end as script
import end_to_end_gguf as gguf_file
import pytest
import torch

from slab_kernels import SlabLinear
from slab_kernels.testing import oracle

TINY = script.Shapes(64, 128, 2, 4, 2, 96, steps=2, prompt=4)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_contestant_of_a_tiny_model(monkeypatch, tmp_path, capsys, dtype):
    monkeypatch.setattr(script, "SMOKE", TINY)
    monkeypatch.setattr(gguf_file, "missing", lambda: "not here")
    out = tmp_path / "new" / "speed.json"
    words = ["--smoke", "--threads", "1", "--dtype", dtype, "--out", str(out)]
    assert script.main(words) == 0
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    record = json.loads(out.read_text())
    assert record["absent"] == {"llama.cpp": "not here"} and record["commit"] and record["device"]
    assert record["shapes"]["vocabulary"] == 96
    found = [
        (r["backend"], r["head"], r["activations"], r["threads"], r["what"], r["batch"])
        for r in record["rows"]
    ]
    models = [("dense", "dense", "exact")]
    models += [("slab", head, mode) for head in ("dense", "packed") for mode in ("exact", "int8")]
    timed = [("decode", 1), ("decode", 8), ("prompt", 1)]
    assert found == [(*m, 1, *what) for m in models for what in timed]
    assert all(row["tokens_per_second"] > 0 for row in record["rows"])
    assert record["rows"][0]["values"] == dtype and record["rows"][-1]["values"] == "int4"
    sizes = {(r["backend"], r["head"]): r["weight_bytes"] for r in record["rows"]}
    assert sizes["dense", "dense"] > sizes["slab", "dense"]
    assert "without llama.cpp: not here" in capsys.readouterr().err


def test_a_packed_model_runs_its_own_weights_in_the_mode_asked_for():
    bf16 = script.DTYPES["bf16"]
    model = script.packed_model(TINY, "packed", bf16)
    assert not model.config.tie_word_embeddings and isinstance(model.lm_head, SlabLinear)
    layers = [m for m in model.modules() if isinstance(m, SlabLinear)]
    assert len(layers) == 2 * 7 + 1
    assert len({layer.values.data_ptr() for layer in layers}) == len(layers), "memory of their own"
    script.prepare(model, bf16, activations="int8")
    assert all("int8" in repr(layer) for layer in layers)
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    exact, size = oracle(x, model.lm_head.packed())
    assert bool(((model.lm_head(x).double() - exact).abs() <= 0.05 * size).all())
    tied = script.packed_model(TINY, "dense", bf16)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_a_weight_of_repeated_rows_is_a_legal_one(monkeypatch):
    monkeypatch.setattr(script, "SLICE", 20)
    packed = script.tall(48, 32)
    dense = packed.dense()
    assert dense.shape == (48, 32) and torch.equal(dense[:16], dense[16:32])


@pytest.mark.parametrize("wrong", [["--threads", "0"], ["--threads", "many"]])
def test_bad_arguments(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(wrong)
    assert stopped.value.code == 2 and "is not a positive number" in capsys.readouterr().err


class Writer:
    """The package gguf's writer, which notes what it is given."""

    def __init__(self, path, kind):
        self.path, self.tensors, self.numbers = path, {}, {}
        Writer.last = self

    def add_tensor(self, name, array, raw_dtype=None):
        self.tensors[name] = (array, raw_dtype)

    def __getattr__(self, name):
        def call(*given):
            self.numbers[name] = given
            if name == "write_tensors_to_file":
                self.path.write_bytes(b"GGUF")

        return call


class Library:
    """llama.cpp's functions, which count what is asked of them."""

    def __init__(self, logit=1.0):
        self.calls, self.threads, self.live, self.logit = [], [], 0, logit

    def llama_log_callback(self, function):
        return function

    def llama_model_default_params(self):
        return types.SimpleNamespace()

    llama_context_default_params = llama_model_default_params

    def llama_model_load_from_file(self, path, settings):
        self.live += 1
        return 1

    def llama_init_from_model(self, model, settings):
        assert settings.n_ctx >= settings.n_seq_max * (TINY.steps + 1)
        assert settings.n_batch == settings.n_ubatch >= TINY.prompt
        assert settings.n_threads == settings.n_threads_batch
        self.threads.append(settings.n_threads)
        self.live += 1
        return 2

    def llama_batch_init(self, tokens, embedding, texts):
        lists = {name: [0] * tokens for name in ("token", "pos", "n_seq_id", "logits")}
        return types.SimpleNamespace(n_tokens=0, seq_id=[[0] for _ in range(tokens)], **lists)

    def llama_decode(self, context, batch):
        count = batch.n_tokens
        texts = [one[0] for one in batch.seq_id[:count]]
        self.calls.append((list(zip(texts, batch.pos, strict=False)), sum(batch.logits[:count])))
        return 0

    def llama_get_logits_ith(self, context, which):
        return [self.logit]

    def llama_free(self, _):
        self.live -= 1

    llama_model_free = llama_free

    def __getattr__(self, name):
        assert name.startswith("llama_")
        return lambda *given: None


def stand_in(monkeypatch, library: Library) -> None:
    monkeypatch.setattr(gguf_file, "missing", lambda: None)
    kinds = types.SimpleNamespace(Q4_0="Q4_0", Q6_K="Q6_K")
    module = types.SimpleNamespace(GGUFWriter=Writer, GGMLQuantizationType=kinds)
    monkeypatch.setitem(sys.modules, "gguf", module)
    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(llama_cpp=library))
    monkeypatch.setattr(script, "contestants", lambda shapes, dtype: ())


def test_llama_cpp_is_given_the_same_shapes_and_threads(monkeypatch):
    shapes = script.Shapes(256, 512, 2, 4, 2, 96, steps=2, prompt=4)
    stand_in(monkeypatch, library := Library())
    rows, absent = script.measure(shapes, [1, 2], "bf16", llama=True)
    assert not absent and library.threads == [1, 2] and library.live == 0
    tensors = Writer.last.tensors
    assert len(tensors) == 2 + 2 * (7 + 2)
    for block in range(2):
        for name, ours in gguf_file.NAMES.items():
            n, k = shapes.linears()[ours]
            array, kind = tensors[f"blk.{block}.{name}.weight"]
            assert kind == "Q4_0" and array.shape == (n, k // 32 * 18)
    assert tensors["token_embd.weight"][0].shape == (96, 256 // 256 * 210)
    assert Writer.last.numbers["add_head_count_kv"] == (2,)
    assert [(r["threads"], r["what"], r["batch"]) for r in rows] == [
        (count, *what) for count in (1, 2) for what in (("decode", 1), ("decode", 8), ("prompt", 1))
    ]
    one, eight = library.calls[:3], library.calls[6:9]
    assert [places for places, _ in one] == [[(0, 0)], [(0, 1)], [(0, 2)]]
    assert [(len(places), answers) for places, answers in eight] == [(8, 8)] * 3
    assert library.calls[12] == ([(0, position) for position in range(4)], 1)


def test_a_llama_cpp_that_fails_is_a_reason(monkeypatch):
    shapes = script.Shapes(256, 512, 1, 4, 2, 96, steps=1, prompt=4)
    stand_in(monkeypatch, library := Library(logit=float("nan")))
    rows, absent = script.measure(shapes, [1], "bf16", llama=True)
    assert not rows and "logits are not finite" in absent["llama.cpp"] and library.live == 0
