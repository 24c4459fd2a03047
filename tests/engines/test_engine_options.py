"""The option that vLLM hands on, read without vLLM."""

from __future__ import annotations

import pytest

from slab_kernels.backends import dense_copy
from slab_kernels.engines.engine_options import prefill_word
from slab_kernels.errors import ArgumentError


def test_the_engines_word_is_above_the_environments(monkeypatch):
    monkeypatch.delenv(dense_copy.ENVIRONMENT, raising=False)
    for nothing in (None, {}, {"other": 1}, {"slab_kernels": None}, {"slab_kernels": {}}, object()):
        assert prefill_word(nothing) == "packed"
    assert prefill_word({"slab_kernels": {"prefill": "auto"}}) == "auto"
    monkeypatch.setenv(dense_copy.ENVIRONMENT, "dense")
    assert prefill_word({}) == "dense"
    assert prefill_word({"slab_kernels": {"prefill": "packed"}}) == "packed"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("dense", r"additional_config\['slab_kernels'\]='dense' must be a dict"),
        ({"prefil": "dense"}, "the unknown option 'prefil'; there is prefill"),
        ({"prefill": "fast"}, "prefill='fast' is unknown; use one of packed, dense, auto"),
    ],
)
def test_what_is_unknown_is_refused(given, message):
    with pytest.raises(ArgumentError, match=message):
        prefill_word({"slab_kernels": given})
