"""A model folder as the commands open it: the model, its tokenizer, and what it stores."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from .meanings import torch_dtype

if TYPE_CHECKING:
    from ..models.hub import HubArguments
    from ..models.totals import Totals


class Opened(NamedTuple):
    """A model, its tokenizer, and what its folder is known to be."""

    model: Any
    tokenizer: Any
    facts: dict[str, Any]
    totals: Totals

    def facts_of_the_run(self) -> dict[str, Any]:
        """The same facts, and the accuracy mode of the packed layers that have run (`activations`,
        see `nn.preparation.activations_of`)."""
        from ..nn.preparation import activations_of

        return self.facts | {"activations": activations_of(self.model)}


class Opening(NamedTuple):
    """How a command opens a folder: its options of the same names (`cli.options`).

    hub: those that say where the model is found.
    """

    device: str
    dtype: str | None
    backend: str | None
    prefill: str | None
    activations: str | None
    hub: HubArguments
    no_verify: bool


def open_model(folder: str, how: Opening) -> Opened:
    """A packed or dense folder; a CPU computes in fp32 unless told otherwise."""
    import torch

    from ..device import resolve_device
    from ..evaluate.inspect import inspect
    from ..models.folder import hub_folder
    from ..models.load import load
    from ..models.source import open_source
    from ..models.totals import read_totals
    from ..nn.preparation import dense_copy_bytes
    from ..text.tokenizer import open_tokenizer

    _force(how.backend)
    skip_checksums(how.no_verify)
    where, trust = resolve_device(how.device), how.hub.trust_remote_code
    kind = torch.float32 if where.type == "cpu" else None
    if how.dtype is not None:
        kind = torch_dtype(how.dtype)
    path = hub_folder(folder, how.hub)
    seen, totals = inspect(path), read_totals(path)
    if seen["stored"] == "packed":
        words: dict[str, Any] = {"prefill": how.prefill, "activations": how.activations}
        model = load(path, device=where, dtype=kind, trust_remote_code=trust, **words)
    else:
        model = open_source(path, how.hub.found()).open_dense().to(device=where, dtype=kind)
    facts = {
        "folder": folder,
        "method": seen["method"] or "dense",
        "stored": seen["stored"],
        "bits_per_weight": seen["bits_per_weight"],
        **totals.to_dict(),
        "dense_copy_bytes": dense_copy_bytes(model),
        "device": str(where),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return Opened(model, open_tokenizer(path, trust), facts, totals)


def of_against(
    hub: HubArguments, against: str | None, revision: str | None, subfolder: str | None
) -> HubArguments:
    """How the model of --against is found: with the token of the first, and places of its own."""
    if against is None and (revision, subfolder) != (None, None):
        raise typer.BadParameter(
            "--against-revision and --against-subfolder are for --against, which is not given"
        )
    return replace(hub, revision=revision, subfolder=subfolder)


def skip_checksums(wanted: bool) -> None:
    from ..models.folder import VERIFY

    if wanted:
        os.environ[VERIFY] = "0"


def _force(backend: str | None) -> None:
    from ..backends import dispatch

    if backend:
        dispatch.backend(backend)  # an unknown name fails here, before a model is loaded
        os.environ[dispatch.ENVIRONMENT] = backend
