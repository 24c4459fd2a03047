"""Experts under calibration: what each is fitted to, what is said of it, and going on."""

from __future__ import annotations

import itertools
import json

import pytest
import tiny_models
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import slab_kernels
from slab_kernels.compression.job import Job
from slab_kernels.compression.model import compress
from slab_kernels.compression.plan import Plan
from slab_kernels.compression.routing import Feeding, in_waves, needed_tokens
from slab_kernels.compression.statistics import Streams
from slab_kernels.methods import LayerSettings
from slab_kernels.models import groups, passes
from slab_kernels.models.blocks import outside_filled
from slab_kernels.models.experts import mixtures
from slab_kernels.models.groups import Group, routed_tokens
from slab_kernels.models.source import open_source
from slab_kernels.models.streams import catch_stream

CPU = torch.device("cpu")
EXPERTS, NEVER = 4, 3


def mixture(seed: int = 0, kind: str = "mixtral", **changes) -> nn.Module:
    """Two blocks; no token of the first goes to the experts 2 and 3: of the products of a token
    with a, -a, 0 and 0 one of the first two is the largest."""
    sizes = {"num_local_experts": EXPERTS, "num_experts_per_tok": 1, "head_dim": 8} | changes
    config = AutoConfig.for_model(kind, **{**tiny_models._TOKENS, **tiny_models._GATED, **sizes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
        mlp = model.model.layers[0].mlp
        router = (mlp.gate if kind == "mixtral" else mlp.router).weight
        router[1], router[2:] = -router[0], 0.0
    return model


TOKENS = tiny_models.tokens()


class Inside:
    """The first block of a model under compression, and what its experts are called with."""

    def __init__(self, tokens: torch.Tensor, **settings):
        model = mixture()
        plan = Plan(LayerSettings(**settings))
        self.job = Job.of(open_source(model), plan, (), CPU)
        job = self.job
        with outside_filled(job.source, job.path, CPU, torch.float32) as outside:
            self.stream = catch_stream(outside, job.blocks, tokens, job.load_block, CPU)
        self.block = job.load_block(0)
        self.linears = {
            name: self.block.get_submodule(name.removeprefix(job.prefix(0)))
            for name in job.linears[0]
        }
        calls = []
        with torch.no_grad():
            hook = self.block.mlp.experts.register_forward_pre_hook(
                lambda _, args: calls.append((args[0].clone(), args[1].clone()))
            )
            for batch in range(len(self.stream.hidden)):
                self.stream.run(0, self.block, batch)
            hook.remove()
        self.x = torch.cat([x for x, _ in calls]).double()
        self.chosen = torch.cat([chosen for _, chosen in calls])

    def grams(self) -> dict[str, tuple[torch.Tensor, int, tuple[str, ...]]]:
        """Linear -> its Gram matrix, the tokens of it, and who else it stands for."""
        prefix = self.job.prefix(0)
        settings = self.job.plan.usual
        feeding = Feeding.of(settings, self.stream, 0, self.block, None, prefix)
        self.record = feeding.records[0]
        streams = Streams(self.stream, None, None, None, None)
        waves, through = streams.enter(0, self.block, None, self.linears, prefix, feeding)
        self.waves = waves
        found = {}
        for wave in waves:
            for group, inputs in zip(wave, through.inputs(wave), strict=True):
                for name in group.names:
                    found[name] = (inputs.stats.matrix, inputs.stats.tokens, group.names)
            through.finish(tuple(name for group in wave for name in group.names))
        return found

    def read_by(self, number: int, everything: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """What the linears of an expert read, in fp64, of its tokens or of all."""
        expert = self.block.mlp.experts.expert(number)
        rows = self.x if everything else self.x[(self.chosen == number).any(-1)]
        gate, up = expert.gate_proj.weight.double(), expert.up_proj.weight.double()
        return rows, nn.functional.silu(rows @ gate.T) * (rows @ up.T)


def long_tokens(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, tiny_models.VOCABULARY, (count // 20, 20), generator=generator)


@pytest.mark.parametrize("count", [600, 60])
def test_an_experts_gram_matrix_is_that_of_its_tokens_or_of_all(count):
    inside = Inside(long_tokens(count), method="slab")
    grams, record = inside.grams(), inside.record
    seen = torch.bincount(inside.chosen.flatten(), minlength=EXPERTS).tolist()
    assert record.tokens == seen and record.of == count and record.needed == 48
    assert record.fed == [n for n in range(EXPERTS) if seen[n] < 48]
    assert seen[2] == seen[NEVER] == 0 and (count == 60) == (len(record.fed) == EXPERTS)
    for number in range(EXPERTS):
        fed = number in record.fed
        for leaf, x in zip(("gate_proj", "down_proj"), inside.read_by(number, fed), strict=True):
            gram, tokens, names = grams[f"model.layers.0.mlp.experts.{number}.{leaf}"]
            assert tokens == len(x) == (count if fed else seen[number])
            torch.testing.assert_close(gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
            numbers = record.fed if fed else [number]
            leaves = ("gate_proj", "up_proj") if leaf == "gate_proj" else (leaf,)
            if leaf == "gate_proj":  # one matrix for gate and up, and for all that are fed
                want = {
                    f"model.layers.0.mlp.experts.{n}.{part}" for n in numbers for part in leaves
                }
                assert set(names) == want


def test_what_is_read_at_once_comes_in_one_wave_as_far_as_there_is_room():
    inside = Inside(long_tokens(600), method="slab")
    inside.grams()
    leaves = [{name.rpartition(".")[2] for g in wave for name in g.names} for wave in inside.waves]
    assert leaves == [
        {"q_proj", "k_proj", "v_proj"},
        {"o_proj"},
        {"gate_proj", "up_proj"},
        {"down_proj"},
    ]
    single = [Group((name,), 1) for name in ("a", "b", "c", "d")]
    linears = dict.fromkeys("abcd", nn.Linear(10, 1))
    stages = {"a": "one", "b": "one", "c": "one"}
    for room, sizes in ((4 * 10 * 15 * 3, [3, 1]), (4 * 10 * 15 * 2, [2, 1, 1]), (1, [1] * 4)):
        waves = in_waves(single, linears, stages, 5, room)
        assert [len(wave) for wave in waves] == sizes
        assert [group for wave in waves for group in wave] == single


@pytest.mark.parametrize(("method", "needed"), [("magnitude", 1), ("wanda", 128), ("slab", 48)])
def test_how_many_tokens_a_method_needs(method, needed):
    inside = Inside(TOKENS, method=method)
    assert needed_tokens(inside.job.plan.usual, inside.block.mlp.experts) == needed


def test_an_expert_whose_last_tokens_go_elsewhere_is_fed_late():
    """Attention is compressed between the count and the experts, and may move a token."""
    inside = Inside(long_tokens(60), method="magnitude")
    prefix = inside.job.prefix(0)
    feeding = Feeding.of(inside.job.plan.usual, inside.stream, 0, inside.block, None, prefix)
    assert feeding.records[0].fed == [2, 3]
    streams = Streams(inside.stream, None, None, None, None)
    waves, through = streams.enter(0, inside.block, None, inside.linears, prefix, feeding)
    with torch.no_grad():
        inside.block.mlp.gate.weight.zero_()
    counts = routed_tokens(inside.stream, 0, inside.block)["mlp.experts"]
    idle = [n for n in (0, 1) if not counts[n]]
    assert idle  # of equal products one expert is the first
    for wave in waves:
        for inputs in through.inputs(wave):
            assert inputs.stats.tokens > 0 and inputs.stats.gram is not None
    assert feeding.records[0].fed == sorted([*idle, 2, 3])
    through.end_feeding()
    assert not mixtures(inside.block)["mlp.experts"].fed


def test_counts_are_recorded_and_shown(tmp_path):
    model, lines = mixture(), []
    out = tmp_path / "out"
    record = compress(
        model, out, method="wanda", calibration=TOKENS, progress=lambda e: lines.append(str(e))
    )
    stored = json.loads((out / "slab_run.json").read_text())["experts"]
    assert [entry["module"] for entry in stored] == [
        f"model.layers.{n}.mlp.experts" for n in range(2)
    ]
    first = record.experts[0]
    assert stored[0]["tokens"] == first.tokens and sum(first.tokens) == first.of
    assert first.fed == list(range(EXPERTS)) and first.needed == 128
    said = next(line for line in lines if line.startswith("model.layers.0.mlp.experts: "))
    assert ", ".join(map(str, first.tokens)) in said and "128" in said and "3 (0)" in said
    assert f"fed all {first.of}" in said
    # All that are fed share a Gram matrix; a record names those of its own expert alone.
    named = {layer.name: layer.group for layer in record.layers}
    for number in range(EXPERTS):
        expert = f"model.layers.0.mlp.experts.{number}"
        both = (f"{expert}.gate_proj", f"{expert}.up_proj")
        assert named[both[0]] == named[both[1]] == both
    assert {len(named[f"model.layers.0.self_attn.{leaf}_proj"]) for leaf in "qkv"} == {3}


def test_memory_for_what_fed_experts_read_is_bounded(monkeypatch):
    inside = Inside(long_tokens(60), method="slab")
    Feeding.of(inside.job.plan.usual, inside.stream, 0, inside.block, None, inside.job.prefix(0))
    given = inside.stream, 0, inside.block, inside.linears
    alone = groups._alone(inside.block, inside.linears)
    assert alone == {name for name in inside.linears if name.endswith("down_proj")}
    seen = groups._inputs(*given, 0, alone)
    assert seen.keys() == inside.linears.keys()
    assert {name for name, read in seen.items() if not read[0].value.numel()} == alone
    found = groups.find_groups(*given)
    assert all(group.names[0] not in alone or len(group.names) == 1 for group in found)

    runs = []
    real = passes.all_inputs
    monkeypatch.setattr(passes, "all_inputs", lambda *a: runs.append(a) or real(*a))
    for room, count in ((1, 0), (1 << 30, len(inside.stream.hidden))):
        runs.clear()
        dense = passes.DensePasses(*given, found, passes.Room(room))
        assert len(runs) == count
        (x,) = dense.inputs([found[0]], 0)
        assert torch.equal(x, groups.group_inputs(*given, [found[0]], 0)[0])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("pattern", ["2:4", "60%"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, kind, pattern):
    mixture(kind=kind).save_pretrained(tmp_path / "dense")
    settings = dict(method="wanda", calibration=long_tokens(400), pattern=pattern)
    if kind == "gpt_oss" and pattern == "2:4":
        settings |= dict(method="slab", matching=1)  # trains biases
    compress(tmp_path / "dense", tmp_path / "whole", progress=False, **settings)
    blocks = itertools.count()

    def stop(event):
        if event.kind == "block" and next(blocks) == 0:
            raise Killed

    with pytest.raises(Killed):
        compress(tmp_path / "dense", tmp_path / "out", progress=stop, **settings)
    record = compress(tmp_path / "dense", tmp_path / "out", progress=False, resume=True, **settings)
    assert len(record.experts) == 2 and 0 < len(record.experts[0].fed) < EXPERTS
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_matching_and_a_budget_reach_experts(tmp_path, kind):
    logits = []
    for more in ({"matching": 1}, {"bits": 6.0}):
        dense = mixture(kind=kind, num_local_experts=2)
        biases = [p for name, p in dense.named_parameters() if name.endswith("proj_bias")]
        assert len(biases) == (4 if kind == "gpt_oss" else 0)
        before = [bias.detach().clone() for bias in biases]
        dense.save_pretrained(tmp_path / f"{len(logits)}")
        settings = dict(method="slab", calibration=long_tokens(60), progress=False, **more)
        model = compress(dense, **settings)
        assert {len(block.mlp.experts.expert(0)._modules) for block in model.model.layers} == {3}
        with torch.no_grad():
            logits.append(model(input_ids=TOKENS).logits)
        if "matching" in more:
            if kind == "gpt_oss":  # biases are trained too, in blocks that training improves
                assert not all(map(torch.equal, biases, before))
            compress(tmp_path / "0", tmp_path / "packed", **settings)
            with torch.no_grad():
                stored = slab_kernels.load(tmp_path / "packed")(input_ids=TOKENS).logits
            assert torch.equal(stored, logits[0])
    assert all(bool(found.isfinite().all()) for found in logits)
    assert slab_kernels.nn.SlabLinear in {type(m) for m in model.modules()}
