"""The same bytes come out whatever the caller has set in torch, whatever state the model is in."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import tiny_models
import torch

from slab_kernels.compression.matching import Matching
from slab_kernels.compression.model import compress
from slab_kernels.models.decompress import decompress
from slab_kernels.models.load import load
from slab_kernels.models.save import save

SETTINGS = dict(
    calibration=tiny_models.tokens(), progress=False, rounds=1, matching=Matching(epochs=1)
)


@contextlib.contextmanager
def setting(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


AROUND = {
    "inference_mode": lambda: torch.inference_mode(),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "bf16": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "fp64": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default meta": lambda: setting(lambda: None, torch.set_default_device, "meta"),
    "with meta": lambda: torch.device("meta"),
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "no_grad": lambda: torch.no_grad(),
    "enable_grad": lambda: torch.enable_grad(),
}


def state(model) -> dict[str, torch.Tensor]:
    return {
        name: t.detach().clone() for name, t in compress(model, **SETTINGS).state_dict().items()
    }


@pytest.fixture(scope="module")
def plain():
    return state(tiny_models.model())


def same(found: dict, plain: dict) -> None:
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", AROUND)
def test_whatever_is_set_around_it(plain, name):
    model = tiny_models.model()
    with AROUND[name]():
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        found = compress(model, **SETTINGS)
        assert (torch.get_default_dtype(), torch.get_default_device()) == (dtype, device)
    same({n: t.detach().clone() for n, t in found.state_dict().items()}, plain)
    assert not any(t.is_inference() for t in found.state_dict().values())


IMPORTS = """
import importlib, pkgutil
import torch
with torch.device("meta"):
    import slab_kernels
    for found in pkgutil.walk_packages(slab_kernels.__path__, "slab_kernels."):
        if not found.name.endswith(("__main__", "._C")):
            try:
                importlib.import_module(found.name)
            except ImportError as error:
                assert not error.name.startswith("slab_kernels"), error
    import transformers.quantizers.auto as auto
    from slab_kernels.methods.solvers.masks import Pattern
    from slab_kernels.methods.solvers.states import group_states
    pattern, cpu = Pattern(keep=2, group=4), torch.device("cpu")
    states = [vars(group_states(pattern, planes, cpu)) for planes in (0, 1)]
assert auto.AUTO_QUANTIZER_MAPPING["slab_kernels"].__module__ == "slab_kernels.engines.transformers"
assert not any(t.is_meta for kept in states for t in kept.values())
assert [len(kept["mask"]) for kept in states] == [6, 24]
"""


@pytest.mark.slow
def test_nothing_is_computed_with_torch_on_import():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_a_model_made_under_inference_mode(plain):
    with torch.inference_mode():
        model = tiny_models.model()
    assert next(model.parameters()).is_inference()
    same(state(model), plain)


def test_a_model_in_training_with_gradients_and_hooks(plain):
    model = tiny_models.model().train()
    called = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda m, args, out: called.append(1) or out * 2
    )
    model.model.layers[1].register_forward_pre_hook(lambda m, args: called.append(2))
    assert all(p.requires_grad for p in model.parameters())
    same(state(model), plain)
    assert not called and model.training


def test_matching_leaves_a_model_in_memory_alone_and_equals_the_folder(tmp_path):
    """Each block is trained beside its dense twin: neither may be the model's own tensors."""
    model = tiny_models.write(tmp_path / "dense")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    compress(tmp_path / "dense", tmp_path / "a", **SETTINGS)
    compress(model, tmp_path / "b", **SETTINGS)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    for file in sorted((tmp_path / "a").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    tiny_models.write(folder / "dense")
    settings = SETTINGS | {"method": "magnitude", "matching": None}
    settings.pop("rounds")
    compress(folder / "dense", folder / "out", **settings)
    return folder / "out"


@pytest.mark.parametrize("name", AROUND)
def test_whatever_is_set_around_load_save_and_decompress(packed, tmp_path, name):
    want = load(packed).state_dict()
    with AROUND[name]():
        model = load(packed)
        save(model, tmp_path / "saved")
        decompress(packed, tmp_path / "dense")
    same(model.state_dict(), want)
    tensors = (*model.parameters(), *model.buffers())
    assert not any(t.is_inference() or t.is_meta for t in tensors)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    same(load(tmp_path / "saved").state_dict(), want)
    decompress(packed, tmp_path / "plain")
    for file in (tmp_path / "plain").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "dense" / file.name).read_bytes()
