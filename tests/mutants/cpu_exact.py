"""The faults in the exact CPU kernels: panels of bf16, tiles, x in blocks of tokens, the dense
weight."""

from __future__ import annotations

from .fault import Fault

EXACT = "tests/backends/cpu/test_cpu_backend.py"
BF16 = "tests/backends/cpu/test_cpu_bf16.py"
AMX = "tests/backends/cpu/test_cpu_amx.py"
ROUNDED = (f"{BF16}::test_only_the_weight_is_rounded",)
INTEGERS = (f"{EXACT}::test_small_integers_are_exact",)
DENSE = (f"{EXACT}::test_dequantize",)
EXECUTED = (f"{AMX}::test_its_instructions_compute_what_the_emulated_ones_do",)

CPU_EXACT = (
    Fault(
        "both halves of a bf16 panel with the factors of the first",
        "csrc/cpu/avx512_bf16.cpp", "V::load(u[h] + r * kRows)", "V::load(u[0] + r * kRows)",
        ROUNDED,
    ),
    Fault(
        "the blocks of a panel on top of each other",
        "csrc/cpu/tile.h", "kb + i, panel + i * kBlockCells * kTileRows)", "kb + i, panel)",
        ROUNDED,
    ),
    Fault(
        "tiles of both row blocks with the weight of the first",
        "csrc/cpu/amx.h", "panel + c * kTileRows + kRows", "panel + c * kTileRows", ROUNDED,
    ),
    Fault(
        "the sums of a smaller block of tokens left behind a row of nobody",
        "csrc/cpu/amx.h", "sums + blocks_.begin(b) * kTileRows, sums",
        "sums + b * blocks_.largest() * kTileRows, sums",
        (f"{BF16}::test_rows_depend_on_their_own_token_only",),
    ),
    Fault(
        "the second block of tokens multiplied by the x of the first, in the CPU's registers alone",
        "csrc/cpu/avx512_amx.cpp", "_tile_dpbf16ps(2, 5, 6)", "_tile_dpbf16ps(2, 4, 6)", EXECUTED,
    ),
    Fault(
        "tile registers that are not released",
        "csrc/cpu/avx512_amx.cpp", "{ _tile_release(); }", "{}", EXECUTED,
    ),
    Fault(
        "a panel multiplied by the first inputs of a block of tokens",
        "csrc/cpu/tile.h", "x + at * all + first * tokens", "x + at * all + first", INTEGERS,
    ),
    Fault(
        "every block of tokens with the adapter's inputs of the first one",
        "csrc/cpu/tile.h", "sums[(at + i) * kTileRows + j];", "sums[i * kTileRows + j];", INTEGERS,
    ),
    Fault(
        "a square of the dense weight not wholly turned",
        "csrc/cpu/avx2.h", "fours[i + 4], 0x31)", "fours[i + 4], 0x20)", DENSE,
    ),
    Fault(
        "a second kept value that is put at the first pruned position",
        "csrc/cpu/stream.h", "kSecond[4] = {0, 27, 25, 24}", "kSecond[4] = {0, 27, 24, 25}",
        INTEGERS,
    ),
    Fault(
        "where signs would be, asked of a weight that has none",
        "csrc/cpu/rebuild.h", "if (signs) return;", "if (signs || !signs) return;",
        (f"{EXACT}::test_against_fp64",),
    ),
    Fault(
        "all ranks of an adapter in the dense weight with the Q of the first sixteen",
        "csrc/cpu/dequantize.h", "q = (r * padded) + k_block", "q = k_block",
        (f"{EXACT}::test_dequantize_adds_the_adapter",),
    ),
)  # fmt: skip
