"""The faults in reading what other libraries have quantised."""

from __future__ import annotations

from .fault import Fault

TWINS = (
    "tests/models/test_quantised_sources.py::"
    "test_a_quantised_folder_gives_the_bytes_of_its_dense_twin",
)
DAMAGE = ("tests/models/test_quantised_sources.py::test_damage_is_told_in_one_sentence",)
FILES = "slab_kernels/models/quantised/*.py"

QUANTISED = (
    Fault(
        "zero points of GPTQ less by one",
        FILES, "zeros = zeros + 1 & (1 << bits) - 1", "zeros = zeros & (1 << bits) - 1", TWINS,
    ),
    Fault(
        "a zero point of GPTQ that does not wrap",
        FILES, "zeros = zeros + 1 & (1 << bits) - 1", "zeros = zeros + 1", TWINS,
    ),
    Fault(
        "blocks of FP8 with rows and columns exchanged",
        FILES, "dense, (rows, columns) = weight.float(), block",
        "dense, (columns, rows) = weight.float(), block", TWINS,
    ),
    Fault(
        "outputs of AWQ in the order of their places",
        FILES, "PLACES = [0, 4, 1, 5, 2, 6, 3, 7]", "PLACES = [0, 2, 4, 6, 1, 3, 5, 7]", TWINS,
    ),
    Fault(
        "inputs of GPTQ in groups by their place",
        FILES, "    if g_idx is None:\n        g_idx = torch.arange(codes",
        "    if True:\n        g_idx = torch.arange(codes", TWINS,
    ),
    Fault(
        "zero points of compressed-tensors without their offset",
        FILES, "[:, : self.N].T - offset", "[:, : self.N].T", TWINS,
    ),
    Fault(
        "zero points that are missing taken for none",
        FILES, "if name not in entries:", "if False:", DAMAGE,
    ),
)  # fmt: skip
