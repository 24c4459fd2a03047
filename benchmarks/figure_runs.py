"""What runs of whole models took, from results files that may not be there yet.

smollm2-runs.json is about SmolLM2-135M-Instruct: `benchmarks/smollm2_runs.py` writes it part by
part, and each part has its region here. mixture-cpu.json is of `benchmarks/mixture.py`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

from figure_findings import wrapped
from figure_tables import Row, markdown, read_if_there, rounded

RUNS, MIXTURE = "smollm2-runs.json", "mixture-cpu.json"
NOT_YET = "This has not been measured yet.\n"


def part(name: str) -> Row | None:
    """What one part of the script found; None where it has not run."""
    return (read_if_there(RUNS) or {}).get(name)


def machine(found: Row) -> str:
    """The threads and the CPU, without versions and kernels."""
    threads = found["threads"]
    name = found["machine"].partition(",")[0]
    return f"{threads} thread{'' if threads == 1 else 's'} of {name}"


def times() -> str:
    """Seconds of compressing the model, and of one large layer."""
    whole, layer = part("compress"), part("layer")
    text = ""
    if whole:
        text += (
            f"`compress --preset {whole['preset']}` took {whole['wall_seconds'] / 60:.1f} minutes "
            f"on {machine(whole)}, "
            f"{whole['cpu_seconds'] / 60:.1f} minutes of CPU time, and at most "
            f"{rounded(whole['peak_bytes'] / 1e9, 1)} GB of memory, on {whole['samples']} windows "
            f"of {whole['window']} tokens, from the start of the command to its end. "
        )
    if layer:
        text += (
            f"One layer of {layer['out_features']} x {layer['in_features']}, {layer['values']} "
            f"values with {layer['planes']} planes, took {layer['seconds']:.0f} s in `decompose` "
            f"on {machine(layer)}."
        )
    return wrapped(text) if text else NOT_YET


def timed_rows(found: Row) -> list[tuple[str, Row]]:
    """Name and measurement: dense and ours for one text, then for several."""
    dense, own = found["results"]
    pairs = zip(dense["decoding"], own["decoding"], strict=True)
    return [row for pair in pairs for row in zip(("dense", "balanced"), pair, strict=True)]


def speeds() -> str:
    """Tokens per second of both models, for one text and for several."""
    found = part("chat")
    if not found:
        return NOT_YET
    rows = timed_rows(found)
    body = [
        (
            str(dense["batch"]),
            f"{dense['tokens_per_second']:.1f}",
            f"{own['tokens_per_second']:.1f}",
            f"{own['tokens_per_second'] / dense['tokens_per_second']:.2f}×",
            f"{dense['prompt_seconds']:.2f}",
            f"{own['prompt_seconds']:.2f}",
        )
        for (_, dense), (_, own) in zip(rows[::2], rows[1::2], strict=True)
    ]
    head = (
        "texts at once", "dense, tokens/s", "balanced, tokens/s", "ratio", "dense, prompt s",
        "balanced, prompt s",
    )  # fmt: skip
    text = (
        f"Greedy decoding in fp32 of {found['tokens']} tokens on {machine(found)}; the "
        f"prompt has {rows[0][1]['prompt_tokens']} tokens. Rows: `benchmarks/results/{RUNS}`."
    )
    return f"{wrapped(text)}\n{markdown(head, body)}"


def steps() -> str:
    """Where the time of a decode step goes, in milliseconds and shares of it."""
    from slab_kernels.evaluate.decoding import PARTS

    found = part("chat")
    if not found:
        return ""
    rows = timed_rows(found)

    def cell(row: dict[str, Any], name: str) -> str:
        share = row["split"][name]
        return f"{1e3 * row['seconds_per_step'] * share:.1f} ms, {100 * share:.0f} %"

    body = [(meaning, *(cell(row, name) for _, row in rows)) for name, meaning in PARTS.items()]
    body.append(("all", *(f"{1e3 * row['seconds_per_step']:.1f} ms" for _, row in rows)))
    head = (
        "part of a step",
        *(f"{name}, {row['batch']} text{'s'[: row['batch'] > 1]}" for name, row in rows),
    )
    return markdown(head, body)


def answers() -> str:
    """What both models write to the same questions."""
    found = part("answers")
    if not found:
        return ""
    text = (
        f"Greedy answers of at most {found['tokens']} tokens; … stands where one was cut off. No "
        "question was left out."
    )
    parts = []
    for row in found["rows"]:
        parts.append(quoted(f"**{row['question']}**"))
        for name in ("dense", "balanced"):
            written = row[name]
            parts.append(quoted(f"*{name}:* {written['text']}{' …' if written['cut'] else ''}"))
    return wrapped(text) + "\n" + "\n>\n".join(parts) + "\n"


def activations() -> str:
    """How far int8 activations move the compressed model from the dense one."""
    found = part("activations")
    if not found:
        return NOT_YET
    exact, rounded_x = found["modes"]

    def change(column: str) -> str:
        return (
            f"from {exact[column]:.4f} to {rounded_x[column]:.4f}, by "
            f"{100 * (rounded_x[column] / exact[column] - 1):.1f} %"
        )

    return wrapped(
        f"On SmolLM2-135M-Instruct with the preset balanced, the mode `int8` takes the KL to the "
        f"dense model {change('kl')}, where {found['read_tokens']:,} tokens of WikiText-2's test "
        f"part are read in windows of {found['window']} (*many*), and {change('kl_decoding')}, "
        f"where {found['decoded_tokens']:,} of them are read one by one in {found['batch']} texts "
        "at once (*few*)."
    )


def mixture() -> str:
    """Time, memory and bits of compressing a random mixture of experts."""
    found = read_if_there(MIXTURE)
    if not found:
        return NOT_YET
    return wrapped(
        f"`{found['command']}` compressed a random mixture of {found['experts']} experts in each "
        f"of {found['blocks']} blocks, {found['weights'] / 1e6:.0f} million weights in all, with "
        f"`{found['method']}` and {found['values']} values to {found['bits_per_weight']:.2f} bits "
        f"per weight, in {found['seconds'] / 60:.1f} minutes on {machine(found)}. At most "
        f"{rounded(found['peak_bytes'] / 1e9, 1)} GB were in memory, of which "
        f"{rounded(found['before_bytes'] / 1e9, 1)} GB were there before it began; one block takes "
        f"{rounded(found['block_bytes']['fp32'] / 1e9, 2)} GB in fp32."
    )


def quoted(text: str) -> str:
    """The text as one Markdown quotation, in lines that fit."""
    plain = " ".join(text.replace("<", "&lt;").split())
    return textwrap.fill(plain, 98, initial_indent="> ", subsequent_indent="> ")


RUN_REGIONS: dict[str, Callable[[], str]] = {
    "smollm2-times": times,
    "smollm2-speeds": speeds,
    "smollm2-steps": steps,
    "smollm2-answers": answers,
    "smollm2-activations": activations,
    "mixture": mixture,
}
