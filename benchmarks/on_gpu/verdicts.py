"""What rows mean: one line, whether it is good, and what stands behind it. Plain functions of rows.

The goals are for up to 16 tokens. A format's byte limit is the speed-up over a dense 16-bit weight
that its bytes alone would give, 16 / bits per weight.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from on_gpu.rows import Row

LARGE = ((28672, 4096), (4096, 14336))
LARGE_GOAL, SMALL_GOAL = 0.9, 0.8  # of the byte limit, for int4 and int8 at up to 4 tokens
GOAL_TOKENS = 4
TRITON_GOAL = 1.15  # times the CUDA kernel's time
OURS = ("cuda", "triton")
PEERS = ("torch-2:4", "marlin", "machete", "gemlite", "humming")
STARTED = "started"  # of a test that has no outcome yet
MOST_NAMED = 3  # cases that a line names


class Verdict(NamedTuple):
    text: str  # one line
    good: bool
    details: Sequence[str] = ()  # a line for each case that is not as it should be

    def say(self) -> None:
        """Prints it as the runner reads it."""
        for line in self.details:
            print(line)
        print(f"verdict: {self.text}", flush=True)


def joined(verdicts: Sequence[Verdict]) -> Verdict:
    """Several verdicts as one line."""
    return Verdict(
        "; ".join(each.text for each in verdicts),
        all(each.good for each in verdicts),
        [line for each in verdicts for line in each.details],
    )


def named(cases: Sequence[str]) -> str:
    """The first few cases, and how many more there are."""
    more = f" and {len(cases) - MOST_NAMED} more" if len(cases) > MOST_NAMED else ""
    return ", ".join(cases[:MOST_NAMED]) + more


def correctness(rows: Sequence[Row]) -> Verdict:
    """Rows of on_gpu.correct: every one has to be right, every kernel has to be reached."""
    wrong = [row for row in rows if row["wrong"]]
    warned = [row for row in rows if row.get("warned")]
    ran = {name for row in rows for name in row.get("kernels", ())}
    missed = sorted({name for row in rows for name in row.get("may_use", ())} - ran)
    details = [f"WRONG {row['case']}: {fault}" for row in wrong for fault in row["wrong"]]
    details += [f"WARNED {row['case']}: {text}" for row in warned for text in row["warned"]]
    details += [f"NEVER RAN {name}" for name in missed]
    ways = sum(row["ways"] for row in rows)
    said = [f"{len(rows) - len(wrong)} of {len(rows)} weights are right, run in {ways} ways"]
    if ran:
        said.append(f"{len(ran)} kernels ran")
    if wrong:
        said.append(f"wrong: {named([row['case'] for row in wrong])}")
    if warned:
        said.append(f"warned: {named([row['case'] for row in warned])}")
    if missed:
        said.append(f"never ran: {named(missed)}")
    return Verdict("; ".join(said), bool(rows) and not (wrong or warned or missed), details)


def limit_share(row: Row) -> float:
    """The speed-up over dense as a share of what the format's bytes alone would give."""
    return row["speedup_vs_dense"] * row["bits_per_weight"] / 16


def cell(row: Row) -> str:
    return f"{row['n']}x{row['k']} {row['values']} M={row['m']}"


def cold(rows: Iterable[Row], *backends: str) -> list[Row]:
    return [row for row in rows if row.get("cache") == "cold" and row["backend"] in backends]


def goal_met(
    name: str, rows: Sequence[Row], figure: Callable[[Row], float], reached: Callable[[Row], bool]
) -> Verdict:
    """name: what is asked of every row; figure: what a row is told by. The lowest is named."""
    if not rows:
        return Verdict(f"{name}: not measured", False)
    missed = sorted((row for row in rows if not reached(row)), key=figure)
    told = [f"{cell(row)} {row['backend']} {figure(row):.2f}" for row in missed]
    details = [f"MISSED {name}: {line}" for line in told]
    if not missed:
        least = min(rows, key=figure)
        text = f"{name}: reached by {len(rows)}, the least {figure(least):.2f} at {cell(least)}"
        return Verdict(text, True)
    text = f"{name}: missed by {len(missed)} of {len(rows)}: {named(told)}"
    return Verdict(text, False, details)


