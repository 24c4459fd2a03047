"""transformers knows packed folders in any order of imports, and its own import never fails."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("transformers")

# What all orders share is loaded once; before each, this library and the registry are unloaded.
ORDERS = """
import itertools, sys
import transformers.modeling_utils

EVENTS = (
    "import slab_kernels",
    "from slab_kernels import SlabConfig",
    "import transformers",
    "from transformers import AutoModelForCausalLM; import transformers.quantizers.auto",
    "import slab_kernels.engines.transformers",
)
for order in itertools.permutations(EVENTS):
    sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("slab")]
    for name in list(sys.modules):
        if name.split(".")[0] == "slab_kernels" or name.startswith("transformers.quantizers"):
            del sys.modules[name]
    for event in order:
        exec(event, {})
    auto = sys.modules["transformers.quantizers.auto"]
    ours = sys.modules["slab_kernels.engines.transformers"]
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["slab_kernels"] is ours.SlabConfig, order
    assert auto.AUTO_QUANTIZER_MAPPING["slab_kernels"] is ours.SlabQuantizer, order
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


@pytest.mark.parametrize(
    ("code", "options"),
    [
        (ORDERS, ()),
        (FROZEN + KNOWN, ("-W", "error")),
        (TWICE + KNOWN, ()),
        (ON_META + KNOWN, ()),
    ],
    ids=[
        "all orders",
        "warnings are errors, and the loader cannot be changed",
        "a failed import and a reload",
        "while meta is the default device",
    ],
)
def test_registered(code, options):
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_strange_transformers_lives_and_refuses_our_folders():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", STRANGE], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "The reason: AttributeError: moved" in done.stderr
