"""Tables of ours on a CPU beside other libraries: one linear, and a whole model.

The rows are those of on_cpu.sh: two runs of bench_linear.py, with one thread and with two, on a
machine with bf16 instructions and on one with AVX2 alone, and bench_end_to_end.py on both. On a
second one with AVX2, an older one, bench_linear.py ran by itself.
`CPU_PEER_TABLES` has a table only where its files are, since a document can name no others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from figure_tables import Row, markdown, matching, read, read_if_there, rounded

Files = dict[int, str]  # by threads
LINEARS: Files = {1: "cpu-peers-1-thread.json", 2: "cpu-peers-2-threads.json"}
AVX2_LINEARS: Files = {1: "cpu-avx2-1-thread.json", 2: "cpu-avx2-2-threads.json"}
AVX2_MANY: Files = {1: "cpu-avx2-many-1.json", 2: "cpu-avx2-many-2.json"}
ZEN1_LINEARS: Files = {1: "cpu-zen1-1-thread.json", 2: "cpu-zen1-2-threads.json"}
WHOLE, AVX2_WHOLE = "end-to-end-cpu.json", "end-to-end-avx2.json"
SHAPES = ((11008, 4096), (4096, 4096))
OURS = "cpu"  # the backend
# Backend in the rows -> what a reader knows it by.
PEERS = {
    "torch-int8-fbgemm": "torch int8 (fbgemm)",
    "torch-int8-onednn": "torch int8 (oneDNN)",
    "torch-int4": "torch int4",
    "onnxruntime-128": "ONNX Runtime int4, groups of 128",
    "onnxruntime-32": "ONNX Runtime int4, groups of 32",
    "openvino": "OpenVINO u4",
    "ggml-q4_0": "llama.cpp q4_0",
    "ggml-q4_K": "llama.cpp q4_K",
    "ggml-q8_0": "llama.cpp q8_0",
}
Key = tuple[str, str, str]  # backend, values, activations


def linear_rows(files: Files, shape: tuple[int, int]) -> dict[int, list[Row]]:
    """The rows of a shape by threads."""
    n, k = shape
    return {
        threads: matching(read(name)["rows"], n=n, k=k, threads=threads)
        for threads, name in files.items()
    }


def key(row: Row) -> Key:
    return row["backend"], row["values"], row["activations"]


def named(contestant: Key, dtype: str) -> str:
    """A contestant in a table: exact products say nothing, rounded ones that x is.

    dtype: of x and of the dense weight.
    """
    backend, values, activations = contestant
    if backend == "dense":
        return f"torch {dtype}"
    if backend != OURS:
        return PEERS.get(backend, backend)
    return f"ours, {values}" + (", int8 activations" if activations == "int8" else "")


def several(numbers: Iterable[str]) -> str:
    return " / ".join(numbers)


def cell(found: dict[int, Row], best: dict[int, float]) -> str:
    """Speed-ups by threads, the best of a column bold; a dash where one was not timed."""
    texts = []
    for threads, fastest in best.items():
        if threads not in found:
            texts.append("–")
            continue
        text = rounded(found[threads]["speedup_vs_dense"], 2)
        texts.append(f"**{text}**" if text == rounded(fastest, 2) else text)
    return several(texts)


def speedups(files: Files, shape: tuple[int, int]) -> str:
    """Speed-up over torch's dense linear, with one thread / with two, for every format."""
    rows = linear_rows(files, shape)
    every = [row for found in rows.values() for row in found]
    dtype = every[0]["dtype"]
    tokens = sorted({row["m"] for row in every})
    bits = {key(row): row["bits_per_weight"] for row in every}
    best = {
        m: {threads: fastest(matching(found, m=m)) for threads, found in rows.items()}
        for m in tokens
    }
    body = []
    for contestant, stored in bits.items():
        backend, values, activations = contestant
        wanted = {"backend": backend, "values": values, "activations": activations}
        cells = []
        for m in tokens:
            here = {
                threads: row
                for threads, found in rows.items()
                for row in matching(found, m=m, **wanted)
            }
            cells.append(cell(here, best[m]))
        body.append((named(contestant, dtype), rounded(stored, 2), *cells))
    return markdown(("format", "bits", *(f"M = {m}" for m in tokens)), body)


def fastest(rows: Iterable[Row]) -> float:
    return max(row["speedup_vs_dense"] for row in rows)


