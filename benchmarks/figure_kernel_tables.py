"""Tables of what kernels and the format allow: machine code, bits, predictions.

KERNEL_TABLES stands beside TABLES of figure_tables.py; `figures.py` writes both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from figure_tables import Row, markdown, matching, read, rounded, the_row

SHOWN_ARCHITECTURES = ("sm_80", "sm_89", "sm_90a")
# By the number of tokens up to which it serves.
SHOWN_KERNELS = {
    4: "narrow_fp16_{}_one",
    16: "wide_fp16_{}_one_t16",
    64: "linear_fp16_{}_one_t64",
}
DECODE = 16  # tokens of decoding at most
BLOCK_WEIGHTS = 128  # weights of one lane in a block of 32 rows × 128 inputs


def several(numbers: Sequence[float]) -> str:
    """The numbers with slashes between them, or one if they are all equal."""
    listed = [f"{number:.2f}" for number in numbers]
    return listed[0] if len(set(numbers)) == 1 else " / ".join(listed)


def instruction_budget() -> str:
    """Warp instructions per weight in the main loop of the CUDA kernels, by pipe."""
    rows = read("instruction-budget.json")["kernels"]
    body = []
    for values in ("w16", "int8", "int4"):
        for tokens, kernel in SHOWN_KERNELS.items():
            counts = [
                the_row(rows, architecture=a, kernel=kernel.format(values))["per_k_block"]
                for a in SHOWN_ARCHITECTURES
            ]
            cells = [
                several([count[pipe] / BLOCK_WEIGHTS for count in counts])
                for pipe in ("tensor", "alu", "fma", "shared", "all")
            ]
            body.append((values, str(tokens), *cells))
    head = ("values", "tokens", "tensor", "ALU", "FMA pipe", "shared memory", "all issued")
    return markdown(head, body)


def budget_rows() -> list[Row]:
    """What decoding up to four tokens takes of each resource, by GPU and value type."""
    return matching(read("instruction-budget.json")["budgets"], tokens=4)


def issue_rates() -> str:
    """What a GPU can issue per weight at full bandwidth, and the share that decoding takes."""
    rows = budget_rows()
    kinds = {row["values"]: row["bits_per_weight"] for row in rows}
    body = []
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        cells = []
        for values in kinds:
            row = the_row(rows, gpu=gpu, values=values)
            used, clocks = row["clocks_used"], row["clocks_of_memory"]
            nearest = max(used, key=used.__getitem__)
            share = used[nearest] / clocks
            room = f"{clocks / BLOCK_WEIGHTS:.1f} / {clocks / BLOCK_WEIGHTS / 2:.1f}"
            limit = f"{nearest} {share:.0%}"
            cells.append(f"{room}: " + (f"bytes, {limit}" if share <= 1 else f"**{limit}**"))
        body.append((gpu, *cells))
    return markdown(("GPU", *(f"{name}, {bits:g} bits" for name, bits in kinds.items())), body)


def predicted(gpu: str, many: bool) -> str:
    """Predicted speed-up over dense fp16, least and greatest over the shapes; * is rebuilt.

    many: for more than 16 tokens, at both ends of a prediction that is a range.
    """
    rows = matching(read("prediction.json")["rows"], gpu=gpu)
    tokens = sorted({row["m"] for row in rows if (row["m"] > DECODE) == many})
    body = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        body.append((kind, *(predicted_cell(matching(rows, kind=kind, m=m)) for m in tokens)))
    return markdown(("S", *(f"M = {m}" for m in tokens)), body)


def predicted_cell(here: Sequence[Row]) -> str:
    """The least and the greatest ratio, where they are ranges at both of their ends."""
    ends = []
    for ratio in ("ratio", "best_ratio"):
        found = [row[ratio] for row in here]
        ends.append(f"{min(found):.2f}–{max(found):.2f}")
    star = "*" if any(row["route"] == "rebuilt" for row in here) else ""
    return " to ".join(dict.fromkeys(ends)) + star


def triton_rows() -> list[Row]:
    """The main loops of the Triton kernels, one row for each tile, weight and architecture."""
    return read("triton-instructions.json")["rows"]


def triton_instructions() -> str:
    """Warp instructions per weight in the main loop of the Triton kernels, by architecture."""
    rows = triton_rows()
    architectures = list(dict.fromkeys(row["architecture"] for row in rows))
    columns = ("block_n", "block_m", "block_k", "values", "activations", "planes")
    cases = {tuple(row[c] for c in columns): None for row in rows}
    body = []
    for case in sorted(cases, key=lambda case: (case[5], case[4] == "fp32", case)):
        here = matching(rows, **dict(zip(columns, case, strict=True)))
        counts = {row["architecture"]: rounded(row["per_weight"], 1) for row in here}
        tile = " × ".join(map(str, case[:3]))
        body.append((tile, *map(str, case[3:]), *(counts.get(a, "–") for a in architectures)))
    return markdown(
        ("out_features × tokens × inputs", "S", "activations", "planes", *architectures), body
    )


def sparse_rows() -> list[Row]:
    """The main loops of Triton's kernel for sparse tensor cores."""
    return read("triton-instructions.json")["sparse"]