def byte_limit(rows: Sequence[Row]) -> Verdict:
    """CUDA, int4 and int8, up to GOAL_TOKENS tokens."""
    found = []
    for large, goal, which in ((True, LARGE_GOAL, "large"), (False, SMALL_GOAL, "small")):
        some = [
            row
            for row in cold(rows, "cuda")
            if row["values"] in ("int4", "int8")
            and row["m"] <= GOAL_TOKENS
            and ((row["n"], row["k"]) in LARGE) == large
        ]
        name = f"at least {goal} of the byte limit on {which} shapes"
        found.append(
            goal_met(name, some, limit_share, lambda row, goal=goal: limit_share(row) >= goal)
        )
    return joined(found)


def triton_beside_cuda(rows: Sequence[Row]) -> Verdict:
    """Triton's time against that of the CUDA kernel in the same cell."""
    cuda = {cell(row): row["median_us"] for row in cold(rows, "cuda")}
    some = [row for row in cold(rows, "triton") if cell(row) in cuda]

    def speed(row: Row) -> float:
        return cuda[cell(row)] / row["median_us"]

    name = f"Triton within {TRITON_GOAL - 1:.0%} of CUDA (CUDA's time over Triton's)"
    return goal_met(name, some, speed, lambda row: speed(row) >= 1 / TRITON_GOAL)


def never_slower_than_dense(rows: Sequence[Row]) -> Verdict:
    def speed(row: Row) -> float:
        return row["speedup_vs_dense"]

    some = cold(rows, *OURS)
    return goal_met("never slower than dense", some, speed, lambda row: speed(row) >= 1)


def beside_peers(rows: Sequence[Row]) -> Verdict:
    """The fastest other library in each cell of int4, against our faster backend; no goal."""
    said = []
    for peer in PEERS:
        ratios = []
        for row in cold(rows, peer):
            values = "fp16" if row["values"] == "2:4" else row["values"]
            same = (row["n"], row["k"], row["m"])
            ours = [
                each["median_us"]
                for each in cold(rows, *OURS)
                if (each["n"], each["k"], each["m"]) == same and each["values"] == values
            ]
            if ours:
                ratios.append(row["median_us"] / min(ours))
        if ratios:
            said.append(f"{min(ratios):.2f} to {max(ratios):.2f} times {peer}'s speed")
    return Verdict(", ".join(said) or "no other library", True)


def prediction(rows: Sequence[Row]) -> Verdict:
    """Measured time over predicted, of the rows that have both. No goal."""
    ratios = sorted(
        row["measured_us"] / row["predicted_us"] for row in rows if row.get("predicted_us")
    )
    if not ratios:
        return Verdict("no prediction", True)
    middle = statistics.median(ratios)
    return Verdict(
        f"measured over predicted {ratios[0]:.2f} to {ratios[-1]:.2f}, median {middle:.2f}", True
    )


def decode(rows: Sequence[Row], failed: Mapping[str, str]) -> Verdict:
    """Rows of on_gpu.decode: all goals.

    failed: what could not be measured, and why.
    """
    found = [byte_limit(rows), triton_beside_cuda(rows), never_slower_than_dense(rows)]
    found += [beside_peers(rows), prediction(predicted(cold(rows, "cuda")))]
    return joined(failures(failed) + found)


def predicted(rows: Iterable[Row]) -> list[Row]:
    """Times of our kernels, measured and predicted, as `prediction` wants them."""
    return [{"measured_us": row["median_us"], "predicted_us": row["predicted_us"]} for row in rows]


def failures(failed: Mapping[str, str]) -> list[Verdict]:
    """The verdict on what could not be measured, if there is any."""
    if not failed:
        return []
    details = [f"NOT MEASURED {case}: {why}" for case, why in failed.items()]
    return [Verdict(f"not measured: {named(list(failed))}", False, details)]


def plans(rows: Sequence[Row], whole: bool) -> Verdict:
    """Rows of on_gpu.sweep: what the model's choices cost over the best plan that was timed.

    whole: whether every plan was timed.
    """
    problems: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        unsigned = row.get("loop") == "prefill_one"  # the kernel of weights without a sign term
        problem = row["n"], row["k"], row["values"], row["m"], unsigned
        problems[problem].append((float(row["predicted_us"]), float(row["measured_us"])))
    left = "" if whole else ", and time ran out before all were"
    if not problems:
        return Verdict(f"no plan was timed{left}", False)
    regrets = [min(some)[1] / min(took for _, took in some) for some in problems.values()]
    timed = [
        {"predicted_us": predicted, "measured_us": took}
        for some in problems.values()
        for predicted, took in some
    ]
    return Verdict(
        f"{len(rows)} plans of {len(problems)} cells were timed{left}; the model's choice takes "
        f"{statistics.mean(regrets):.3f} times the best one's time, at worst {max(regrets):.3f}; "
        f"{prediction(timed).text}",
        whole,
    )


