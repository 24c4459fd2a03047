"""Tests marked `gpu` run where there is a CUDA device and are reported as skipped elsewhere; `--every N` runs a sample."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="run each N-th test only; 5 meets every value of every parameter",
    )


def pytest_collection_modifyitems(config, items):
    every = config.getoption("every")
    if every < 1:
        raise pytest.UsageError(f"--every {every}: must be 1 or more")
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % every])
    items[:] = items[::every]
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN, so an element that no kernel writes shows. A warning: cuBLAS is not the matter here."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
