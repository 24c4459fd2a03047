"""backends/cuda/prefill.py and prefill_cost.py: plans of the Hopper kernels for many tokens,
whatever the layer, the device and the number of tokens. Arithmetic alone."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace

import pytest
import torch
from prefill_checks import FRAMES, check_items, check_prefill, items

from slab_kernels.backends.base import LinearProblem
from slab_kernels.backends.cuda import BACKEND, cost, plan, prefill, prefill_cost, unknowns
from slab_kernels.backends.cuda.gpus import GPUS, gpu_named
from slab_kernels.backends.cuda.layout import DENSE, INT4, INT8, W16
from slab_kernels.backends.cuda.plan import NEVER, Rebuild, choose, dense_from, takes_dense
from slab_kernels.backends.cuda.prefill import Prefill, dealings, stages
from slab_kernels.backends.cuda.tiles import REBUILD, CudaSizes
from slab_kernels.bench.layer_shapes import layers

H100, H200, A100 = (gpu_named(name) for name in ("H100", "H200", "A100"))
TOKENS = (17, 33, 64, 65, 127, 128, 129, 256, 257, 1000, 4096)
SIGNS = ((0, 1), (1, 1), (2, 1), (16, 1), (1, 2), (1, 3), (16, 3))  # ranks and sign planes
VALUES = ((W16, 4), (INT8, 4), (INT4, 1))  # and steps of 32 inputs that a scale covers
DESIGN = [shape for name in ("llama-3-8b", "llama-3-70b") for shape in layers(name)]


def some(seed: int, count: int):
    """Random sizes, devices of Hopper and parts of one, and numbers of tokens."""
    chance = random.Random(seed)
    for _ in range(count):
        rows = tuple(chance.choice((1, 33, 128, 1000, 4096, 28672)) + chance.randrange(300)
                     for _ in range(chance.choice((1, 1, 1, 2, 3, 4))))  # fmt: skip
        (values, steps), (rank, planes) = chance.choice(VALUES), chance.choice(SIGNS)
        K = chance.choice((1, 100, 512, 4096, 14336)) + chance.randrange(300)
        sizes = CudaSizes(K, rows, values, steps, rank, chance.choice((0, 0, 4)), planes)
        gpu = replace(
            H100,
            multiprocessors=chance.choice((1, 7, 16, 78, 114, 132)),
            shared_limit=chance.choice((232448, 232448, 101376)),
        )
        yield sizes, chance.choice((*TOKENS, chance.randrange(17, 3000))), gpu


# ---- every plan


def test_thousands_of_plans_fit_and_cover():
    """All that are weighed, not only the one that is chosen."""
    seen = set()
    for sizes, M, gpu in some(1, 1500):
        for each in prefill.plans(sizes, M, gpu):
            check_prefill(each, sizes, M, gpu)
            seen.add(("any" if each.any_rank else each.kind, each.tokens))
    assert seen == FRAMES.keys()


def test_every_k_block_of_every_tile_is_taken_once():
    ways = set()
    for sizes, M, gpu in some(2, 400):
        for each in prefill.plans(sizes, M, gpu):
            if each.tiles * sizes.k_blocks < 50_000:
                check_items(each)
                ways.add((each.share > 1, each.share == 0, each.pair, each.whole_tiles > 0))
    assert len(ways) >= 6, ways


def test_the_tail_of_a_known_case():
    """Ten tiles of seven K blocks on four clusters: eight whole, two dealt in shares of four, four,
    three and three."""
    assert dealings(10, 7, 4) == [(4, 10)], "three K blocks are no share"
    assert dealings(10, 8, 4) == [(4, 10), (4, 8)]
    one = next(
        each
        for each in prefill.plans(CudaSizes(1024, (1280,), W16, 4, 1, 0), 64, H100)
        if each.kind == "both"
    )
    dealt = replace(one, clusters=4, whole_tiles=8)
    assert (dealt.tail_tiles, dealt.tail_share, dealt.tail_more) == (2, 4, 0)
    assert items(dealt)[0] == [(0, 0, 8), (4, 0, 8), (8, 0, 4)]
    assert items(dealt)[3] == [(3, 0, 8), (7, 0, 8), (9, 4, 8)]
    assert (dealt.share, one.share) == (0, one.share)
    uneven = replace(one, clusters=4, whole_tiles=7)
    assert [mine[-1] for mine in items(uneven)] == [(7, 0, 6), (8, 0, 4), (9, 0, 2), (9, 2, 8)]
    check_items(uneven)


def test_few_k_blocks_take_few_clusters():
    assert dealings(1, 4, 264) == [(1, 1)]
    assert dealings(2, 16, 264) == [(2, 2), (8, 0), (4, 0)]
    assert dealings(66, 4, 66) == [(66, 66)]
    assert dealings(3, 1000, 66)[:2] == [(3, 3), (66, 0)]


def test_rings_reach_equally_far():
    assert stages(100_000, 19712, 8192) == (3, 4)
    assert stages(1 << 20, 1000, 1000) == (8, 8)
    assert stages(2 * 19712 + 2 * 8192, 19712, 8192) == (2, 2)
    assert stages(2 * 19712 + 2 * 8192 - 1, 19712, 8192) is None


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 1), (10, 0), (12, 0)])
def test_only_hopper_has_them(capability):
    gpu, sizes = replace(H100, capability=capability), CudaSizes(4096, (4096,), W16, 4, 1, 0)
    assert not prefill.plans(sizes, 100, gpu)
    assert plan.families(sizes, gpu, plan.regime(100)) == ["many", REBUILD]
    adapter = sizes._replace(adapter_steps=4).adapter()
    assert adapter.values == DENSE and not prefill.plans(adapter, 100, H100)


# ---- the choice


def way(chosen) -> tuple:
    """All that decides in which order a token's products are added."""
    if isinstance(chosen, Prefill):
        rings = (chosen.weight_stages, chosen.token_stages)
        return (chosen.loop, *chosen.split, chosen.clusters, chosen.whole_tiles, *rings)
    return chosen.tile.loop, chosen.tile.warp_inputs, chosen.splits


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_up_to_64_tokens_one_family_and_one_way_serve(gpu):
    loops = set()
    for (N, K), (values, steps), (rank, planes) in itertools.product(DESIGN, VALUES, SIGNS):
        sizes = CudaSizes(K, (N,), values, steps, rank, 0, planes)
        ways = {way(choose(sizes, M, gpu)) for M in range(17, 65)}
        assert len(ways) == 1, (sizes, ways)
        loops |= {loop for loop, *_ in ways}
    known = {"H100": {"many", "prefill_one", "prefill_both", "prefill_rebuild"}}
    known["H200"] = known["H100"]
    assert loops == known.get(gpu.name, {"many", REBUILD}), "each is of use"


