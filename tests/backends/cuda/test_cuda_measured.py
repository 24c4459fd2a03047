"""backends/cuda/measured.py: which rows there are, when a plan is chosen by one, and what is said
of a damaged file."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from slab_kernels.backends.base import LinearProblem
from slab_kernels.backends.cuda import BACKEND, measured, plan
from slab_kernels.backends.cuda.gpus import GPUS, gpu_like, gpu_named
from slab_kernels.backends.cuda.layout import INT4, INT8, W16
from slab_kernels.backends.cuda.measured import MeasuredRow
from slab_kernels.backends.cuda.plan import choose
from slab_kernels.backends.cuda.tiles import MANY, NARROW, WIDE, CudaSizes
from slab_kernels.errors import ConfigError

H100 = gpu_named("H100")
CARD = gpu_like("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448)
SIZES = CudaSizes(4096, (4096,), INT4, 4, 1, 0)
# K groups of four warps each, which the model takes for no number of tokens.
WIDE_ROW = MeasuredRow(
    "H100", 132, 4096, 4096, "int4", 4, 1, 1, 4, 16, WIDE, 4, 1, 4, 2, 16, 1, 2, 1, 5.5, "x.csv"
)
NARROW_ROW = WIDE_ROW._replace(above=0, tokens=4, loop=NARROW, warp_width=4, stages=3)
MANY_ROW = WIDE_ROW._replace(
    above=16, tokens=32, loop=MANY, warp_rows=2, warp_inputs=2, warp_width=32, stages=4, resident=1
)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A function that puts rows where the backend looks for them."""

    def write(*rows: MeasuredRow | dict | str, **more) -> None:
        path = tmp_path / "measured.json"
        entries = [row._asdict() if isinstance(row, MeasuredRow) else row for row in rows]
        path.write_text(json.dumps({"format": 1, "rows": entries} | more))
        monkeypatch.setattr(measured, "FILE", path)
        forget()

    yield write
    forget()


def forget() -> None:
    measured.rows.cache_clear()
    for cached in (plan.choose, plan._split):
        cached.cache_clear()


def way(sizes=SIZES, M=16, gpu=CARD) -> tuple:
    """Of the chosen plan: whether a row chose it, loop, warps, splits, stages."""
    found = choose(sizes, M, gpu)
    tile = found.tile
    return (
        found.measured is not None,
        tile.loop,
        (tile.warp_rows, tile.warp_inputs),
        (found.splits, found.stages, found.resident),
    )


# ---- the file that is shipped


def test_every_shipped_row_chooses_its_plan():
    """It names a plan that there is and that fits, and is asked for the sizes that were measured,
    by the card's own name and by the table's."""
    rows = measured.rows(measured.FILE)
    assert rows
    for row in rows:
        values = measured.VALUES[row.values]
        sizes = CudaSizes(row.k, (row.n,), values, row.group_steps, row.rank, 0, row.planes)
        gpu = gpu_named(row.gpu)
        assert gpu.multiprocessors == row.multiprocessors
        for device in (gpu, replace(gpu, name=f"NVIDIA {row.gpu} 80GB HBM3")):
            for M in (row.above + 1, row.tokens):
                chosen = choose(sizes, M, device)
                if isinstance(chosen, plan.Plan):
                    assert chosen.measured == row, (row, M)
                    assert chosen.stages == row.stages


def test_nothing_is_read_before_a_plan_is_asked_for():
    forget()
    assert measured.rows.cache_info().currsize == 0
    choose(SIZES, 1, CARD)
    assert measured.rows.cache_info().currsize == 1


# ---- which row speaks


def test_a_row_beats_the_model(file):
    file()
    own = [way(M=M) for M in (1, 4, 5, 16, 17, 32, 33)]
    assert not any(by_row for by_row, *_ in own)
    file(WIDE_ROW, NARROW_ROW, MANY_ROW)
    assert way(M=1) == way(M=4) == (True, NARROW, (4, 4), (1, 3, 1))
    assert way(M=5) == way(M=16) == (True, WIDE, (4, 4), (1, 2, 1))
    assert way(M=17) == way(M=32) == (True, MANY, (2, 2), (1, 4, 1))
    # No row speaks of 33 tokens and more, but those of the regime bind how K is split.
    by_row, loop, (_, warp_inputs), (splits, *_) = way(M=33)
    assert (by_row, loop, warp_inputs, splits) == (False, MANY, 2, 1)
    assert [choose(SIZES, M, CARD, by_rows=False).tile.warp_inputs for M in (1, 16)] == [16, 16]


def test_one_row_binds_the_whole_regime(file):
    """A token's result is the same for every number of tokens up to 16."""
    file(WIDE_ROW)
    ways = {(choose(SIZES, M, CARD).tile.warp_inputs, choose(SIZES, M, CARD).splits)
            for M in range(1, 17)}  # fmt: skip
    assert ways == {(4, 1)}


