"""Structurally different types of the matrix, and that the page in docs/ says the same of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from matrix.roads import REFUSED, RIGHT, Different, same_function, travel

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
SAMPLE = {
    "llama": "tied, gated",
    "opt": "embeddings narrower than the blocks",
    "bloom": "ALiBi, fused q, k and v",
    "gpt_neox": "tensors that transformers renames on saving",
    "phi3": "fused on disk",
    "gpt_bigcode": "initialised by its own rule",
    "youtu": "latent attention",
    "qwen3_5_text": "linear attention",
    "falcon_h1": "state space beside attention",
    "gemma3": "a language model inside one of several modalities",
    "gemma4": "buffers that hold infinite numbers",
    "falcon_mamba": "initialises linears from the module around them",
    "bart": "cross attention that never runs",
    "gpt2": "no nn.Linear in its blocks",
    "mixtral": "stacked experts",
}


@pytest.mark.parametrize("name", SAMPLE)
def test_equal_on_every_road_or_refused_in_words(name, tmp_path):
    found = travel(name, tmp_path)
    assert found.outcome in (RIGHT, REFUSED), f"{found.road}: {found.message}"
    page = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} " in page:
        right, _, others = page.partition("\n## Refused")
        assert f"`{name}`" in (right if found.outcome == RIGHT else others), (
            f"docs/architectures.md says otherwise of {name}"
        )


def test_other_logits_are_seen():
    same_function(torch.ones(3), torch.ones(3) + 1e-6, "sums")
    for other in (torch.ones(3) + 1e-2, torch.full((3,), float("nan"))):
        with pytest.raises(Different, match="apart"):
            same_function(torch.ones(3), other, "two roads")
