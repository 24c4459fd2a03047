"""Numbers inside sentences of the documents, each tied to a file under benchmarks/results/.

A claim is a sentence with a format field for every number. The document has to contain it with
the numbers that the claim computes; `figures.py --write` puts them there. Numbers that need no
file follow from the format itself (`stored_bits`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from figure_runs import RUNS
from figure_tables import H100, RESULTS, cold_rows, matching, method, read, the_row

FIELD = re.compile(r"\{(:[^{}]*)?\}")
NUMBER = r"[0-9][0-9,]*(?:\.[0-9]+)?"


@dataclass(frozen=True)
class Claim:
    """`sentence` stands in `document` with `numbers()` in its fields; line breaks are free."""

    document: str
    sentence: str
    numbers: Callable[[], Iterable[float]]

    def text(self) -> str:
        """The sentence with its numbers."""
        return self.sentence.format(*self.numbers())

    def pattern(self) -> re.Pattern[str]:
        """Finds the sentence with any numbers; the text between two numbers is a group."""
        parts = re.split(FIELD.pattern.replace("(:", "(?::"), self.sentence)
        spaced = [r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in parts]
        return re.compile("(" + f"){NUMBER}(".join(spaced) + ")")

    def renewed(self, text: str) -> str:
        """The text with the claim's numbers in it. Raises: ValueError if it lacks the sentence."""
        found = self.pattern().search(text)
        if not found:
            raise ValueError(f"the sentence {self.sentence!r} is not there")
        forms = [f"{{{form}}}" for form in FIELD.findall(self.sentence)]
        numbers = [form.format(n) for form, n in zip(forms, self.numbers(), strict=True)]
        pieces = found.groups()
        whole = pieces[0] + "".join(n + after for n, after in zip(numbers, pieces[1:], strict=True))
        return text[: found.start()] + whole + text[found.end() :]


# ---- where the numbers come from ----


def bits(label: str, model: str = "shipped") -> float:
    """Stored bits per weight, with a half rounded up as in the tables."""
    return method(label, model)["bits_per_weight"] + 1e-9


def perplexity(label: str, model: str = "shipped") -> float:
    return method(label, model)["perplexity"]


def h100(backend: str, values: str, m: int) -> tuple[float, float]:
    """Least and greatest speed-up over the shapes, weights from memory."""
    rows = matching(cold_rows(H100), backend=backend, values=values, m=m)
    speedups = [row["speedup_vs_dense"] for row in rows]
    return min(speedups), max(speedups)


def slowest_at(m: int) -> tuple[float, float]:
    """Least and greatest speed-up of the CUDA kernels over shapes and value types."""
    speedups = [row["speedup_vs_dense"] for row in matching(cold_rows(H100), backend="cuda", m=m)]
    return min(speedups), max(speedups)


def fastest_read(backend: str, values: str) -> float:
    """TB/s of weights at one token, the fastest of the shapes."""
    rows = matching(cold_rows(H100), backend=backend, values=values, m=1)
    return max(row["gbytes_per_s"] for row in rows) / 1000


def demo(method_name: str) -> dict:
    return the_row(read("demo-shipped-cpu.json")["results"], method=method_name)


def gap_closed() -> float:
    """Share of the gap between the paper's SLaB and dense that `slab` closes, in per cent."""
    dense, paper, ours = (demo(name)["perplexity"] for name in ("dense", "slab-paper", "slab"))
    return 100 * (paper - ours) / (paper - dense)


def xeon_bandwidth() -> tuple[float, float]:
    """Least and greatest read bandwidth measured beside the rows, GB/s."""
    rows = read("linear-11008x4096-cpu.json")["rows"]
    measured = [row["gbytes_per_s"] / row["bandwidth_share"] for row in rows]
    return min(measured), max(measured)


def xeon(values: str, dtype: str, m: int) -> dict:
    rows = read("linear-11008x4096-cpu.json")["rows"]
    backend = "cpu" if values else "dense"
    return the_row(rows, backend=backend, values=values, dtype=dtype, m=m)


def bytes_allow() -> float:
    """Dense fp32 bytes over those of fp16 values."""
    return xeon("", "fp32", 1)["weight_bytes"] / xeon("fp16", "fp32", 1)["weight_bytes"]


def dense_smollm2(column: str) -> float:
    """Of the dense SmolLM2."""
    return read("methods-smollm2.json")[column]


def smollm2(name: str, column: str) -> float:
    """Of SmolLM2 with the default settings, or with GPTQ at about as many bits."""
    labels = {"balanced": "preset balanced", "gptq": "gptq int4, groups of 64"}
    return method(labels[name], "smollm2")[column]


def end_to_end() -> tuple[float, ...]:
    """Tokens per second of one text and of eight on two threads: ours, llama.cpp, dense."""
    rows = read("end-to-end-cpu.json")["rows"]
    ours = {"backend": "slab", "activations": "int8", "head": "packed"}
    return tuple(
        the_row(rows, threads=2, what="decode", batch=batch, **wanted)["tokens_per_second"]
        for wanted in (ours, {"backend": "llama.cpp"}, {"backend": "dense"})
        for batch in (1, 8)
    )


def one_text(stored: str) -> float:
    """Tokens per second of SmolLM2, dense or packed, that writes one text on a CPU."""
    found = the_row(read(RUNS)["chat"]["results"], stored=stored)
    return the_row(found["decoding"], batch=1)["tokens_per_second"]


