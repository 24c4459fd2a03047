"""A model's own code, run so that its failures name its folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import CheckpointError
from ..models.streams import is_model_failure
from ..terminal import first_line


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
        folder = getattr(getattr(model, "config", None), "_name_or_path", None)
        raise CheckpointError(
            f"the model of {folder or type(model).__name__} does not run: "
            f"{type(error).__name__}: {first_line(error)}; "
            "its config.json and generation_config.json may be damaged"
        ) from error
