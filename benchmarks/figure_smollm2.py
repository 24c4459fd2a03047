"""The tables of SmolLM2-135M-Instruct, from whichever rows methods-smollm2.json has."""

from __future__ import annotations

from collections.abc import Callable

from figure_tables import METHOD_NAMES, Row, markdown, read, rounded

FILE = "methods-smollm2.json"
GPTQ_4, GPTQ_3 = "gptq int4, groups of 64", "gptq int3, groups of 32"
# Label in the file -> name in the README's first table, of what is there.
KEY_ROWS = {
    "preset balanced": "**`--preset balanced`, the default**",
    "preset exact": "**`--preset exact`**",
    GPTQ_4: "GPTQ, 4 bits, groups of 64",
    "rtn int4, groups of 64": "round to nearest, 4 bits, groups of 64",
    "preset small": "**`--preset small`**",
    GPTQ_3: "GPTQ, 3 bits, groups of 32",
    "slab-paper": "SLaB as published, 2:4",
    "sparsegpt": "SparseGPT, 2:4",
}
# Goal -> flags of `compress` and label, of which the first that was measured counts. {} are the
# epochs of matching that the row had.
GOALS = {
    "few bytes; fastest while decoding": [("--preset small", "preset small")],
    "near the dense model for few bits, the default": [("--preset balanced", "preset balanced")],
    "nearer, for half a bit more": [
        ("--planes 3 --embeddings dense", "slab int4, 3 planes"),
    ],
    **{
        f"linears of {bits} bits": [
            (f"{flags} --match {{}}", f"slab, searched for {bits} bits, matched"),
            (flags, f"slab, searched for {bits} bits"),
        ]
        for bits in (3.6, 4.6)
        for flags in (f"--bits {bits} --group-size 0",)
    },
}
PRESETS = ("small", "balanced", "exact")
NAMES = {label: name for name, label in METHOD_NAMES.items()}
NAMES |= {f"preset {name}": f"`--preset {name}`" for name in PRESETS}
NAMES |= {
    f"{short} int{bits}, groups of {size}": f"{name}, {bits} bits, groups of {size}"
    for bits in (4, 3)
    for size in (32, 64, 128)
    for name, short in (("GPTQ", "gptq"), ("round to nearest", "rtn"))
}
MATCHED, PERMUTED = ", matched", ", permuted"


def by_label() -> dict[str, Row]:
    """Every row that was measured."""
    return {row["label"]: row for row in read(FILE)["rows"]}


def name_of(label: str) -> str:
    """What a row is called in a document; the label itself where nothing is known of it."""
    known = [start for start in NAMES if label == start or label.startswith(f"{start}, ")]
    longest = max(known, key=len, default="")
    return NAMES[longest] + label[len(longest) :] if known else f"`{label}`"


def megabytes(size: float) -> str:
    return rounded(size / 1e6, 1)


def per_cent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def key_rows() -> str:
    """What a user chooses between, and what it costs."""
    whole, found = read(FILE), by_label()
    rows = [("dense, fp16", "16.00", megabytes(whole["bytes"]), "0", f"{whole['dense']:.2f}", "–")]
    rows += [
        (
            name,
            rounded(found[label]["bits_per_weight"], 2),
            megabytes(found[label]["bytes"]),
            f"{found[label]['kl']:.3f}",
            f"{found[label]['perplexity']:.2f}",
            per_cent(found[label]["top1"]),
        )
        for label, name in KEY_ROWS.items()
        if label in found
    ]
    head = ("", "bits per weight", "whole model, MB", "KL", "perplexity", "same next token")
    return markdown(head, rows)


def settings_for_goals() -> str:
    """Settings of `compress`, by what they are for."""
    found = by_label()
    rows = []
    for goal, choices in GOALS.items():
        flags, row = next(((f, found[label]) for f, label in choices if label in found), ("", None))
        if row:
            flags = flags.format(row["settings"].get("matching"))
            rows.append((goal, f"`{flags}`", *costs(row)))
    head = ("goal", "flags of `compress`", "bits per weight", "MB", "KL", "perplexity")
    return markdown(head, rows)


def costs(row: Row) -> tuple[str, str, str, str]:
    """Bits, MB of the folder, KL and perplexity."""
    return (
        rounded(row["bits_per_weight"], 2),
        megabytes(row["bytes"]),
        f"{row['kl']:.3f}",
        f"{row['perplexity']:.2f}",
    )


def cpu_seconds(row: Row) -> str:
    """CPU seconds of compressing; none for a row of another machine than the table's."""
    here = row.get("machine") in (None, read(FILE)["machine"])
    return f"{row['cpu_seconds']:.0f}" if here else "–"


def presets() -> str:
    """The presets that were measured."""
    found = by_label()
    rows = [
        (f"`{name}`", *costs(row), per_cent(row["top1"]), cpu_seconds(row))
        for name in PRESETS
        if (row := found.get(f"preset {name}"))
    ]
    head = ("preset", "bits", "MB", "KL", "perplexity", "same next token", "CPU s")
    return markdown(head, rows)


def all_rows() -> str:
    """Every row, fewest bits first."""
    body = []
    for row in sorted(read(FILE)["rows"], key=lambda row: (row["bits_per_weight"], -row["kl"])):
        heldout, calibration = row["heldout_error"], row["calibration_error"]
        body.append(
            (
                name_of(row["label"]),
                rounded(row["bits_per_weight"], 2),
                megabytes(row["bytes"]),
                f"{row['kl']:.4f}",
                f"{row['kl_p99']:.2f}",
                f"{row['perplexity']:.2f}",
                f"{100 * row['top1']:.1f}",
                f"{heldout:.3f}" if heldout else "–",
                f"{heldout / calibration:.2f}" if heldout and calibration else "–",
                cpu_seconds(row),
                rounded(row["peak_bytes"] / 1e9, 1),
            )
        )
    head = (
        "method", "bits", "MB", "KL", "99 %", "perplexity", "top-1 %", "held-out error",
        "÷ calibration", "CPU s", "GB",
    )  # fmt: skip
    return markdown(head, body)


SMOLLM2_TABLES: dict[str, Callable[[], str]] = {
    "smollm2": key_rows,
    "smollm2-all": all_rows,
    "smollm2-presets": presets,
    "settings-for-goals": settings_for_goals,
}
