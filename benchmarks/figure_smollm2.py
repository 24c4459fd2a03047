"""The tables and the picture of SmolLM2-135M-Instruct, from methods-smollm2.json."""

from __future__ import annotations

from typing import Any

from figure_pictures import (
    BLUE,
    FAMILIES,
    GREY,
    INK,
    ORANGE,
    Picture,
    as_svg,
    figure,
    plain_numbers,
)  # fmt: skip
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
PANELS = ((3.0, 5.9), (8.8, 10.6))  # stored bits per weight of the picture's two halves


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


PICTURED = FAMILIES | {"preset": ("presets of slab", BLUE, "D", "")}


def picture_rows() -> list[Row]:
    """Family, label, bits and KL of every row."""
    columns = ("family", "label", "bits_per_weight", "kl")
    return [{c: row[c] for c in columns} for row in read(FILE)["rows"]]


def picture(found: list[dict[str, Any]]) -> str:
    """KL to the dense model against stored bits, both scales from the file."""
    drawn, axes = figure(9.6, 4.4, columns=2, width_ratios=(3, 2), sharey=True)
    for ax, (low, high) in zip(axes, PANELS, strict=True):
        for family, (name, ink, marker, line) in PICTURED.items():
            rows = [
                r for r in found if r["family"] == family and low <= r["bits_per_weight"] < high
            ]
            rows.sort(key=lambda r: r["bits_per_weight"])
            ax.plot(
                [r["bits_per_weight"] for r in rows], [r["kl"] for r in rows],
                linestyle=line or "none", color=ink, marker=marker, label=name if rows else None,
                linewidth=1.2, markersize=9 if family == "preset" else 6,
            )  # fmt: skip
        for row in found:
            if row["label"] in ("slab-paper", "sparsegpt") and low <= row["bits_per_weight"] < high:
                ax.annotate(
                    row["label"], (row["bits_per_weight"], row["kl"]), xytext=(6, 4),
                    textcoords="offset points", color=ORANGE, fontsize=8.5,
                )  # fmt: skip
        ax.set_yscale("log")
        plain_numbers(ax.yaxis, (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5))
        ax.set_xlim(low, high)
        ax.set_xlabel("stored bits per weight", color=GREY, fontsize=9.5)
    axes[0].set_ylabel("KL to the dense model, nats per token", color=GREY, fontsize=9.5)
    axes[0].legend(fontsize=8.5, frameon=False, labelcolor=INK)
    return as_svg(drawn)


SMOLLM2_TABLES = {"smollm2": key_rows, "smollm2-all": all_rows}
SMOLLM2_PICTURES = {"methods-smollm2.svg": Picture(picture_rows, picture)}
