"""What follows a method: matching, adapter training, a budget of bits, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from slab_kernels.compression.budget import LADDER, Choice, spend
from slab_kernels.compression.matching import Goal, Matching, Target, match_block
from slab_kernels.compression.model import compress
from slab_kernels.compression.trainable import TrainableLinear
from slab_kernels.compression.training import Training, train
from slab_kernels.errors import ArgumentError, BudgetError, CheckpointError
from slab_kernels.format import pack, unpack
from slab_kernels.methods import decompose
from slab_kernels.models.load import load
from slab_kernels.models.streams import _HIDDEN, Stream
from slab_kernels.testing import random_packed

COUNTING = (7 * torch.arange(16)[:, None] + 3 * torch.arange(32)) % 96  # a text that can be learnt
TOKENS = torch.randint(0, 96, (16, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "m"
    tiny_models.write(folder)
    return folder


def layouts():
    from slab_kernels.format import PackedLayout

    yield PackedLayout(24, 40, "fp16", None, 1, 0)
    yield PackedLayout(24, 40, "fp16", None, 2, 3, planes=2)
    yield PackedLayout(24, 40, "int4", 32, 1, 2, planes=3)
    yield PackedLayout(24, 40, "int3", None, 0, 2)


@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_a_trainable_linear_is_its_decomposition_and_gives_it_back(layout):
    packed = random_packed(layout)
    d = unpack(packed)
    module = TrainableLinear(d, None)
    torch.testing.assert_close(module.weight().detach(), d.dense())
    again = pack(module.decomposition(), layout.values, layout.group_size)
    assert all(torch.equal(t, again.tensors()[name]) for name, t in packed.tensors().items())
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    module(x).square().sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.isfinite().all()) and bool((p.grad != 0).any())
        for p in module.parameters()
    )
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.01)
    moved = module.decomposition()
    assert torch.equal(moved.mask, d.mask) and bool(
        (moved.S[~d.mask] == 0).all()
    )  # a step cannot fill a zero
    assert moved.B is None or torch.equal(moved.B, d.B)


class Block(torch.nn.Module):
    """Two linears and a norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = (
            torch.nn.LayerNorm(32),
            torch.nn.Linear(32, 64),
            torch.nn.Linear(64, 32, bias=False),
        )

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


@pytest.mark.parametrize("values", ["fp16", "int4"])
def test_matching_brings_a_block_nearer_and_never_further(values):
    torch.manual_seed(0)
    block, twin = Block(), Block()
    twin.load_state_dict(block.state_dict())
    hidden = [torch.randn(4, 16, 32) for _ in range(8)]
    calls, targets = [[((_HIDDEN,), {})] * 8], [twin(h).detach() for h in hidden]

    def part(first: int, last: int, outputs: list[torch.Tensor]) -> Target:
        stream = Stream(hidden[first:last], calls, torch.device("cpu"))
        return Target(stream, outputs[first:last])

    parts = {}
    for name in ("up", "down"):
        d = unpack(
            pack(
                decompose(
                    getattr(block, name).weight.detach(),
                    method="magnitude",
                    values=values,
                    group_size=32,
                ),
                values,
                32,
            )
        )
        parts[name] = d
        getattr(block, name).weight.data = d.dense()
    stored = lambda name, d: unpack(pack(d, values, 32))  # noqa: E731
    goal = Goal(0, part(0, 7, targets), part(7, 8, targets))
    untrained = {name: t.clone() for name, t in block.state_dict().items()}
    result, other, record = match_block(goal, block, parts, Matching(3, 1e-2), stored)
    assert all(torch.equal(t, untrained[name]) for name, t in block.state_dict().items())
    assert record.after < 0.97 * record.before and record.epochs > 0
    assert set(other) == {"norm.weight", "norm.bias", "up.bias"}
    for name, d in result.items():
        assert (
            torch.equal(d.mask, parts[name].mask) and (d.mask.sum(1) == d.mask.shape[1] // 2).all()
        )
    goal = Goal(0, part(0, 7, hidden), part(7, 8, hidden))
    result, other, record = match_block(
        goal, _restored(block, parts), parts, Matching(1, 0.9), stored
    )
    assert record.after <= record.before
    if record.epochs == 0:
        assert other == {} and all(result[name] is parts[name] for name in parts)


def _restored(block, parts):
    fresh = Block()
    for name, d in parts.items():
        getattr(fresh, name).weight.data = d.dense()
    return fresh


def test_matching_of_a_model_is_written_resumed_and_loaded(dense, tmp_path):
    settings = {"calibration": TOKENS, "method": "wanda", "matching": 2, "progress": False}
    record = compress(dense, tmp_path / "a", **settings)
    assert len(record.matching) == 2 and all(m.after <= m.before for m in record.matching)
    plain = compress(dense, tmp_path / "b", **{**settings, "matching": 0})
    assert not plain.matching
    norm = "model.layers.0.input_layernorm.weight"
    tensors = [
        {
            n: t
            for f in sorted((tmp_path / d).glob("*.safetensors"))
            for n, t in load_file(f).items()
        }
        for d in "ab"
    ]
    assert (
        not torch.equal(tensors[0][norm], tensors[1][norm])
        and tensors[0][norm].dtype == tensors[1][norm].dtype
    )
    assert torch.equal(tensors[0]["model.norm.weight"], tensors[1]["model.norm.weight"])

    def stop(event):
        if event.kind == "block" and event.block == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(dense, tmp_path / "c", **{**settings, "progress": stop})
    compress(dense, tmp_path / "c", **{**settings, "resume": True})
    for file in sorted((tmp_path / "a").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "c" / file.name).read_bytes(), file.name
    memory = compress(tiny_models.model(), **settings)
    assert torch.equal(
        memory.model.layers[0].input_layernorm.weight,
        load(tmp_path / "a").model.layers[0].input_layernorm.weight,
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"rate": 2.0}, "rate=2.0"),
        ({"target": "moon"}, "target='moon' of matching is unknown; choose one of dense, prefix"),
    ],
)
def test_bad_matching_settings(change, text):
    with pytest.raises(ValueError, match=text):
        Matching(**change)


