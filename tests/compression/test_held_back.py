"""Windows of the calibration text that no weight is fitted to, and what judges by them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny_models
import torch
from torch import nn

from slab_kernels import methods
from slab_kernels.compression import matching, plan
from slab_kernels.compression.calibration import Tokens
from slab_kernels.compression.model import compress
from slab_kernels.errors import CheckpointError
from slab_kernels.methods.inputs import InputStats
from slab_kernels.models.blocks import find_blocks
from slab_kernels.models.streams import rounded_products
from slab_kernels.text.windows import Windows

QUICK = dict(method="magnitude", progress=False)


@pytest.mark.parametrize(
    ("samples", "judging"),
    [(1, []), (2, [1]), (7, [6]), (8, [7]), (9, [7]), (16, [7, 15]), (128, range(7, 128, 8))],
)
def test_an_eighth_of_the_windows_is_held_back(samples, judging):
    ids = torch.arange(samples)[:, None].expand(samples, 3)
    tokens = Tokens(Windows.of(ids), None)
    held_back = tokens.held_back
    assert (held_back is None) == (not judging) and tokens.windows_held_back == len(judging)
    if held_back is not None:
        assert [int(row[0]) for row in held_back.rows] == list(judging)
    fitted = [int(row[0]) for row in tokens.fitted.rows]
    assert fitted == [window for window in range(samples) if window not in judging]


def _seen(monkeypatch) -> list[InputStats]:
    """The statistics that the method gets, layer after layer."""
    seen: list[InputStats] = []
    real = plan.decompose_layer

    def watched(weight, stats, settings):
        seen.append(replace(stats))
        return real(weight, stats, settings)

    monkeypatch.setattr(plan, "decompose_layer", watched)
    return seen


def _inputs(model: nn.Module, tokens: torch.Tensor, name: str) -> torch.Tensor:
    """[tokens, K] fp64: what a linear reads in a plain forward of the whole model."""
    inputs: list[torch.Tensor] = []
    linear = model.get_submodule(name)
    handle = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double()))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    return torch.cat(inputs).flatten(0, -2)


def test_methods_get_both_gram_matrices_and_neither_has_windows_of_the_other(monkeypatch):
    """Against fp64 sums over plain forwards. The text of `heldout` is in neither."""
    tokens, seen = tiny_models.tokens(9, 16), _seen(monkeypatch)
    model = tiny_models.model()
    compress(model, **QUICK | {"method": "sparsegpt"}, calibration=tokens, heldout=tokens[:2])
    path, _ = find_blocks(tiny_models.model())
    dense = tiny_models.model()
    x = _inputs(dense, tokens, f"{path}.0.self_attn.q_proj").reshape(9, 16, -1)
    for gram, windows in ((seen[0].gram, [*range(7), 8]), (seen[0].held_back, [7])):
        part = x[windows].flatten(0, 1)
        want = part.T @ part / len(part)
        assert gram is not None and float((gram - want).norm() / want.norm()) < 1e-5
    assert all(stats.held_back is not None for stats in seen) and len(seen) == 14


@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_statistics_of_later_layers_are_those_of_a_plain_forward(monkeypatch, products):
    """The last layer of the last block in the finished prefix, and its drift, against fp64 sums.

    With rounded products the plain forward rounds them too.
    """
    monkeypatch.setattr("slab_kernels.compression.job.native_products", lambda device: products)
    tokens, seen = tiny_models.tokens(16, 16), _seen(monkeypatch)
    result = compress(
        tiny_models.model(), calibration=tokens, progress=False, pattern="50%", rounds=1
    )
    name = "model.layers.1.mlp.down_proj"
    windows = Tokens(Windows.of(tokens), None)
    fitted, held_back = (torch.stack(part.rows) for part in (windows.fitted, windows.held_back))
    with rounded_products(torch.device("cpu"), products):
        x, other = (_inputs(m, fitted, name) for m in (result, tiny_models.model()))
        judging = _inputs(result, held_back, name)
    weight = tiny_models.model().get_submodule(name).weight.detach().double()
    drift = weight @ (other - x).T @ x / len(x)
    for found, want in (
        (seen[-1].gram, x.T @ x / len(x)),
        (seen[-1].held_back, judging.T @ judging / len(judging)),
        (seen[-1].drift, drift),
    ):
        error = float((found - want).norm() / want.norm())
        assert error < (1e-5 if products is None else 5e-3), error


def test_statistics_behind_a_matched_block_are_of_what_matching_left(monkeypatch):
    """What the second block's first layers read, against fp64 sums over plain forwards.

    The first block is final by then; of the second the norm is as it was, and is matched later.
    """
    monkeypatch.setattr("slab_kernels.compression.job.native_products", lambda device: None)
    tokens, seen = tiny_models.tokens(16, 16), _seen(monkeypatch)
    settings = QUICK | {"method": "sparsegpt", "matching": matching.Matching(epochs=2)}
    result = compress(tiny_models.model(), **settings, calibration=tokens)
    match = result.slab_record.matching[0]
    assert match.after < match.before
    norm, hidden = tiny_models.model().model.layers[1].input_layernorm, []
    result.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: hidden.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    texts, stats = Tokens(Windows.of(tokens), None), seen[len(seen) // 2]
    for found, text in ((stats.gram, texts.fitted), (stats.held_back, texts.held_back)):
        hidden.clear()
        with torch.no_grad():
            result(input_ids=torch.stack(text.rows), use_cache=False)
            x = norm(hidden[0]).flatten(0, -2).double()
        want = x.T @ x / len(x)
        assert float((found - want).norm() / want.norm()) < 1e-5


def test_a_single_window_is_fitted_to_and_nothing_judges(monkeypatch):
    seen, tokens = _seen(monkeypatch), tiny_models.tokens(1, 64)
    record = compress(
        tiny_models.model(), **QUICK, calibration=tokens, matching=1, planes=1
    ).slab_record
    assert record.held_back == 0 and record.mean_heldout_error is None
    assert record.named_error == f"mean calibration error {record.mean_error:.4f}"
    assert all(stats.held_back is None and stats.tokens == 64 for stats in seen)


@pytest.mark.parametrize("target", ["prefix", "dense"])
def test_matching_never_trains_on_windows_that_judge(monkeypatch, target):
    """Nor is it judged by others."""
    tokens, trained = tiny_models.tokens(16, 16), []
    real = matching._train

    def watched(goal, *rest):
        trained.append((goal, list(goal.judged.stream.hidden)))
        return real(goal, *rest)

    monkeypatch.setattr(matching, "_train", watched)
    settings = matching.Matching(epochs=1, target=target)
    compress(tiny_models.model(), **QUICK, calibration=tokens, matching=settings)
    goal, judged = trained[0]
    assert [len(torch.cat(t.outputs)) for t in (goal.taught, goal.judged)] == [14, 2]
    embedded = tiny_models.model().get_input_embeddings()(tokens)
    assert torch.equal(torch.cat(judged), embedded[7::8])


def test_a_run_is_not_resumed_by_other_rules_of_computing(tmp_path, monkeypatch):
    def stop(event):
        if event.kind == "block":
            raise KeyboardInterrupt

    tiny_models.write(tmp_path / "dense")
    arguments = dict(calibration=tiny_models.tokens(16, 16), method="magnitude")
    where = (tmp_path / "dense", tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        compress(*where, **arguments, progress=stop)
    settings = json.loads(next((tmp_path / "out").glob("*progress*")).read_text())["settings"]
    assert settings["held_back"] == 2
    other = None if settings["products"] == "bfloat16" else torch.bfloat16
    monkeypatch.setattr("slab_kernels.compression.job.native_products", lambda device: other)
    with pytest.raises(CheckpointError, match="products was '"):
        compress(*where, **arguments, progress=False, resume=True)


def test_a_gram_matrix_in_strips_is_symmetric_and_exact():
    generator = torch.Generator().manual_seed(0)
    for width in (5, 383, 384, 386, 1000):
        x = torch.randn(64, width, generator=generator)
        gram = methods.InputStats.from_inputs(x).matrix
        want = x.double().T @ x.double() / 64
        assert torch.equal(gram, gram.T) or width < 384
        assert float((gram - want).abs().max()) < 1e-6
