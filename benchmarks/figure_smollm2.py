"""The tables of SmolLM2-135M-Instruct, from methods-smollm2.json."""

from __future__ import annotations

from figure_tables import METHOD_NAMES, Row, markdown, read, rounded

FILE = "methods-smollm2.json"
# Name in the README's table -> label in the file.
KEY_ROWS = {
    "`--preset balanced`, the default": "preset balanced",
    "`--preset small`": "preset small",
    "`--preset exact`": "preset exact",
    "SLaB as published": "slab-paper",
    "SparseGPT, 2:4": "sparsegpt",
    "GPTQ, 4 bits, groups of 64": "gptq int4, groups of 64",
    "GPTQ, 3 bits, groups of 32": "gptq int3, groups of 32",
    "nearest, 4 bits, groups of 64": "rtn int4, groups of 64",
}
INTEGER_NAMES = {
    f"{name}, {bits} bits, groups of {size}": f"{short} int{bits}, groups of {size}"
    for bits in (4, 3)
    for size in (32, 64, 128)
    for name, short in (("GPTQ", "gptq"), ("round to nearest", "rtn"))
}
PRESET_NAMES = {f"`--preset {name}`": f"preset {name}" for name in ("small", "balanced", "exact")}
ALL_NAMES = PRESET_NAMES | METHOD_NAMES | INTEGER_NAMES
ALL_NAMES |= {f"{name}, matched": f"{label}, matched" for name, label in ALL_NAMES.items()}


def by_label() -> dict[str, Row]:
    return {row["label"]: row for row in read(FILE)["rows"]}


def megabytes(size: float) -> str:
    return rounded(size / 1e6, 1)


def key_rows() -> str:
    """What a user chooses between, and what it costs."""
    whole, found = read(FILE), by_label()
    rows = [("dense, fp16", "16.00", megabytes(whole["bytes"]), f"{whole['dense']:.2f}", "0", "–")]
    for name, label in KEY_ROWS.items():
        if label in found:
            row = found[label]
            rows.append(
                (
                    name,
                    rounded(row["bits_per_weight"], 2),
                    megabytes(row["bytes"]),
                    f"{row['perplexity']:.2f}",
                    f"{row['kl']:.3f}",
                    f"{100 * row['top1']:.1f} %",
                )
            )
    head = ("", "bits per weight", "whole model, MB", "perplexity", "KL", "same next token")
    return markdown(head, rows)


def all_rows() -> str:
    """Every row, fewest bits first."""
    found = by_label()
    named = [(name, found[label]) for name, label in ALL_NAMES.items() if label in found]
    body = []
    for name, row in sorted(named, key=lambda pair: pair[1]["bits_per_weight"]):
        heldout, calibration = row["heldout_error"], row["calibration_error"]
        body.append(
            (
                name,
                rounded(row["bits_per_weight"], 2),
                megabytes(row["bytes"]),
                f"{row['perplexity']:.2f}",
                f"{row['kl']:.4f}",
                f"{row['kl_p99']:.2f}",
                f"{100 * row['top1']:.1f}",
                f"{heldout:.3f}" if heldout else "–",
                f"{heldout / calibration:.2f}" if heldout and calibration else "–",
                f"{row['cpu_seconds']:.0f}",
                rounded(row["peak_bytes"] / 1e9, 1),
            )
        )
    head = (
        "method", "bits", "MB", "perplexity", "KL", "99 %", "top-1 %", "held-out error",
        "÷ calibration", "CPU s", "GB",
    )  # fmt: skip
    return markdown(head, body)


SMOLLM2_TABLES = {"smollm2": key_rows, "smollm2-all": all_rows}
