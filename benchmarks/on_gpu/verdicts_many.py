"""What rows of the parts about many tokens mean, as verdicts.py has it for the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from on_gpu.rows import Row
from on_gpu.verdicts import (
    Verdict,
    beside_peers,
    cold,
    failures,
    goal_met,
    joined,
    named,
    predicted,
    prediction,
)

# What an H100 should reach, as speed-ups over dense, by signs, dense copy, value types and between
# which numbers of tokens. Other devices are told by the same figures.
MANY_GOALS = {
    (True, "packed", ("fp16",), 64, 64): 1.15,
    (True, "packed", ("int4",), 64, 64): 1.4,
    (True, "packed", ("fp16", "int8", "int4"), 128, 128): 1.05,
    (True, "packed", ("fp16", "int8", "int4"), 256, 4096): 0.9,
    (True, "dense", ("fp16", "int8", "int4"), 256, 4096): 0.99,  # 1, but for the launch
    (False, "packed", ("fp16", "int8"), 1024, 4096): 1.1,
    (False, "packed", ("int4",), 1024, 4096): 1.2,
}


def many(rows: Sequence[Row], failed: Mapping[str, str]) -> Verdict:
    """Rows of on_gpu.many: all goals.

    failed: what could not be measured, and why.
    """
    ours = cold(rows, "cuda")
    found = []
    for (signs, prefill, values, least, most), speed in MANY_GOALS.items():
        some = [
            row
            for row in ours
            if (row["rank"] > 0) == signs
            and row["prefill"] == prefill
            and row["values"] in values
            and least <= row["m"] <= most
        ]
        kind = "with signs" if signs else "without signs"
        kind += " and a dense copy" if prefill == "dense" else ""
        tokens = f"M={least}" if least == most else f"M={least} to {most}"
        name = f"{speed} of dense at {tokens}, {'/'.join(values)} {kind}"
        found.append(
            goal_met(
                name,
                some,
                lambda row: row["speedup_vs_dense"],
                lambda row, speed=speed: row["speedup_vs_dense"] >= speed,
            )
        )
    signed = [
        row
        for row in rows
        if row["backend"] != "cuda" or (row["rank"] and row["prefill"] == "packed")
    ]
    found += [beside_peers(signed), prediction(predicted(ours))]
    return joined(failures(failed) + found)


def hardware(rows: Sequence[Row]) -> Verdict:
    """Rows of on_gpu.hardware: the kernels for many tokens rely on every one."""
    wrong = [row for row in rows if row["wrong"]]
    said = f"{len(rows) - len(wrong)} of {len(rows)} are as the interpreter has them"
    if wrong:
        said += f"; not {named([row['case'] for row in wrong])}"
    details = [f"WRONG {row['case']}: {fault}" for row in wrong for fault in row["wrong"]]
    return Verdict(said, bool(rows) and not wrong, details)


def unknowns(rows: Sequence[Row], constants: Mapping[str, float]) -> Verdict:
    """Rows of on_gpu.unknowns. constants: what they say of each; there is no goal."""
    said = [f"{name} {value:.2f}" for name, value in constants.items()]
    for row in rows:
        if row["point"] == "port":
            said.append(f"{row['case']} {max(row['read_clocks'], row['copy_clocks'])} clocks")
        elif row["point"] == "look-ups":
            said.append(f"{row['case']} {row['clocks']:.2f} clocks")
        else:
            said.append(f"{row['case']} {row['clocks']:.2f} clocks an instruction")
    return Verdict("; ".join(said) or "nothing was measured", len(constants) == 3)
