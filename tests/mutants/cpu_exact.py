"""The faults in the exact CPU kernels: panels of bf16, x in blocks of tokens, the dense weight."""

from __future__ import annotations

from .fault import Fault

EXACT = "tests/backends/cpu/test_cpu_backend.py"
BF16 = "tests/backends/cpu/test_cpu_bf16.py"
ROUNDED = (f"{BF16}::test_only_the_weight_is_rounded",)
INTEGERS = (f"{EXACT}::test_small_integers_are_exact",)
DENSE = (f"{EXACT}::test_dequantize",)

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
        "a panel multiplied by the first inputs of a block of tokens",
        "csrc/cpu/tile.h", "x + at * all + first * tokens", "x + at * all + first", INTEGERS,
    ),
    Fault(
        "every block of tokens with the adapter's inputs of the first one",
        "csrc/cpu/tile.h", "sums[(at + i) * kTileRows + j];", "sums[i * kTileRows + j];", INTEGERS,
    ),
    Fault(
        "a square of the dense weight not wholly turned",
        "csrc/cpu/avx2.cpp", "fours[i + 4], 0x31)", "fours[i + 4], 0x20)", DENSE,
    ),
    Fault(
        "all ranks of an adapter in the dense weight with the Q of the first sixteen",
        "csrc/cpu/dequantize.h", "q = (r * padded) + k_block", "q = k_block",
        (f"{EXACT}::test_dequantize_adds_the_adapter",),
    ),
)  # fmt: skip
