"""benchmarks/plan_rows.py: from files of timed plans to the rows of backends/cuda/measured.json."""

from __future__ import annotations

import csv
from pathlib import Path

import fit_plans
import plan_rows
import pytest

from slab_kernels.backends.cuda import measured, plan, prefill, unknowns
from slab_kernels.backends.cuda.gpus import gpu_named
from slab_kernels.backends.cuda.layout import INT4
from slab_kernels.backends.cuda.tiles import MANY, NARROW, REBUILD, WIDE, CudaSizes

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
H100 = gpu_named("H100")
SIZES = CudaSizes(4096, (4096,), INT4, 4, 1, 0)


def timed(M: int, took, only=lambda each: True) -> list[dict]:
    """Rows of a file as `fit_plans.py time` writes it. took: microseconds by plan."""
    found = []
    for each in fit_plans.candidates(SIZES, M, H100):
        if only(each):
            tile = each.tile
            how = (tile.warp_rows, tile.warp_tokens, tile.warp_inputs, tile.row_tiles)
            how += (each.tokens, each.splits, each.stages, each.resident)
            line = (4096, 4096, "int4", M, "fused", *how, 1.0, "memory", took(each), 0.1, tile.loop)
            found.append(dict(zip(plan_rows.COLUMNS, line, strict=True)))
    return found


@pytest.fixture
def written(tmp_path):
    """A function that writes lines into a file of that name."""

    def write(name: str, lines: list[dict], columns=plan_rows.COLUMNS) -> Path:
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(lines)
        return tmp_path / name

    return write


def test_the_shipped_rows_are_those_of_the_shipped_files(tmp_path, capsys):
    """Whoever changes the model or adds a file runs `fit_plans.py rows` again."""
    shipped = measured.rows(measured.FILE)
    for name in {row.gpu for row in shipped}:
        files = [RESULTS / file for file in sorted({r.file for r in shipped if r.gpu == name})]
        plan_rows.write_rows(files, gpu_named(name), out := tmp_path / "rows.json")
        assert measured.rows(out) == tuple(row for row in shipped if row.gpu == name)


def test_an_older_file_speaks_of_the_loop_for_many_tokens_alone():
    """Its rows of up to 16 tokens, and of 64 rows a warp with integers, are of kernels that are
    gone."""
    timings = plan_rows.fused(RESULTS / "plans-h100.csv")
    assert min(timing.M for timing in timings) == 32 and len(timings) == 624
    assert {timing.tile.loop for timing in timings} == {MANY}
    assert {timing.tokens for timing in timings} == {32, 64}


def eight_groups(each) -> bool:
    """Whether a plan is of that way of splitting K, which the model does not choose here."""
    return (each.tile.warp_inputs, each.splits) == (8, 1)


def test_decoding_gets_one_way_of_splitting_k(written):
    """That whose fastest plans have the least sum, although another is the fastest for one token
    count."""
    own = plan.choose(SIZES, 1, H100, by_rows=False)
    assert not eight_groups(own)

    def took(each):
        if eight_groups(each):
            return 5.0 + each.stages / 10
        return 4.9 if each.M == 1 else 6.0

    lines = [line for M in (1, 4, 16) for line in timed(M, took)]
    found = plan_rows.rows(plan_rows.fused(written("new.csv", lines)), H100)
    assert {row.split for row in found} == {(8, 1)}
    assert [(row.above, row.tokens) for row in found] == [(0, 1), (1, 4), (4, 16)]
    assert {row.loop for row in found[:2]} <= {NARROW, WIDE} and found[2].loop == WIDE
    assert {row.file for row in found} == {"new.csv"}


@pytest.mark.parametrize("gain", (0.995, 1.1))
def test_a_row_that_saves_less_than_a_hundredth_is_left_out(written, gain):
    lines = [line for M in (1, 4, 16) for line in timed(M, lambda e: 5 * gain ** eight_groups(e))]
    assert not plan_rows.rows(plan_rows.fused(written("new.csv", lines)), H100)


def test_a_model_whose_own_plan_was_not_timed_is_not_overruled(written):
    lines = [line for M in (1, 4, 16) for line in timed(M, lambda _: 5.0, eight_groups)]
    assert lines and not plan_rows.rows(plan_rows.fused(written("new.csv", lines)), H100)


def test_the_last_file_that_has_a_regime_decides(written):
    """Times of different kernels are not compared with each other."""
    fast = [line for M in (1, 4, 16) for line in timed(M, lambda e: 5.0 - eight_groups(e))]
    slow = [line for M in (1, 4, 16) for line in timed(M, lambda e: 9.0 + eight_groups(e))]
    first, second = written("first.csv", fast), written("second.csv", slow)
    timings = [*plan_rows.fused(first), *plan_rows.fused(second)]
    assert not plan_rows.rows(timings, H100)
    timings = [*plan_rows.fused(second), *plan_rows.fused(first)]
    assert {row.file for row in plan_rows.rows(timings, H100)} == {"first.csv"}


# ---- the kernels for many tokens


def timed_prefill(sizes: CudaSizes, M: int, took, gpu=H100) -> list[dict]:
    """Rows of a file of every plan of prefill.py. took: microseconds by plan."""
    found = []
    for each in prefill.plans(sizes, M, gpu):
        line = (sizes.N, sizes.K, "int4", M, "fused", *fit_plans.how(each))
        line += (1.0, "memory", took(each), 0.1, each.loop)
        found.append(dict(zip(plan_rows.COLUMNS, line, strict=True)))
    return found


