"""Models by name on the hub: revisions, subfolders and tokens, from a cache without network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

import slab_kernels
from slab_kernels.cli import main as cli
from slab_kernels.cli.main import without_token
from slab_kernels.engines.transformers import compare
from slab_kernels.errors import ArgumentError, CheckpointError
from slab_kernels.evaluate.against import compare as distance
from slab_kernels.evaluate.inspect import inspect
from slab_kernels.models import source
from slab_kernels.models.folder import hub_folder
from slab_kernels.models.hub import HubArguments
from slab_kernels.models.source import open_source

NAME, TOKEN = "someone/small", "hf_NobodyMayReadThis"
MAIN, OTHER = "a" * 40, "b" * 40  # commits
QUICK = dict(method="magnitude", calibration=tiny_models.tokens(3, 16), progress=False)


def snapshot(cache: Path, name: str, commit: str, *refs: str) -> Path:
    """The folder of a commit in a cache as the hub's client lays it out."""
    home = cache / ("models--" + name.replace("/", "--"))
    for ref in refs:
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / ref).write_text(commit)
    folder = home / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def link_into_blobs(folder: Path, blobs: Path) -> None:
    """What the client does on a disk with links: files lie in `blobs`, and a snapshot has links."""
    blobs.mkdir(exist_ok=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            blob = blobs / f"{len(list(blobs.iterdir())):040x}"
            path.rename(blob)
            path.symlink_to(os.path.relpath(blob, path.parent))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A cache: a dense model with two revisions and a subfolder, and packed ones of them."""
    cache = tmp_path_factory.mktemp("cache")
    main = snapshot(cache, NAME, MAIN, "main")
    tiny_models.write(main)
    tiny_models.write(main / "wide", intermediate_size=64)
    other = snapshot(cache, NAME, OTHER, "v2", "main-2")
    tiny_models.write(other, tie_word_embeddings=False)
    packed = snapshot(cache, "someone/packed", OTHER, "v2")
    slab_kernels.compress(main, packed / "sub", **QUICK, values="int8")
    for home in cache.iterdir():
        for folder in (home / "snapshots").iterdir():
            link_into_blobs(folder, home / "blobs")
    return cache


@pytest.fixture
def cache(made, monkeypatch) -> Path:
    """The same for this process, as HF_HUB_CACHE and HF_HUB_OFFLINE make it for a new one."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(made))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return made


def test_a_revision_and_a_subfolder_are_found(cache):
    for given, commit in (({}, MAIN), ({"revision": "v2"}, OTHER), ({"revision": OTHER}, OTHER)):
        assert hub_folder(NAME, HubArguments(**given, token=TOKEN)).name == commit
    assert hub_folder(NAME, HubArguments(subfolder="wide")).relative_to(cache).parts[2:] == (
        MAIN,
        "wide",
    )
    source = open_source(NAME, HubArguments("v2"))
    assert source.name == "small"
    assert "lm_head.weight" in source.names and "lm_head.weight" not in open_source(NAME).names
    assert source.origin == {
        "name": NAME,
        "revision": "v2",
        "subfolder": None,
        "commit": OTHER,
    }
    assert open_source(cache / f"models--someone--small/snapshots/{MAIN}").origin == {}


def test_a_run_takes_them_and_records_no_token(cache, tmp_path, capsys):
    where = dict(revision="main", subfolder="wide", token=TOKEN)
    slab_kernels.compress(NAME, tmp_path / "a", **QUICK, **where)
    model = slab_kernels.compress(NAME, **QUICK, revision="v2", token=TOKEN)
    assert model.slab_record.origin["commit"] == OTHER
    record = json.loads((tmp_path / "a" / "slab_run.json").read_text())
    assert record["origin"] == {
        "name": NAME, "revision": "main", "subfolder": "wide", "commit": MAIN,
    }  # fmt: skip
    assert record["layers"][-1]["shape"] == [32, 64], "of the subfolder, not of the top"
    assert (tmp_path / "a" / "tokenizer.json").is_file(), "a link to a blob of the cache is carried"
    assert f"base_model: {NAME}" in (tmp_path / "a" / "README.md").read_text()
    command = ["compress", NAME, str(tmp_path / "b"), "--method", "magnitude", "--samples", "2"]
    more = ["--window", "16", "--revision", "v2", "--token", TOKEN]
    assert cli.run([*command, *more]) == 0
    shown = capsys.readouterr()
    for text in (shown.out, shown.err, *map(_content, tmp_path.rglob("*"))):
        assert TOKEN not in text


def _content(path: Path) -> str:
    return path.read_bytes().decode("latin-1") if path.is_file() else ""


def test_everything_that_takes_a_name_takes_them(cache, tmp_path):
    packed, where = "someone/packed", dict(revision="v2", subfolder="sub", token=TOKEN)
    model = slab_kernels.load(packed, **where)
    slab_kernels.decompress(packed, tmp_path / "dense", **where)
    assert (tmp_path / "dense" / "config.json").is_file()
    assert inspect(packed, **where)["stored"] == "packed"
    assert compare(packed, **where)["tensors"] == len(model.state_dict())
    tokenizer, text = tiny_models.tokenizer(), tiny_models.text(60)
    for place, folder in (
        ({}, MAIN),
        ({"subfolder": "wide"}, f"{MAIN}/wide"),
        ({"revision": "v2"}, OTHER),
    ):
        found = distance(model, NAME, tokenizer, text, window=16, token=TOKEN, **place)
        dense = cache / "models--someone--small" / "snapshots" / folder
        assert found == distance(model, dense, tokenizer, text, window=16)


def test_transformers_opens_a_packed_subfolder_of_a_revision(cache):
    from transformers import AutoModelForCausalLM

    where = dict(revision="v2", subfolder="sub")
    theirs = AutoModelForCausalLM.from_pretrained("someone/packed", **where)
    ours, ids = slab_kernels.load("someone/packed", **where), tiny_models.tokens(1, 8)
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


def test_every_command_with_a_model_takes_them(cache, tmp_path, capsys):
    packed = ["someone/packed", "--revision", "v2", "--subfolder", "sub", "--token", TOKEN]
    text = tmp_path / "t.txt"
    text.write_text(tiny_models.text(60))
    read = ["--text", str(text), "--window", "16"]
    beside = ["--against", NAME, "--against-revision", "main", "--json"]
    few = ["--steps", "1", "--samples", "4", "--window", "16", "--adapter-rank", "1"]
    for command in (
        ["inspect", *packed, "--json"],
        ["check", *packed],
        ["eval", *packed, *read, *beside],
        ["generate", *packed, "--tokens", "3", "--prompt", "abc", *beside],
        ["decompress", packed[0], str(tmp_path / "d"), *packed[1:]],
        ["train", packed[0], str(tmp_path / "t"), *packed[1:], "--text", str(text), *few],
    ):
        assert cli.run(command) == 0, (command, capsys.readouterr().err)
        shown = capsys.readouterr()
        assert TOKEN not in shown.out + shown.err
        if "--json" in command:
            found = json.loads(shown.out)
            assert found["folder"] == "someone/packed"
            assert "--token" in found.get("run", {}).get("command", "--token")
    assert cli.run(["eval", *packed, *read, "--against-revision", "main"]) == 2
    assert "for --against, which is not given" in capsys.readouterr().err


def test_a_command_line_is_shown_without_its_token():
    given = ["eval", "m", "--token", TOKEN, "--json", f"--token={TOKEN}", "--token"]
    shown = ["eval", "m", "--token", "***", "--json", "--token=***", "--token"]
    assert without_token(given) == shown


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (NAME, {"revision": "v9"}, "cannot be fetched from the Hugging Face hub at revision 'v9'"),
        (NAME, {"subfolder": "narrow"}, "has no folder 'narrow'; those with a model are wide"),
        ("someone/else", {"token": TOKEN}, "someone/else is no folder here and cannot be fetched"),
    ],
)
def test_what_is_not_there_is_named(cache, name, given, message):
    with pytest.raises(CheckpointError, match=message):
        hub_folder(name, HubArguments(**given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"revision": ""}, "revision='' must be a text"),
        ({"revision": 3}, "revision=3 must be"),
        ({"subfolder": "../up"}, "must be a folder below"),
        ({"subfolder": "/etc"}, "must be a folder below"),
        ({"token": " "}, "token= is empty"),
        ({"token": 12345}, "token= is a int; give the text"),
    ],
)
def test_arguments_that_mean_nothing_are_named(given, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        HubArguments(**given)
    assert "12345" not in str(caught.value)


def test_a_folder_here_has_no_revision_and_may_have_a_subfolder(tmp_path):
    tiny_models.write(tmp_path / "m" / "fp16")
    assert hub_folder(tmp_path / "m", HubArguments(subfolder="fp16")) == tmp_path / "m" / "fp16"
    with pytest.raises(ArgumentError, match="revision='v2' is for a model of the hub"):
        hub_folder(tmp_path / "m", HubArguments("v2"))
    assert open_source(tmp_path / "m", HubArguments(subfolder="fp16")).origin == {}


def test_a_token_is_in_no_message(monkeypatch):
    def refuse(name, **how):
        raise OSError(f"no rights with {how['token']}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    hub = HubArguments(token=TOKEN)
    with pytest.raises(CheckpointError, match=r"no rights with \*\*\*") as caught:
        hub.download(NAME)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert TOKEN not in repr(hub)
    model = tiny_models.model()
    model.config._name_or_path = NAME
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(CheckpointError, match=r"no rights with \*\*\*"):
        open_source(model, hub).tokenizer()


def test_a_token_as_a_file_holds_it():
    assert HubArguments(token=f"{TOKEN}\n").token == TOKEN
    for token in (f"{TOKEN} {TOKEN}", f"{TOKEN}\n{TOKEN}"):
        with pytest.raises(ArgumentError, match="inside") as caught:
            HubArguments(token=token)
        assert TOKEN not in str(caught.value)


def test_a_subfolder_is_one_however_it_is_written():
    assert {HubArguments(subfolder=name).subfolder for name in ("fp16", "fp16/", "./fp16")} == {
        "fp16"
    }
    assert HubArguments(subfolder=".").subfolder is None
    with pytest.raises(ArgumentError, match="a folder below"):
        HubArguments(subfolder="fp*")


def test_what_a_subfolder_needs_is_downloaded_and_no_more(monkeypatch, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    asked: dict = {}

    def download(name, **how):
        asked.update(how)
        return str(tmp_path)

    (tmp_path / "fp16").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    hub_folder(NAME, HubArguments("v2", "fp16", TOKEN))
    assert (asked.pop("revision"), asked.pop("token")) == ("v2", TOKEN)
    files = ["config.json", "model.safetensors", "fp16/config.json", "fp16/model.safetensors",
             "fp16/pytorch_model.bin", "fp16/more/model.safetensors", "fp16/tokenizer.json",
             "fp32/model.safetensors"]  # fmt: skip
    assert list(filter_repo_objects(files, **asked)) == [
        "fp16/config.json", "fp16/model.safetensors", "fp16/tokenizer.json",
    ]  # fmt: skip


def test_the_environment_of_the_hub_is_enough_for_a_new_process(made):
    code = (
        "from slab_kernels.models.folder import hub_folder; "
        "from slab_kernels.models.hub import HubArguments; "
        f"print(hub_folder({NAME!r}, HubArguments('v2')).name)"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(made), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == OTHER, done.stderr


def test_from_pretrained_reads_a_text_with_the_tokenizer_of_its_revision(
    cache, tmp_path, monkeypatch
):
    asked: list = []

    def opened(path, trust, **where):
        asked.append((str(path), trust, where))
        return tiny_models.tokenizer()

    monkeypatch.setattr(source, "open_tokenizer", opened)
    (tmp_path / "text.txt").write_text(tiny_models.text(40))
    text = {"method": "magnitude", "calibration": str(tmp_path / "text.txt")}
    main = cache / f"models--someone--small/snapshots/{MAIN}"
    for name, given, words, want in (
        (NAME, {"revision": "v2"}, {}, (NAME, False, {"revision": OTHER})),
        (NAME, {"subfolder": "wide"}, {"trust_remote_code": True, "token": TOKEN},
         (NAME, True, {"revision": MAIN, "subfolder": "wide", "token": TOKEN})),
        (str(main), {"subfolder": "wide"}, {}, (str(main / "wide"), False, {})),
    ):  # fmt: skip
        config = slab_kernels.SlabConfig(**text, **words, samples=2, window=16)
        assert TOKEN not in repr(config)
        where = {"cache_dir": str(cache), "local_files_only": True, **given}
        AutoModelForCausalLM.from_pretrained(name, quantization_config=config, **where)
        assert asked.pop() == want and not asked


def test_report_finds_the_dense_model_on_the_hub(cache, tmp_path, capsys):
    packed = cache / f"models--someone--packed/snapshots/{OTHER}/sub"
    command = ["report", str(packed), "--no-plots", "--out", str(tmp_path), "--json"]
    assert cli.run([*command, "--dense", NAME, "--dense-revision", "main", "--token", TOKEN]) == 0
    shown = capsys.readouterr().out
    assert any(row["label"] == "dense" for row in json.loads(shown)["results"])
    assert TOKEN not in shown
    assert cli.run([*command, "--dense", NAME, "--dense-subfolder", "narrow"]) == 3
    assert "has no folder 'narrow'" in capsys.readouterr().out
    assert cli.run([*command, "--dense-revision", "main"]) == 2
