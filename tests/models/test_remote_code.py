"""Folders whose model is Python code of their own.

They are refused before any of it runs; on request it is run, and carried along.
"""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from slab_kernels.cli import main as cli
from slab_kernels.compression.model import compress
from slab_kernels.errors import ArchitectureError
from slab_kernels.models.decompress import decompress
from slab_kernels.models.load import load
from slab_kernels.models.source import open_source

SETTINGS = dict(method="magnitude", calibration=tiny_models.tokens(), progress=False)
CODE = {
    "configuration_own.py": """
import os, pathlib
from transformers import LlamaConfig
pathlib.Path(os.environ["RAN"]).touch()
class OwnConfig(LlamaConfig):
    model_type = "{kind}"
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output
""",
}


def write(folder, kind: str) -> None:
    tiny_models.write(folder)
    config = json.loads((folder / "config.json").read_text())
    named = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": kind, "auto_map": named})
    )
    for name, code in CODE.items():
        (folder / name).write_text(code.replace("{kind}", kind))


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """A file that is there once the folder's code has run."""
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    return tmp_path / "ran"


def test_nothing_runs_and_nothing_is_asked(tmp_path, ran, capsys, monkeypatch):
    write(tmp_path / "dense", "own_llama")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for attempt in (
        lambda: compress(tmp_path / "dense", tmp_path / "out", **SETTINGS),
        lambda: open_source(tmp_path / "dense"),
    ):
        with pytest.raises(
            ArchitectureError,
            match=r"own Python code \(model_type 'own_llama'\), which was not run; "
            r".*give trust_remote_code=True",
        ):
            attempt()
    capsys.readouterr()
    arguments = [
        "compress",
        str(tmp_path / "dense"),
        str(tmp_path / "out"),
        "--samples",
        "2",
        "--window",
        "16",
        "--json",
    ]
    assert cli.run(arguments) == 3
    assert set(json.loads(capsys.readouterr().out)) == {"error"}
    assert not ran.exists() and not (tmp_path / "out").exists()


def test_on_request_it_runs_and_goes_along(tmp_path, ran):
    write(tmp_path / "dense", "own_llama")
    compress(tmp_path / "dense", tmp_path / "packed", trust_remote_code=True, **SETTINGS)
    assert ran.exists()
    for name in CODE:
        assert (tmp_path / "packed" / name).read_text() == (tmp_path / "dense" / name).read_text()
    with pytest.raises(ArchitectureError, match="give trust_remote_code=True"):
        load(tmp_path / "packed")
    loaded = load(tmp_path / "packed", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    memory = compress(tmp_path / "dense", trust_remote_code=True, **SETTINGS)
    decompress(tmp_path / "packed", tmp_path / "again", trust_remote_code=True)
    opened = [
        AutoModelForCausalLM.from_pretrained(tmp_path / d, trust_remote_code=True)
        for d in ("packed", "again")
    ]
    tokens = tiny_models.tokens()
    with torch.no_grad():
        want, *found = (m.eval()(input_ids=tokens).logits for m in (loaded, memory, *opened))
    assert (
        torch.equal(found[0], want)
        and torch.equal(found[1], want)
        and torch.allclose(found[2], want, atol=1e-5)
    )


def test_a_type_that_transformers_knows_needs_no_code_of_the_folder(tmp_path, ran):
    write(tmp_path / "dense", "llama")
    compress(tmp_path / "dense", tmp_path / "packed", **SETTINGS)
    assert not ran.exists() and type(load(tmp_path / "packed")).__name__ == "LlamaForCausalLM"
    assert (tmp_path / "packed" / "modeling_own.py").is_file()
