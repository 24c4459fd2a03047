"""How far an error of one layer moves the model's predictions, in nats, from one backward pass.

Near the dense model the divergence of the predicted distributions is quadratic in the change e_t
of a layer's outputs, with the Fisher information as its matrix (Martens, JMLR 2020, section 8):

    KL(dense || changed), summed over tokens  ~  1/2 E[(sum_t g_t . e_t)^2]

where g_t is the gradient, with respect to the layer's output for token t, of the log-likelihood of
tokens that are drawn from the dense model's own predictions. Errors of different tokens are taken
to be uncorrelated, which leaves the sum of (g_t . e_t)^2: it is known to a few per cent from one
draw for each of some thousand tokens. One backward pass serves all layers and all their errors;
measuring the divergence itself takes a forward pass for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArchitectureError
from ..models.blocks import batches, find_blocks
from ..models.streams import Stream, one_sentence
from ..text.windows import Windows

SEED = 0  # of the drawn tokens


class Sensitivity:
    """The gradients of a dense model in memory, which is as before afterwards.

    probes: windows on which they are taken. Of one window at a time all that the model computes is
    in memory; kept are the gradients at the output of each block, tokens * hidden_size numbers.
    stream: the probes at the input of the first block.
    """

    def __init__(self, model: nn.Module, probes: Windows, stream: Stream):
        self.model, self.probes, self.stream = model, probes, stream
        self.device = next(model.parameters()).device
        self.blocks = find_blocks(model)[1]
        # block -> batch -> [samples, window, hidden_size]
        self.gradients = self._of_all_blocks()

    def _of_all_blocks(self) -> list[list[Tensor]]:
        """At the output of each block, for each batch of the probes."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        found: list[list[Tensor]] = [[] for _ in self.blocks]
        for batch in batches(self.probes):
            windows = [self._of_a_window(ids, generator) for ids in batch.split(1)]
            for index, parts in enumerate(zip(*windows, strict=True)):
                found[index].append(torch.cat(parts))
        return found

    def _of_a_window(self, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The same for ids [1, window], of each block; kept in host memory."""
        with torch.enable_grad(), _outputs(self.model, self.blocks) as outputs:
            with one_sentence(self.model):
                logits = self.model(input_ids=ids.to(self.device), use_cache=False).logits
            logs = logits[0].float().log_softmax(-1)
            drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            with one_sentence(self.model):
                found = torch.autograd.grad(logs.gather(-1, drawn).sum(), outputs)
        return tuple(gradient.cpu() for gradient in found)

    def of_block(
        self, index: int, block: nn.Module, linears: dict[str, nn.Linear]
    ) -> dict[str, LayerSensitivity]:
        """What the errors of some linears of block `index` cost, at whose input the stream is.

        Raises: ArchitectureError for a linear that the model runs without gradients.
        """
        stream = self.stream
        found = {name: LayerSensitivity(self.probes.tokens) for name in linears}
        for batch, gradient in enumerate(self.gradients[index]):
            with torch.enable_grad(), _calls(linears) as calls:
                stream.hidden[batch].requires_grad_()
                output = stream.run(index, block, batch)
                stream.hidden[batch].requires_grad_(False)
                outputs = [y for _, _, y in calls]
                for name, _, y in calls:
                    if not y.requires_grad:  # as of what picks the tokens to attend to
                        raise ArchitectureError(
                            f"{name} runs without gradients in the code of the model, so a search "
                            "of bits cannot tell what its errors cost; leave it dense with "
                            f"skip='*.{name.rpartition('.')[2]}'"
                        )
                if not outputs:  # experts that no token reaches
                    continue
                gradients = torch.autograd.grad(
                    output, outputs, gradient.to(output), allow_unused=True
                )
            for (name, x, _), g in zip(calls, gradients, strict=True):
                if g is not None:
                    found[name].add(x.detach().flatten(0, -2), g.flatten(0, -2))
        return found


class LayerSensitivity:
    """What a layer reads, and the gradients at what it puts out.

    tokens: of the text, of which an expert sees some.
    """

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.parts: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, g: Tensor) -> None:
        """x [tokens,K] and g [tokens,N] of one call."""
        self.parts.append((x, g))

    def loss(self, error: Tensor) -> float:
        """The divergence that an error [N,K] fp32 of the weight is expected to cause, in nats per
        token."""
        total = 0.0
        for x, g in self.parts:
            moved = ((x.float() @ error.T) * g.float()).sum(-1)
            total += float(moved.square().sum(dtype=torch.float64))
        return total / (2 * self.tokens)


@contextmanager
def _outputs(model: Any, blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Inside, the hidden states that the blocks put out in a forward are listed."""
    found: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple | list) else output)

    hooks = [block.register_forward_hook(note) for block in blocks]
    # Gradients flow from here on, whether or not any weight wants one.
    embedding = model.get_input_embeddings()
    hooks.append(embedding.register_forward_hook(lambda _, __, output: output.requires_grad_()))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _calls(linears: dict[str, nn.Linear]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Inside, every call of a linear is listed with its name, input and output."""
    found: list[tuple[str, Tensor, Tensor]] = []

    def noting(name: str) -> Any:
        return lambda _, args, output: found.append((name, args[0], output))

    hooks = [linear.register_forward_hook(noting(name)) for name, linear in linears.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
