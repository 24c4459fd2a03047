"""benchmarks/predict.py: rows of predictions, their ranges, and the cells of tables."""

from __future__ import annotations

import json

import predict
import pytest
from figure_kernel_tables import predicted_cell

from slab_kernels.backends.cuda.cost import LAUNCH_US
from slab_kernels.backends.cuda.gpus import gpu_named
from slab_kernels.backends.cuda.layout import INT4, W16
from slab_kernels.backends.cuda.tiles import CudaSizes


@pytest.mark.parametrize("gpu, ranges", [("H100", {"fp16 / bf16", "int4"}), ("RTX 4090", set())])
def test_every_row_holds_both_ends(monkeypatch, gpu, ranges):
    """The better end is no worse; they differ where a kernel was never timed."""
    monkeypatch.setattr(predict, "TOKENS", (1, 17, 64, 128, 4096))
    found = predict.rows(gpu, ["llama-3-8b"])
    assert len(found) == 4 * len(predict.KINDS) * 5
    for row in found:
        assert row["best_us"] <= row["predicted_us"] and row["ratio"] <= row["best_ratio"]
        assert row["ratio"] == pytest.approx(row["dense_us"] / row["predicted_us"], rel=1e-2)
        assert row["m"] > 16 or row["best_us"] == row["predicted_us"]
        assert (row["route"] == "fused") == ("loop" in row) == ("overlapped_us" in row)
    differing = {row["kind"] for row in found if row["best_us"] < row["predicted_us"]}
    assert differing >= ranges
    loops = {row.get("loop") for row in found}
    assert ("prefill_both" in loops) == (gpu == "H100")


def test_an_adapter_counts_with_its_launch():
    sizes, gpu = CudaSizes(4096, (4096,), W16, 4, 0, 0), gpu_named("H100")
    plain, more = (predict.predicted(sizes._replace(adapter_steps=n), 512, gpu) for n in (0, 4))
    assert more["predicted_us"] > plain["predicted_us"] + LAUNCH_US
    saved = [row["predicted_us"] - row["overlapped_us"] for row in (plain, more)]
    assert saved == pytest.approx([LAUNCH_US, 2 * LAUNCH_US], abs=0.01)


def test_a_cell_says_both_ends_where_there_are_two():
    rows = [
        {"ratio": 1.0, "best_ratio": 1.2, "route": "fused"},
        {"ratio": 0.8, "best_ratio": 0.8, "route": "rebuilt"},
    ]
    assert predicted_cell(rows) == "0.80–1.00 to 0.80–1.20*"
    assert predicted_cell(rows[1:]) == "0.80–0.80*"


def test_the_file_has_what_the_tables_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "TOKENS", (17, 256))
    monkeypatch.setattr(predict, "KINDS", {"int4": (INT4, 1, 0)})
    out = tmp_path / "prediction.json"
    arguments = ["predict.py", "--gpu", "h200", "--models", "llama-3-8b", "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    predict.main()
    record = json.loads(out.read_text(encoding="utf-8"))
    assert {row["gpu"] for row in record["rows"]} == {"H200"} and len(record["rows"]) == 8
    printed = capsys.readouterr().out
    assert "| S | M = 17 | M = 256 |" in printed
    assert f"| int4 | {predicted_cell(record['rows'][::2])} |" in printed
