"""What the tests of documents share."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models

import slab_kernels


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A dense and a packed folder to put under the names that documents use."""
    top = tmp_path_factory.mktemp("models")
    tiny_models.write(top / "dense")
    slab_kernels.compress(
        top / "dense",
        top / "packed",
        method="magnitude",
        calibration=tiny_models.tokens(),
        progress=False,
    )
    return top
