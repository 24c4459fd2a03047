"""The report: what it reads, how it merges, what it draws, and that the page stands alone."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.text import Text

from slab_kernels.cli import main as cli
from slab_kernels.errors import ReportError
from slab_kernels.report import figures, page, speed, stacks, style, tables
from slab_kernels.report.headline import headline, key_numbers, title
from slab_kernels.report.measurements import read
from slab_kernels.report.results import Report, Result
from slab_kernels.report.write import pictures, rows, write

PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
BENCH = [
    {
        "backend": "dense",
        "m": 1,
        "n": 64,
        "k": 32,
        "values": None,
        "dtype": "bf16",
        "median_us": 10.0,
        "speedup_vs_dense": 1.0,
        "gbytes_per_s": 4.0,
    },
    {
        "backend": "cpu",
        "m": 1,
        "n": 64,
        "k": 32,
        "values": "int4",
        "dtype": "bf16",
        "median_us": 4.0,
        "speedup_vs_dense": 2.5,
        "gbytes_per_s": 3.0,
    },
]


def record(method: str, error: float, blocks: int = 2, heldout: float | None = None) -> dict:
    layers = [
        {
            "name": f"model.layers.{b}.{p}",
            "block": b,
            "shape": [8, 16 * (1 + b)],
            "method": method,
            "pattern": "2:4",
            "rank": 1,
            "values": "fp16",
            "bits_per_weight": 9.5 + b,
            "error": error * (1 + b),
            "heldout_error": heldout,
            "seconds": 0.1,
        }
        for b in range(blocks)
        for p in PROJECTIONS
    ]
    settings = {"method": method, "pattern": "2:4", "rank": 1, "values": "fp16"}
    return {"model": "tiny", "settings": settings, "stored": "packed", "layers": layers}


@pytest.fixture
def runs(tmp_path):
    for method, error in (("magnitude", 0.3), ("slab-paper", 0.2), ("slab", 0.05)):
        (tmp_path / "runs" / method).mkdir(parents=True)
        (tmp_path / "runs" / method / "slab_run.json").write_text(json.dumps(record(method, error)))
    return tmp_path / "runs"


def test_bits_are_weighted_by_layer_size(runs):
    slab = next(r for r in read([runs]).results if r.method == "slab")
    assert slab.bits_per_weight == pytest.approx((9.5 * 16 + 10.5 * 32) / 48)
    assert slab.layer_error == pytest.approx(0.05 * 1.5)


def test_record_and_evaluation_of_one_folder_are_one_row(runs, tmp_path):
    evaluation = {
        "folder": str(runs / "slab"),
        "method": "slab",
        "perplexity": 6.25,
        "bits_per_weight": 9.9,
        "tokens": 5,
    }
    (tmp_path / "eval.json").write_text(json.dumps(evaluation))
    found = read([runs, tmp_path / "eval.json"])
    (slab,) = [r for r in found.results if r.method == "slab"]
    assert slab.perplexity == 6.25 and slab.errors and slab.pattern == "2:4"
    assert len(found.results) == 3


def test_heldout_errors_win_over_calibration_errors(tmp_path):
    (tmp_path / "slab_run.json").write_text(json.dumps(record("slab", 0.05, heldout=0.08)))
    (only,) = read([tmp_path]).results
    assert only.heldout and only.layer_error == pytest.approx(0.08)


def test_the_table_says_of_what_its_errors_are(tmp_path):
    (tmp_path / "slab_run.json").write_text(json.dumps(record("slab", 0.05, heldout=0.08)))
    found = read([tmp_path])
    assert "mean layer output error, held out" in tables.columns(found)
    assert "0.0800" in tables.table(found)[0]
    (tmp_path / "slab_run.json").write_text(json.dumps(record("slab", 0.05)))
    assert "mean layer output error" in tables.columns(read([tmp_path]))


AGAINST = {
    "folder": "/models/slab",
    "against": "/models/dense",
    "method": "slab",
    "perplexity": 5.1,
    "dense_perplexity": 5.0,
    "kl": 0.03534,
    "kl_p99": 0.4123,
    "top1": 0.9213,
    "perplexity_ratio": 1.02,
    "perplexity_ratio_stderr": 0.0031,
    "bytes": 1_000_000,
    "parameters": 2_000_000,
    "bits_per_parameter": 4.0,
    "packed_bytes": 700_000,
    "packed_head_bytes": 100_000,
    "dense_bytes": {"embeddings": 290_000, "norms": 10_000},
}


def test_a_comparison_with_the_dense_model_is_told_everywhere(tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps(AGAINST))
    found = read([tmp_path / "eval.json"])
    dense, slab = found.results
    assert dense.perplexity == 5.0 and dense.is_dense and dense.folder.endswith("dense")
    assert slab.kl == 0.03534 and slab.stored == {
        "packed linears": 600_000,
        "packed head": 100_000,
        "embeddings": 290_000,
        "norms": 10_000,
    }
    first, second = headline(found)
    assert "loses 2 ± 0.3 % of perplexity (5.00 → 5.10)" in first
    assert second == (
        "Its predictions lie 0.0353 nats (KL) from the dense model's per token, 0.412 at the 99th "
        "percentile; the most probable token is the same for 92.1% of them."
    )
    numbers = {number.name: number.value for number in key_numbers(found)}
    assert numbers["KL to dense, nats per token"] == "0.0353"
    assert numbers["Same most probable token"] == "92.1%"
    assert numbers["Bits per parameter, whole folder"] == "4.00"
    names, row = tables.columns(found), tables.table(found)[1]
    shown = dict(zip(names, row, strict=True))
    assert shown["perplexity ratio"] == "1.0200" and shown["its standard error"] == "0.0031"
    assert shown["KL to dense, nats"] == "0.03534" and shown["KL, 99th percentile"] == "0.4123"
    assert shown["same top token"] == "92.13%"
    assert {p.stem for p in pictures(found)} == {"folder-parts"}
    html = write(found, tmp_path / "out")[-1].read_text()
    assert "0.0353 nats (KL)" in html and "What the whole folder stores" in html


def test_a_loss_within_its_standard_error_is_none():
    known = {"perplexity": 5.01, "perplexity_ratio": 1.002, "perplexity_ratio_stderr": 0.003}
    model = Result("slab", label="slab", bits_per_weight=4.0, **known)
    assert (
        "keeps its perplexity within the standard error of 0.3 % (5.00 → 5.01)"
        in (headline(Report((model,)))[0])
    )


def step(batch: int, seconds: float) -> dict:
    split = {"linears": 0.5, "head": 0.2, "attention": 0.1, "modules": 0.05, "overhead": 0.15}
    return {
        "batch": batch,
        "seconds_per_step": seconds,
        "tokens_per_second": batch / seconds,
        "split": split,
    }


def test_two_models_that_write_stand_side_by_side(tmp_path):
    rows_ = [
        {"method": m, "folder": f"/models/{m}", "continuation": f" as {m} writes",
         "tokens_per_second": 1 / s, "decoding": [step(1, s), step(8, 2 * s)]}
        for m, s in (("dense", 0.02), ("slab", 0.01))
    ]  # fmt: skip
    content = {"prompt": "Once", "text": "", "results": rows_}
    (tmp_path / "beside.json").write_text(json.dumps(content))
    found = read([tmp_path / "beside.json"])
    assert found.prompt == "Once"
    assert {p.stem for p in pictures(found)} == {"decode-step", "speed-model"}
    (ax,) = stacks.decode_steps(found.results, style.LIGHT).axes
    ends = sorted({round(bar.get_x() + bar.get_width(), 6) for bar in ax.patches})
    assert ends[-1] == 40 and {10.0, 20.0} <= set(ends) and len(ax.patches) == 5 * 4
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "dense, 1 text",
        "slab, 1 text",
        "dense, 8 texts",
        "slab, 8 texts",
    ]
    html = write(found, tmp_path / "out")[-1].read_text()
    assert html.index("as dense writes") < html.index("as slab writes")
    assert "2.00× as fast" in html


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl": "much"}, "kl='much'"),
        ({"dense_bytes": 3}, "dense_bytes=3"),
        ({"dense_bytes": {"norms": "9"}}, "norms='9'"),
        ({"decoding": 3}, "decoding=3"),
        ({"decoding": [{"split": {}}]}, "batch=None"),
        ({"decoding": [step(1, 0.1) | {"split": {"head": None}}]}, "head=None"),
        ({"dense_perplexity": "x"}, "dense_perplexity='x'"),
    ],
)
def test_damaged_comparisons_are_named(changes, message, tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps(AGAINST | changes))
    with pytest.raises(ReportError, match=message):
        read([tmp_path / "eval.json"])


DENSE = Result("dense", bits_per_weight=16.0, perplexity=5.0, label="dense", bytes=4_100_000)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {},
            "This model is 4.1× smaller (1.0 MB instead of 4.1 MB, embeddings included), "
            "and loses 1 % of perplexity (5.00 → 5.05).",
        ),
        (
            {"bytes": None},
            "This model is 2.0× smaller in its compressed linears (8.00 instead of 16 bits per "
            "weight), and loses 1 % of perplexity",
        ),
        ({"bytes": 8_200_000}, "This model is 2.0× larger (8.2 MB instead of 4.1 MB"),
        ({"bytes": 4_100_000}, "This model is as large as the dense one (4.1 MB"),
        (
            {"perplexity": None},
            "and its loss of perplexity against the dense model was not measured.",
        ),
        ({"perplexity": 4.9}, "and gains 2 % of perplexity (5.00 → 4.90)."),
        ({"perplexity": 50.0}, "and its perplexity is 10.0× as high (5.00 → 50.00)."),
        ({"perplexity": 5.0}, "and keeps its perplexity"),
    ],
)
def test_the_headline_says_what_the_data_says(changes, sentence):
    known = {"bits_per_weight": 8.0, "perplexity": 5.05, "bytes": 1_000_000}
    model = Result("slab", label="slab", **(known | changes))
    assert sentence in headline(Report((DENSE, model)))[0]


def test_a_model_alone_promises_nothing_that_was_not_measured():
    (sentence,) = headline(Report((Result("slab", bits_per_weight=8.0, label="slab"),)))
    assert sentence == (
        "This model stores 8.00 bits per weight of its compressed linears, and its loss of "
        "perplexity against the dense model was not measured."
    )


def test_a_dense_model_alone_is_compared_with_nothing():
    found = Report((DENSE,))
    assert headline(found) == ["Only a dense model was measured; nothing is compared with it."]
    assert title(found) == "Compression report"


def test_the_headline_tells_slower_generation_too():
    dense = Result("dense", tokens_per_second=10.0, label="dense")
    for speed_, said in ((5.0, "more slowly here, at 0.50× the speed"), (20.0, "2.00× as fast")):
        model = Result("slab", tokens_per_second=speed_, label="slab")
        assert said in headline(Report((dense, model)))[1]


def test_headline_states_the_closed_gap():
    measured = [("dense", 5.0), ("slab-paper", 10.0), ("slab", 6.0)]
    found = Report(tuple(Result(m, perplexity=p, label=m) for m, p in measured))
    assert headline(found)[-1].startswith("80% of the perplexity gap")


def test_a_benchmark_is_called_one(tmp_path):
    (tmp_path / "linears.json").write_text(json.dumps({"device": "two cores", "rows": BENCH}))
    found = read([tmp_path / "linears.json"])
    assert title(found) == "Benchmark report: linears"
    (sentence,) = headline(found)
    assert sentence == (
        "With one token at a time, our compressed linears outrun torch's dense one: "
        "2.50× its speed."
    )
    slow = [BENCH[0], BENCH[1] | {"speedup_vs_dense": 0.5}]
    assert "are slower than torch's dense one" in headline(Report(bench=tuple(slow)))[0]
    assert title(Report((Result("slab"),))) == "Compression report"


def test_same_method_twice_gets_two_labels(tmp_path):
    rows = [{"method": "slab", "values": v, "rank": r} for v in ("fp16", "int4") for r in (1, 2)]
    (tmp_path / "results.json").write_text(json.dumps({"results": rows}))
    labels = [r.label for r in read([tmp_path]).results]
    assert labels == [
        "slab fp16 rank 1",
        "slab fp16 rank 2",
        "slab int4 rank 1",
        "slab int4 rank 2",
    ]


def test_a_label_says_nothing_of_settings_that_are_unknown(tmp_path):
    """The JSON of eval alone names neither pattern nor rank."""
    rows = [{"method": "slab", "values": "int4", "rank": 1}, {"method": "slab", "perplexity": 5.0}]
    (tmp_path / "results.json").write_text(json.dumps({"results": rows}))
    assert [r.label for r in read([tmp_path]).results] == ["slab int4 rank 1", "slab"]


def test_rows_read_back_as_written(runs, tmp_path):
    found = read([runs])
    (tmp_path / "again.json").write_text(json.dumps({"results": rows(found)}))
    assert read([tmp_path / "again.json"]).results == found.results


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "not readable JSON"),
        ("[1]", "not an object"),
        ('{"a": 1}', "none of the kinds"),
        (None, "does not exist"),
    ],
)
def test_bad_paths_are_named(tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ReportError, match=message):
        read([path])
    with pytest.raises(ReportError, match="does not exist"):
        read([tmp_path / "nowhere"])


RESULTS = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda path: path.stem)
def test_every_results_file_of_the_repository_opens(file, tmp_path, capsys):
    data = json.loads(file.read_text())
    assert cli.run(["report", str(file), "--no-plots", "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = data.get("results") or data.get("rows") or data.get("kernels") or []
    shown = [
        len(found["results"]),
        len(found["bench"]),
        *(len(table["rows"]) for table in found["tables"]),
    ]
    assert len(rows) + ("dense" in data) in shown or (
        any(len(table["rows"]) for table in found["tables"]) and not rows
    )
    assert cli.run(["report", str(file), "--no-plots", "--out", str(tmp_path)]) == 0
    assert (
        "<table" in (tmp_path / "report.html").read_text()
        and "report it" not in capsys.readouterr().err
    )


def test_a_method_of_several_formats_is_not_compared_as_if_it_had_one(tmp_path):
    rows = [
        {"label": f"{m} {b}", "settings": {"method": m}, "perplexity": p, "bits_per_weight": b}
        for m, p, b in (("slab", 6.0, 9.5), ("slab", 8.0, 3.5), ("slab-paper", 10.0, 3.5))
    ]
    (tmp_path / "methods.json").write_text(
        json.dumps({"rows": rows, "dense": 5.0, "machine": "two cores"})
    )
    found = read([tmp_path / "methods.json"])
    assert [r.label for r in found.results] == [
        "dense",
        "slab 9.5",
        "slab 3.5",
        "slab-paper 3.5",
    ] and found.notes == ("two cores",)
    assert headline(found) == [
        "Of 3 settings of 2 methods, the lowest perplexity is that of slab 9.5, 6.00 at 9.50 bits "
        "per weight; dense 5.00.",
        "The fewest bits are those of slab 3.5, 8.00 at 3.50 bits per weight.",
    ]
    assert title(found) == "Benchmark report: methods"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"rows": [{"backend": "cpu", "median_us": 3}]},
            "timing row 1 of .* has n=None, expected an integer",
        ),
        ({"rows": [BENCH[0], BENCH[1] | {"m": "1"}]}, "timing row 2 of .* has m='1'"),
        ({"rows": 3}, "no list of objects: 3"),
        ({"rows": [BENCH[0] | {"median_us": 10**400}]}, "has median_us=1000"),
        ({"results": [{"method": "x", "perplexity": "6"}]}, "perplexity='6'"),
        ({"results": [{"method": "x", "errors": [1]}]}, "row 1 of .* has errors=.1., expected"),
        ({"layers": [3]}, "layer 1 of .* is 3"),
        ({"layers": [{"shape": [8, 8], "name": "x"}]}, "layer 1 of .* has bits_per_weight=None"),
        ({"perplexity": []}, r"has perplexity=\[\]"),
        ({"device": "\ud800"}, "not readable JSON"),
    ],
)
def test_a_damaged_file_is_named_with_the_row(tmp_path, data, message):
    (tmp_path / "x.json").write_text(json.dumps(data))
    with pytest.raises(ReportError, match=message):
        read([tmp_path / "x.json"])


def test_folder_without_record_is_refused(tmp_path):
    with pytest.raises(ReportError, match="holds no slab_run"):
        read([tmp_path])


def test_a_page_of_somebody_else_is_not_overwritten(runs, tmp_path, capsys):
    other = tmp_path / "report.html"
    other.write_text("<html>my own</html>")
    with pytest.raises(ReportError, match=r"report.html was not written by slab_kernels"):
        write(read([runs]), tmp_path, plots=False)
    assert cli.run(["report", str(runs), "--out", str(tmp_path), "--no-plots"]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.glob("*.*")] == ["report.html"]
    assert other.read_text() == "<html>my own</html>"
    other.unlink()
    for _ in range(2):  # The second time it replaces its own page.
        assert write(read([runs]), tmp_path, plots=False) == [other]


def test_writes_pictures_and_a_page_that_stands_alone(runs, tmp_path):
    rows = [
        {
            "method": m,
            "perplexity": p,
            "bits_per_weight": b,
            "tokens_per_second": 9.0,
            "folder": str(runs / m),
        }
        for m, p, b in (("magnitude", 40.0, 9.0), ("slab-paper", 10.0, 9.6), ("slab", 6.0, 9.6))
    ]
    rows.append(
        {"method": "dense", "perplexity": 5.0, "bits_per_weight": 16.0, "tokens_per_second": 12.0}
    )
    file = tmp_path / "results.json"
    file.write_text(
        json.dumps(
            {"model": "<b>tiny</b>", "results": rows, "bench": BENCH, "notes": ["two cores"]}
        )
    )
    written = write(read([runs, file]), tmp_path / "out")
    assert [p.name for p in written] == [
        "perplexity-by-bits.png",
        "error-by-layer.png",
        "speed-layers.png",
        "speed-model.png",
        "report.html",
    ]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written[:-1])
    html = written[-1].read_text()
    assert "<b>tiny</b>" not in html and "&lt;b&gt;tiny" in html
    assert html.count("data:image/png;base64,") == 8  # light and dark
    outside = r"(?:src|srcset|href)=[\"'](?!data:)|https?://|<script|@import|url\("
    assert not re.search(outside, html)
    assert "name=viewport" in html and "prefers-color-scheme: dark" in html


SPEEDS = [
    Result("dense", tokens_per_second=3.0, label="dense"),
    Result("slab", tokens_per_second=2.9, label="slab"),
]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: speed.layer_speed(BENCH, style.DARK),
        lambda: speed.model_speed(SPEEDS, style.LIGHT),
    ],
)
def test_bars_start_at_zero_and_none_is_cut(draw):
    (ax,) = draw().axes
    low, high = ax.get_xlim()
    assert low == 0 and all(bar.get_width() <= high and bar.get_x() == 0 for bar in ax.patches)


def test_many_methods_all_look_different():
    methods = [*style.STYLES, *"abcdefghij"]
    chosen = style.styles([(method, method) for method in methods for _ in range(3)])
    assert len(set(chosen.values())) == len(methods) == len(chosen)


def test_labels_of_close_points_do_not_cover_each_other():
    points = [
        Result(m, bits_per_weight=9.5, perplexity=6 + 0.001 * i, label=m)
        for i, m in enumerate(style.STYLES)
    ]
    fig = figures.perplexity_by_bits(points, Result("dense", perplexity=5.9), style.LIGHT)
    fig.draw_without_rendering()
    boxes = [
        Text.get_window_extent(t) for t in fig.axes[0].texts if not t.get_text().startswith("dense")
    ]  # without leader lines
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_equal_data_gives_equal_pictures(runs):
    found = read([runs])
    (picture,) = [p for p in pictures(found) if p.stem == "error-by-layer"]
    assert style.png(picture.draw(style.LIGHT)) == style.png(picture.draw(style.LIGHT))


def test_page_without_anything_measured_is_still_a_page():
    empty = page.Page("Report", "", ["Nothing."], [], "", [], [], [], [], [], [])
    assert "<table" not in page.html(empty) and "Nothing." in page.html(empty)


def crop(*names: str) -> dict:
    """A corner of 2×3 entries whose parts hold the levels 0 to 5."""
    levels = base64.b64encode(bytes(range(6))).decode()
    return {"layer": "a.0.b", "shape": [2, 3], "step": 0.5, "parts": dict.fromkeys(names, levels)}


def test_a_whole_page_shows_everything_that_the_results_hold(tmp_path):
    parts = {"m.0.q": {"values": 8.0, "signs": 0.5}, "m.1.q": {"values": 4.0, "scales": 0.1}}
    results = [
        {"method": "dense", "perplexity": 5.0, "bytes": 4_100_000, "continuation": " <dense> text"},
        {
            "method": "slab",
            "perplexity": 5.1,
            "bytes": 1_000_000,
            "continuation": " compressed text",
            "parts": parts,
            "crop": crop("weight", "sparse", "signs", "left"),
        },
        {"method": "wanda", "perplexity": 9.0, "continuation": " other text"},
    ]
    run = {"date": "2030-01-02T03:04", "command": "make demo", "seconds": 61.4}
    content = {"model": "tiny", "prompt": "Once", "results": results, "bench": BENCH, "run": run}
    (tmp_path / "results.json").write_text(json.dumps(content))
    found = read([tmp_path / "results.json"])
    assert {p.stem for p in pictures(found)} == {"bits-by-layer", "heat-maps", "speed-layers"}
    html = write(found, tmp_path / "out")[-1].read_text()
    for text in (
        "Compressed with slab, this model is 4.1× smaller",
        "<span class=prompt>Once</span> &lt;dense&gt; text",
        "<span class=prompt>Once</span> compressed text",
        "make demo",
        "2030-01-02T03:04",
        "61 s",
        "1.00",
        "embeddings included",
    ):
        assert text in html, text
    assert html.index("other text") > html.index("<details>"), "more than two are folded"
    (link,) = re.findall(
        r'<a download="results.json" href="data:application/json;base64,([^"]+)"', html
    )
    assert json.loads(base64.b64decode(link)) == content


def test_speed_stands_before_any_table_and_long_tables_are_folded(tmp_path):
    bench = [
        row
        | {
            "m": m,
            "measured_gbytes_per_s": 40.0,
            "measured_tflops": 2.0,
            "tflops": 0.1,
            "weight_bytes": 999,
        }
        for m in (1, 4, 16, 64, 128, 256, 512)
        for row in BENCH
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"rows": bench}))
    html = write(read([tmp_path / "bench.json"]), tmp_path / "out")[-1].read_text()
    order = [html.index(text) for text in ("Speed-up against", "Roofline", "<details>", "<table")]
    assert order == sorted(order) and "14 rows" in html


@pytest.mark.parametrize(
    "damage",
    [
        {"shape": [2, 2]},
        {"shape": "x"},
        {"step": "much"},
        {"step": -1},
        {"parts": {"sparse": ""}},
        {"parts": {"weight": "%%%"}},
        {"parts": 3},
        {"layer": None},
    ],
)
def test_a_damaged_corner_of_a_weight_is_named(damage, tmp_path):
    content = {"results": [{"method": "slab", "crop": crop("weight") | damage}]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ReportError, match="row 1 of .* which is no corner of a weight"):
        read([tmp_path / "x.json"])


def test_stored_parts_that_are_no_numbers_are_named(tmp_path):
    for parts, message in (
        (3, "expected numbers by layer"),
        ({"a": {"values": "8"}}, "values='8'"),
    ):
        (tmp_path / "x.json").write_text(json.dumps({"results": [{"method": "s", "parts": parts}]}))
        with pytest.raises(ReportError, match=message):
            read([tmp_path / "x.json"])


def test_the_stacked_bars_add_up():
    parts = {f"m.{i}.q": {"values": 8.0, "metadata": 1.0, "adapters": 0.25} for i in range(3)}
    (ax,) = figures.bits_by_layer(Result("slab", label="slab", parts=parts), style.LIGHT).axes
    assert max(bar.get_y() + bar.get_height() for bar in ax.patches) == pytest.approx(9.25)
    assert len(ax.patches) == 9 and ax.get_ylim()[0] == 0


def test_the_roofline_is_what_the_machine_reached():
    ceilings = {"measured_gbytes_per_s": 1000.0, "measured_tflops": 50.0}
    timed = [row | ceilings | {"tflops": 1.0, "weight_bytes": 1024} for row in BENCH]
    others = [timed[0] | {"dtype": "fp32", "device": "cpu"}, timed[0] | {"weight_bytes": 0}]
    found = speed.with_ceilings([*timed, BENCH[0], *others])
    assert {name: len(rows_) for name, rows_ in found.items()} == {"bf16": 2, "fp32 on cpu": 1}
    (ax,) = speed.roofline(timed, style.DARK).axes
    roof = ax.lines[-1]
    assert roof.get_xdata()[1] == 50.0 and list(roof.get_ydata()[1:]) == [50.0, 50.0]


def test_missing_matplotlib_is_a_sentence(runs, tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from slab_kernels.cli.main import run\n"
        f"sys.exit(run(['report', {str(runs)!r}, '--out', {str(tmp_path / 'r')!r}] + sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 4 and "pip install" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-plots"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "slab-paper" in done.stdout