# ---- budget ----


def test_spend_is_optimal_on_hulls_and_never_worse_than_uniform():
    import itertools

    g = torch.Generator().manual_seed(3)
    for _ in range(20):
        choices = {}
        for layer in range(4):
            loss, bits, options = float(torch.rand(1, generator=g)) * 4, 3.0, []
            for row in LADDER[:4]:
                options.append(Choice(row, bits, loss))
                bits, loss = (
                    bits + 0.2 + float(torch.rand(1, generator=g)),
                    loss * float(torch.rand(1, generator=g)),
                )
            choices[str(layer)] = options
        budget = 4 * 3.0 + 4 * float(torch.rand(1, generator=g))
        chosen = spend(choices, budget)
        assert sum(c.bits for c in chosen.values()) <= budget
        best = min(
            sum(c.loss for c in combination)
            for combination in itertools.product(*choices.values())
            if sum(c.bits for c in combination) <= budget
        )
        got = sum(c.loss for c in chosen.values())
        assert got >= best - 1e-9
        for row in LADDER[:4]:
            uniform = [
                next(c for c in options if c.settings == row) for options in choices.values()
            ]
            if sum(c.bits for c in uniform) <= budget:
                assert got <= sum(c.loss for c in uniform) + 1e-9


@pytest.mark.slow
def test_a_budget_is_met_by_the_bytes_on_disk(dense, tmp_path):
    reach = None
    with pytest.raises(
        BudgetError, match=r"bits=1 is below .*: \d+\.\d+ to \d+\.\d+ stored"
    ) as caught:
        compress(dense, tmp_path / "a", calibration=TOKENS, bits=1, group_size=32, progress=False)
    reach = [float(word) for word in str(caught.value).split(": ")[1].split() if word[0].isdigit()]
    bits = reach[0] + 1.5
    record = compress(
        dense, tmp_path / "b", calibration=TOKENS, bits=bits, group_size=32, progress=False
    )
    assert record.bits_per_weight <= bits and record.bits_per_weight > bits - 0.8
    assert len({(layer.values, layer.planes, layer.rank) for layer in record.layers}) > 1
    assert load(tmp_path / "b")(TOKENS[:1]).logits.isfinite().all()
    with pytest.raises(BudgetError, match="above what"):
        compress(dense, tmp_path / "c", calibration=TOKENS, bits=60, group_size=32, progress=False)
    assert not (tmp_path / "a").exists() and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"values": "int4"},
        {"planes": 2},
        {"rank": 3},
        {"adapter_rank": 4},
        {"method": "oats"},
        {"pattern": "4:8"},
    ],
)
def test_a_budget_beside_what_it_chooses_itself_is_refused(dense, change):
    with pytest.raises(BudgetError, match="bits=4"):
        compress(dense, calibration=TOKENS, bits=4.0, progress=False, **change)


