"""Which kernel a linear gets on a GPU and why, in words."""

from __future__ import annotations

from .cost import Rebuild, dense_microseconds, rebuild
from .gpus import Gpu
from .plan import choose, takes_dense, weighed
from .tiles import DECODE, FEW, MANY, REBUILD, CudaSizes

FAMILIES = {
    MANY: "the many loop",
    REBUILD: "the rebuild loop",
    "prefill_one": "the prefill kernel of kept pairs",
    "prefill_both": "the prefill kernel of kept pairs and signs",
    "prefill_rebuild": "the prefill kernel that rebuilds the weight",
}


def explained(sizes: CudaSizes, M: int, gpu: Gpu) -> str:
    """The plan for M tokens and the time of a dense linear by the same model; above 16 tokens what
    the kernels that were not chosen would take, and whether a dense copy would be used.

    Raises: ArgumentError if no plan fits the device, ConfigError if the file of measured rows is
    damaged.
    """
    chosen, dense = choose(sizes, M, gpu), dense_microseconds(sizes.N, sizes.K, M, gpu)
    text = f"{gpu.name}: {chosen.describe()}; a dense fp16 linear by the same model: {dense:.1f} us"
    if M <= DECODE:
        return text
    found = list(weighed(sizes, M, gpu))
    others = [f"{FAMILIES[each.family]} ({each.microseconds:.1f} us)" for each in found]
    if not isinstance(chosen, Rebuild):
        if found[0].adapter_us:
            text += f"; z = x Q before it: {found[0].adapter_us:.1f} us"
        del others[0]
        if M > FEW:
            again = rebuild(sizes, M, gpu).microseconds
            others.append(f"the weight rebuilt dense ({again:.1f} us)")
    if others:
        scope = "" if M > FEW else f", for all of {DECODE + 1} to {FEW} tokens"
        text += f"; preferred to {', '.join(others)}{scope}"
    copy = "a dense copy" if takes_dense(sizes, M, gpu) else "no dense copy"
    return f"{text}; {copy} would be faster"
