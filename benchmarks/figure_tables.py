"""The tables that documents repeat from files under benchmarks/results/, as Markdown.

TABLES maps the name that stands in a document's marker to the function that builds the table.
`figures.py` writes them between the markers and compares them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
H100 = "linear-nvidia-h100-80gb-hbm3-llama-3-8b-b421ae1.json"

Row = dict[str, Any]


@functools.cache
def read(name: str) -> Any:
    """The content of one JSON file of results."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def read_if_there(name: str) -> Any:
    """`read`, or None where nobody has measured it yet."""
    return read(name) if (RESULTS / name).exists() else None


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """One Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def matching(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows whose columns have the wanted values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def the_row(rows: Iterable[Row], **wanted: Any) -> Row:
    """The only row whose columns have the wanted values. Raises: ValueError for none or several."""
    (row,) = matching(rows, **wanted)
    return row


def rounded(number: float, digits: int) -> str:
    """The number with so many decimals; a half goes up, as a reader would round 3.125."""
    return f"{number + 1e-9:.{digits}f}"


def spread(numbers: Iterable[float], digits: int = 2) -> str:
    """The least and the greatest number, or the one that both round to."""
    listed = list(numbers)
    low, high = (rounded(bound, digits) for bound in (min(listed), max(listed)))
    return low if low == high else f"{low}–{high}"


# ---- methods: perplexity, bits, layer error ----


def method(label: str, model: str = "shipped") -> Row:
    """One row of methods-<model>.json, by its label."""
    return the_row(read(f"methods-{model}.json")["rows"], label=label)


def demo_shipped() -> str:
    """What `make demo` printed for the shipped model."""
    rows = []
    for found in read("demo-shipped-cpu.json")["results"]:
        error = found.get("layer_error")
        rows.append(
            (
                f"`{found['method']}`" if found["method"] != "dense" else "dense",
                rounded(found["bits_per_weight"], 2),
                "–" if error is None else f"{error:.3f}",
                f"{found['perplexity']:.2f}",
                f"{found['tokens_per_second']:.0f}",
            )
        )
    head = ("method", "stored bits per weight", "layer error", "perplexity", "tokens/s")
    return markdown(head, rows)


# Name in the table -> label in the files.
METHOD_NAMES = {
    "`magnitude`": "magnitude",
    "`wanda`": "wanda",
    "`sparsegpt`": "sparsegpt",
    "`alps`": "alps as published",
    "`alps`, polished": "alps polished",
    "`eora` on sparsegpt": "eora as published",
    "`eora` on sparsegpt, polished": "eora polished",
    "`oats`": "oats as published",
    "`oats`, polished": "oats polished",
    "`sslc`": "sslc as published",
    "`sslc`, polished": "sslc polished",
    "`hassle-free`": "hassle-free as published",
    "`hassle-free`, polished": "hassle-free polished",
    "`hassle-free`, alps inside": "hassle-free, alps inside",
    "`threebasil`": "threebasil as published",
    "`threebasil`, polished": "threebasil polished",
    "`threebasil`, polished, matched": "threebasil polished, matched",
    "`threebasil`, int4, polished": "threebasil int4 polished",
    "`slab-paper`": "slab-paper",
    "`slim`, fp16": "slim fp16 as published",
    "`slim`, fp16, polished": "slim fp16 polished",
    "`slim`, int4": "slim int4 as published",
    "`slim`, int4, polished": "slim int4 polished",
    "`slab`, fp16": "slab fp16",
    "`slab`, fp16, matched": "slab fp16, matched",
    "`slab`, fp16, two planes": "slab fp16, 2 planes",
    "`slab`, fp16, P Qᵀ instead of signs": "slab fp16, S + P Q^T only",
    "`slab`, fp16, P Qᵀ and signs": "slab fp16, with P Q^T",
    "`slab`, int8": "slab int8",
    "`slab`, int4": "slab int4",
    "`slab`, int4, two planes": "slab int4, 2 planes",
    "`slab`, int4, two planes, matched": "slab int4, 2 planes, matched",
    "`slab`, int4, three planes": "slab int4, 3 planes",
    "`slab`, int4, P Qᵀ instead of signs": "slab int4, S + P Q^T only",
    "`slab`, int4, P Qᵀ and signs": "slab int4, with P Q^T",
    "`slab`, int3": "slab int3",
    "`slab`, int3, two planes": "slab int3, 2 planes",
    "`slab`, int3, two planes, one scale per row": "slab int3, 2 planes, a scale a row",
    "`slab --bits 3.6`": "slab, searched for 3.6 bits",
    "`slab --bits 3.6`, matched": "slab, searched for 3.6 bits, matched",
    "`slab --bits 4.6`": "slab, searched for 4.6 bits",
    "`slab --bits 4.6`, matched": "slab, searched for 4.6 bits, matched",
}
DENSE_NAMES = {
    f"{name}, int{bits}{', groups of 32' if small else ''}{', matched' if matched else ''}": (
        f"{short} int{bits}{', groups of 32' if small else ''}{', matched' if matched else ''}"
    )
    for bits in (2, 3, 4, 8)
    for name, short in (("round to nearest", "rtn"), ("GPTQ", "gptq"))
    for small in (False, True)
    for matched in (False, True)
}


def method_rows(names: dict[str, str], model: str) -> str:
    """Bits, perplexity, layer error, and seconds of the labels that the model's file has."""
    found = {row["label"]: row for row in read(f"methods-{model}.json")["rows"]}
    rows = []
    for name, label in names.items():
        if label in found:
            row = found[label]
            error = row["layer_error"]
            rows.append(
                (
                    name,
                    rounded(row["bits_per_weight"], 2),
                    f"{row['perplexity']:.2f}",
                    "–" if error is None else f"{error:.3f}",
                    f"{row['seconds']:.0f}",
                )
            )
    return markdown(("method", "bits", "perplexity", "layer error", "seconds"), rows)


