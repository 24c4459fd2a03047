"""Options of the suite, the grids, the order of the tests, and fixtures that several rooms share.

Tests marked `gpu` run where there is a CUDA device and are reported as skipped elsewhere.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from pathlib import Path

import pairwise
import pytest
import torch

# Tests compare layers with fp64 results and with each other. On a CPU products with int8
# activations are the default; tests/backends/cpu/test_cpu_int8.py holds them to a bound of their
# own.
os.environ.setdefault("SLAB_KERNELS_CPU_ACTIVATIONS", "exact")

# These take longest, so they begin first: then no worker is left with one of them at the end. All
# of tests/sass is one of them, so that one worker reads the machine code for all of it.
LONGEST = (
    "test_everything_in_tritons_interpreter",
    "test_triton_code.py",
    "tests/sass/",
    "test_cuda_kernels.py",
    "test_triton_kernels.py",
)


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="every combination of the grids, where otherwise any two of their values meet",
    )
    parser.addoption(
        "--quick",
        action="store_true",
        help="one case of every test, without those marked slow",
    )
    parser.addoption(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="run each N-th test only; 5 meets every value of every parameter",
    )


def pytest_generate_tests(metafunc):
    pairwise.parametrise(metafunc, metafunc.config.getoption("full"))


def pytest_collection_modifyitems(config, items):
    items.sort(key=_turn)
    every = config.getoption("every")
    if every < 1:
        raise pytest.UsageError(f"--every {every}: must be 1 or more")
    kept = items[::every]
    if config.getoption("quick"):
        kept = _one_of_each(kept)
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish(session):
    _leave_to_the_end()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """Runs when the fixtures of a file's last test have ended, too."""
    result = yield
    if nextitem is None or nextitem.path != item.path:
        _leave_to_the_end()
    return result


def _leave_to_the_end() -> None:
    """Takes everything that is alive now out of the garbage collector's sight.

    Ten thousand collected tests and the kernels that were parsed are millions of objects, which
    live as long as the process. Every full collection would visit all of them: a test that asks for
    five took 26 s, which takes half of one on its own.
    """
    gc.collect()
    gc.freeze()


def _turn(item) -> int:
    places = (at for at, part in enumerate(LONGEST) if part in item.nodeid)
    return next(places, len(LONGEST))


def _one_of_each(items):
    """The first case of every test function that is not marked slow."""
    first = {}
    for item in items:
        if "slow" not in item.keywords:
            first.setdefault((item.path, item.originalname), item)
    return list(first.values())


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py as a module, its setup() call silenced."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    path = Path(__file__).resolve().parents[1] / "setup.py"
    spec = importlib.util.spec_from_file_location("slab_kernels_setup", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def poisoned():
    """Fills uninitialised memory with NaN, so that an element that no kernel writes shows.

    It only warns about operations without a deterministic form: cuBLAS is not what is tested here.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