def triton_sparse() -> str:
    """Warp instructions per weight in the main loop of that kernel, by architecture."""
    rows = sparse_rows()
    architectures = list(dict.fromkeys(row["architecture"] for row in rows))
    columns = ("planes", "tokens", "activations", "values")
    body = []
    for case in sorted({tuple(row[c] for c in columns) for row in rows}, key=shown_order):
        here = matching(rows, **dict(zip(columns, case, strict=True)))
        counts = {row["architecture"]: rounded(row["per_weight"], 2) for row in here}
        body.append((*map(str, case[::-1]), *(counts.get(a, "–") for a in architectures)))
    return markdown(("S", "activations", "tokens", "planes", *architectures), body)


def shown_order(case: tuple[int, int, str, str]) -> tuple[bool, int, int, bool, int]:
    """One plane first, then by planes, tokens, activations and the bits of the values."""
    planes, tokens, activations, values = case
    return planes != 1, planes, tokens, activations == "bf16", -int(values.lstrip("fpint"))


SCHEDULERS = 4  # of one multiprocessor; each issues one warp instruction per clock


def triton_bounds() -> str:
    """The greatest speed-up that bytes and the issue rate allow at 8 tokens or fewer."""
    from slab_kernels.backends.cuda.gpus import GPUS

    decoding = matching(sparse_rows(), activations="fp16", planes=1, tokens=8)
    kinds = {row["values"]: row["bits_per_weight"] for row in budget_rows()}
    body = []
    for values, stored in (
        ("fp16", kinds["w16"]),
        ("int8", kinds["int8"]),
        ("int4", kinds["int4"]),
    ):
        cells = []
        for gpu in GPUS:
            architecture = "sm_{}{}".format(*gpu.capability)
            count = the_row(decoding, values=values, architecture=architecture)["per_weight"]
            issued = SCHEDULERS * gpu.multiprocessors * gpu.clock  # warp instructions per ns
            read_dense = 2 / gpu.bandwidth  # ns for the two bytes of a dense fp16 weight
            cells.append(rounded(min(16 / stored, read_dense / (count / 32 / issued)), 2))
        body.append((values, *cells))
    return markdown(("S", *(gpu.name for gpu in GPUS)), body)


def group_error() -> str:
    """Share of the variance that a 2:4 group loses, by value type, planes and kind of weight."""
    rows = read("group-error.json")["rows"]
    cases = {(row["bits"], row["values"], row["planes"]): None for row in rows}
    body = []
    for bits, values, planes in sorted(cases):
        here = matching(rows, values=values, planes=planes)
        lost = {row["weights"]: f"{rounded(100 * row['lost'], 1)} %" for row in here}
        kind = f"2:4, {values}" if planes else f"dense {values}, round to nearest"
        body.append((f"{bits:g}", kind, str(planes or "–"), lost["Gaussian"], lost["Student-t"]))
    head = ("bits", "kept values", "planes", "Gaussian weights", "Student-t weights")
    return markdown(head, body)


def stored_bits(values: str, group_size: int | None = None, planes: int = 1) -> float:
    """Bits per weight without factors, from the sizes of the packed tensors of a large layer."""
    from slab_kernels.format import PackedLayout

    layout = PackedLayout(4096, 4096, values, group_size, rank=1, planes=planes)
    return layout.bits_per_weight(factors=False)


def bits_by_type() -> str:
    """Stored bits per weight without factors, by value type and planes."""
    body = []
    for values in ("fp16", "bf16", "int8", "int4", "int3"):
        group_size = 128 if values.startswith("int") else None
        name = values + (", groups of 128" if group_size else "")
        planes = (stored_bits(values, group_size, count) for count in (1, 2, 3))
        body.append((name, *(f"{bits:g}" for bits in planes)))
    return markdown(("values", "one plane", "two planes", "three planes"), body)


def presets() -> str:
    """The settings of every preset of `compress`, and its bits for a large layer."""
    from slab_kernels.compression.presets import DEFAULT, PRESETS

    rows = []
    for name, preset in PRESETS.items():
        group_size = 128 if preset.values.startswith("int") else None
        rows.append(
            (
                f"`{name}`" + (", the default" if name == DEFAULT else ""),
                preset.meaning,
                preset.values,
                str(preset.planes),
                preset.embeddings,
                "packed" if preset.head else "dense",
                f"{stored_bits(preset.values, group_size, preset.planes):g}",
            )
        )
    head = ("preset", "goal", "values", "planes", "embeddings", "head", "bits per weight")
    return markdown(head, rows)


PREDICTED_GPUS = ("A100", "RTX 3090", "RTX 4090", "H100", "H200", "RTX 5090")

KERNEL_TABLES: dict[str, Callable[[], str]] = {
    "instruction-budget": instruction_budget,
    "issue-rates": issue_rates,
    "triton-instructions": triton_instructions,
    "triton-sparse": triton_sparse,
    "triton-bounds": triton_bounds,
    "group-error": group_error,
    "bits-by-type": bits_by_type,
    "presets": presets,
    **{
        f"predicted{'-many' if many else ''}-{gpu.lower().replace(' ', '-')}": functools.partial(
            predicted, gpu, many
        )
        for gpu in PREDICTED_GPUS
        for many in (False, True)
    },
}
