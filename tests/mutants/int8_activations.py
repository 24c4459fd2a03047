"""The faults in the CPU's products with int8 activations (csrc/int8*, csrc/cpu/int8_*).

Most of them leave results plausible: a little less accurate, or wrong for some tokens only.
"""

from __future__ import annotations

from .fault import Fault

INT8 = "tests/backends/cpu/test_cpu_int8.py"
TERMS = "tests/backends/cpu/test_cpu_int8_terms.py"
INTEGERS = (f"{INT8}::test_against_integers_and_fp64",)
BEYOND = (f"{INT8}::test_a_sign_term_beyond_the_panel",)

INT8_ACTIVATIONS = (
    Fault(
        "the step of a block's first piece for all of them",
        "csrc/cpu/int8_scalar.cpp", "float(total) * t.step[at] * scale",
        "float(total) * t.step[at - piece] * scale", INTEGERS,
    ),
    Fault(
        "a shift that is left out",
        "csrc/cpu/int8_scalar.cpp", "int32_t total = weights * int16_t(t.shift[at]);",
        "int32_t total = 0;", INTEGERS,
    ),
    Fault(
        "a scale times a step before the integers",
        "csrc/cpu/int8_scalar.cpp", "float(total) * t.step[at] * scale",
        "float(total) * (t.step[at] * scale)", (f"{INT8}::test_a_scale_times_x_beyond_fp32",),
    ),
    Fault(
        "x v multiplied by the steps of x",
        "csrc/cpu/int8_scalar.cpp", "multiply(panel, p, t, (1 + r) * w.k_blocks + kb,",
        "multiply(panel, p, t, kb,", INTEGERS,
    ),
    Fault(
        "pruned entries that saturate",
        "csrc/cpu/int8_scalar.cpp", "unit > 0x1p-100f && most <= unit * float(kMostUnits) &&",
        "unit > 0x1p-100f &&", BEYOND,
    ),
    Fault(
        "a small sign term in steps of int8 values",
        "csrc/cpu/int8_scalar.cpp", "most >= unit * float(least_units(w.values))", "true",
        (f"{TERMS}::test_a_small_sign_term_beside_int8_values",),
    ),
    Fault(
        "one product for all parts of a fused layer",
        "csrc/int8_bindings.cpp", "way(int8_kernels(run), w.rank, call.tokens)",
        "way(int8_kernels(run), weights.back().rank, call.tokens)",
        (f"{TERMS}::test_fused_parts_with_ranks_that_have_other_products",),
    ),
    Fault(
        "a second panel that is not multiplied",
        "csrc/cpu/int8_scalar.cpp", "if (kMany && f.second)", "if (kMany && false)", BEYOND,
    ),
    Fault(
        "128 more on every integer of a table",
        "csrc/cpu/int8_tables.h", "shift = shift_word(shift - 128);", "shift = shift_word(shift);",
        INTEGERS,
    ),
    Fault(
        "a pruned position that is another one for one of six patterns",
        "csrc/cpu/int8_shuffle.h", "positions(3, 3, 2, 3, 2, 1)", "positions(3, 3, 2, 3, 1, 1)",
        INTEGERS,
    ),
    Fault(
        "128 less on every integer beside int8 values",
        "csrc/cpu/int8_shuffle.h", "int16_t(shift) + 128", "int16_t(shift)", INTEGERS,
    ),
    Fault(
        "the steps of the first of four tokens for all of them",
        "csrc/cpu/int8_shuffle.h", "here = (at + i) * kPieces + word",
        "here = at * kPieces + word", INTEGERS,
    ),
    Fault(
        "the levels of two groups for those of the other two",
        "csrc/cpu/int8_shuffle.h", "_mm256_srli_epi16(four, 4), 0xAA)",
        "_mm256_srli_epi16(four, 4), 0x00)", INTEGERS,
    ),
    Fault(
        "a shift that meets the sum of half of the weights",
        "csrc/cpu/int8_shuffle.h", "weights[s] = _mm256_add_epi8(weights[s], value[s]);",
        "weights[s] = value[s];", INTEGERS,
    ),
    Fault(
        "few tokens whatever the rank",
        "csrc/int8_bindings.cpp", "tokens * (1 + rank) <= k.few_terms", "true",
        (f"{INT8}::test_up_to_how_many_tokens_each_product_runs",),
    ),
    Fault(
        "sums of two integers that leave 8 bits",
        "csrc/cpu/int8_tokens.h", "bits = bits_of(largest_pair(x));", "bits = bits + 0;",
        INTEGERS,
    ),
    Fault(
        "the largest input of a piece among the integers, too",
        "csrc/cpu/int8_tokens.h", "q[at] = 0;", "q[at] = 1;", INTEGERS,
    ),
    Fault(
        "the largest of all inputs as the step of the others",
        "csrc/cpu/int8_tokens.h", "const uint32_t size = i == at ? 0u : bits_of",
        "const uint32_t size = i > kManyPiece ? 0u : bits_of", INTEGERS,
    ),
    Fault(
        "the largest input of a piece for both of the scales that it has",
        "csrc/cpu/int8_product.h", "piece.place / kSpanBytes == p % 2", "piece.place >= 0",
        INTEGERS,
    ),
    Fault(
        "the first scale of a block for all of its inputs",
        "csrc/cpu/int8_product.h", "V::fma(scales[s][b][h], of_x", "V::fma(scales[0][b][h], of_x",
        INTEGERS,
    ),
    Fault(
        "the offset of the weights taken off for one half of a piece twice",
        "csrc/cpu/int8_tokens.h", "total += q[half * kManyPiece / 2 + i];", "total += q[i];",
        INTEGERS,
    ),
    Fault(
        "the two inner weights of a group at each other's place for one of six patterns",
        "csrc/cpu/int8_quad_panel.h", "kSecondAtBack | kCrossed,", "kSecondAtBack,", INTEGERS,
    ),
    Fault(
        "inputs behind the last one that are not 0",
        "csrc/int8_linear.h", "k < padded; ++k) row.get()[k] = 0.0f;",
        "k < padded; ++k) row.get()[k] = 9.0f;", INTEGERS,
    ),
    Fault(
        "the step of a token in the first block for all blocks",
        "csrc/cpu/int16_tile.h", "steps[kb * M + token] = most", "steps[token] = most",
        INTEGERS,
    ),
    Fault(
        "the step of the first of six tokens for all of them",
        "csrc/cpu/int16_tile.h", "const F step = Avx2::broadcast(steps + i);",
        "const F step = Avx2::broadcast(steps);", INTEGERS,
    ),
    Fault(
        "a bound of the sign term without its levels",
        "csrc/cpu/int16_panel.h", "_mm256_max_ps(steps[h], bound[h] * levels);",
        "_mm256_max_ps(steps[h], bound[h] * part);", INTEGERS,
    ),
    Fault(
        "int8 values at most 128 whatever they are",
        "csrc/cpu/int16_panel.h", "if (bytes) largest_values(w, at -",
        "if (bytes) most[0] = most[1] = _mm256_set1_ps(128.0f);\n"
        "      if (false) largest_values(w, at -",
        (f"{TERMS}::test_a_small_sign_term_beside_int8_values",),
    ),
    Fault(
        "a first pruned input that is another one for one of six patterns",
        "csrc/cpu/int16_panel.h", "Lane{}, where_at(kPrunedFirst, 1)", "Lane{}, kFirstAt[1]",
        INTEGERS,
    ),
    Fault(
        "the sign of one group of a pair for both",
        "csrc/cpu/int16_panel.h", "0x40408080 >> 2 * j", "0x80808080 >> 2 * j", INTEGERS,
    ),
    Fault(
        "a token with NaN that stays with 16-bit integers",
        "csrc/int16_linear.cpp", "if (!quantised.finite()[i])", "if (i < 0)",
        (f"{INT8}::test_nan_and_infinity_reach_y_as_in_the_exact_product",),
    ),
    Fault(
        "a token with NaN that stays with the integers",
        "csrc/int8_bindings.cpp", "if (!linear.finite(part.w, i))",
        "if (!linear.finite(part.w, i) && rank > 16)",
        (f"{INT8}::test_nan_and_infinity_reach_y_as_in_the_exact_product",),
    ),
    Fault(
        "numbers whose sums of integers overflow when their step comes in",
        "csrc/cpu/int8_tokens.h", "kTooLarge = 0x75800000u", "kTooLarge = 0x7F800000u",
        (f"{INT8}::test_small_and_large_numbers",),
    ),
    Fault(
        "a call's first tokens for all parts of it",
        "csrc/linear.h", "static_cast<const uint8_t*>(x) + first * w.in_features * bytes",
        "static_cast<const uint8_t*>(x) + 0 * w.in_features * bytes",
        (f"{INT8}::test_a_call_of_more_tokens_than_are_run_at_once",),
    ),
)  # fmt: skip