def times(speedup: float) -> str:
    return rounded(speedup, 2) + "×"


def best_peers(files: Files, shape: tuple[int, int]) -> str:
    """Ours with the fewest bits against the fastest of the others, by threads and tokens."""
    body = []
    for threads, rows in linear_rows(files, shape).items():
        ours = [row for row in rows if row["backend"] == OURS]
        fewest = min(row["bits_per_weight"] for row in ours)
        for m in sorted({row["m"] for row in rows}):
            here = matching(rows, m=m)
            mine = {
                row["activations"]: row["speedup_vs_dense"]
                for row in here
                if row["backend"] == OURS and row["bits_per_weight"] == fewest
            }
            others = [row for row in here if row["backend"] in PEERS]
            if not others:
                raise ValueError(f"no peer was timed at M = {m} with {threads} threads")
            rival = max(others, key=lambda row: row["speedup_vs_dense"])
            words = (times(mine[mode]) if mode in mine else "–" for mode in ("exact", "int8"))
            theirs = rival["speedup_vs_dense"]
            name = named(key(rival), rival["dtype"])
            body.append(
                (
                    str(threads),
                    str(m),
                    *words,
                    times(theirs),
                    f"{name}, {rounded(rival['bits_per_weight'], 2)} bits",
                    rounded(max(mine.values()) / theirs, 2),
                )
            )
    head = ("threads", "M", "ours, exact", "ours, int8 activations", "best other", "which",
            "ours ÷ best other")  # fmt: skip
    return markdown(head, body)


def whole_model(file: str) -> str:
    """Tokens a second of every contestant, with one thread / with two, the best bold."""
    rows = read(file)["rows"]
    threads = sorted({row["threads"] for row in rows})
    columns = list(dict.fromkeys((row["what"], row["batch"], row["tokens"]) for row in rows))
    names = ("what", "batch", "tokens")
    lines = ("backend", "values", "activations", "head")
    body = []
    for line in dict.fromkeys(tuple(row[name] for name in lines) for row in rows):
        cells = []
        for column in columns:
            texts = []
            for count in threads:
                there = matching(rows, threads=count, **dict(zip(names, column, strict=True)))
                mine = matching(there, **dict(zip(lines, line, strict=True)))
                rates = [row["tokens_per_second"] for row in mine]
                text = rounded(rates[0], 1) if rates else "–"
                most = max(row["tokens_per_second"] for row in there)
                texts.append(f"**{text}**" if rates and rates[0] == most else text)
            cells.append(several(texts))
        body.append((contestant(*line), *cells))
    heads = (
        f"prompt of {tokens}" if what == "prompt" else f"decoding, {batch} at once"
        for what, batch, tokens in columns
    )
    return markdown(("model", *heads), body)


def contestant(backend: str, values: str, activations: str, head: str) -> str:
    if backend == "dense":
        return f"transformers, {values}"
    if backend == "llama.cpp":
        return f"llama.cpp, {values}"
    rounded_x = ", int8 activations" if activations == "int8" else ""
    return f"ours, {values}, {head} head{rounded_x}"


def tables() -> dict[str, Callable[[], str]]:
    """Name -> table, of those whose files are there."""
    found: dict[str, Callable[[], str]] = {}
    if all(read_if_there(name) for name in LINEARS.values()):
        for n, k in SHAPES:
            found[f"cpu-peers-{n}x{k}"] = functools.partial(speedups, LINEARS, (n, k))
        found["cpu-peers-best"] = functools.partial(best_peers, LINEARS, SHAPES[0])
    if all(read_if_there(name) for name in AVX2_LINEARS.values()):
        found["cpu-avx2"] = functools.partial(speedups, AVX2_LINEARS, SHAPES[0])
        found["cpu-avx2-best"] = functools.partial(best_peers, AVX2_LINEARS, SHAPES[0])
    for table, files in (("cpu-avx2-many", AVX2_MANY), ("cpu-zen1", ZEN1_LINEARS)):
        if all(read_if_there(name) for name in files.values()):
            found[table] = functools.partial(speedups, files, SHAPES[0])
    for file in (WHOLE, AVX2_WHOLE):
        if read_if_there(file):
            found[file.removesuffix(".json")] = functools.partial(whole_model, file)
    return found


CPU_PEER_TABLES = tables()
