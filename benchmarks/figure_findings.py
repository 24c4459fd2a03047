"""What the rows of SmolLM2-135M-Instruct say, as paragraphs, from whichever rows there are.

Numbers, and words like "below" and "above", follow from methods-smollm2.json. A paragraph without
its rows is left out, and the last one names what has not been measured. `channel_orders` writes
the sentence of docs/methods.md about `--permute`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence

from figure_smollm2 import FILE, MATCHED, PERMUTED, by_label, name_of
from figure_tables import Row, markdown, read, rounded
from method_entries import entries

from slab_kernels.compression.presets import PRESETS

COLUMNS = 100
# Ours beside the GPTQ row that has about as many bits.
RIVALS = {
    "slab, searched for 3.6 bits": "gptq int3, groups of 32",
    "slab int4": "gptq int3, groups of 32",
    "slab int4, 2 planes": "gptq int4, groups of 64",
    "slab, searched for 4.6 bits": "gptq int4, groups of 32",
    "slab int4, 3 planes": "gptq int4, groups of 32",
    "slab int3, 2 planes": "gptq int3, groups of 32",
    "slab int3": "gptq int3, groups of 64",
}
SAME_LINEARS = {
    "slab int4": "preset small",
    "slab int4, 2 planes": "preset balanced",
    "slab fp16, 2 planes": "preset exact",
}
WITH_TABLES = [f"preset {name}" for name, p in PRESETS.items() if p.embeddings == "int8"]
# A bit more of an integer halves its step and quarters the squared error, and so at best the KL.
PER_BIT = 4.0
# The worse one stands first, as the methods' own papers have them.
PUBLISHED = (
    ("magnitude", "wanda"),
    ("wanda", "sparsegpt"),
    ("sparsegpt", "alps as published"),
    ("sparsegpt", "slab-paper"),
    ("oats as published", "hassle-free as published"),
    ("sslc as published", "hassle-free as published"),
    ("hassle-free as published", "threebasil as published"),
)
METHODS = ("alps", "eora", "oats", "sslc", "hassle-free", "threebasil", "slim fp16", "slim int4")


def wrapped(text: str) -> str:
    """The paragraph in lines that fit."""
    lines = textwrap.wrap(text, COLUMNS, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def listed(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def spread(numbers: Iterable[float], form: str = "{:.2f}") -> str:
    """ "1.00", or "1.00 to 1.05"."""
    found = list(numbers)
    low, high = form.format(min(found)), form.format(max(found))
    return low if low == high else f"{low} to {high}"


def kl(row: Row) -> str:
    return f"{row['kl']:.3f}"


def bits(row: Row) -> str:
    return rounded(row["bits_per_weight"], 2)


def measured(label: str) -> Row | None:
    """The row, or that of the preset whose linears are the same; its embedding may be int8."""
    found = by_label()
    return found.get(label) or found.get(SAME_LINEARS.get(label, ""))


def pairs() -> list[tuple[Row, Row]]:
    """Ours and GPTQ of about as many bits, both without matching or both with it; where ours has
    not been measured with it, GPTQ with it beside ours without."""
    return [
        (own, other)
        for end in ("", MATCHED)
        for label, rival in RIVALS.items()
        if (own := measured(label + end) or measured(label)) and (other := measured(rival + end))
    ]


def of_matching(own: Row, other: Row) -> str:
    """Which of a pair was matched, in words behind the bits of ours."""
    if "matching" in own["settings"]:
        return " with matching"
    return " without matching, where GPTQ has it" if "matching" in other["settings"] else ""


def at_as_many_bits(own: Row, other: Row) -> float:
    """KL of ours over that of the other, were the difference in bits spent on the other."""
    more = own["bits_per_weight"] - other["bits_per_weight"]
    return own["kl"] / (other["kl"] * PER_BIT**-more)


def equal_bits_table() -> str:
    rows = [
        (
            name_of(own["label"]), bits(own), kl(own), name_of(other["label"]), bits(other),
            kl(other), f"{own['kl'] / other['kl']:.2f}", f"{at_as_many_bits(own, other):.2f}",
        )
        for own, other in pairs()
    ]  # fmt: skip
    head = ("ours", "bits", "KL", "beside", "bits", "KL", "KL ÷ KL", "at as many bits")
    return markdown(head, rows)


def equal_bits() -> str:
    """Ours and GPTQ at about as many bits."""
    found = pairs()
    if not found:
        return ""
    ahead = [pair for pair in found if at_as_many_bits(*pair) < 1]
    behind = [pair for pair in found if pair not in ahead]
    text = "**At as many bits.** "
    if not behind:
        every = f"all {len(found)} pairs" if len(found) > 1 else "the one pair here"
        text += f"The KL of ours is below that of GPTQ in {every}"
    elif not ahead:
        text += "GPTQ has the lower KL in every pair"
    else:
        lost = [f"{bits(own)} bits{of_matching(own, other)}" for own, other in behind]
        text += (
            f"The KL of ours is below that of GPTQ in {len(ahead)} of {len(found)} pairs; GPTQ is "
            f"ahead at {listed(lost)}"
        )
    if ahead:
        gains = [100 * (1 - at_as_many_bits(*pair)) for pair in ahead]
        text += f". Where ours is ahead, it is lower by {spread(gains, '{:.0f}')} %"
    text += (
        ". The bits of a pair differ a little, and the last column corrects for that in favour of "
        "GPTQ: its KL is divided by four for each bit that it has less, and by as much of that as "
        "a part of a bit is. One more bit halves the step of an integer, and cannot lower the KL "
        "more. The percentages are those of that column."
    )
    return f"{wrapped(text)}\n{equal_bits_table()}"


def change(before: Row, after: Row) -> str:
    return f"from {kl(before)} to {kl(after)}"


def planes() -> str:
    """What a second and a third sign plane are worth."""
    second, third = [], []
    for values in ("int3", "int4", "fp16"):
        one, two, three = (
            measured(f"slab {values}{end}") for end in ("", ", 2 planes", ", 3 planes")
        )
        if one and two:
            second.append(f"{change(one, two)} with {values} values")
        if two and three:
            third.append(f"{change(two, three)} with {values} values")
    if not second:
        return ""
    text = f"**Planes.** A second sign plane costs half a bit and takes the KL {listed(second)}."
    if third:
        text += f" A third one costs as much and takes it {listed(third)}."
    one, two = measured("slab int4"), measured("slab int3, 2 planes")
    if one and two:
        loses = "less" if two["kl"] < one["kl"] else "more"
        text += (
            f" Int3 values with two planes take {bits(two)} bits and lose {loses} than int4 values "
            f"with one, which take {bits(one)}: the KL is {kl(two)} against {kl(one)}."
        )
    return wrapped(text)


def sixteen_bits() -> str:
    """What kept values of 16 bits buy."""
    full, short, plane = (measured(f"slab {name}") for name in ("fp16", "int4", "int4, 2 planes"))
    if full and plane and not short:
        nearer = "nearer to" if full["kl"] < plane["kl"] else "farther from"
        return wrapped(
            f"**Values of 16 bits.** With fp16 values and one plane, {bits(full)} bits, the model "
            f"is {nearer} the dense one than with int4 values and two planes, {bits(plane)} bits: "
            f"the KL is {kl(full)} against {kl(plane)}."
        )
    if not full or not short:
        return ""
    text = (
        f"**Values of 16 bits.** From int4 to fp16 kept values the linears grow from {bits(short)} "
        f"to {bits(full)} bits per weight, and the KL goes {change(short, full)}"
    )
    if middle := measured("slab int8"):
        text += f"; int8 values of {bits(middle)} bits give {kl(middle)}"
    text += "."
    if plane := measured("slab int4, 2 planes"):
        does = "does more" if plane["kl"] < full["kl"] else "does less"
        text += (
            f" Half a bit spent on a second plane {does}: int4 values with two planes are at "
            f"{kl(plane)} with {bits(plane)} bits."
        )
    return wrapped(text)


# More than the plain rows of the paper's own format: ends of labels, and what they stand for.
PAPERS_FORMAT = {
    PERMUTED: "in a better order of channels",
    MATCHED: "with matching",
    PERMUTED + MATCHED: "with both",
}


def papers_format() -> str:
    """Ours and the paper's solver at the same format."""
    own, paper, dense = measured("slab fp16"), measured("slab-paper"), read(FILE)["dense"]
    if not own or not paper:
        return ""

    def closed(row: Row) -> str:
        gap = (paper["perplexity"] - row["perplexity"]) / (paper["perplexity"] - dense)
        divergence = 1 - row["kl"] / paper["kl"]
        return f"{100 * gap:.1f} % in perplexity and {100 * divergence:.1f} % in KL"

    text = (
        f"**The paper's own format.** With fp16 values and one plane, {bits(own)} bits, `slab` has "
        f"a perplexity of {own['perplexity']:.2f} and a KL of {kl(own)}, where SLaB as published "
        f"has {paper['perplexity']:.2f} and {kl(paper)}. Of the way to the dense model that is "
        f"{closed(own)}"
    )
    more = [
        f"{words} it is {closed(row)} ({row['perplexity']:.2f} and {kl(row)})"
        for end, words in PAPERS_FORMAT.items()
        if (row := measured(f"slab fp16{end}"))
    ]
    return wrapped("; ".join([text, *more]) + ".")


