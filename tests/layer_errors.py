"""The output error of every compressed linear, measured on a finished model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from slab_kernels.models.blocks import find_blocks
from slab_kernels.nn import SlabLinear


@torch.no_grad()
def layer_errors(
    dense_model: nn.Module, compressed_model: nn.Module, tokens: Tensor
) -> dict[str, float]:
    """Module name -> ||X (W - W')^T|| / ||X W^T||, X its inputs in the compressed model.

    Measured are all SlabLinear modules, and all nn.Linear of the decoder blocks whose weight
    differs from the dense model's. tokens: ids [samples, window].
    """
    path, _ = find_blocks(compressed_model)
    sums: dict[str, list[float]] = {}

    def watch(name: str, weight: Tensor, stored: Tensor):
        def see(module, args):
            x = args[0].flatten(0, -2).float()
            for position, matrix in enumerate((weight - stored, weight)):
                sums[name][position] += float((x @ matrix.T).square().sum(dtype=torch.float64))

        return see

    handles = []
    for name, module in compressed_model.named_modules():
        if not name.startswith(path + ".") or type(module) not in (nn.Linear, SlabLinear):
            continue
        weight = dense_model.get_submodule(name).weight.float()
        packed = isinstance(module, SlabLinear)
        stored = module.packed().dense() if packed else module.weight.float()
        if packed or not torch.equal(stored, weight):
            sums[name] = [0.0, 0.0]
            handles.append(module.register_forward_pre_hook(watch(name, weight, stored)))
    compressed_model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return {
        name: math.sqrt(error / whole) if whole else 0.0 for name, (error, whole) in sums.items()
    }
