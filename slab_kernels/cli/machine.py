"""The command about this machine and what is installed on it: info."""

from __future__ import annotations

from typing import Any

from ..errors import DONE
from . import console, options
from .console import Outcome


def info(
    support: options.Support = False, methods: options.Methods = False, json: options.Json = False
) -> Outcome:
    """Versions, devices, and which backends work here and why the others do not."""
    from ..bench import machine

    if methods:
        return _methods()
    if support:
        return _support()
    # Where a variable forces what there is not, the exit code is that of a command with a model.
    wrong = machine.wrong_variables()
    data = machine.information() | {"problems": list(map(str, wrong))}
    for error in wrong:
        console.say(f"slab-kernels: no model runs here: {error}")

    def show() -> None:
        versions = [(name, found or "not installed") for name, found in data["versions"].items()]
        console.print_pairs(versions, "versions")
        console.print_pairs(map(_device, data["devices"]), "devices")
        backends = [
            (f"{name} on {kind}", "no: " + "; ".join(reasons) if reasons else "works")
            for name, kinds in data["backends"].items()
            for kind, reasons in kinds.items()
        ]
        backends.append(("CUDA kernels", data["cuda_kernels"]))
        console.print_pairs(backends, "backends, in order of preference")
        console.print_pairs(_copies(data["dense_copies"]), "dense copies for many tokens")
        console.print_pairs([("activations", data["cpu_activations"])], "products on a CPU")
        variables = [
            (name, f"{data['variables'][name] or 'not set'} ({meaning})")
            for name, meaning in machine.VARIABLES.items()
        ]
        console.print_pairs(variables, "environment")

    return Outcome(data, show, wrong[0].exit_code if wrong else DONE)


def _copies(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What dense copies cost here, and how much "auto" would let them take."""
    bits = f"{facts['prefill']}; a copy takes {facts['bits_per_weight']} bits per weight"
    room = facts["auto_bytes"].items()
    return [
        ("prefill", bits),
        *((gpu, f"auto lets all copies take {size / 1e6:.0f} MB now") for gpu, size in room),
    ]


def _device(facts: dict[str, Any]) -> tuple[str, str]:
    """The name of a device, and everything else that is known of it."""
    rest = [
        str(value) if name == "name" else f"{name} {value}"
        for name, value in facts.items()
        if name != "device"
    ]
    return facts["device"], ", ".join(rest)


def _support() -> Outcome:
    """What every backend runs, as the table of the documents."""
    from ..backends.support import answers, markdown

    data = {"support": [answer.to_dict() for answer in answers()]}
    return Outcome(data, lambda: print(markdown(), end=""))


def _methods() -> Outcome:
    """The table of methods, and default, range and meaning of every setting that is their own."""
    from ..methods import all_methods, origins, problems

    origin = origins()
    data: list[dict[str, Any]] = [
        {
            "method": name,
            "description": method.description,
            "origin": origin[name],
            "options": [
                {
                    "name": option,
                    "default": default,
                    "range": rule.range(),
                    "meaning": rule.meaning,
                }
                for option, (default, rule) in method.options().items()
            ],
        }
        for name, method in all_methods().items()
    ]
    for problem in problems():
        console.say(f"warning: {problem}")

    def show() -> None:
        for row in data:
            pairs = [
                (f"{option['name']}={option['default']}", f"{option['range']}: {option['meaning']}")
                for option in row["options"]
            ]
            title = f"{row['method']}: {row['description']}, from {row['origin']}"
            console.print_pairs(pairs or [("no settings of its own", "")], title)

    return Outcome({"methods": data}, show)
