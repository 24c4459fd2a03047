"""The faults in what serves many tokens: Hopper's kernels (csrc/cuda/prefill.cu) and how they are
launched, and the kernels of mma.sync that rebuild W in registers (csrc/cuda/rebuild.cuh).
"""

from __future__ import annotations

from .fault import Fault

PREFILL = "tests/backends/cuda/test_cuda_prefill.py"
REBUILD = "tests/backends/cuda/test_cuda_rebuild.py"


def fused(kernel: str) -> tuple[str, ...]:
    """Three fused projections with an adapter and a bias, in small integers."""
    return (f"{PREFILL}::test_fused_projections_are_one_launch[{kernel}]",)


ONE, BOTH = fused("one_t64_rank0_planes1-whole"), fused("both_t64_rank1_planes1-whole")
REBUILT, SHARED = fused("rebuild_t64_rank1_planes1-tail"), fused("one_t128_rank0_planes1-tail")
PAIR = fused("one_t256_rank0_planes1-both")
SCALES = (f"{PREFILL}::test_scales_outside_of_fp16",)
LAUNCHED = ("tests/backends/cuda/test_cuda_prefill_launch.py",)
POWERS = ("tests/backends/cuda/test_cuda_powers.py",)
LANES, CODES, RANKS = (
    (f"{REBUILD}::test_every_pattern_and_sign_at_every_lane[{kernel}-dtype0]",)
    for kernel in ("1-fp16", "1-int8", "2-fp16")
)
TOGETHER, PLANES = (
    (f"{REBUILD}::test_fused_projections_are_one_launch[{signs}]",) for signs in ("1-1", "3-3")
)