@pytest.mark.parametrize("gpu", (H100, H200), ids=lambda gpu: gpu.name)
def test_what_is_chosen_fits_and_covers(gpu):
    for (N, K), (rank, planes), M in itertools.product(DESIGN[::3], SIGNS, TOKENS):
        values, steps = VALUES[(N + M) % 3]
        sizes = CudaSizes(K, (N,), values, steps, rank, 0, planes)
        if isinstance(chosen := choose(sizes, M, gpu), Prefill):
            check_prefill(chosen, sizes, M, gpu)


def test_more_tokens_take_tiles_of_more():
    """64 for few, 256 for many, on the design's shapes; few signs by a second sparse product."""
    for N, K in DESIGN:
        sizes = CudaSizes(K, (N,), INT4, 4, 1, 0)
        found = [choose(sizes, M, H100) for M in (64, 512)]
        assert [(each.kind, each.tokens) for each in found] == [("both", 64), ("rebuild", 256)]
        alone = choose(sizes._replace(rank=0), 4096, H100)
        assert (alone.kind, alone.tokens, alone.pair) == ("one", 256, 2)


# ---- the predicted time


def test_the_model_forecasts_what_a_hand_did(monkeypatch):
    """Clocks of a multiprocessor for 128 rows x T tokens x 128 inputs, computed by hand from the
    counts below, where a look-up was one wavefront and rows of V were no part of what is copied."""
    monkeypatch.setitem(prefill_cost.REBUILD_WARP, W16, (326, 164, 89))
    monkeypatch.setitem(prefill_cost.BOTH_WARP, W16, (135, 39, 20))
    known = {  # shared memory, issue, L2 of w16
        ("rebuild", 64, 2): (1314, 1247, 1493), ("rebuild", 256, 1): (2526, 1594, 2176),
        ("both", 64, 2): (1272, 516, 1493),
    }  # fmt: skip
    one_wavefront = unknowns.assumed(cost.OVERLAP)._replace(table_wavefronts=1.0)
    sizes = CudaSizes(4096, (1 << 16,), W16, 4, 1, 0)
    for each in prefill.plans(sizes, 256, H100):
        if (key := (each.kind, each.tokens, each.at_once)) in known and not each.tail_tiles:
            met = prefill_cost.clocks(each, one_wavefront)
            per_block = each.most_k_blocks * each.at_once * each.rows / 128
            found = [met[name] / per_block for name in ("shared memory", "issue", "L2")]
            assert found == pytest.approx(known.pop(key), rel=0.02)
    assert not known