def test_rows_of_prefill_kernels_are_made_of_their_own_times(written, tmp_path, capsys):
    """Of each kind the fastest way that was timed for all of a regime, if it beats the model's own;
    the file says which, and the backend takes it."""

    def took(each):
        return 3.0 if (each.kind, each.share) == ("both", 8) else 4.0 + each.weight_stages / 8

    lines = [line for M in (32, 64, 128) for line in timed_prefill(SIZES, M, took)]
    found = plan_rows.rows(plan_rows.fused(written("new.csv", lines)), H100)
    few = [row for row in found if row.tokens <= 64]
    assert [(row.loop, row.split, row.above, row.tokens) for row in few] == [
        ("prefill_both", (64, 8), 16, 32), ("prefill_both", (64, 8), 32, 64)
    ]  # fmt: skip
    plan_rows.write_rows([tmp_path / "new.csv"], H100, out := tmp_path / "rows.json")
    assert set(measured.rows(out)) == set(found)


def test_a_file_without_signs_speaks_of_the_kernel_for_kept_pairs(written):
    alone = SIZES._replace(rank=0)
    lines = timed_prefill(alone, 64, lambda _: 5.0)
    (timing, *_) = plan_rows.fused(written("new.csv", lines))
    assert (timing.loop, timing.sizes.rank, timing.plan(H100).kind) == ("prefill_one", 0, "one")
    assert timing.plan(gpu_named("A100")) is None


def test_times_of_a_loop_are_not_compared_with_another(written):
    """The loop for many gets its row although a prefill kernel took less."""
    many = [line for M in (32, 64) for line in timed(M, lambda e: 9.0 - (e.splits == 2))]
    lines = many + [line for M in (32, 64) for line in timed_prefill(SIZES, M, lambda _: 1.0)]
    found = plan_rows.rows(plan_rows.fused(written("new.csv", lines)), H100)
    assert plan.own(MANY, SIZES, 64, H100).splits == 1
    assert {(row.loop, row.splits) for row in found} == {(MANY, 2)}


# ---- the constants


def a_gpu_with(monkeypatch, **constants) -> None:
    for name, value in constants.items():
        monkeypatch.setattr(unknowns, name, value)


@pytest.mark.parametrize(
    "true",
    [
        {"COPY_WRITES": 0.3, "TABLE_WAVEFRONTS": 1.0, "CONSUMER_WAIT": 0.8},
        {"COPY_WRITES": 1.0, "TABLE_WAVEFRONTS": 1.6, "CONSUMER_WAIT": 3.0},
    ],
)
def test_the_unknowns_are_fitted_to_times_of_prefill_kernels(written, monkeypatch, true):
    """Times that the model itself makes with other constants: they are found again."""
    shapes = [SIZES, SIZES._replace(rows=(28672,)), SIZES._replace(K=14336)]
    before = {name: getattr(unknowns, name) for name in fit_plans.UNKNOWN}
    with monkeypatch.context() as patch:
        a_gpu_with(patch, **true)
        lines = [
            line
            for sizes in shapes
            for M in (64, 128, 1024)
            for line in timed_prefill(sizes, M, lambda each: each.microseconds)
        ]
    a_gpu_with(monkeypatch, **before)  # Whatever the fit sets is put back.
    model = fit_plans.Model(plan_rows.fused(written("new.csv", lines)), H100)
    assert [name for _, name, *_ in model.constants()] == list(fit_plans.UNKNOWN)
    wrong = model.error()
    assert model.fit() < wrong / 4
    for name, value in true.items():
        assert getattr(unknowns, name) == pytest.approx(value, rel=0.25), name


def test_only_what_was_timed_is_fitted():
    """The file of the loop for many tells nothing of the unknowns; that of the loop that rebuilds
    the weight tells of the table alone."""
    older = fit_plans.Model(plan_rows.fused(RESULTS / "plans-h100.csv"), H100)
    assert [name for _, name, *_ in older.constants()] == list(fit_plans.FITTED)
    a100 = gpu_named("A100")
    rebuilt = plan.own(REBUILD, SIZES, 64, a100)
    how = (64, rebuilt.tile, 64, rebuilt.splits, rebuilt.stages, rebuilt.resident, 9.0, "x.csv")
    newer = fit_plans.Model([plan_rows.Timing(SIZES, *how)], a100)
    assert [name for _, name, *_ in newer.constants()] == ["TABLE_WAVEFRONTS"]


def test_rows_of_other_gpus_stay(written, tmp_path, capsys):
    other = measured.rows(measured.FILE)[0]._replace(gpu="H200")
    out = tmp_path / "rows.json"
    plan_rows.write_rows([RESULTS / "plans-h100.csv"], H100, out)
    text = out.read_text().replace('"gpu": "H100"', '"gpu": "H200"')
    out.write_text(text)
    plan_rows.write_rows([RESULTS / "plans-h100.csv"], H100, out)
    assert other in measured.rows(out)
    assert {row.gpu for row in measured.rows(out)} == {"H100", "H200"}


def test_files_of_something_else_are_refused(written, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other.csv has no columns n, k, values"):
        plan_rows.fused(other)
    with pytest.raises(ValueError, match="has no row of a fused plan"):
        plan_rows.fused(written("empty.csv", []))
