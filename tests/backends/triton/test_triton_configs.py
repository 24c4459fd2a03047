"""Rows of configurations: their order, what a file may hold, and what the choice costs. No Triton,
no GPU."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import timeit
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest

from slab_kernels.backends.triton import configs, launch, row_files, rows
from slab_kernels.backends.triton.configs import choose, splits
from slab_kernels.backends.triton.row_files import read, row_from, row_to
from slab_kernels.backends.triton.rows import Row, TileConfig, TritonDevice, TritonSizes
from slab_kernels.cli import console
from slab_kernels.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
A100 = TritonDevice("NVIDIA A100-SXM4-80GB", 108, 166912, 80)
LAYER = TritonSizes(4096, (4096,), "int4", 128, 1, 0)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The user's and the shipped folder, empty; nothing remembered before or after."""
    user, shipped = tmp_path / "user", tmp_path / "shipped"
    monkeypatch.setenv(row_files.ENVIRONMENT, str(user))
    monkeypatch.setattr(configs, "SHIPPED", shipped)
    configs.forget()
    yield user, shipped
    configs.forget()


def write(folder: Path, *rows, **content) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / configs.file_name(A100.name)
    path.write_text(json.dumps({"format": 1, "rows": list(rows)} | content))
    configs.forget()
    return path


# Which row is taken


def test_the_users_rows_come_before_the_shipped_and_those_before_the_defaults(folders):
    user, shipped = folders
    default = choose(LAYER, 1, 16, A100)
    assert default in [row.config for row in configs.DEFAULTS] and default.reason
    write(shipped, {"tokens": 16, "values": ["int4"], "block_n": 32, "reason": "shipped"})
    assert choose(LAYER, 1, 16, A100).reason == "shipped"
    write(user, {"tokens": 16, "N": 4096, "block_n": 128, "block_k": 64, "reason": "mine"})
    assert [choose(LAYER, m, 16, A100).reason for m in (1, 16)] == ["mine"] * 2
    assert choose(LAYER, 1, 16, A100, own=False).reason == "shipped"
    assert choose(LAYER._replace(rows=(1024,)), 1, 16, A100).reason == "shipped"
    assert choose(LAYER, 17, 16, A100) in [row.config for row in configs.DEFAULTS]
    other = A100._replace(name="NVIDIA L4")
    assert choose(LAYER, 1, 16, other) in [row.config for row in configs.DEFAULTS], (
        "a file is for one device"
    )


def test_every_problem_has_a_default(folders):
    devices = [A100, TritonDevice("small", 4, 48 << 10, 75), TritonDevice("H100", 132, 232448, 90)]
    for device, m, bits, values, rank in itertools.product(
        devices, (0, 1, 16, 17, 64, 65, 513, 5000), (16, 32), rows.VALUES, (0, 1, 4)
    ):
        sizes = TritonSizes(4096, (64, 64), values, 128, rank, 16)
        config = choose(sizes, m, bits, device)
        assert config.reason and splits(sizes, m, config, device) in (1, 2, 4, 8, 16)


@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("values, last", [("fp16", 128), ("bf16", 128), ("int8", 64), ("int4", 64)])
def test_more_tokens_than_this_rebuild_the_weight(folders, values, last, rank):
    """fp32 activations never do: torch may multiply them in TF32."""
    sizes = TritonSizes(4096, (4096,), values, 128, rank, 0)
    for bits, rebuilds in ((16, True), (32, False)):
        found = [choose(sizes, m, bits, A100).rebuild for m in (1, last, last + 1, 10**6)]
        assert found == [False, False, rebuilds, rebuilds]


@pytest.mark.parametrize(
    "config", [TileConfig(fill=2), TileConfig(16, 128, 64, 4, 3, 4), TileConfig()]
)
def test_a_decoded_token_is_summed_alike_whatever_is_beside_it(config):
    assert len({splits(LAYER, m, config, A100) for m in range(1, 17)}) == 1


def test_above_and_tokens_bound_a_row(folders):
    write(folders[0], {"above": 64, "tokens": 100, "reason": "mine"})
    assert [m for m in (1, 64, 65, 100, 101) if choose(LAYER, m, 16, A100).reason == "mine"] == [
        65,
        100,
    ]


def test_a_regime_is_what_the_shipped_rows_tell_apart(folders):
    assert [configs.regime(m, A100.name) for m in (1, 16, 17, 10**6)][:3] == [
        (0, 16),
        (0, 16),
        (16, 32),
    ]
    assert configs.regime(10**6, A100.name)[1] is None
    write(folders[1], {"above": 140, "tokens": 200})
    assert configs.regime(150, A100.name) == (140, 200)
    write(folders[0], {"above": 145, "tokens": 160})
    assert configs.regime(150, A100.name) == (140, 200), "the user's own rows do not count"