# ---- speed of single linears ----

H100_LINES = {
    "`cuda`, fp16": {"backend": "cuda", "values": "fp16"},
    "`cuda`, int8": {"backend": "cuda", "values": "int8"},
    "`cuda`, int4": {"backend": "cuda", "values": "int4"},
    "`triton`, fp16": {"backend": "triton", "values": "fp16"},
    "`triton`, int8": {"backend": "triton", "values": "int8"},
    "`triton`, int4": {"backend": "triton", "values": "int4"},
    "torch 2:4, fp16": {"backend": "torch-2:4"},
}


def cold_rows(name: str) -> list[Row]:
    """The rows whose weights came from memory."""
    return matching(read(name)["rows"], cache="cold")


def speedups(name: str, lines: dict[str, Row]) -> str:
    """Speed-up over the dense linear, least and greatest over the shapes, by token count."""
    rows = cold_rows(name)
    tokens = sorted({row["m"] for row in rows})
    body = [
        (
            label,
            *(
                spread(row["speedup_vs_dense"] for row in matching(rows, m=m, **wanted))
                for m in tokens
            ),
        )
        for label, wanted in lines.items()
    ]
    return markdown(("backend, S", *(f"M = {m}" for m in tokens)), body)


def h100_speedups() -> str:
    """Every backend on the H100."""
    return speedups(H100, H100_LINES)


def xeon_linear() -> str:
    """One linear of 11008×4096 on an Intel Xeon, by tokens and activations."""
    rows = read("linear-11008x4096-cpu.json")["rows"]
    values = ("fp16", "bf16", "int8", "int4")
    body = []
    for m in (1, 4, 16):
        for dtype in ("bf16", "fp32"):
            found = [the_row(rows, backend="cpu", values=v, dtype=dtype, m=m) for v in values]
            rate = f"{found[0]['gbytes_per_s']:.1f}, {found[0]['bandwidth_share']:.2f}"
            body.append(
                (str(m), dtype, *(f"{row['speedup_vs_dense']:.2f}×" for row in found), rate)
            )
    head = ("M", "activations", *(f"{v} S" for v in values), "fp16 S: GB/s, share")
    return markdown(head, body)


def call_overhead() -> str:
    """What a call costs on small layers, as ratios within one run."""
    rows = read("overhead-cpu.json")["rows"]
    body = []
    for size in sorted({row["N"] for row in rows}):
        here = matching(rows, N=size)
        extra = [row["SlabLinear us"] - row["nn.Linear us"] for row in here]
        body.append(
            (
                f"{size}×{size}",
                spread(row["op / linear"] for row in here),
                spread(row["module / nn.Linear"] for row in here),
                spread(extra, 1),
            )
        )
    head = ("layer", "op ÷ torch's linear", "`SlabLinear` ÷ `nn.Linear`", "µs more per module call")
    return markdown(head, body)


TABLES: dict[str, Callable[[], str]] = {
    "demo-shipped": demo_shipped,
    "methods-shipped": functools.partial(method_rows, METHOD_NAMES, "shipped"),
    "methods-stories260k": functools.partial(method_rows, METHOD_NAMES, "stories260k"),
    "dense-integers-shipped": functools.partial(method_rows, DENSE_NAMES, "shipped"),
    "dense-integers-stories260k": functools.partial(method_rows, DENSE_NAMES, "stories260k"),
    "h100-speedups": h100_speedups,
    "xeon-linear": xeon_linear,
    "call-overhead": call_overhead,
}