# ---- adapter training ----


def test_training_moves_the_adapters_alone_resumes_and_ends_with_the_same_bytes(
    dense, tmp_path, monkeypatch
):
    compress(
        dense,
        tmp_path / "p",
        method="threebasil",
        adapter_rank=4,
        iterations=120,
        calibration=TOKENS,
        progress=False,
    )
    settings = Training(steps=6, batch=4, rate=1e-2, every=2)
    measured = train(tmp_path / "p", tmp_path / "t", COUNTING, settings)
    assert measured["after"] < measured["before"] and measured["steps"] == 6
    before, after = (
        {n: t for f in d.glob("*.safetensors") for n, t in load_file(f).items()}
        for d in (tmp_path / "p", tmp_path / "t")
    )
    assert before.keys() == after.keys()
    changed = {n.rpartition(".")[2] for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"P", "Q"}

    def stop(message):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "p", tmp_path / "r", COUNTING, settings, say=stop)
    with pytest.raises(CheckpointError, match="left of an interrupted run"):
        train(tmp_path / "p", tmp_path / "r", COUNTING, settings)
    with pytest.raises(CheckpointError, match="begun with steps=6"):
        train(tmp_path / "p", tmp_path / "r", COUNTING, replace(settings, steps=7), resume=True)
    with pytest.raises(CheckpointError, match="begun with text_sha256="):
        train(tmp_path / "p", tmp_path / "r", TOKENS, settings, resume=True)
    with pytest.raises(CheckpointError, match="begun with model_sha256="):
        train(tmp_path / "t", tmp_path / "r", COUNTING, settings, resume=True)
    state = tmp_path / "r.training.safetensors"
    whole = state.read_bytes()
    for at in (0.5, 0.9):  # a bit of a number
        damaged = bytearray(whole)
        damaged[int(at * len(whole))] ^= 1
        state.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged or of another model"):
            train(tmp_path / "p", tmp_path / "r", COUNTING, settings, resume=True)
    state.write_bytes(whole)
    train(tmp_path / "p", tmp_path / "r", COUNTING, settings, resume=True)
    for file in sorted((tmp_path / "t").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "r" / file.name).read_bytes()
    assert not list(tmp_path.glob("*.training.safetensors"))


def test_training_adds_adapters_where_asked_and_says_what_is_missing(dense, tmp_path):
    compress(dense, tmp_path / "p", method="magnitude", calibration=TOKENS, progress=False)
    with pytest.raises(ValueError, match="no adapter P Q.T to train; give adapter_rank"):
        train(tmp_path / "p", tmp_path / "t", TOKENS, Training(steps=1))
    assert not (tmp_path / "t").exists()
    train(tmp_path / "p", tmp_path / "t", TOKENS, Training(steps=2, adapter_rank=3))
    config = json.loads((tmp_path / "t" / "config.json").read_text())["quantization_config"][
        "modules"
    ]
    assert {m["adapter_rank"] for m in config.values()} == {3}
    with pytest.raises(ArgumentError, match="every layer has an adapter already, of rank 3"):
        train(tmp_path / "t", tmp_path / "u", TOKENS, Training(steps=1, adapter_rank=2))
    with pytest.raises(ArgumentError, match=r"adapter_rank=33 is larger .* 32x32; give at most 32"):
        train(tmp_path / "p", tmp_path / "u", TOKENS, Training(steps=1, adapter_rank=33))
    assert not (tmp_path / "u").exists()
    with pytest.raises(CheckpointError, match="is not empty"):
        train(tmp_path / "p", tmp_path / "t", TOKENS, Training(steps=2, adapter_rank=3))
    with pytest.raises(ValueError, match="steps=0"):
        Training(steps=0)


# ---- several processes ----

SCRIPT = """
import sys, torch
from slab_kernels.compression.model import compress
tokens = torch.randint(0, 96, (16, 32), generator=torch.Generator().manual_seed(0))
method = {"method": sys.argv[3], "matching": 1, "device": "cpu", "progress": False}
compress(sys.argv[1], sys.argv[2], calibration=tokens, **method)
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(dense, tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, launcher in (
        ("one", [sys.executable]),
        (
            "two",
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"],
        ),
    ):
        command = [*launcher, str(tmp_path / "run.py"), str(dense), str(tmp_path / name), "slab"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    for file in sorted((tmp_path / "one").glob("*")):
        if file.name != "slab_run.json":
            assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
