"""The report: what it reads, how it merges, what it draws, and that the page stands alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.text import Text

from slab_kernels.cli import main as cli
from slab_kernels.report import figures, page
from slab_kernels.report import tables as report

PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
BENCH = [
    {"backend": "dense", "m": 1, "n": 64, "k": 32, "values": None, "dtype": "bf16", "median_us": 10.0, "speedup_vs_dense": 1.0, "gbytes_per_s": 4.0},
    {"backend": "cpu", "m": 1, "n": 64, "k": 32, "values": "int4", "dtype": "bf16", "median_us": 4.0, "speedup_vs_dense": 2.5, "gbytes_per_s": 3.0},
]  # fmt: skip


def record(method: str, error: float, blocks: int = 2, heldout: float | None = None) -> dict:
    layers = [
        {"name": f"model.layers.{b}.{p}", "block": b, "shape": [8, 16 * (1 + b)], "method": method, "pattern": "2:4", "rank": 1,
         "values": "fp16", "bits_per_weight": 9.5 + b, "error": error * (1 + b), "heldout_error": heldout, "seconds": 0.1}
        for b in range(blocks)
        for p in PROJECTIONS
    ]  # fmt: skip
    settings = {"method": method, "pattern": "2:4", "rank": 1, "values": "fp16"}
    return {"model": "tiny", "settings": settings, "stored": "packed", "layers": layers}


@pytest.fixture
def runs(tmp_path):
    for method, error in (("magnitude", 0.3), ("slab-paper", 0.2), ("slab", 0.05)):
        (tmp_path / "runs" / method).mkdir(parents=True)
        (tmp_path / "runs" / method / "slab_run.json").write_text(json.dumps(record(method, error)))
    return tmp_path / "runs"


def test_bits_are_weighted_by_layer_size(runs):
    slab = next(r for r in report.read([runs]).results if r.method == "slab")
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
    found = report.read([runs, tmp_path / "eval.json"])
    (slab,) = [r for r in found.results if r.method == "slab"]
    assert slab.perplexity == 6.25 and slab.errors and slab.pattern == "2:4"
    assert len(found.results) == 3


def test_heldout_errors_win_over_calibration_errors(tmp_path):
    (tmp_path / "slab_run.json").write_text(json.dumps(record("slab", 0.05, heldout=0.08)))
    (only,) = report.read([tmp_path]).results
    assert only.heldout and only.layer_error == pytest.approx(0.08)


def test_headline_states_the_closed_gap():
    rows = [("dense", 5.0), ("slab-paper", 10.0), ("slab", 6.0)]
    found = report.Report(tuple(report.Result(m, perplexity=p, label=m) for m, p in rows))
    assert report.headline(found).startswith("80% of the perplexity gap")


def test_same_method_twice_gets_two_labels(tmp_path):
    rows = [{"method": "slab", "values": v, "rank": r} for v in ("fp16", "int4") for r in (1, 2)]
    (tmp_path / "results.json").write_text(json.dumps({"results": rows}))
    labels = [r.label for r in report.read([tmp_path]).results]
    assert labels == [
        "slab fp16 rank 1",
        "slab fp16 rank 2",
        "slab int4 rank 1",
        "slab int4 rank 2",
    ]


def test_rows_read_back_as_written(runs, tmp_path):
    found = report.read([runs])
    (tmp_path / "again.json").write_text(json.dumps({"results": report.rows(found)}))
    assert report.read([tmp_path / "again.json"]).results == found.results


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
    with pytest.raises(report.ReportError, match=message):
        report.read([path])
    with pytest.raises(report.ReportError, match="does not exist"):
        report.read([tmp_path / "nowhere"])


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
    rows = [{"label": f"{m} {b}", "settings": {"method": m}, "perplexity": p, "bits_per_weight": b}
            for m, p, b in (("slab", 6.0, 9.5), ("slab", 8.0, 3.5), ("slab-paper", 10.0, 3.5))]  # fmt: skip
    (tmp_path / "methods.json").write_text(
        json.dumps({"rows": rows, "dense": 5.0, "machine": "two cores"})
    )
    found = report.read([tmp_path / "methods.json"])
    assert [r.label for r in found.results] == [
        "dense",
        "slab 9.5",
        "slab 3.5",
        "slab-paper 3.5",
    ] and found.notes == ("two cores",)
    assert report.headline(found).startswith(
        "Best: slab 9.5, perplexity 6.00 where the dense model has 5.00"
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rows": [{"backend": "cpu", "median_us": 3}]}, "timing row 1 of .* has n=None, expected an integer"),
        ({"rows": [BENCH[0], BENCH[1] | {"m": "1"}]}, "timing row 2 of .* has m='1'"), ({"rows": 3}, "no list of objects: 3"),
        ({"rows": [BENCH[0] | {"median_us": 10**400}]}, "has median_us=1000"), ({"results": [{"method": "x", "perplexity": "6"}]}, "perplexity='6'"),
        ({"results": [{"method": "x", "errors": [1]}]}, "row 1 of .* has errors=.1., expected"), ({"layers": [3]}, "layer 1 of .* is 3"),
        ({"layers": [{"shape": [8, 8], "name": "x"}]}, "layer 1 of .* has bits_per_weight=None"), ({"perplexity": []}, r"has perplexity=\[\]"),
        ({"device": "\ud800"}, "not readable JSON"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_with_the_row(tmp_path, data, message):
    (tmp_path / "x.json").write_text(json.dumps(data))
    with pytest.raises(report.ReportError, match=message):
        report.read([tmp_path / "x.json"])


def test_folder_without_record_is_refused(tmp_path):
    with pytest.raises(report.ReportError, match="holds no slab_run"):
        report.read([tmp_path])


def test_writes_pictures_and_a_page_that_stands_alone(runs, tmp_path):
    rows = [{"method": m, "perplexity": p, "bits_per_weight": b, "tokens_per_second": 9.0, "folder": str(runs / m)}
            for m, p, b in (("magnitude", 40.0, 9.0), ("slab-paper", 10.0, 9.6), ("slab", 6.0, 9.6))]  # fmt: skip
    rows.append(
        {"method": "dense", "perplexity": 5.0, "bits_per_weight": 16.0, "tokens_per_second": 12.0}
    )
    file = tmp_path / "results.json"
    file.write_text(
        json.dumps(
            {"model": "<b>tiny</b>", "results": rows, "bench": BENCH, "notes": ["two cores"]}
        )
    )
    written = report.write(report.read([runs, file]), tmp_path / "out")
    assert [p.name for p in written] == [
        "error-by-layer.png", "perplexity-by-bits.png", "speed-model.png", "speed-layers.png", "report.html",
    ]  # fmt: skip
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written[:-1])
    html = written[-1].read_text()
    assert "<b>tiny</b>" not in html and "&lt;b&gt;tiny" in html
    assert html.count("data:image/png;base64,") == 8  # light and dark
    assert not re.search(
        r"(?:src|srcset|href)=[\"'](?!data:)|https?://|<script|@import|url\(", html
    )
    assert "name=viewport" in html and "prefers-color-scheme: dark" in html


@pytest.mark.parametrize("draw", [lambda: figures.layer_speed(BENCH, figures.DARK), lambda: figures.model_speed(
    [report.Result("dense", tokens_per_second=3.0, label="dense"), report.Result("slab", tokens_per_second=2.9, label="slab")], figures.LIGHT)])  # fmt: skip
def test_bars_start_at_zero_and_none_is_cut(draw):
    (ax,) = draw().axes
    low, high = ax.get_xlim()
    assert low == 0 and all(bar.get_width() <= high and bar.get_x() == 0 for bar in ax.patches)


def test_labels_of_close_points_do_not_cover_each_other():
    points = [
        report.Result(m, bits_per_weight=9.5, perplexity=6 + 0.001 * i, label=m)
        for i, m in enumerate(figures.STYLES)
    ]
    fig = figures.perplexity_by_bits(points, report.Result("dense", perplexity=5.9), figures.LIGHT)
    fig.draw_without_rendering()
    boxes = [
        Text.get_window_extent(t) for t in fig.axes[0].texts if not t.get_text().startswith("dense")
    ]  # without leader lines
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_equal_data_gives_equal_pictures(runs):
    found = report.read([runs])
    draw = report.draw(found)["error-by-layer"][2]
    assert figures.png(draw(figures.LIGHT)) == figures.png(draw(figures.LIGHT))


def test_page_without_anything_measured_is_still_a_page():
    assert "<table" not in page.html("", "nothing", [], [], [])


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