def test_the_choice_costs_less_than_two_microseconds(folders):
    def both():
        splits(LAYER, 1, choose(LAYER, 1, 16, A100), A100)

    both()
    assert min(timeit.repeat(both, number=1000, repeat=20)) / 1000 < 2e-6


def test_a_file_is_read_once(folders, monkeypatch):
    write(folders[0], {"tokens": 16, "reason": "mine"})
    seen = []
    monkeypatch.setattr(configs, "read", lambda path: seen.append(path) or read(path))
    for m in range(1, 200):
        choose(LAYER, m, 16, A100)
    assert len(seen) == 1
    configs.forget()
    choose(LAYER, 1, 16, A100)
    assert len(seen) == 2


# Where files lie


def test_folders_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv(row_files.ENVIRONMENT, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert configs.user_folder() == tmp_path / "slab_kernels"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert configs.user_folder() == tmp_path / ".config" / "slab_kernels"


def test_without_a_home_the_defaults_run(monkeypatch):
    """A container's user without an entry in /etc/passwd."""
    for name in (row_files.ENVIRONMENT, "XDG_CONFIG_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    configs.forget()
    assert choose(LAYER, 1, 16, A100) in [row.config for row in configs.DEFAULTS]


def test_a_file_that_everybody_may_write_and_a_variable_that_names_no_folder(folders, monkeypatch):
    path = write(folders[0], {"tokens": 16, "block_m": 16})
    path.chmod(0o666)
    with pytest.raises(ConfigError, match=r"everybody may write to it \(mode 0666; chmod o-w\)"):
        configs.read(path)
    monkeypatch.setenv(row_files.ENVIRONMENT, str(path))
    configs.forget()
    with pytest.raises(ConfigError, match="SLAB_KERNELS_CONFIGS=.*is no folder"):
        choose(LAYER, 1, 16, A100)


def test_file_names():
    assert configs.file_name("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb.json"
    assert configs.file_name("../AMD Instinct MI300X/") == "amd-instinct-mi300x.json", (
        "no path in it"
    )


def test_shipped_files_are_packaged_and_fit_their_devices(tmp_path):
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    assert packaged["slab_kernels.backends.triton"] == ["configs/*.json"]
    assert (configs.SHIPPED.name, configs.SHIPPED.parent) == (
        "configs",
        Path(configs.__file__).parent,
    )
    source = tmp_path / "source"
    (source / "slab_kernels/backends/triton/configs").mkdir(parents=True)
    (source / "slab_kernels/backends/triton/configs/nvidia-l4.json").write_text("{}")
    for name in ("pyproject.toml", "slab_kernels/__init__.py"):
        shutil.copy(ROOT / name, source / name)
    code = (
        "from setuptools import Distribution; from setuptools.command.build_py import build_py;"
        "d = Distribution(); d.parse_config_files(); c = build_py(d); c.finalize_options();"
        "print(*(f for _, _, _, files in c.data_files for f in files))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.stdout.split() == ["configs/nvidia-l4.json"], done.stderr
    for path in configs.SHIPPED.glob("*"):
        assert path.name == configs.file_name(json.loads(path.read_text())["device"])
        assert read(path) and all(row.config.reason for row in read(path))


# What a file may hold


def test_rows_survive_a_round_trip():
    rows = [*configs.DEFAULTS, Row(TileConfig(), 64, 16, ("int4",), 1, 64, 128, 4096, 80, 16)]
    for row in rows:
        if not (
            row.config.rebuild and row.above < configs.DECODE
        ):  # only a default may, which stands after those for decoding
            assert row_from(json.loads(json.dumps(row_to(row)))) == row
    assert row_from({}) == row_from({"tokens": None, "stages": None}) == Row(TileConfig())


BAD_ROWS = {
    "a list": ([1], "must be an object"),
    "unknown key": ({"blockm": 16}, "unknown keys 'blockm' (known: tokens,"),
    "a config inside": ({"config": {}}, "unknown keys 'config'"),
    "not a power of two": ({"block_m": 24}, "block_m=24 must be one of 16, 32, 64, 128, 256"),
    "zero": ({"block_n": 0}, "block_n=0"),
    "block_k too small": ({"block_k": 16}, "block_k=16 must be one of 32,"),
    "text": ({"block_n": "64"}, "block_n='64' must be one of"),
    "a float": ({"block_n": 64.0}, "block_n=64.0"),
    "true for one": ({"warps": True}, "warps=True"),
    "a list for a number": ({"block_m": [16]}, "block_m=[16]"),
    "warps": ({"warps": 32}, "warps=32 must be one of 1, 2, 4, 8"),
    "no stage": ({"stages": 0}, "stages=0 must be a whole number from 1 to 8"),
    "fill": ({"fill": -1}, "fill=-1 must be a whole number from 0 to 64"),
    "rebuild": ({"rebuild": "yes"}, "rebuild='yes' must be true or false"),
    "reason": ({"reason": 3}, "reason=3 text"),
    "registers": (
        {"block_m": 256, "block_n": 256, "warps": 4},
        "a thread 512 numbers of a tile, at most 256",
    ),
    "few tokens": ({"tokens": 4}, "tokens=4 must be a whole number from 16"),
    "tokens as text": ({"tokens": "all"}, "tokens='all'"),
    "above": (
        {"above": 8},
        "above=16 or more, not 8: up to 16 tokens no result may depend on their number",
    ),
    "nothing between": ({"above": 64, "tokens": 64}, "tokens=64 must be more than above=64"),
    "rebuilding to decode": ({"rebuild": True}, "rebuild=true needs above=16 or more, not 0"),
    "values as text": (
        {"values": "int4"},
        "values='int4' must be a list of fp16, bf16, int8, int4",
    ),
    "unknown values": ({"values": ["int3"]}, "values=['int3']"),
    "no values": ({"values": []}, "values=[]"),
    "unhashable values": ({"values": [{}]}, "values=[{}]"),
    "bits": ({"bits": 24}, "bits=24 must be 16 or 32"),
    "N": ({"N": 0}, "N=0"),
    "K": ({"K": 1 << 40}, "K=1099511627776"),
    "rank": ({"rank": -1}, "rank=-1"),
    "shared": ({"shared": "48k"}, "shared='48k'"),
    "capability": ({"capability": 9.0}, "capability=9.0"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_with_its_file_and_value(name, folders):
    row, message = BAD_ROWS[name]
    path = write(folders[0], {"tokens": 16}, row)
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        choose(LAYER, 1, 16, A100)
    text = str(raised.value)
    assert text.startswith(f"{path}: row 2: ") and text.endswith(
        "; correct it, or delete it and run slab-kernels tune again"
    )
    assert "\n" not in text and console.exit_code(raised.value) == console.BAD_FILE


BAD_FILES = {
    "empty": (b"", "not valid JSON"),
    "half": (b'{"format": 1, "rows": [', "not valid JSON"),
    "binary": (b"\xff\xfe\x00\x01", "not valid JSON"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "a list": (b"[]", 'must be an object {"format": 1, "rows": [...]}'),
    "no rows": (b'{"format": 1}', "must be an object"),
    "rows no list": (b'{"format": 1, "rows": {}}', "must be an object"),
    "no format": (b'{"rows": []}', "format None, this version of slab_kernels reads format 1"),
    "newer": (b'{"format": 2, "rows": []}', "format 2, this version"),
    "true": (b'{"format": true, "rows": []}', "format True, this version"),
    "unknown key": (
        b'{"format": 1, "rows": [], "gpu": "x"}',
        "unknown keys 'gpu' (known: format, device, versions, rows)",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(name, folders):
    content, message = BAD_FILES[name]
    path = write(folders[0])
    path.write_bytes(content)
    for _ in range(2):  # the failure is not remembered as no rows
        with pytest.raises(ConfigError, match=re.escape(message)) as raised:
            choose(LAYER, 1, 16, A100)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    path.unlink()
    configs.forget()
    choose(LAYER, 1, 16, A100)


def test_a_file_that_cannot_be_read(folders):
    (folders[0] / configs.file_name(A100.name)).mkdir(parents=True)
    with pytest.raises(
        ConfigError, match="cannot read .*a100.*: Is a directory; make it readable, or delete it"
    ):
        choose(LAYER, 1, 16, A100)


def test_blocks_that_a_row_may_name_are_those_that_the_kernels_take():
    """`tl.dot` wants 16 at least, Triton powers of two and 2^20 numbers at most; a unit is 16
    inputs, and K-steps are 32 or more."""
    assert all(block >= 16 and block & (block - 1) == 0 for block in rows.BLOCKS)
    assert max(rows.BLOCKS) ** 2 <= 1 << 20 and min(rows.BLOCKS[1:]) >= 32
    assert set(rows.VALUES) == set(launch.ELEMENT)


def test_describe():
    assert (
        TileConfig(reason="why").describe()
        == "64 rows x 16 tokens x 128 inputs, 4 warps, 3 stages (why)"
    )
    assert TileConfig(rebuild=True).describe() == "the weight rebuilt dense, then torch's matmul"
    assert "shared" not in asdict(TileConfig()), "a row's, not a configuration's"
