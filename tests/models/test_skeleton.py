"""Skeletons: no other thread sees them, no weight takes memory, buffers are transformers' own."""

from __future__ import annotations

import threading

import pytest
import tiny_models
import torch
from torch import nn

import slab_kernels
from slab_kernels.errors import ArchitectureError
from slab_kernels.models import skeleton
from slab_kernels.models.skeleton import config_skeleton

transformers = pytest.importorskip("transformers")


def test_threads_that_load_get_their_own_models_and_others_are_not_disturbed(tmp_path):
    folders = []
    for tied in (True, False):
        folders.append(tmp_path / str(tied))
        tiny_models.write(
            tmp_path / "dense" / str(tied), dtype=torch.bfloat16, tie_word_embeddings=tied
        )
        slab_kernels.compress(
            tmp_path / "dense" / str(tied),
            folders[-1],
            method="magnitude",
            calibration=tiny_models.tokens(),
            progress=False,
        )
    want = [slab_kernels.load(folder).state_dict() for folder in folders]
    loaded, built, errors, done = [], [], [], threading.Event()

    def load(index: int) -> None:
        try:
            for _ in range(3):
                loaded.append((index, slab_kernels.load(folders[index])))
        except Exception as error:
            errors.append(error)

    def build() -> None:
        while not done.is_set():
            built.append(nn.Linear(4, 4))

    other, loaders = (
        threading.Thread(target=build),
        [threading.Thread(target=load, args=(i % 2,)) for i in range(4)],
    )
    for thread in (other, *loaders):
        thread.start()
    for thread in loaders:
        thread.join()
    done.set()
    other.join()
    assert not errors and len(loaded) == 12
    for index, model in loaded:
        state = model.state_dict()
        assert state.keys() == want[index].keys()
        assert all(torch.equal(t, want[index][name]) for name, t in state.items())
        assert all(torch.isfinite(b).all() for b in model.buffers() if b.is_floating_point())
    assert all(
        (m.weight.device.type, m.weight.dtype) == ("cpu", torch.float32)
        for m in [*built, nn.Linear(4, 4)]
    )


def test_a_skeleton_takes_no_memory():
    """A terabyte of weights in linears, an embedding and stacked experts."""
    sizes = {
        "hidden_size": 1 << 15,
        "intermediate_size": 1 << 17,
        "vocab_size": 1 << 19,
        "num_local_experts": 8,
    }
    for kind, more in (("llama", {}), ("mixtral", {})):
        config = transformers.AutoConfig.for_model(
            kind, **sizes, num_hidden_layers=4, num_attention_heads=256, **more
        )
        model = config_skeleton(config)
        assert all(p.is_meta for p in model.parameters())
        assert sum(p.numel() for p in model.parameters()) > 1 << 36


XGLM = {
    "vocab_size": 96,
    "d_model": 32,
    "num_layers": 2,
    "attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gptj", "opt", "bloom", "mpt", "xglm"])
def test_buffers_are_those_of_from_pretrained(tmp_path, monkeypatch, name):
    """Under bfloat16, which transformers makes the default of the process to build a model."""
    monkeypatch.setitem(tiny_models.CONFIGS, "xglm", XGLM)
    tiny_models.model(name, dtype=torch.bfloat16).save_pretrained(tmp_path)
    theirs = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).named_buffers())
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = config_skeleton(config)
    assert (torch.get_default_dtype(), config.dtype) == (torch.float32, torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    found = dict(ours.named_buffers())
    assert found.keys() == theirs.keys()
    for key, buffer in found.items():
        assert buffer.is_meta or (
            buffer.dtype == theirs[key].dtype and torch.equal(buffer, theirs[key])
        ), key


def test_a_buffer_without_values_is_refused():
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.empty(3), persistent=False)

        def _init_weights(self, module):
            pass

    with pytest.raises(
        ArchitectureError, match=r"Careless makes the buffer 'table' of .* without values"
    ):
        skeleton.build(Careless, torch.float32)