OTHERS = {
    "a slice of the card": (SIZES, replace(CARD, multiprocessors=16)),
    "another board": (SIZES, replace(CARD, multiprocessors=114)),
    "another model": (SIZES, replace(CARD, name="NVIDIA H200")),
    "another K": (SIZES._replace(K=4224), CARD),
    "another N": (SIZES._replace(rows=(4128,)), CARD),
    "other values": (SIZES._replace(values=INT8), CARD),
    "another group": (SIZES._replace(group_steps=2), CARD),
    "another rank": (SIZES._replace(rank=2), CARD),
    "several planes": (SIZES._replace(planes=2), CARD),
    "an adapter": (SIZES._replace(adapter_steps=1), CARD),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_row_is_for_its_own_gpu_and_sizes_alone(file, name):
    file(WIDE_ROW)
    assert way()[0] and not way(*[OTHERS[name][0], 16, OTHERS[name][1]])[0]


def test_fused_parts_are_the_sizes_together(file):
    """q, k and v of a Llama 3 were timed as one weight of 6144 rows."""
    file(WIDE_ROW)
    assert way(SIZES._replace(rows=(2048, 1024, 1024)))[0]


@pytest.mark.parametrize(
    "change",
    [
        {"warp_rows": 16},  # no such tile
        {"loop": NARROW},  # not for 16 tokens
        {"loop": MANY},
        {"resident": 4},  # 2048 threads
        {"splits": 8, "warp_inputs": 16, "warp_rows": 1},  # of 32 K blocks
    ],
)
def test_a_row_of_a_tile_that_is_not_to_be_had_leaves_it_to_the_model(file, change):
    file()
    own = way()
    file(WIDE_ROW._replace(**change))
    assert way() == own and way(M=1)[0] is False


def test_a_row_takes_no_more_stages_than_fit(file):
    file(WIDE_ROW._replace(stages=4))
    assert way()[:2] == (True, WIDE) and way()[3][1] <= 4
    assert choose(SIZES, 16, CARD).shared_bytes <= CARD.shared_limit


# ---- words


def test_explain_says_who_chose(file):
    file(WIDE_ROW)
    problem = LinearProblem(16, 4096, 4096, "int4", 128, dtype=torch.float16, device="cuda")
    said = BACKEND.describe(problem, "H100")
    assert "; chosen because it took 5.5 us with 16 tokens on an H100 (x.csv); a dense" in said
    assert "; chosen by the cost model; a dense" in BACKEND.describe(problem, "H200")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "it is not valid JSON"),
        ("[]", r'it must be an object {"format": 1, "rows": \[...\]}'),
        ('{"format": 1}', "it must be an object"),
        ('{"format": 2, "rows": []}', "it has format 2, this version of slab_kernels reads"),
        ('{"format": true, "rows": []}', "it has format True"),
        ('{"format": 1, "rows": [7]}', "row 1: 7 must be an object"),
        ('{"format": 1, "rows": [{"gpu": "H100"}]}', "row 1: its keys must be gpu, multiproc"),
        ("[" * 10000, "it is not valid JSON"),
        (b"\xff\xfe\xff", "it is not valid JSON"),
    ],
)
def test_a_damaged_file_is_one_sentence(file, tmp_path, text, says):
    file()
    path = measured.FILE
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=says) as caught:
        choose(SIZES, 1, CARD)
    assert str(path) in str(caught.value) and "fit_plans.py rows" in str(caught.value)
    path.unlink()
    with pytest.raises(ConfigError, match="cannot read .*; install slab_kernels again"):
        choose(SIZES, 1, CARD)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n": "4096"}, "n='4096' must be of type int"),
        ({"n": True}, "n=True must be of type int"),
        ({"splits": 0}, "splits=0 must be an integer from 1 to 2147483647"),
        ({"k": 1 << 40}, "k=1099511627776 must be an integer"),
        # Kernels would take a ring of one or five stages for one of four.
        ({"stages": 1}, "stages=1 must be an integer from 2 to 4"),
        ({"stages": 5}, "stages=5 must be an integer from 2 to 4"),
        ({"values": "fp16"}, "values='fp16' must be one of w16, int8, int4"),
        ({"loop": "fast"}, "loop='fast' must be one of narrow, wide, many"),
        ({"measured_us": -1.0}, "measured_us=-1.0 must be above 0"),
        ({"measured_us": float("nan")}, "measured_us=nan must be above 0"),
        ({"measured_us": float("inf")}, "measured_us=inf must be above 0"),
        ({"measured_us": "5"}, "measured_us='5' must be of type float"),
        ({"above": 16}, "above=16 and tokens=16 must lie within one regime"),
        ({"above": 1, "tokens": 64}, "above=1 and tokens=64 must lie within one regime"),
        ({"above": 64, "tokens": 128}, r"above 64 tokens K is not split, .* has \(4, 1\)"),
    ],
)
def test_a_wrong_row_is_named(file, change, says):
    file(WIDE_ROW, WIDE_ROW._asdict() | change)
    with pytest.raises(ConfigError, match=f"row 2: {says}"):
        choose(SIZES, 1, CARD)


def test_rows_that_would_make_a_result_depend_on_others_are_refused(file):
    file(WIDE_ROW, NARROW_ROW._replace(warp_inputs=8))
    with pytest.raises(ConfigError, match=r"splits K in two ways, \(4, 1\) and \(8, 1\)"):
        choose(SIZES, 1, CARD)
    file(WIDE_ROW, WIDE_ROW._replace(above=8))
    with pytest.raises(ConfigError, match="has two rows for M=16"):
        choose(SIZES, 1, CARD)
    file(WIDE_ROW, NARROW_ROW._replace(warp_inputs=8, values="int8"), MANY_ROW)
    assert way()[0], "another weight and another regime may split K in another way"


def test_a_time_may_be_a_whole_number(file):
    file(WIDE_ROW._asdict() | {"measured_us": 5})
    assert way()[0]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_weight_without_rows_is_the_models(gpu):
    for M in (1, 16, 17, 64, 65):
        assert (
            getattr(choose(CudaSizes(512, (96,), W16, 4, 1, 0), M, gpu), "measured", None) is None
        )
