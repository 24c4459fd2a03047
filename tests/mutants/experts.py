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
        "slab_kernels/models/*.py", "Held((names[at],), False)", "Held((names[-1 - at],), False)",
        ROADS,
    ),
    Fault(
        "rows of up taken for rows of gate",
        "slab_kernels/models/*.py", "part = projections.index(name), len(projections)",
        "part = 0, len(projections)", ROADS,
    ),
    Fault(
        "rows of gate and up that take turns, taken for halves",
        "slab_kernels/models/*.py", "return not module.is_concatenated", "return False", MODULE,
    ),
    Fault(
        "a gate that reads gate and up in turns, given halves",
        "slab_kernels/nn/*.py", "if self.interleaved else torch.cat(read, -1)",
        "if not read else torch.cat(read, -1)", MODULE,
    ),
    Fault(
        "biases of experts that views of one stack keep from being saved",
        "slab_kernels/models/*.py", "bias.of(stacks[bias.stack]).clone()",
        "bias.of(stacks[bias.stack])", MODULE,
    ),
    Fault(
        "a router that is packed or refused",
        "slab_kernels/models/*.py", "if _is_skipped(full, (*skip, *dense)):",
        "if _is_skipped(full, skip):", ROADS,
    ),
)  # fmt: skip