def adapters() -> str:
    """What P Q^T is worth instead of signs, and beside them."""
    sentences = []
    for where, end in (("Instead of", "S + P Q^T only"), ("Beside", "with P Q^T")):
        parts = [
            f"from {kl(plain)} with {bits(plain)} bits to {kl(row)} with {bits(row)} for {values}"
            for values in ("int4", "fp16")
            if (plain := measured(f"slab {values}")) and (row := measured(f"slab {values}, {end}"))
        ]
        if parts:
            sentences.append(f"{where} the signs P Qᵀ takes the KL {listed(parts)} values.")
    return wrapped(f"**Adapters.** {' '.join(sentences)}") if sentences else ""


def published_order() -> str:
    """Whether the published methods come out in the order of their papers."""
    found = by_label()
    there = [(worse, better) for worse, better in PUBLISHED if worse in found and better in found]
    if not there:
        return ""
    published = [row for row in found.values() if row["family"] == "2:4, published"]
    ranked = sorted(published, key=lambda row: -row["kl"])
    names = [f"{short_name(row['label'])} ({kl(row)})" for row in ranked]
    turned = [
        f"{short_name(better)} is worse than {short_name(worse)}"
        for worse, better in there
        if found[worse]["kl"] < found[better]["kl"]
    ]
    text = f"**Methods as published.** From the greatest KL to the least: {', '.join(names)}. "
    if turned:
        text += (
            f"Of what their papers say of who is ahead of whom, {len(there)} pairs were looked at, "
            f"and {len(turned)} come out the other way here: {listed(turned)}."
        )
    else:
        text += (
            f"Of what their papers say of who is ahead of whom, {len(there)} pairs were looked at, "
            "and all come out the same way here."
        )
    if plain := found.get("sparsegpt"):
        behind = [
            short_name(row["label"])
            for row in ranked
            if row["kl"] > plain["kl"] and row["bits_per_weight"] > plain["bits_per_weight"]
        ]
        if behind:
            text += f" With more bits than `sparsegpt`, {listed(behind)} lose more than it does."
    refit = [
        (found[f"{name} as published"], found[f"{name} polished"])
        for name in METHODS
        if f"{name} as published" in found and f"{name} polished" in found
    ]
    if refit:
        less = [f"{short_name(a['label'])} {change(a, b)}" for a, b in refit]
        text += f" Our refit (*polished*) takes the KL of {listed(less)}."
    return wrapped(text)


