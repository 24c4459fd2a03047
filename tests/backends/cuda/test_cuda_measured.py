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
from slab_kernels.backends.cuda.measured import MeasuredRow, PrefillRow
from slab_kernels.backends.cuda.plan import choose
from slab_kernels.backends.cuda.prefill import Prefill
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

# 64 tokens a CTA, eight CTAs share each tile; the model takes four.
PREFILL_ROW = PrefillRow(
    "H100", 132, 4096, 4096, "int4", 4, 1, 1, 32, 64, "prefill_both", 64, 8, 9.5, "y.csv"
)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A function that puts rows where the backend looks for them."""

    def write(*rows: measured.Row | dict, **more) -> None:
        path = tmp_path / "measured.json"
        entries = [row if isinstance(row, dict) else row._asdict() for row in rows]
        path.write_text(json.dumps({"format": 2, "rows": entries} | more))
        monkeypatch.setattr(measured, "FILE", path)
        forget()

    yield write
    forget()


def forget() -> None:
    measured.rows.cache_clear()
    for cached in (
        plan.choose,
        plan.dense_from,
        plan._slower_than_dense,
        plan._rebuilt_from,
        plan._ways,
        plan._split,
    ):
        cached.cache_clear()


def way(sizes=SIZES, M=16, gpu=CARD) -> tuple:
    """Of the chosen plan: whether a row chose it, loop, warps, splits, stages."""
    found = choose(sizes, M, gpu)
    if isinstance(found, Prefill):
        return found.measured is not None, found.loop, found.split
    tile = found.tile
    return (
        found.measured is not None,
        tile.loop,
        (tile.warp_rows, tile.warp_inputs),
        (found.splits, found.stages, found.resident),
    )


def plan_of(family: str, M: int):
    """The plan of a family with which it competes."""
    return next(each.plan for each in plan.weighed(SIZES, M, CARD) if each.family == family)


# ---- the file that is shipped


def test_every_shipped_row_speaks_for_its_loop():
    """It names a plan that there is and that fits, and is asked for the sizes that were measured,
    by the card's own name and by the table's; what is chosen takes no longer than it did."""
    rows = measured.rows(measured.FILE)
    assert rows
    for row in rows:
        values = measured.VALUES[row.values]
        sizes = CudaSizes(row.k, (row.n,), values, row.group_steps, row.rank, 0, row.planes)
        gpu = gpu_named(row.gpu)
        assert gpu.multiprocessors == row.multiprocessors
        for device in (gpu, replace(gpu, name=f"NVIDIA {row.gpu} 80GB HBM3")):
            for M in (row.above + 1, row.tokens):
                found = list(plan.weighed(sizes, M, device))
                (own,) = (each for each in found if each.family == row.loop)
                assert own.plan.measured == row and own.plan.stages == row.stages, (row, M)
                if M == row.tokens:
                    assert own.microseconds == row.measured_us
                else:
                    assert own.microseconds <= row.measured_us
                if M > 64:
                    assert own.microseconds >= found[0].microseconds


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
    many = {M: plan_of(MANY, M) for M in (17, 32, 33)}
    assert [each.measured for each in many.values()] == [MANY_ROW, MANY_ROW, None]
    # No row speaks of 33 tokens and more, but those of the regime bind how K is split.
    assert {each.split for each in many.values()} == {(2, 1)}
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


# ---- rows and predictions of several families of kernels


def test_a_row_decides_within_its_family_alone(file):
    """Its time stands where the families compete: the loop for many is chosen where it was measured
    to take less than the others are predicted to, and not because it was measured."""
    more = MANY_ROW._replace(above=32, tokens=64, warp_width=64, stages=2, resident=1)
    fast, slow = (
        [each._replace(measured_us=us) for each in (MANY_ROW, more)] for us in (5.0, 50.0)
    )
    file()
    own = way(M=32)
    assert own[1] == "prefill_both"
    file(*fast)
    assert way(M=17)[:2] == way(M=32)[:2] == way(M=64)[:2] == (True, MANY)
    file(fast[0])
    assert way(M=17) == way(M=64) == own, "what is not measured is predicted, and not by the row"
    file(*slow)
    assert way(M=17) == way(M=64) == own
    (many,) = (each for each in plan.weighed(SIZES, 32, CARD) if each.family == MANY)
    assert (many.microseconds, many.plan.measured) == (50.0, slow[0])


def test_a_row_of_fewer_tokens_than_were_timed_takes_its_share(file):
    file(MANY_ROW._replace(above=64, tokens=512, warp_inputs=1, warp_rows=4, warp_width=64,
                           resident=1, stages=2, measured_us=80.0))  # fmt: skip
    times = [
        next(each for each in plan.weighed(SIZES, M, CARD) if each.family == MANY)
        for M in (65, 300, 512)
    ]
    assert [each.plan.measured is not None for each in times] == [True] * 3
    assert times[0].microseconds < times[1].microseconds < times[2].microseconds == 80.0


def test_a_row_names_a_prefill_kernel(file):
    file()
    assert way(M=64) == (False, "prefill_both", (64, 4))
    file(PREFILL_ROW)
    chosen = choose(SIZES, 64, CARD)
    assert way(M=64) == (True, "prefill_both", (64, 8)) and chosen.measured == PREFILL_ROW
    assert way(M=17) == (False, "prefill_both", (64, 8)), "the regime has one way"
    assert "; chosen because it took 9.5 us with 64 tokens on an H100 (y.csv)" in chosen.describe()
    rebuilt = PREFILL_ROW._replace(loop="prefill_rebuild", measured_us=2.0)
    file(PREFILL_ROW, rebuilt)
    assert way(M=64) == (True, "prefill_rebuild", (64, 8)), "of two families the faster"
    # Above 64 tokens a row says nothing of how K is split for other numbers of tokens.
    many = rebuilt._replace(above=64, tokens=128, cta_tokens=128, share=8)
    file(PREFILL_ROW, many, many._replace(above=128, tokens=512, cta_tokens=256, share=2))
    assert [way(M=M)[1:] for M in (65, 128, 512)] == [
        ("prefill_rebuild", (128, 8)), ("prefill_rebuild", (128, 8)), ("prefill_rebuild", (256, 2))
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"share": 3}, {"cta_tokens": 100}, {"cta_tokens": 128}, {"loop": "prefill_one"}],
)
def test_a_prefill_row_that_names_no_plan_leaves_it_to_the_model(file, change):
    file()
    own = way(M=64)
    file(PREFILL_ROW._replace(**change))
    assert way(M=64) == own


def test_prefill_rows_are_checked_as_strictly(file):
    for change, says in (
        ({"share": -1}, "share=-1 must be an integer from 0"),
        ({"cta_tokens": True}, "cta_tokens=True must be of type int"),
        ({"loop": "prefill_none"}, "its keys must be gpu"),
        ({"stages": 2}, "its keys must be gpu"),
        ({"above": 32, "tokens": 128}, "must lie within one regime"),
    ):
        file(PREFILL_ROW._asdict() | change)
        with pytest.raises(ConfigError, match=f"row 1: .*{says}"):
            choose(SIZES, 64, CARD)
    file(PREFILL_ROW, PREFILL_ROW._replace(above=16, tokens=32, share=4))
    with pytest.raises(ConfigError, match=r"splits K in two ways, \(64, 8\) and \(64, 4\)"):
        choose(SIZES, 64, CARD)


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
        ("[]", r'it must be an object {"format": 2, "rows": \[...\]}'),
        ('{"format": 2}', "it must be an object"),
        ('{"format": 1, "rows": []}', "it has format 1, this version of slab_kernels reads"),
        ('{"format": true, "rows": []}', "it has format True"),
        ('{"format": 2, "rows": [7]}', "row 1: 7 must be an object"),
        ('{"format": 2, "rows": [{"gpu": "H100"}]}', "row 1: its keys must be gpu, multiproc"),
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
        ({"loop": "fast"}, "loop='fast' must be one of narrow, wide, many, rebuild, prefill_one"),
        ({"measured_us": -1.0}, "measured_us=-1.0 must be above 0"),
        ({"measured_us": float("nan")}, "measured_us=nan must be above 0"),
        ({"measured_us": float("inf")}, "measured_us=inf must be above 0"),
        ({"measured_us": "5"}, "measured_us='5' must be of type float"),
        ({"above": 16}, "above=16 and tokens=16 must lie within one regime"),
        ({"above": 1, "tokens": 64}, "above=1 and tokens=64 must lie within one regime"),
        ({"above": 64, "tokens": 128}, "above 64 tokens a CTA has one K group, .* has 4"),
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
