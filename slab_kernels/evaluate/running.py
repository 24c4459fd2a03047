"""A model's own code, run so that its failures name its folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.streams import is_model_failure
from ..terminal import first_line


def folder_of(model: nn.Module) -> str:
    """The folder that a model came from, else the name of its class."""
    folder = getattr(getattr(model, "config", None), "_name_or_path", None)
    return folder or type(model).__name__


def check_numbers(model: nn.Module, computed: Tensor) -> None:
    """Refuse NaN in what a model computed. Raises: CheckpointError that names its folder."""
    if bool(computed.isnan().any()):
        raise CheckpointError(
            f"the model of {folder_of(model)} computes NaN: a weight of it is NaN or infinite, or "
            "its numbers are too large for its dtype; try dtype float32, or copy it again"
        )


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Around a model's own code, which fails in any way where its config's values do not fit.

    Raises: CheckpointError that names the model's folder, instead of what transformers and torch
        raise; what is not the model's matter (`is_model_failure`) as it is.
    """
    try:
        yield
    except Exception as error:
        if not is_model_failure(error):
            raise
        raise CheckpointError(
            f"the model of {folder_of(model)} does not run: "
            f"{type(error).__name__}: {first_line(error)}; "
            "its config.json and generation_config.json may be damaged"
        ) from error