def tests(rows: Sequence[Row], selected: int | None, before: int = 0) -> Verdict:
    """Rows of on_gpu.pytests.

    selected: how many tests there were to be run, None if pytest did not say. before: how many of
    the rows are of an earlier call, beside those. A test that has only started hung or was stopped.
    """
    count = Counter(row["outcome"] for row in rows)
    bad = [row for row in rows if row["outcome"] in ("failed", "error", STARTED)]
    said = ", ".join(f"{number} {word}" for word, number in sorted(count.items()))
    if missing := 0 if selected is None else selected + before - len(rows):
        said += f", {missing} not run"
    if bad:
        said += f": {named([row['case'].split('::')[-1] for row in bad])}"
    details = [f"{row['outcome'].upper()} {row['case']} {row.get('reason', '')}" for row in bad]
    return Verdict(said or "no test was run", bool(rows) and not (bad or missing), details)


def sanitizer(row: Row) -> Verdict:
    """A row of on_gpu.sanitized."""
    if row["errors"] is None:
        last = row["said"][-1] if row["said"] else "nothing"
        return Verdict(f"no summary (code {row['code']}); it said last: {last}", False)
    results = "every result is right" if row["right"] else "a result is wrong or missing"
    good = row["errors"] == 0 and row["right"] and row["code"] == 0
    return Verdict(f"{row['errors']} errors or hazards, {results}", good)


class Line(NamedTuple):
    """y = at_zero + slope * x."""

    at_zero: float
    slope: float


def line_through(points: Sequence[tuple[float, float]]) -> Line:
    """The least-squares line; it needs two points of different x."""
    slope, at_zero = statistics.linear_regression(*zip(*points, strict=True))
    return Line(at_zero, slope)


def causes(rows: Sequence[Row]) -> Verdict:
    """Rows of on_gpu.causes: each point in a clause, measured (predicted)."""
    by_point: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_point[row["point"]].append(row)
    said = [
        f"{row['values']} launch of a tiny weight {row['measured_us']:.2f} us "
        f"({row['predicted_us']:.2f})"
        for row in by_point["start"]
    ]
    said += _loops(by_point["loop"])
    said += _warps(by_point["warps"])
    said += _overlap(by_point["overlap"])
    said += [
        f"{row['values']} behind another kernel {row['how']} {row['measured_us']:.2f} us"
        for row in by_point["prefetch"]
    ]
    return Verdict("; ".join(said) or "nothing was timed", bool(rows))


def _loops(rows: Sequence[Row]) -> list[str]:
    """For each value type the line of time over K blocks: what a block costs, and what the rest."""
    said = []
    for values in dict.fromkeys(row["values"] for row in rows):
        lines = []
        for time in ("measured_us", "predicted_us"):
            points = [
                (row["k_blocks"], row[time])
                for row in rows
                if row["values"] == values and row["cache"] == "warm"
            ]
            if len(points) > 1:
                lines.append(line_through(points))
        if len(lines) == 2:
            measured, predicted = lines
            said.append(
                f"{values} in cache {measured.at_zero:.2f} us "
                f"+ {1e3 * measured.slope:.1f} ns a K block "
                f"({predicted.at_zero:.2f} us + {1e3 * predicted.slope:.1f} ns)"
            )
    return said


def _warps(rows: Sequence[Row]) -> list[str]:
    """For each linear its time by the warps of a CTA."""
    said = []
    for linear in dict.fromkeys((row["n"], row["k"], row["values"]) for row in rows):
        times = [
            f"{row['warps']} warps {row['measured_us']:.2f} us ({row['predicted_us']:.2f})"
            for row in rows
            if (row["n"], row["k"], row["values"]) == linear
        ]
        said.append("{}x{} {}: ".format(*linear) + ", ".join(times))
    return said


def _overlap(rows: Sequence[Row]) -> list[str]:
    """For each chain of linears the time of one by how they follow each other."""
    said = []
    for linear in dict.fromkeys((row["n"], row["k"], row["values"], row["cache"]) for row in rows):
        found = {
            row["how"]: f"{row['how']} {row['measured_us']:.2f} us ({row['predicted_us']:.2f})"
            for row in rows
            if (row["n"], row["k"], row["values"], row["cache"]) == linear
        }
        said.append("{}x{} {} {}: ".format(*linear) + ", ".join(found.values()))
    return said
