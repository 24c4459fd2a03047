"""A sample of the fuzzer in the ordinary suite, and what its judgement sees."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slab_kernels
from fuzz.file_damage import KINDS, damaged
from fuzz.folders import SHARDED, SINGLE, Odd, Place, build, read
from fuzz.targets import Fault, judge_model, stored_tensors

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_sample_of_damaged_folders():
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--cases", "150"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "150 cases" in done.stdout and "own weights" in done.stdout and "named error" in done.stdout
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    top = tmp_path_factory.mktemp("fuzz")
    build(top)
    return top, {name: read(top / name) for name in (SINGLE, SHARDED)}


def test_a_number_decides_the_damage(bases):
    for number in range(300):
        first, again = (damaged(number, 3, bases[1])[1] for _ in range(2))
        assert first.damage == again.damage and first.files == again.files
    assert {damaged(number, 3, bases[1])[0] for number in range(300)} == set(KINDS)


def test_only_what_differs_is_written_and_everything_comes_back(bases, tmp_path):
    place = Place(tmp_path / "shown")
    for number in range(200):
        _, folder, _ = damaged(number, 0, bases[1])
        place.show(folder)
        assert {path.name for path in place.path.iterdir()} == set(folder.files)
    sound = bases[1][SINGLE]
    folder = sound.copy()
    folder.files |= {
        "config.json": Odd("link", "nowhere"),
        "pipe": Odd("pipe"),
        "large": Odd("sparse", size=1 << 33),
    }
    place.show(folder)
    assert {p.name: p.read_bytes() for p in place.show(sound).iterdir()} == sound.files


@pytest.mark.parametrize("name", [SINGLE, SHARDED])
def test_the_judgement_sees_a_changed_a_missing_and_a_random_tensor(bases, name):
    model, stored = slab_kernels.load(bases[0] / name), stored_tensors(bases[0] / name)
    judge_model(model, stored)
    rng = random.Random(0)
    packed = rng.choice([n for n in stored if n.endswith(".values")])
    with pytest.raises(Fault, match="is not the stored"):
        judge_model(
            model,
            {
                **stored,
                packed: [
                    stored[packed][0] ^ 1
                    if not stored[packed][0].is_floating_point()
                    else stored[packed][0] + 1
                ],
            },
        )
    with pytest.raises(Fault, match="is not in the opened model"):
        judge_model(model, {**stored, "model.extra": [torch.zeros(1)]})
    with pytest.raises(Fault, match="is in no file"):
        judge_model(model, {n: t for n, t in stored.items() if n != packed})