MANY_TOKENS = (
    # Products and rings of Hopper's kernels
    Fault(
        "operands made anew while products read them",
        "csrc/cuda/*", "    products_wait<1>();  // Those two groups before are over.\n", "",
        REBUILT,
    ),
    Fault(
        "sums read while the last products add to them",
        "csrc/cuda/*", "    products_wait<0>();\n    give_tokens_back(last_tokens);",
        "    give_tokens_back(last_tokens);", ONE,
    ),
    Fault(
        "sums of the adapter read while products add to them",
        "csrc/cuda/*", "        products_commit();\n        products_wait<0>();\n",
        "        products_commit();\n", ONE,
    ),
    Fault(
        "activations that are not waited for",
        "csrc/cuda/*", "    if (kStep % 2 == 0 && kIssue == 0) wait_for_tokens();\n", "", REBUILT,
    ),
    Fault(
        "weights that are not waited for",
        "csrc/cuda/*", "      mbarrier_wait(weights.full, weights.parity);\n", "", REBUILT,
    ),
    Fault(
        "activations fetched over those that are read",
        "csrc/cuda/*",
        "left = 2 * k_blocks; left > 0; --left) {\n"
        "      mbarrier_wait(ring.full + Traits::kEmpty, ring.parity);",
        "left = 2 * k_blocks; left > 0; --left) {", REBUILT,
    ),
    Fault(
        "weights fetched over those that are read",
        "csrc/cuda/*",
        "left = walk.k_blocks(params, cluster); left > 0; --left) {\n"
        "      mbarrier_wait(ring.full + Traits::kEmpty, ring.parity);",
        "left = walk.k_blocks(params, cluster); left > 0; --left) {", REBUILT,
    ),
    Fault(
        "activations given back before the products are over",
        "csrc/cuda/*",
        "    products_wait<1>();  // Those two groups before are over.\n"
        "    if (kStep % 2 == 1 && kIssue == 0 && (kStep > 1 || last_tokens)) "
        "give_tokens_back(last_tokens);\n",
        "    if (kStep % 2 == 1 && kIssue == 0 && (kStep > 1 || last_tokens)) "
        "give_tokens_back(last_tokens);\n"
        "    products_wait<1>();\n", REBUILT,
    ),
    Fault(
        "weights given back two steps early",
        "csrc/cuda/*", "if (kStep == kSteps - 1 && kIssue == Operands::kIssues - 1) {",
        "if (kStep == 1 && kIssue == Operands::kIssues - 1) {", REBUILT,
    ),
    Fault(
        "weights given back before all lanes have read them",
        "csrc/cuda/*", "      __syncwarp();\n      if (operands.is_first_lane()) mbarrier_arrive(",
        "      if (operands.is_first_lane()) mbarrier_arrive(", REBUILT,
    ),
    Fault(
        "one arrival too few for a stage of weights",
        "csrc/cuda/*", "mbarrier_init(weights + Traits::kEmpty, Traits::kConsumerWarps)",
        "mbarrier_init(weights + Traits::kEmpty, Traits::kConsumerWarps - 1)", REBUILT,
    ),
    Fault(
        "a stage of activations given back by one CTA of a pair",
        "csrc/cuda/*", "Traits::kPair * Traits::kConsumerWarps);", "Traits::kConsumerWarps);",
        PAIR,
    ),
    Fault(
        "bytes of v that a stage of weights does not count",
        "csrc/cuda/*", "Traits::kPairs * shared.block_bytes + ranks * kTokenRow;",
        "Traits::kPairs * shared.block_bytes;", REBUILT,
    ),
    Fault(
        "bytes of x that a stage of activations does not count",
        "csrc/cuda/*", "Traits::kBoxBytes);\n      if constexpr (Traits::kPair == 1)",
        "Traits::kBoxBytes - 128);\n      if constexpr (Traits::kPair == 1)", ONE,
    ),
    Fault(
        "barriers that copies do not know of",
        "csrc/cuda/*", "  mbarriers_are_ready();\n  publish_to_async_proxy();\n", "", ONE,
    ),
    Fault(
        "x fetched before the kernel ahead has written it",
        "csrc/cuda/*", "  wait_for_predecessor();\n  PrefillRing ring", "  PrefillRing ring", ONE,
    ),
    Fault(
        "y written before the kernel ahead has ended",
        "csrc/cuda/*", "    wait_for_predecessor();  // before anything is written", "    //", ONE,
    ),
    Fault(
        "weights of a row pair behind the last",
        "csrc/cuda/*", "if (pair < last) from += pair_bytes",
        "if (pair <= last) from += pair_bytes", ONE,
    ),
    Fault(
        "eights of tokens half as far apart",
        "csrc/cuda/*", "0x40000040u", "0x40000020u", ONE,
    ),
    # Pairs of CTAs
    Fault(
        "x for the first CTA of a pair alone",
        "csrc/cuda/*", '"h"(uint16_t(3))', '"h"(uint16_t(1))', PAIR,
    ),
    Fault(
        "the same tokens from both CTAs of a pair",
        "csrc/cuda/*", "place.first_token + rank_in_pair * kBoxTokens, ring.full",
        "place.first_token, ring.full", PAIR,
    ),
    Fault(
        "a pair that begins before the other CTA has its barriers",
        "csrc/cuda/*", "  else\n    cluster_barrier();", "  else\n    __syncthreads();", PAIR,
    ),
    Fault(
        "a CTA that ends while the other still arrives there",
        "csrc/cuda/*", "  if constexpr (Traits::kPair == 2) cluster_barrier();\n", "", PAIR,
    ),
    # The signs' second product
    Fault(
        "v * x is not waited for",
        "csrc/cuda/*",
        "    if constexpr (Traits::kKind == kPrefillBoth)\n"
        "      mbarrier_wait(tokens.full + Traits::kProducts, tokens.parity);\n",
        "", BOTH,
    ),
    Fault(
        "v * x made before x is there",
        "csrc/cuda/*", "      mbarrier_wait(ring.full, ring.parity);\n      if (of_x) {",
        "      if (of_x) {", BOTH,
    ),
    Fault(
        "v * x that the products do not see",
        "csrc/cuda/*", "        publish_to_async_proxy();\n", "", BOTH,
    ),
    Fault(
        "v * x of another projection's v",
        "csrc/cuda/*", "(int64_t(place.part) * params.num_k_blocks + first_k_block) * kTokenRow +",
        "int64_t(first_k_block) * kTokenRow +", BOTH,
    ),
    Fault(
        "v * x of a piece of x that the swizzle has moved",
        "csrc/cuda/*", "16 * (piece ^ token % 8)", "16 * piece", BOTH,
    ),
    Fault(
        "the metadata of the other step",
        "csrc/cuda/*", "sparse<kStep % 2>(T(), sums, kept",
        "sparse<(kStep + 1) % 2>(T(), sums, kept", ONE,
    ),
    Fault(
        "signs at the kept places",
        "csrc/cuda/*", "b + Traits::kBoxBytes / 16, pruned[kStep / 2]",
        "b + Traits::kBoxBytes / 16, metadata[kStep / 2]", BOTH,
    ),
    # The weight rebuilt for Hopper
    Fault(
        "the odd lanes' table of selectors",
        "csrc/cuda/*", "t % 2 ? 8 * kOddEntry : 0", "t % 2 ? 8 * (kOddEntry - 1) : 0", REBUILT,
    ),
    Fault(
        "odd lanes that keep the even ones' half",
        "csrc/cuda/*", "to[h + 2] = is_even_lane() ? got : own",
        "to[h + 2] = is_even_lane() ? own : got", REBUILT,
    ),
    Fault(
        "the v of another projection",
        "csrc/cuda/*",
        "(int64_t(place.part) * ranks * params.num_k_blocks + first_k_block) * kTokenRow;",
        "int64_t(first_k_block) * kTokenRow;", REBUILT,
    ),
    Fault(
        "u without its row's power",
        "csrc/cuda/*", "if constexpr (!kPowers) return choose_bytes(near, far, 0x5410);",
        "return choose_bytes(near, far, 0x5410);", REBUILT,
    ),
    Fault(
        "sums divided by the power of the tile's other row",
        "csrc/cuda/*", "operands.rows.inverse(i / 2 % 2)", "operands.rows.inverse(i % 2)", ONE,
    ),
    Fault(
        "an adapter's products divided by the row's power",
        "csrc/cuda/*",
        "    if constexpr (PrefillRows<Traits>::kPowers) {\n"
        "#pragma unroll\n"
        "      for (int i = 0; i < Traits::kTokens / 2; ++i) "
        "sums[i] *= operands.rows.inverse(i / 2 % 2);\n"
        "    }\n"
        "    if (params.adapter_steps && first + count == params.num_k_blocks)\n"
        "      add_adapter(place, thread / 32, thread % 32);\n",
        "    if (params.adapter_steps && first + count == params.num_k_blocks)\n"
        "      add_adapter(place, thread / 32, thread % 32);\n"
        "    if constexpr (PrefillRows<Traits>::kPowers) {\n"
        "#pragma unroll\n"
        "      for (int i = 0; i < Traits::kTokens / 2; ++i) "
        "sums[i] *= operands.rows.inverse(i / 2 % 2);\n"
        "    }\n", ONE,
    ),
    Fault(
        "the z of another projection",
        "csrc/cuda/*", "column = place.part * 16 * params.adapter_steps;", "column = 0;", ONE,
    ),
    Fault(
        "an adapter added by every share of a tile",
        "csrc/cuda/*", "if (params.adapter_steps && first + count == params.num_k_blocks)",
        "if (params.adapter_steps)", SHARED,
    ),
    # Stores and shares of tiles
    Fault(
        "staged tokens overwritten while other lanes may read them",
        "csrc/cuda/*", "  __syncwarp();  // The tokens before have been read.\n", "", ONE,
    ),
    Fault(
        "staged tokens read while other lanes may not have stored them",
        "csrc/cuda/*", "  __syncwarp();\n  const int token = first_token",
        "  const int token = first_token", ONE,
    ),
    Fault(
        "shares of both CTAs of a pair in one slot",
        "csrc/cuda/*", ": 1)) * params.cluster_ctas + rank;", ": 1)) * params.cluster_ctas;", PAIR,
    ),
    Fault(
        "both shares of a cluster in one slot",
        "csrc/cuda/*", "(2 * cluster + (first_k_block > 0 ? 0 : 1))", "(2 * cluster)", SHARED,
    ),
    Fault(
        "the other slot of the cluster that begins a tile",
        "csrc/cuda/*", "prefill_slot(params, cluster, unit - first, rank)",
        "prefill_slot(params, cluster, unit, rank)", SHARED,
    ),
    Fault(
        "the owner of a K-block counted by the shorter shares",
        "csrc/cuda/*", "params.tail_more * (params.tail_share + 1);",
        "params.tail_more * params.tail_share;", SHARED,
    ),
    Fault(
        "shares added to a tile that one cluster has stored",
        "csrc/cuda/*", "if (first_tail_unit(params, cluster + 1) >= end) return;",
        "if (first_tail_unit(params, cluster + 1) > end) return;", SHARED,
    ),
    Fault(
        "a bias that the sum of shares lacks",
        "csrc/cuda/*",
        "  load_bias(bias, params, first_row, place.end_row, lane);\n  store_tokens<T>",
        "  bias[0] = bias[1] = 0.0f;\n  store_tokens<T>", SHARED,
    ),
    Fault(
        "shares added while they are still written",
        "csrc/cuda/*", "  wait_for_predecessor();\n  const int warp = __shfl_sync",
        "  const int warp = __shfl_sync", SHARED,
    ),
    Fault(
        "a last band as wide as the others",
        "csrc/cuda/*", "min(kBand, params.token_tiles - kBand * int(band))", "unsigned(kBand)",
        (f"{PREFILL}::test_bands_of_token_tiles",),
    ),
    # Launches
    Fault(
        "boxes of all tokens for each CTA of a pair",
        "slab_kernels/backends/cuda/prefill_launch.py", "plan.tokens // plan.pair, matrix.dtype",
        "plan.tokens, matrix.dtype", LAUNCHED,
    ),
    Fault(
        "powers of rows that no kernel is told",
        "slab_kernels/backends/cuda/prefill_launch.py", "args.powers = state.powers.data_ptr()",
        "args.powers = 0", SCALES,
    ),
    Fault(
        "a weight without powers of its rows",
        "slab_kernels/backends/cuda/layout.py",
        "powers = torch.cat([_powers(part) for part in parts])", "powers = None", POWERS,
    ),
    # The weight rebuilt for mma.sync
    Fault(
        "activations as if they lay without a swizzle",
        "csrc/cuda/*", "(block.tokens ^ (kNumber % 4 << 5))", "(block.tokens + (kNumber % 4 << 5))",
        LANES,
    ),
    Fault(
        "the selectors of the tile's other row",
        "csrc/cuda/*", "selectors_at<1>(tables, word, read.selector_shift)",
        "selectors_at<0>(tables, word, read.selector_shift)", LANES,
    ),
    Fault(
        "the scale of the group before, where W is rebuilt",
        "csrc/cuda/rebuild.cuh", "kStep >> (params.group_steps >> 1)",
        "kStep >> (params.group_steps >> 2)", CODES,
    ),
    Fault(
        "u of the tile's other row",
        "csrc/cuda/*", "T::multiply(far, block.u[2 * m + 1])", "T::multiply(far, block.u[2 * m])",
        LANES,
    ),
    Fault(
        "u of the tile's other row, of any rank",
        "csrc/cuda/*", "two[m][i][0] >> 16, u_r[2 * m + i % 2]", "two[m][i][0] >> 16, u_r[2 * m]",
        RANKS,
    ),
    Fault(
        "sums divided by the power of the tile's other row, by mma.sync",
        "csrc/cuda/*", "inverse_power(__uint_as_float(words[2 * m + i / 2]))",
        "inverse_power(__uint_as_float(words[2 * m + i % 2]))", TOGETHER,
    ),
    Fault(
        "tables read before all threads have filled them",
        "csrc/cuda/*", "    fill_tables();\n    __syncthreads();", "    fill_tables();", TOGETHER,
    ),
    Fault(
        "the middle level of three planes that two have",
        "csrc/cuda/*", "planes == 2 ? kTwo : kThree", "planes == 3 ? kTwo : kThree", PLANES,
    ),
)  # fmt: skip
