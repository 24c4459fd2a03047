"""The kernels' machine code, read once a process."""

from __future__ import annotations

import functools

import pytest

from sass import counter as sass
from slab_kernels.backends.cuda import compile as recipe


@functools.cache
def compiled(architecture: str) -> tuple[int, dict[str, sass.Kernel]]:
    """The size of an architecture's cubin, and its kernels."""
    image = sass.image(architecture)
    return len(image), sass.disassemble(image)


@pytest.fixture
def machine_code():
    """`compiled`; without a compiler or disassembler a test fails in one sentence."""

    def get(architecture: str) -> tuple[int, dict[str, sass.Kernel]]:
        try:
            return compiled(architecture)
        except recipe.Impossible as reason:
            pytest.fail(str(reason), pytrace=False)

    return get
