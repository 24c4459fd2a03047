"""What a run tells on the way: time passed, time left, and a sign of life in a quiet log."""

from __future__ import annotations

import itertools
import time
import warnings

import pytest
import tiny_models
import torch

from slab_kernels.compression import events
from slab_kernels.compression.events import Lines, ProgressEvent, Reporter
from slab_kernels.compression.model import compress
from slab_kernels.terminal import clock

QUICK = dict(method="magnitude", calibration=tiny_models.tokens())


def test_every_layers_line_has_the_time_passed_and_an_estimate_of_the_rest(tmp_path):
    tiny_models.write(tmp_path / "dense")
    seen: list[ProgressEvent] = []
    compress(tmp_path / "dense", tmp_path / "out", progress=seen.append, **QUICK)
    layers = [event for event in seen if event.kind == "layer"]
    assert all(a.elapsed <= b.elapsed for a, b in itertools.pairwise(seen))
    assert all(event.remaining is not None for event in layers) and layers[-1].remaining == 0
    assert all(" elapsed, about 0:00:0" in str(event) and " left" in str(event) for event in layers)


def test_the_estimate_counts_from_where_the_run_went_on(monkeypatch):
    now, seen = [100.0], []
    monkeypatch.setattr(events.time, "perf_counter", lambda: now[0])
    report = Reporter(seen.append)
    now[0] = 160.0
    report(ProgressEvent("start", layers=0))
    report(ProgressEvent("resumed", done=10, layers=40))
    now[0] = 190.0
    report(ProgressEvent("layer", done=20, layers=40))
    assert [event.remaining for event in seen] == [None, None, 60.0]
    assert [event.elapsed for event in seen] == [60.0, 60.0, 90.0]


def test_a_quiet_log_gets_a_sign_of_life(monkeypatch):
    monkeypatch.setattr(events, "QUIET", 0.05)
    said: list[str] = []
    lines = Lines(said.append)
    lines.start()
    lines(ProgressEvent("layer", done=3, layers=14, message="a layer", elapsed=60, remaining=120))
    lines(ProgressEvent("block", done=3, layers=14, elapsed=61, remaining=119))
    deadline = time.monotonic() + 20
    while len(said) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    lines.close()
    assert said[0] == "a layer"
    assert said[1] == said[2] == "[3/14] still at work; 0:01:01 elapsed, about 0:01:59 left"
    count = len(said)
    time.sleep(0.2)
    assert len(said) <= count + 1


@pytest.mark.parametrize("progress", [False, None])
def test_what_did_not_go_as_asked_is_said_where_no_progress_is_shown(progress):
    """The default preset's int8 rows, in a model that cannot have them."""

    class Tripled(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 3

    model = tiny_models.model(tie_word_embeddings=False)
    model.model.embed_tokens.__class__ = Tripled
    with pytest.warns(RuntimeWarning, match="^the embedding stays dense: .* is a Tripled"):
        compress(model, calibration=tiny_models.tokens(), progress=progress, rounds=0)


def test_what_is_shown_is_not_said_twice_and_only_one_process_of_a_team_speaks(capsys):
    warned = ProgressEvent("warning", message="warning: the head stays dense")
    seen: list[ProgressEvent] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for report in (Reporter(seen.append), Reporter(True), Reporter(False, leads=False)):
            report(warned)
            report.close()
    assert [str(event) for event in seen] == ["warning: the head stays dense"]
    assert capsys.readouterr().err.count("the head stays dense") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Reporter(False)(ProgressEvent("layer", message="a layer"))


def test_a_clock_shows_hours_minutes_and_seconds():
    shown = [clock(seconds) for seconds in (0.4, 59.6, 754, 36061)]
    assert shown == ["0:00:00", "0:01:00", "0:12:34", "10:01:01"]