def test_both_ends_of_a_range_and_what_moves_them(monkeypatch):
    """Each unknown at its better value makes a prediction no worse; all of them are the other
    end."""
    sizes = CudaSizes(4096, (28672,), INT4, 4, 1, 0)
    for M in (64, 128, 1024):
        chosen = choose(sizes, M, H100)
        low, high = chosen.range_us
        assert low < high == chosen.microseconds
        for name, better in (("COPY_WRITES", 0.0), ("TABLE_WAVEFRONTS", 1.0), ("CONSUMER_WAIT", 0)):
            with monkeypatch.context() as patch:
                patch.setattr(unknowns, name, better)
                assert low <= replace(chosen).microseconds <= high
    rebuilt = plan.own(REBUILD, sizes, 128, A100)
    assert rebuilt.range_us[0] < rebuilt.range_us[1] == rebuilt.microseconds
    assert (
        plan.own("many", sizes, 128, A100).range_us[0]
        == plan.own("many", sizes, 128, A100).microseconds
    )


def test_ranks_planes_and_adapters_cost():
    sizes = CudaSizes(8192, (8192,), INT4, 4, 2, 0)
    times = [
        min(each.microseconds for each in prefill.plans(other, 128, H100))
        for other in (sizes, sizes._replace(rank=8), sizes._replace(rank=8, planes=2))
    ]
    assert times[0] < times[1] < times[2]
    plain, more = (next(plan.weighed(sizes._replace(adapter_steps=n), 128, H100)) for n in (0, 8))
    assert plain.adapter_us == 0 < more.adapter_us < more.microseconds - plain.microseconds


# ---- a dense copy


def test_a_dense_copy_is_taken_where_it_is_faster():
    """Up to 64 tokens there is one answer, above one for each number that was weighed; never while
    decoding."""
    for gpu, (N, K), (values, steps), rank in itertools.product(
        GPUS, DESIGN[::4], VALUES[::2], (0, 1)
    ):
        sizes = CudaSizes(K, (N,), values, steps, rank, 0)

        def gained(M: int, sizes=sizes, gpu=gpu) -> float:
            dense = cost.dense_microseconds(sizes.N, sizes.K, M, gpu)
            return plan.microseconds(sizes, M, gpu) - dense

        assert not any(takes_dense(sizes, M, gpu) for M in (1, 16))
        few = {takes_dense(sizes, M, gpu) for M in range(17, 65)}
        assert few == {max(gained(32), gained(64)) > cost.LAUNCH_US}, (sizes, gpu.name)
        for M in plan.REBUILT_FROM[::4]:
            assert takes_dense(sizes, M, gpu) == (gained(M) > 0), (sizes, M, gpu.name)
        since = dense_from(sizes, gpu)
        assert since == NEVER or takes_dense(sizes, since, gpu)
        assert not any(takes_dense(sizes, M, gpu) for M in plan.REBUILT_FROM if M < since)


