"""The state of an adapter training, kept in a file so that an interrupted one can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.shards import tensor_bytes, write_atomically


def state_file(out: Path) -> Path:
    """Where a run that writes to `out` keeps its state until it is done: beside it."""
    return out.with_name(out.name + ".training.safetensors")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and numbers."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode())
        sha.update(tensor_bytes(tensors[name]))
    return sha.hexdigest()


@dataclass(frozen=True)
class TrainingState:
    """Parameters and Adam's moments, in `file`.

    begun: what the run began with; a run that began otherwise cannot go on from the file.
    """

    file: Path
    begun: dict[str, Any]
    optimizer: torch.optim.Optimizer
    parameters: Sequence[nn.Parameter]

    def note(self, step: int, before: float) -> None:
        """Write the state after `step` steps, whole or not at all.

        before: the likelihood at the start of the run.
        """
        from safetensors.torch import save as to_bytes

        tensors: dict[str, Tensor] = {}
        for i, parameter in enumerate(self.parameters):
            moments = self.optimizer.state[parameter]
            tensors[f"{i}.value"] = parameter.detach()
            tensors[f"{i}.first"] = moments["exp_avg"]
            tensors[f"{i}.second"] = moments["exp_avg_sq"]
        notes = {
            "begun": json.dumps(self.begun),
            "step": str(step),
            "before": repr(before),
            "sha256": digest(tensors),
        }
        on_cpu = {name: t.cpu().contiguous() for name, t in tensors.items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, [to_bytes(on_cpu, notes)])

    def restore(self) -> tuple[int, float]:
        """Put the noted state back; returns the steps that are done, and `before`.

        Raises: CheckpointError if the file is damaged, or of a run that began otherwise.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="pt") as f:
                notes = f.metadata() or {}
                tensors = {name: f.get_tensor(name) for name in f.keys()}
            step, before = int(notes["step"]), float(notes["before"])
            if notes["sha256"] != digest(tensors):
                raise ValueError("its numbers are not those that were written")
            self._check(json.loads(notes["begun"]))
            for i, parameter in enumerate(self.parameters):
                parameter.data.copy_(tensors[f"{i}.value"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": tensors[f"{i}.first"].to(parameter),
                    "exp_avg_sq": tensors[f"{i}.second"].to(parameter),
                }
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.file} is damaged or of another model ({error}); delete it to start anew"
            ) from error
        return step, before

    def _check(self, known: dict[str, Any]) -> None:
        """Raises: CheckpointError naming the first thing in which the run began otherwise."""
        for name, now in self.begun.items():
            if known[name] != now:
                raise CheckpointError(
                    f"{self.file} was begun with {name}={known[name]}, now it is {now}; use the "
                    "model, the text and the settings of the first run, or delete it"
                )
