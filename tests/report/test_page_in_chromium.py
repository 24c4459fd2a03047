"""The page in a real browser: light and dark, wide and as narrow as a phone, nothing wider than it.

Skipped where no Chromium is installed.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from slab_kernels.report.measurements import read
from slab_kernels.report.write import write

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
WIDTHS = (320, 390, 800, 1400)  # pixels; 390 is a phone
GROUNDS = {"light": "rgb(244, 245, 247)", "dark": "rgb(16, 18, 22)"}  # of the style sheet

# Frames of every width around the page. Each folded part is opened, then every element that no
# scrolling box holds has to lie inside its frame.
PROBE = """<!doctype html><meta charset=utf-8><body>FRAMES<pre id=found></pre><script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, view = frame.contentWindow, width = view.innerWidth;
    page.querySelectorAll("details").forEach(part => { part.open = true; });
    const outside = [...page.body.querySelectorAll("*")].filter(element => {
      const box = element.getBoundingClientRect();
      return !element.parentElement.closest(".scroll")
        && (box.right > width + 0.5 || box.left < -0.5);
    });
    const boxes = [...page.querySelectorAll(".scroll")];
    const image = page.querySelector("picture img");
    const source = page.querySelector("picture source");
    return {
      width, whole: page.documentElement.scrollWidth,
      outside: outside.map(element => element.outerHTML.slice(0, 120)),
      cut: boxes.filter(box => box.scrollWidth > box.clientWidth + 1
        && !["auto", "scroll"].includes(view.getComputedStyle(box).overflowX)).length,
      ground: view.getComputedStyle(page.body).backgroundColor,
      darkPicture: image ? image.currentSrc === source.srcset : null,
    };
  });
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


def in_browser(page: Path, scheme: str, folder: Path) -> list[dict]:
    """What the probe finds, one entry for each of WIDTHS."""
    frames = "".join(
        f'<iframe src="{page.as_uri()}" style="border:0;height:900px;width:{width}px"></iframe>'
        for width in WIDTHS
    )
    probe = folder / "probe.html"
    probe.write_text(PROBE.replace("FRAMES", frames), encoding="utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        "--window-size=1500,1000",
        "--virtual-time-budget=20000",
        f"--user-data-dir={folder / 'profile'}",
        "--dump-dom",
        probe.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<pre id=\"found\">(.+?)</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1]))


def story(folder: Path) -> Path:
    """A results file of the demo with every part that a page can show, and unfriendly names."""
    long = "a_name_without_any_place_to_break_" * 6
    levels = base64.b64encode(bytes(range(64))).decode()
    crop = {"layer": f"model.{long}", "shape": [8, 8], "step": 0.01}
    crop["parts"] = {name: levels for name in ("weight", "sparse", "signs", "left")}
    layers = [f"model.layers.{i}.{name}" for i in range(20) for name in ("q_proj", "down_proj")]
    model = {
        "method": "slab",
        "perplexity": 6.0,
        "bits_per_weight": 9.5,
        "bytes": 1_000_000,
        "tokens_per_second": 20.0,
        "errors": dict.fromkeys(layers, 0.1),
        "parts": {name: {"values": 8.0, "metadata": 1.0, "signs": 0.5} for name in layers},
        "crop": crop,
        "continuation": f"{long}\n    indented\n" + "word " * 100,
        "kl": 0.03,
        "kl_p99": 0.4,
        "top1": 0.92,
        "perplexity_ratio": 1.2,
        "perplexity_ratio_stderr": 0.01,
        "parameters": 2_000_000,
        "bits_per_parameter": 4.0,
        "packed_bytes": 700_000,
        "dense_bytes": {"embeddings": 290_000, "norms": 10_000},
        "decoding": [
            {
                "batch": batch,
                "seconds_per_step": 0.01,
                "tokens_per_second": batch / 0.01,
                "split": {"linears": 0.6, "head": 0.2, "overhead": 0.2},
            }
            for batch in (1, 8)
        ],
    }
    dense = {"method": "dense", "perplexity": 5.0, "bytes": 4_100_000, "bits_per_weight": 16.0}
    others = [model | {"method": name} for name in ("wanda", "slab-paper")]
    content = {
        "model": f"/home/somebody/{long}",
        "prompt": "def f():\n    ",
        "results": [dense | {"continuation": "text"}, *others, model],
        "notes": [long],
        "run": {"command": f"make demo MODEL={long}", "date": "2030-01-02", "seconds": 3},
    }
    file = folder / "results.json"
    file.write_text(json.dumps(content))
    return file


PAGES = {
    "story": (story, True),
    "timings": (lambda _: RESULTS / "cpu-peers-1-thread.json", True),
    "wide-tables": (lambda _: RESULTS / "instruction-budget.json", False),
    "many-settings": (lambda _: RESULTS / "methods-shipped.json", False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_wider_than_the_page(name, tmp_path):
    source, plots = PAGES[name]
    page = write(read([source(tmp_path)]), tmp_path / "page", plots)[-1]
    for scheme in ("light", "dark") if plots else ("light",):
        for found in in_browser(page, scheme, tmp_path):
            assert found["whole"] <= found["width"], found
            assert not found["outside"] and not found["cut"], found
            assert found["ground"] == GROUNDS[scheme]
            assert found["darkPicture"] is (scheme == "dark" if plots else None)