def test_the_backend_asks_for_no_more_tokens_than_there_are(monkeypatch):
    """`dense_from` weighs every step: some ten times what a call has time for."""
    monkeypatch.delattr("slab_kernels.backends.cuda.dense_from")
    problem = LinearProblem(512, 14336, 4096, "int4", 32, 1, dtype=torch.float16)
    assert BACKEND.takes_dense(problem, "A100")
    assert not BACKEND.takes_dense(replace(problem, M=16), "A100")
    assert not BACKEND.takes_dense(replace(problem, rank=17), "A100")


def test_dense_from_falls_as_cublas_gets_faster():
    sizes, found = CudaSizes(4096, (4096,), INT4, 4, 1, 0), []
    for rate in (1, 400, 1200, 1650, 4096):
        found.append(dense_from(sizes, replace(H100, gemm_rate=rate)))
    assert found == sorted(found, reverse=True) and found[0] == NEVER > found[-1]


def test_a_weight_that_fits_nowhere_is_the_dense_copys():
    tiny = replace(A100, shared_limit=16384)
    assert dense_from(CudaSizes(4096, (64,), W16, 4, 16, 0), tiny) == 17


def test_rebuilding_for_cublas_is_weighed_against_the_prefill_kernels():
    sizes = CudaSizes(4096, (4096,), W16, 4, 1, 0)
    assert isinstance(choose(sizes, 512, H100), Prefill)
    assert isinstance(choose(sizes, 1 << 16, H100), Rebuild)


# ---- words


def said(gpu: str, M: int, values: str = "int4", rank: int = 1, adapter_rank: int = 0) -> str:
    group = None if values == "fp16" else 128
    problem = LinearProblem(M, 4096, 4096, values, group, rank, adapter_rank, torch.float16, "cuda")
    return BACKEND.describe(problem, gpu)


def test_explain_says_which_kernel_and_why():
    number, us = r"\d+", r"\d+\.\d us"
    text = said("H200", 256)
    assert re.fullmatch(
        rf"H200: prefill kernel for sm_90a, the weight rebuilt in registers for wgmma, 128 rows x "
        rf"256 tokens a CTA in pairs that share x, 2 consumer warpgroups, {number} weight and "
        rf"{number} token stages, {number} bytes shared, 1 CTAs a multiprocessor, {number} pairs "
        rf"take the K blocks of 16 tiles evenly \(two CTAs share each read of x\); predicted "
        rf"\d+\.\d to {us}, bound by [a-zL2 ]+; chosen by the cost model; a dense fp16 linear by "
        rf"the same model: {us}; preferred to (the [a-z ]+ \({us}\), )+the weight rebuilt dense "
        rf"\({us}\)"
        r"; a dense copy would be faster",
        text,
    ), text


def test_explain_compares_within_the_regime():
    text = said("H100", 40)
    assert "128 rows x 64 tokens a CTA, 2 consumer warpgroups" in text
    assert "the many loop (" in text and ", for all of 17 to 64 tokens; no dense copy" in text
    assert "rebuilt dense" not in text, "for cuBLAS only above 64 tokens"
    alone = said("A100", 40, rank=0)
    assert "preferred" not in alone, "there is no other family"
    assert said("H100", 16).endswith(" us"), "what is decoding is said as before"


def test_explain_names_the_adapter_and_who_is_slower():
    with_z = said("H100", 4096, rank=0, adapter_rank=64)
    assert "kept pairs by sparse wgmma" in with_z
    assert re.search(r"; z = x Q before it: \d+\.\d us; preferred to the many loop", with_z)
    assert with_z.endswith("; no dense copy would be faster")
    rebuilt = said("A100", 4096)
    assert re.search(
        r"the weight rebuilt dense, .*; preferred to the rebuild loop \(\d+\.\d us\), the many "
        r"loop \(\d+\.\d us\); a dense copy would be faster",
        rebuilt,
    )


def test_a_range_is_said_where_there_is_one():
    assert re.search(r"predicted \d+\.\d to \d+\.\d us, bound by", said("A100", 128))
    assert re.search(r"predicted \d+\.\d us, bound by", said("A100", 128, rank=0))
