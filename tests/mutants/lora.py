"""The faults in LoRA around packed layers: what is merged, where, and what is written then."""

from __future__ import annotations

from .fault import Fault

PEFT = ("tests/engines/test_peft.py",)
ADDED = ("tests/format/test_conversions.py",)

LORA = (
    Fault(
        "LoRA merged without its scaling",
        "slab_kernels/engines/*.py", "with_adapter(packed, self.scaling[name] * B.float(), A.T)",
        "with_adapter(packed, B.float(), A.T)", PEFT,
    ),
    Fault(
        "the weight between two merges taken for that of before",
        "slab_kernels/engines/*.py", "self._before = self._before or layer.packed()",
        "self._before = layer.packed()", PEFT,
    ),
    Fault(
        "a fused layer that runs without the adapters of its parts",
        "slab_kernels/engines/*.py", "            layer.forget()\n", "            pass\n", PEFT,
    ),
    Fault(
        "a config that says the ranks of before the merge",
        "slab_kernels/engines/*.py", "    note_layouts(tuner.model)", "    pass", PEFT,
    ),
    Fault(
        "layers replaced before one of them is refused",
        "slab_kernels/engines/*.py", "            _check(tuner, config, asked, layers)\n",
        "            _include_all_linear(config, model, layers)\n", PEFT,
    ),
    Fault(
        "an int8 adapter that loses what is added to it",
        "slab_kernels/format/*.py", "if not _product_norm(*lost) <=", "if _product_norm(*lost) ==",
        ADDED,
    ),
)  # fmt: skip
