"""Several processes at one model: who waits for whom, and what is said when one stops."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest
import torch

from slab_kernels.compression import team
from slab_kernels.format import unpack
from slab_kernels.format.layout import PackedLayout
from slab_kernels.testing import random_packed

PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
# The times of a real run are shortened; what stands for gloo's 30 minutes is shorter than the
# leader's work.
SCRIPT = """
import datetime, functools, os, sys, time
import torch.distributed as dist
from slab_kernels.compression import team
team.ARRIVAL, team.SILENCE, team.BEAT = 20.0, 2.0, 0.2
second = datetime.timedelta(seconds=1)
dist.init_process_group = functools.partial(dist.init_process_group, timeout=second)
kind = sys.argv[1]
def work():
    if kind == "long":
        time.sleep(4)
    if kind == "killed":
        os._exit(9)
    return "done"
try:
    with team.Team() as t:
        t.from_leader(lambda: None)
        if kind == "fails" and t.leads:
            raise OSError("no space")
        print(t.from_leader(work))
except (team.TeamError, OSError) as error:
    print(type(error).__name__, error)
"""


def environment(rank: int, port: int) -> dict[str, str]:
    place = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return {**os.environ, **place, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "leader", "other"),
    [
        ("long", "done", "done"),
        ("killed", "", "TeamError "),
        ("fails", "OSError no space", "TeamError "),
    ],
)
def test_two_processes(kind, leader, other):
    port, began = free_port(), time.monotonic()
    command = [sys.executable, "-c", SCRIPT, kind]
    both = [
        subprocess.Popen(command, env=environment(r, port), stdout=subprocess.PIPE, text=True)
        for r in (0, 1)
    ]
    outputs = [process.communicate(timeout=60)[0].strip() for process in both]
    assert outputs[0] == leader and outputs[1].startswith(other), outputs
    assert time.monotonic() - began < 50


def test_a_process_that_stops_without_a_word_is_missed(monkeypatch):
    """The other one is there and its store too, but it gives no sign of life."""
    monkeypatch.setattr(team, "SILENCE", 0.2)
    waiting = team.Team.__new__(team.Team)
    waiting._store = torch.distributed.HashStore()
    waiting._alive = torch.distributed.PrefixStore("alive", waiting._store)
    waiting._alive.set("1", "7")
    waiting._counts = {1: (b"", time.monotonic())}
    with pytest.raises(team.TeamError, match="process 1 of this run has given no sign of life"):
        waiting._await("done/0/1", 1)
    waiting._store.set("left/1", "MemoryError: full")
    with pytest.raises(
        team.TeamError, match=r"process 1 of this run stopped \(MemoryError: full\)"
    ):
        waiting._await("done/0/1", 1)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"RANK": "0"}, "RANK is set in the environment without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set in the environment without RANK"),
        (
            {"RANK": "two", "WORLD_SIZE": "2"},
            "RANK='two' and WORLD_SIZE='2' of the environment are no place",
        ),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "are no place among processes"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "without MASTER_ADDR and MASTER_PORT"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"},
            "were to meet at nowhere.invalid:1",
        ),
    ],
)
def test_an_environment_that_is_no_place(monkeypatch, capfd, place, message):
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(team.TeamError, match=message):
        team.Team()
    assert not capfd.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_others_do_not_come(monkeypatch, rank):
    monkeypatch.setattr(team, "ARRIVAL", 2.0)
    for name, value in environment(int(rank), free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(team.TeamError, match="WORLD_SIZE=2 processes were to meet at 127.0.0.1"):
        team.Team()


def test_what_lay_on_another_gpu_comes_to_this_one(monkeypatch):
    """A decomposition that was written with the place cuda:7, which this machine does not have."""
    d = unpack(random_packed(PackedLayout(8, 32, "int4", 32, 1, 2, planes=2)))
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
    data = team._packed({"layer": d})
    received = team._unpacked(data, "meta")["layer"]  # meta stands for the device of this process
    for name in ("S", "mask", "U", "V", "B", "P", "Q", "scales"):
        t, want = getattr(received, name), getattr(d, name)
        assert (t.device.type, t.shape, t.dtype) == ("meta", want.shape, want.dtype), name
    monkeypatch.undo()
    received = team._unpacked(team._packed({"layer": d}), "meta")[
        "layer"
    ]  # what lay on the CPU stays there
    assert torch.equal(received.dense(), d.dense())


def test_an_exception_that_cannot_travel_still_tells_its_message():
    class Own(Exception):
        def __init__(self, first, second):
            super().__init__(f"{first} {second}")

    received = team._unpacked(team._packed({"layer": Own("too", "large")}), "cpu")["layer"]
    assert str(received) == "Own: too large"
