"""transformers knows packed folders in any order of imports, and its own import never fails."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
from pairwise import subset

pytest.importorskip("transformers")

EVENTS = (
    "import slab_kernels",
    "from slab_kernels import SlabConfig",
    "import transformers",
    "from transformers import AutoModelForCausalLM; import transformers.quantizers.auto",
    "import slab_kernels.engines.transformers",
)
RUN = """
import json, os, sys

orders = json.loads(sys.argv[1])

def run(order):
    for event in order:
        exec(event, {})
        auto = sys.modules.get("transformers.quantizers.auto")
        if auto is not None and "slab_kernels" in sys.modules:
            ours = sys.modules["slab_kernels.engines.transformers"]
            assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["slab_kernels"] is ours.SlabConfig, order
            assert auto.AUTO_QUANTIZER_MAPPING["slab_kernels"] is ours.SlabQuantizer, order
"""
# Each order runs in a process of its own, into which only packages have been imported that neither
# of the two libraries belongs to.
FRESH = """
import accelerate, huggingface_hub, safetensors.torch, tokenizers, torch._dynamo

assert not {"transformers", "slab_kernels"} & sys.modules.keys()
for order in orders:
    child = os.fork()
    if child == 0:
        try:
            run(order)
            os._exit(0)
        except BaseException as error:
            print(order, repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
"""
# All in one process: this library and the registry are unloaded before each.
ORDERS = """
import transformers.modeling_utils

for order in orders:
    sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("slab")]
    for name in list(sys.modules):
        if name.split(".")[0] == "slab_kernels" or name.startswith("transformers.quantizers"):
            del sys.modules[name]
    run(order)
    assert "slab_kernels.engines.transformers" in sys.modules
"""
KNOWN = """
auto = sys.modules["transformers.quantizers.auto"]
assert auto.AUTO_QUANTIZER_MAPPING["slab_kernels"].__module__ == "slab_kernels.engines.transformers"
"""
FROZEN = """
import importlib.machinery, sys
import slab_kernels

class Frozen:
    __slots__ = ("loader",)
    def __init__(self, loader): object.__setattr__(self, "loader", loader)
    def __setattr__(self, name, value): raise AttributeError(name)
    def create_module(self, spec): return None
    def exec_module(self, module): self.loader.exec_module(module)

class Finder:
    def find_spec(name, path=None, target=None):
        if name != "transformers.quantizers.auto": return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = Frozen(spec.loader)
        return spec

sys.meta_path.insert(1, Finder)
from slab_kernels import SlabConfig
import transformers.quantizers.auto as auto
assert type(auto.__spec__.loader) is Frozen
"""
TWICE = """
import builtins, importlib, sys
import slab_kernels
plain = builtins.__import__

def failed(name, *rest, **more):
    if name.endswith("quantizer_awq"): raise OSError("once")
    return plain(name, *rest, **more)

builtins.__import__ = failed
try: import transformers.quantizers.auto
except OSError: builtins.__import__ = plain
else: raise AssertionError("nothing failed")
import transformers.quantizers.auto as auto
assert auto.AUTO_QUANTIZER_MAPPING["slab_kernels"]
importlib.reload(auto)
"""
ON_META = """
import sys, torch
import slab_kernels
with torch.device("meta"):
    import transformers.quantizers.auto
"""
STRANGE = """
import slab_kernels, slab_kernels.engines as engines, sys, types
broken = types.ModuleType("slab_kernels.engines.transformers")
def register(): raise AttributeError("moved")
broken.register = register
sys.modules[broken.__name__] = broken
from transformers.quantizers.auto import AutoHfQuantizer
assert AutoHfQuantizer.supports_quant_method({"quant_method": "slab_kernels"})
try: AutoHfQuantizer.from_config({"quant_method": "slab_kernels"}, pre_quantized=True)
except RuntimeError as error: assert "use slab_kernels.load" in str(error)
else: raise AssertionError("opened")
"""


def check_orders(program: str, orders) -> None:
    command = [sys.executable, "-c", RUN + program, json.dumps(list(orders))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_all_orders():
    check_orders(ORDERS, itertools.permutations(EVENTS))


def distinct_orders() -> list[tuple[str, ...]]:
    """The orders that differ in what happens.

    Whatever follows the second or the last event finds everything imported.
    """
    found = set()
    for order in itertools.permutations(EVENTS):
        end = min(order.index(EVENTS[1]), order.index(EVENTS[4]))
        found.add(order[: end + 1])
    return sorted(found)


def which_is_first(order: tuple[str, ...]) -> list[bool | None]:
    """Of every two events, whether the one comes before the other; None if either does not come."""
    return [
        order.index(one) < order.index(other) if {one, other} <= set(order) else None
        for one, other in itertools.combinations(EVENTS, 2)
    ]


@pytest.mark.slow
def test_orders_in_fresh_processes(request):
    """Any two events in either order, and each first event with each last one; test_all_orders
    runs all orders in one process."""
    orders = distinct_orders()
    assert len(orders) == 32
    full = request.config.getoption("full")
    ends = lambda order: (order[0], order[-1])  # noqa: E731
    few = subset(orders, which_is_first, each=ends, together=1)
    check_orders(FRESH, orders if full else few)


@pytest.mark.parametrize(
    ("code", "options"),
    [
        (FROZEN + KNOWN, ("-W", "error")),
        (TWICE + KNOWN, ()),
        (ON_META + KNOWN, ()),
    ],
    ids=[
        "warnings are errors, and the loader cannot be changed",
        "a failed import and a reload",
        "while meta is the default device",
    ],
)
def test_registered(code, options):
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_strange_transformers_lives_and_refuses_our_folders():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", STRANGE], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "The reason: AttributeError: moved" in done.stderr


DEFAULT_META = """
import torch
with torch.device("meta"):
    import slab_kernels.cli.main, slab_kernels.compression.model, slab_kernels.nn
    import slab_kernels.engines.transformers
from slab_kernels.methods.solvers.quantize import SEARCH
assert SEARCH == torch.linspace(0.5, 1.0, 21).tolist()
"""
BEING_IMPORTED = """
import sys, types
import slab_kernels
sys.modules["slab_kernels.engines.transformers"] = types.ModuleType("half")  # by another thread
import transformers.quantizers.auto as auto
try:
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["slab_kernels"].from_dict({})
except RuntimeError as error:
    assert "still being imported" in str(error)
else:
    raise AssertionError("a packed folder would open with random weights")
del sys.modules["slab_kernels.engines.transformers"]
ours = __import__("slab_kernels.engines.transformers", fromlist=["register"])
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["slab_kernels"] is ours.SlabConfig
assert auto.AUTO_QUANTIZER_MAPPING["slab_kernels"] is ours.SlabQuantizer
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [DEFAULT_META, BEING_IMPORTED], ids=["meta", "being imported"])
def test_circumstances_of_the_import(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
