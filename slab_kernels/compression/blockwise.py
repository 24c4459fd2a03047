"""Compressing a model block after block, whatever its source and wherever the result goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import CheckpointError
from ..format import paddings
from ..models.blocks import outside_filled
from ..models.streams import Stream, catch_stream
from ..text.windows import Windows
from .block import BlockWork, set_weight
from .calibration import Tokens
from .events import ProgressEvent
from .head import HeadWork
from .job import Job
from .outside import look_up_as_stored
from .record import LayerRecord
from .sinks import FinishedBlock, Sink, dense_weight
from .statistics import Streams
from .team import Team

# Hidden states stay on a GPU while they take less than this share of its free memory.
KEEP_ON_DEVICE = 0.25
USUAL_HIDDEN_SIZE = 8192  # of a model whose config does not say


@dataclass
class BlockwiseRun:
    """The blocks of a job in order, each compressed on what the compressed ones before it put out.

    Statistics of a layer come from the compressed prefix: earlier blocks, and earlier groups of its
    own block. One block is in memory at a time, and its dense twin where that is wanted.

    finished: the blocks that are done, without their weights.
    """

    job: Job
    tokens: Tokens
    sink: Sink
    report: Callable[[ProgressEvent], None]
    team: Team
    finished: list[FinishedBlock] = field(default_factory=list)
    streams: Streams = field(init=False)

    def run(self) -> list[FinishedBlock]:
        """Compress every block that the sink does not hold yet.

        Raises: CheckpointError if what the sink holds is not of this model, and what the method
            raises.
        """
        self._warn_of_little_text()
        self._warn_of_padding()
        self.finished = self.sink.finished()
        self._check_finished()
        done, total = len(self.finished), len(self.job.blocks)
        if done < self.job.steps:
            self.streams = self._open_streams()
            if done:
                self._report("resumed", done, f"resuming after block {done} of {total}")
            for index in range(done):
                self.restore(index)
            for index in range(done, total):
                self.compress(index)
            if self.job.head is not None:
                self.compress_head()
        return self.finished

    @property
    def layers_done(self) -> int:
        return sum(len(block.layers) for block in self.finished)

    def load_block(self, index: int) -> nn.Module:
        """Block `index` with its dense weights."""
        return self.job.load_block(index)

    def restore(self, index: int) -> None:
        """Let the texts pass a block that is finished already."""
        block = self.load_block(index)
        dense_block = self.load_block(index) if self.job.plan.dense_stream else None
        self._put(index, block, self.sink.restore(index, self._linears(index, block)))
        self.advance(index, block, dense_block)

    def compress(self, index: int) -> None:
        """Compress and store a block, then let the texts pass it."""
        plan, done = self.job.plan, self.layers_done
        block = self.load_block(index)
        dense_block = self.load_block(index) if plan.dense_stream or plan.matching else None
        linears = self._linears(index, block)

        def tell(layer: LayerRecord, position: int) -> None:
            self._report("layer", index, layer=layer, done=done + position)

        work = BlockWork(self.job, index, block, dense_block, linears, self.streams, self.team)
        kept = work.compress(tell, lambda text: self._report("experts", index, text))
        if plan.matching is not None and linears:
            work.match(
                kept, lambda text: self._report("matching", index, text, done=done + len(linears))
            )
        kept.layers = self.sink.store(index, kept)
        self.finished.append(kept.records())
        self._report("block", index)
        self._put(index, block, kept)
        self.advance(index, block, dense_block)

    def compress_head(self) -> None:
        """Compress and store the output head, on what the last block put out."""
        job, index = self.job, len(self.job.blocks)
        with outside_filled(job.source, job.path, job.device, job.dtype) as model:
            look_up_as_stored(model, job)
            kept = HeadWork(job, model, self.tokens, self.streams, self.team).compress()
        kept.layers = self.sink.store(index, kept)
        self._report("layer", index, layer=kept.layers[0], done=self.layers_done + 1)
        self.finished.append(kept.records())

    def advance(self, index: int, block: nn.Module, dense_block: nn.Module | None) -> None:
        """Let the texts pass block `index`, unless nothing comes after it."""
        if index + 1 < self.job.steps:
            self.streams.advance(index, block, dense_block)

    def _linears(self, index: int, block: nn.Module) -> dict[str, nn.Linear]:
        """Full name -> linear of the loaded block, of those that are compressed."""
        found: dict[str, nn.Linear] = {}
        for name in self.job.linears[index]:
            linear = block.get_submodule(name.removeprefix(self.job.prefix(index)))
            assert isinstance(linear, nn.Linear)
            found[name] = linear
        return found

    def _put(self, index: int, block: nn.Module, kept: FinishedBlock) -> None:
        """The stored numbers into a block, so that what follows sees what will be loaded."""
        prefix, device, dtype = self.job.prefix(index), self.job.device, self.job.dtype
        for name, stored in kept.stored.items():
            linear = block.get_submodule(name.removeprefix(prefix))
            assert isinstance(linear, nn.Linear)
            set_weight(linear, dense_weight(stored))
        for name, value in kept.other.items():
            path, _, leaf = name.removeprefix(prefix).rpartition(".")
            owner = block.get_submodule(path)
            if leaf in owner._parameters:
                number = value.to(device=device, dtype=dtype)
                owner._parameters[leaf] = nn.Parameter(number, requires_grad=False)
        block.requires_grad_(False)

    def _open_streams(self) -> Streams:
        """Every text at the input of the first block."""
        job = self.job
        replaced: dict[str, nn.Linear] = {}
        if job.plan.usual.packed:
            replaced = {name: m for block in job.linears for name, m in block.items()}
        with outside_filled(job.source, job.path, job.device, job.dtype) as model:

            def caught(text: Windows | None) -> Stream | None:
                if text is None:
                    return None
                return catch_stream(
                    model,
                    job.blocks,
                    text,
                    self.load_block,
                    job.device,
                    keep_on=self._home(text),
                    packed=replaced,
                    products=job.products,
                )

            tokens, plan = self.tokens, job.plan
            dense = dense_held_back = None
            if job.tables:  # the dense model's embedding is not the one that is stored
                dense = caught(tokens.fitted if plan.dense_stream else None)
                dense_held_back = caught(tokens.held_back if plan.dense_target else None)
            look_up_as_stored(model, job)
            calibration = caught(tokens.fitted)
            held_back, heldout = caught(tokens.held_back), caught(tokens.heldout)
            assert calibration is not None
        if plan.dense_stream and dense is None:
            dense = calibration.twin()
        if plan.dense_target and dense_held_back is None and held_back is not None:
            dense_held_back = held_back.twin()
        return Streams(calibration, held_back, heldout, dense, dense_held_back)

    def _home(self, text: Windows) -> torch.device:
        """Where the hidden states of a text are kept."""
        device = self.job.device
        if device.type != "cuda":
            return device
        width = int(self.job.source.config.get("hidden_size") or USUAL_HIDDEN_SIZE)
        room = KEEP_ON_DEVICE * torch.cuda.mem_get_info(device)[0]
        return device if text.tokens * width * 4 < room else torch.device("cpu")

    def _check_finished(self) -> None:
        """Raises: CheckpointError for finished blocks that are not this model's."""
        for block, linears in zip(self.finished, self.job.linears, strict=False):
            wanted = {name: tuple(linear.weight.shape) for name, linear in linears.items()}
            if {layer.name: layer.shape for layer in block.layers} != wanted:
                raise CheckpointError(
                    "the finished blocks of the interrupted run are not this model's; "
                    "use an empty folder"
                )

    def _warn_of_little_text(self) -> None:
        shapes, settings = self.job.shapes, self.job.plan.usual
        widest = max(shapes, key=lambda name: shapes[name][1])
        tokens, inputs = self.tokens.fitted.tokens, shapes[widest][1]
        if settings.needs_gram and tokens < inputs:
            message = (
                f"warning: {tokens} calibration tokens are fewer than the {inputs} inputs of "
                f"{widest}; method {settings.method!r} fits that sample and little else: "
                "use several times as many"
            )
            self._report("warning", message=message)

    def _warn_of_padding(self) -> None:
        plan = self.job.plan
        if not plan.usual.packed:
            return
        shapes = self.job.shapes.items()
        padded = paddings(plan.layer(name).layout(shape) for name, shape in shapes)
        if padded:
            message = (
                f"warning: inputs are padded, {'; '.join(map(str, padded))}; one scale per row "
                "(group_size=None, --group-size 0) needs none where K is a multiple of 16"
            )
            self._report("warning", message=message)

    def _report(
        self,
        kind: str,
        block: int = 0,
        message: str = "",
        layer: LayerRecord | None = None,
        done: int | None = None,
    ) -> None:
        """done: the finished layers, where they are not those of the finished blocks."""
        blocks, layers = len(self.job.blocks), self.job.layers
        number = self.layers_done if done is None else done
        self.report(ProgressEvent(kind, block, blocks, number, layers, layer, message))