def serving() -> tuple[float, ...]:
    found = read("serving-vllm-cpu.json")
    names = ("requests", "clients", "seconds", "tokens_per_second", "wrong_count", "failed_count")
    return (*(found[name] for name in names), found["growth_mb"])


def parameters() -> float:
    """Million parameters of the model in benchmarks/model, from the shapes in its file."""
    path = RESULTS.parent / "model" / "model.safetensors"
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tensors = (found for name, found in header.items() if name != "__metadata__")
    return sum(math.prod(tensor["shape"]) for tensor in tensors) / 1e6


SERVED = (
    "{:d} requests from {:d} clients took {:.0f} s, {:.0f} tokens/s, with {:d} wrong and {:d} "
    "failed; memory grew by {:.1f} MB"
)
CLAIMS: list[Claim] = [
    Claim(
        "README.md",
        "takes {:.1f} MB instead of {:.1f} with the default settings: its linears {:.2f} bits per",
        lambda: (
            smollm2("balanced", "bytes") / 1e6,
            dense_smollm2("bytes") / 1e6,
            smollm2("balanced", "bits_per_weight"),
        ),
    ),
    Claim(
        "README.md",
        "It writes {:.1f} tokens/s on {:d} threads of a CPU, the dense model in fp32 {:.1f} (",
        lambda: (one_text("packed"), read(RUNS)["chat"]["threads"], one_text("dense")),
    ),
    Claim(
        "README.md",
        "moves by a KL of {:.3f}, with GPTQ at {:.2f} bits by {:.3f};",
        lambda: (
            smollm2("balanced", "kl"),
            smollm2("gptq", "bits_per_weight"),
            smollm2("gptq", "kl"),
        ),
    ),
    Claim(
        "README.md",
        "runs {:.2f} to {:.2f} times as fast as torch's dense fp16 with int4 values at one token, "
        "{:.2f} to {:.2f} times with fp16.",
        lambda: (*h100("cuda", "int4", 1), *h100("cuda", "fp16", 1)),
    ),
    Claim(
        "README.md",
        "at 128 tokens it has {:.2f} to {:.2f} of the dense speed",
        lambda: slowest_at(128),
    ),
    Claim(
        "docs/results.md",
        "The model in `benchmarks/model` has {:.1f} million parameters",
        lambda: (parameters(),),
    ),
    Claim(
        "docs/results.md",
        "over {:,} held-out tokens in windows of {:d}",
        lambda: (demo("dense")["tokens"], demo("dense")["window"]),
    ),
    Claim("docs/results.md", "`slab` closes {:.0f} % of the gap", lambda: (gap_closed(),)),
    Claim(
        "docs/results.md",
        "The shipped Llama, dense {:.2f}:",
        lambda: (read("methods-shipped.json")["dense"],),
    ),
    Claim(
        "docs/results.md",
        "costs half a bit), dense {:.2f},",
        lambda: (read("methods-stories260k.json")["dense"],),
    ),
    Claim(
        "docs/results.md",
        "2:4 at {:.1f} bits ({:.2f}, matched {:.2f}) beats GPTQ at {:.1f} bits ({:.2f}) and at "
        "{:.2f} bits ({:.2f}, matched {:.2f}).",
        lambda: (
            bits("slab, searched for 3.6 bits"),
            perplexity("slab, searched for 3.6 bits"),
            perplexity("slab, searched for 3.6 bits, matched"),
            bits("gptq int3, groups of 32"),
            perplexity("gptq int3, groups of 32"),
            bits("gptq int3"),
            perplexity("gptq int3"),
            perplexity("gptq int3, matched"),
        ),
    ),
    Claim(
        "docs/results.md",
        "At {:.1f} bits, matched, it meets GPTQ with groups of 32 ({:.2f} and {:.2f}).",
        lambda: (
            bits("slab, searched for 4.6 bits"),
            perplexity("slab, searched for 4.6 bits, matched"),
            perplexity("gptq int4, groups of 32"),
        ),
    ),
    Claim(
        "docs/results.md",
        "({:.2f} at {:.1f} bits, matched, against {:.2f} at {:.2f})",
        lambda: (
            perplexity("slab, searched for 4.6 bits, matched", "stories260k"),
            bits("slab, searched for 4.6 bits, matched", "stories260k"),
            perplexity("gptq int4, groups of 32", "stories260k"),
            bits("gptq int4, groups of 32", "stories260k"),
        ),
    ),
    Claim(
        "docs/results.md",
        "read fp16 weights at up to {:.2f} TB/s, where torch's dense linear reads at up to "
        "{:.2f} TB/s.",
        lambda: (fastest_read("cuda", "fp16"), fastest_read("dense", "")),
    ),
    Claim("docs/results.md", "measured in the run, {:.0f} to {:.0f} GB/s", xeon_bandwidth),
    Claim(
        "docs/results.md",
        "The bytes alone would allow {:.2f} times the speed",
        lambda: (bytes_allow(),),
    ),
    Claim("docs/results.md", SERVED, serving),
    Claim("docs/engines.md", SERVED, serving),
    Claim(
        "README.md",
        "writes {:.1f} tokens/s, eight texts at once {:.1f}; llama.cpp's Q4_0 {:.1f} and {:.1f}, "
        "dense bf16 {:.1f} and {:.1f} (",
        end_to_end,
    ),
]