def short_name(label: str) -> str:
    return name_of(label).replace(" on sparsegpt", "")


def transformer_matching() -> str:
    """What training each block towards the dense one adds."""
    both = [
        (before, row)
        for label, row in by_label().items()
        if label.endswith(MATCHED) and (before := measured(label.removesuffix(MATCHED)))
    ]
    if not both:
        return ""
    both.sort(key=lambda pair: pair[1]["bits_per_weight"])
    epochs = [after["settings"]["matching"] for _, after in both]
    better = sum(after["kl"] < before["kl"] for before, after in both)
    text = (
        f"**Matching.** {spread(epochs, '{:d}')} epochs of transformer matching lower the KL in "
        f"{better} of {len(both)} rows. With it compressing took "
        f"{spread((after['cpu_seconds'] for _, after in both), '{:.0f}')} CPU seconds, on several "
        "kinds of machine."
    )
    body = [
        (
            name_of(before["label"]), bits(before), kl(before), kl(after),
            f"{100 * (after['kl'] / before['kl'] - 1):+.0f} %",
        )
        for before, after in both
    ]  # fmt: skip
    head = ("row", "bits", "KL", "matched", "change")
    return f"{wrapped(text)}\n{markdown(head, body)}"


def heldout() -> str:
    """How much of what was fitted holds on other windows."""
    families = {
        "ours": ("preset", "slab", "slab, searched"),
        "GPTQ": ("gptq",),
        "round to nearest": ("rtn",),
        "the other 2:4 methods as published": ("2:4, published",),
    }
    parts = []
    for name, wanted in families.items():
        ratios = [
            row["heldout_error"] / row["calibration_error"]
            for row in by_label().values()
            if row["family"] in wanted and row["heldout_error"]
        ]
        if ratios:
            parts.append(f"{spread(ratios)} for {name}")
    if not parts:
        return ""
    return wrapped(
        "**Held-out error.** The mean layer's error on windows that nothing was fitted to, divided "
        f"by that on the windows that were fitted, is {listed(parts)}."
    )


