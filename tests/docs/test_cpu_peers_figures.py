"""benchmarks/figure_cpu_peers.py: the tables of ours beside other libraries on a CPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import bench_linear
import figure_cpu_peers as figure
import figure_tables
import pytest

TOKENS = (1, 4, 16)
# contestant -> bits, and its speed-up with one thread and two, by token count
SPEEDS = {
    ("dense", "", "exact"): (16.0, [(1.0, 1.0)] * 3),
    ("cpu", "fp16", "exact"): (9.51, [(1.5, 1.4), (1.2, 1.1), (1.1, 1.05)]),
    ("cpu", "int4", "exact"): (3.63, [(3.004, 2.5), (2.0, 1.9), (1.5, 1.4)]),
    ("cpu", "int4", "int8"): (3.63, [(5.0, 4.0), (3.0, 2.9), (2.2, 2.1)]),
    ("openvino", "u4", "int8"): (4.125, [(4.0, 4.5), (4.1, 4.0), (2.2, 2.0)]),
    ("ggml-q4_K", "q4_K", "int8"): (4.5, [(7.125, 3.0), (1.9, 1.5), (1.0, 0.9)]),
}


def linear(threads: int, dtype: str = "bf16") -> dict:
    rows = [
        {
            "n": n, "k": k, "m": m, "backend": backend, "values": values, "threads": threads,
            "dtype": dtype, "activations": activations, "bits_per_weight": bits,
            "speedup_vs_dense": speeds[at][threads - 1],
        }
        for n, k in figure.SHAPES
        for at, m in enumerate(TOKENS)
        for (backend, values, activations), (bits, speeds) in SPEEDS.items()
    ]  # fmt: skip
    return {"rows": rows}


def whole() -> dict:
    lines = {
        ("dense", "bf16", "exact", "dense"): 4.0,
        ("slab", "int4", "exact", "dense"): 11.0,
        ("slab", "int4", "int8", "packed"): 20.0,
        ("llama.cpp", "Q4_0", "int8", "q6_K"): 25.64,
    }
    what = (("decode", 1, 24), ("decode", 8, 24), ("prompt", 1, 512))
    rows = [
        {
            "backend": backend, "values": values, "activations": activations, "head": head,
            "threads": threads, "what": kind, "batch": batch, "tokens": tokens,
            "tokens_per_second": rate * threads * batch,
        }
        for (backend, values, activations, head), rate in lines.items()
        for threads in (1, 2)
        for kind, batch, tokens in what
    ]  # fmt: skip
    return {"rows": rows}


@pytest.fixture
def results(monkeypatch, tmp_path):
    """A folder of results, which the tables read."""
    monkeypatch.setattr(figure_tables, "RESULTS", tmp_path)
    figure_tables.read.cache_clear()
    yield tmp_path
    figure_tables.read.cache_clear()


@pytest.fixture
def measured(results):
    for threads, name in figure.LINEARS.items():
        (results / name).write_text(json.dumps(linear(threads)), encoding="utf-8")
    (results / figure.WHOLE).write_text(json.dumps(whole()), encoding="utf-8")


def test_a_table_is_there_with_its_files(results):
    assert figure.tables() == {}
    (results / figure.LINEARS[1]).write_text(json.dumps(linear(1)), encoding="utf-8")
    assert figure.tables() == {}, "both numbers of threads are needed"
    (results / figure.LINEARS[2]).write_text(json.dumps(linear(2)), encoding="utf-8")
    linears = {"cpu-peers-11008x4096", "cpu-peers-4096x4096", "cpu-peers-best"}
    assert set(figure.tables()) == linears
    (results / figure.WHOLE).write_text(json.dumps(whole()), encoding="utf-8")
    assert set(figure.tables()) == linears | {"end-to-end-cpu"}


def test_machines_without_bf16_have_tables_of_their_own(results):
    for threads, name in figure.AVX2_LINEARS.items():
        (results / name).write_text(json.dumps(linear(threads, "fp32")), encoding="utf-8")
    tables = figure.tables()
    assert set(tables) == {"cpu-avx2", "cpu-avx2-best"}
    assert tables["cpu-avx2"]().splitlines()[2].startswith("| torch fp32 | 16.00 | 1.00 / 1.00 |")
    assert tables["cpu-avx2-best"]().splitlines()[7].startswith("| 2 | 16 | 1.40× | 2.10× |")
    for threads, name in figure.ZEN1_LINEARS.items():
        (results / name).write_text(json.dumps(linear(threads, "fp32")), encoding="utf-8")
    for threads, name in figure.AVX2_MANY.items():
        (results / name).write_text(json.dumps(linear(threads, "fp32")), encoding="utf-8")
    assert set(figure.tables()) == {*tables, "cpu-zen1", "cpu-avx2-many"}
    (results / figure.AVX2_WHOLE).write_text(json.dumps(whole()), encoding="utf-8")
    assert set(figure.tables()) == {*tables, "cpu-zen1", "cpu-avx2-many", "end-to-end-avx2"}


def test_speed_ups_by_format_with_the_best_of_a_column_bold(measured):
    lines = figure.tables()["cpu-peers-11008x4096"]().splitlines()
    assert lines[0] == "| format | bits | M = 1 | M = 4 | M = 16 |"
    assert lines[2] == "| torch bf16 | 16.00 | 1.00 / 1.00 | 1.00 / 1.00 | 1.00 / 1.00 |"
    assert lines[4] == "| ours, int4 | 3.63 | 3.00 / 2.50 | 2.00 / 1.90 | 1.50 / 1.40 |"
    assert lines[5] == (
        "| ours, int4, int8 activations | 3.63 | 5.00 / 4.00 | 3.00 / 2.90 | **2.20** / **2.10** |"
    )
    assert lines[6] == (
        "| OpenVINO u4 | 4.13 | 4.00 / **4.50** | **4.10** / **4.00** | **2.20** / 2.00 |"
    )
    assert lines[7] == "| llama.cpp q4_K | 4.50 | **7.13** / 3.00 | 1.90 / 1.50 | 1.00 / 0.90 |"
    assert len(lines) == 8


def test_a_contestant_that_was_not_timed_with_some_threads_has_a_dash(results, measured):
    less = linear(2)
    less["rows"] = [r for r in less["rows"] if (r["backend"], r["m"]) != ("openvino", 4)]
    (results / figure.LINEARS[2]).write_text(json.dumps(less), encoding="utf-8")
    assert "| **4.10** / – |" in figure.tables()["cpu-peers-11008x4096"]()


def test_the_best_other_library_is_named(results, measured):
    lines = figure.tables()["cpu-peers-best"]().splitlines()
    assert lines[2] == "| 1 | 1 | 3.00× | 5.00× | 7.13× | llama.cpp q4_K, 4.50 bits | 0.70 |"
    assert lines[7] == "| 2 | 16 | 1.40× | 2.10× | 2.00× | OpenVINO u4, 4.13 bits | 1.05 |"
    alone = linear(1)
    alone["rows"] = [row for row in alone["rows"] if row["backend"] in ("dense", "cpu")]
    figure_tables.read.cache_clear()
    (results / figure.LINEARS[1]).write_text(json.dumps(alone), encoding="utf-8")
    with pytest.raises(ValueError, match="no peer was timed at M = 1 with 1 threads"):
        figure.tables()["cpu-peers-best"]()


def test_tokens_a_second_of_whole_models(measured):
    lines = figure.tables()["end-to-end-cpu"]().splitlines()
    assert lines[0] == "| model | decoding, 1 at once | decoding, 8 at once | prompt of 512 |"
    assert lines[2] == "| transformers, bf16 | 4.0 / 8.0 | 32.0 / 64.0 | 4.0 / 8.0 |"
    assert lines[4].startswith("| ours, int4, packed head, int8 activations | 20.0 / 40.0 |")
    assert lines[5].startswith("| llama.cpp, Q4_0 | **25.6** / **51.3** |")


def test_the_script_writes_the_files_that_the_tables_read():
    text = (Path(bench_linear.__file__).parent / "on_cpu.sh").read_text(encoding="utf-8")
    words = " ".join(text.replace("\\\n", " ").split())
    always = re.search(r"bench_linear.py (--device .*?) --seconds", words)[1].split()
    machines = re.findall(r"how=\((.*?)\)(.*?)(?=\bhow=|$)", words)
    expected = (
        (figure.SHAPES, "bf16", figure.LINEARS),
        (figure.SHAPES[:1], "fp32", figure.AVX2_LINEARS),
    )
    for (own, runs), (shapes, dtype, files) in zip(machines, expected, strict=True):
        args = bench_linear.parse([*always, *own.split()])
        assert tuple(args.shapes) == shapes and tuple(args.activations) == ("exact", "int8")
        assert args.peers and args.dtype == [dtype]
        found = re.findall(r"linear (\d) (\S+)", runs)
        assert {int(threads): f"{name}.json" for threads, name in found} == files
    assert 'for threads in 1 2; do linear "$threads" "cpu-avx2-many-$threads"' in words
    assert {f"cpu-avx2-many-{n}.json" for n in (1, 2)} == set(figure.AVX2_MANY.values())
    assert f'--threads 1 2 --out "$new/{figure.WHOLE}"' in words
    assert f'--threads 1 2 --dtype fp32 --out "$new/{figure.AVX2_WHOLE}"' in words
