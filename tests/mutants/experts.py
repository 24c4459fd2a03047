"""The faults in the experts of a mixture: which tokens, which rows, and under which names."""

from __future__ import annotations

from .fault import Fault

MODULE = ("tests/nn/test_experts.py",)
ROUTING = ("tests/compression/test_routing.py",)
ROADS = ("tests/models/test_mixtures.py",)

EXPERTS = (
    Fault(
        "outputs that are not put back in the order of the tokens",
        "slab_kernels/nn/*.py", "out[order] = torch.arange(len(order), device=order.device)",
        "out = order", MODULE,
    ),
    Fault(
        "an expert that is fed what its router does not send it",
        "slab_kernels/nn/*.py", "if number in self.fed else self._run",
        "if number not in self.fed else self._run", MODULE,
    ),
    Fault(
        "every expert fed everything",
        "slab_kernels/compression/*.py", "if count < needed]", "if count < needed + total]",
        ROUTING,
    ),
    Fault(
        "an expert that got too few tokens fitted to them",
        "slab_kernels/compression/*.py",
        "if found[number].stats.tokens < needed and self.feeding.feed(group.names):",
        "if False:", ROUTING,
    ),
    Fault(
        "fed experts that stay fed once their block is done",
        "slab_kernels/compression/*.py", "experts.fed = frozenset()", "pass", ROUTING,
    ),
    Fault(
        "weights of experts stored under each other's names",
        "slab_kernels/models/*.py", "names.sort(key=lambda name: (slices[name].expert, slices",
        "names.sort(key=lambda name: (-slices[name].expert, slices", ROADS,
    ),
    Fault(
        "rows of up taken for rows of gate",
        "slab_kernels/models/*.py", "start = 0 if name == DOWN else first", "start = 0", ROADS,
    ),
    Fault(
        "a router that is packed or refused",
        "slab_kernels/models/*.py", "if _is_skipped(full, (*skip, *dense)):",
        "if _is_skipped(full, skip):", ROADS,
    ),
)  # fmt: skip