def embedding() -> str:
    """What an int8 embedding costs, and which presets, which have one, stand above for rows with
    the embedding in fp16 that were not measured."""
    found = by_label()
    there = {a: p for a, p in SAME_LINEARS.items() if p in WITH_TABLES and p in found}
    both = [
        f"the KL is {found[label]['kl']:.4f} with the embedding in fp16 and "
        f"{found[preset]['kl']:.4f} in int8, as {name_of(preset)} has it"
        for label, preset in there.items()
        if label in found
    ]
    alone = [name_of(preset) for label, preset in there.items() if label not in found]
    text = f" With equal settings {listed(both)}." if both else ""
    if alone:
        text += (
            f" Above, {listed(alone)} stand{'s' if len(alone) == 1 else ''} for the same settings "
            "with an embedding in fp16."
        )
    return wrapped(f"**Embedding.**{text}") if text else ""


FINDINGS = (
    equal_bits, planes, sixteen_bits, adapters, papers_format, published_order,
    transformer_matching, heldout, embedding,
)  # fmt: skip


def missing() -> str:
    """The last paragraph: the rows of `bench_methods.py` that are not there."""
    left = [
        name_of(entry.label)
        for entry in entries(adapter_rank=1, epochs=1)
        if not measured(entry.label)
    ]
    return wrapped(f"Not measured on this model yet: {'; '.join(left)}.") if left else ""


def findings() -> str:
    """All paragraphs that have their rows."""
    parts = [paragraph() for paragraph in (*FINDINGS, missing)]
    return "\n".join(part for part in parts if part)


# ---- orders of channels ----


def channel_orders() -> str:
    """Whether `--permute` pays, as far as it has been measured."""
    found = by_label()
    both = [
        (found[plain], row)
        for label, row in found.items()
        if label.endswith(PERMUTED) and (plain := label.removesuffix(PERMUTED)) in found
    ]
    whole = [f"{change(plain, row)} with {name_of(plain['label'])}" for plain, row in both]
    if not whole:
        return wrapped(
            "It is off by default, since its gain with the present defaults has not been measured."
        )
    return wrapped(
        f"On [SmolLM2](results.md) it takes the KL {listed(whole)}. It is off by default, because "
        "it takes longer, and because LoRA adapters, and whatever else was made for the channels "
        "as they were trained, do not fit the new order."
    )


FINDING_TEXTS: dict[str, Callable[[], str]] = {
    "smollm2-findings": findings,
    "channel-orders": channel_orders,
}
