"""llama.cpp's part of bench_end_to_end.py: a random Q4_0 file, and how fast llama.cpp runs it.

The file is what llama.cpp's own tools write as Q4_0: linears as q4_0, the embedding, which is the
head too, as q6_K. It is written with the package gguf and run by the library that the package
llama_cpp (llama-cpp-python) brings, through its plain bindings.
"""

from __future__ import annotations

import ctypes
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench_end_to_end import Shapes

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Bytes of a block of each format, its inputs, and where its scale stands, an fp16.
BLOCKS = {"Q4_0": (18, 32, 0), "Q6_K": (210, 256, 208)}


def missing() -> str | None:
    """Why llama.cpp cannot be timed here, or None."""
    for package in ("llama_cpp", "gguf"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package!r} is not installed"
    return None


def random_rows(kind: str, n: int, k: int) -> Any:
    """[n, bytes of a row] uint8: random codes with one small scale."""
    import numpy as np

    size, inputs, at = BLOCKS[kind]
    rows = np.random.default_rng(0).integers(0, 256, (n, k // inputs, size), dtype=np.uint8)
    scale = np.array([0.005 if kind == "Q4_0" else 0.00002], np.float16).view(np.uint8)
    rows[:, :, at : at + 2] = scale
    return rows.reshape(n, -1)


@contextmanager
def written(shapes: Shapes) -> Iterator[Path]:
    """The file, in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        write(path, shapes)
        yield path


def write(path: Path, shapes: Shapes) -> None:
    """A Llama of those shapes without a vocabulary of words."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(shapes.layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(shapes.hidden)
    writer.add_feed_forward_length(shapes.ffn)
    writer.add_head_count(shapes.heads)
    writer.add_head_count_kv(shapes.kv_heads)
    writer.add_rope_dimension_count(shapes.head_size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shapes.vocabulary)
    writer.add_tokenizer_model("none")
    kinds = gguf.GGMLQuantizationType
    ones = np.ones(shapes.hidden, np.float32)
    table = random_rows("Q6_K", shapes.vocabulary, shapes.hidden)
    writer.add_tensor("token_embd.weight", table, raw_dtype=kinds.Q6_K)
    writer.add_tensor("output_norm.weight", ones)
    sizes = shapes.linears()
    rows = {name: random_rows("Q4_0", *sizes[ours]) for name, ours in NAMES.items()}
    for block in range(shapes.layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{name}.weight", ones)
        for name, numbers in rows.items():
            writer.add_tensor(f"blk.{block}.{name}.weight", numbers, raw_dtype=kinds.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def timings(
    path: Path, shapes: Shapes, threads: Sequence[int]
) -> Iterator[tuple[dict[str, Any], Callable[[], float]]]:
    """Columns of a row, and a function that runs it once and returns tokens a second."""
    from llama_cpp import llama_cpp as library

    quiet = library.llama_log_callback(lambda level, text, data: None)
    library.llama_log_set(quiet, None)
    library.llama_backend_init()
    model = library.llama_model_load_from_file(
        str(path).encode(), library.llama_model_default_params()
    )
    if not model:
        raise OSError(f"llama.cpp cannot open {path}, which was written with the package gguf")
    try:
        for count in threads:
            context = Context(library, model, shapes, count)
            named = {"backend": "llama.cpp", "values": "Q4_0", "activations": "int8"}
            named |= {"head": "q6_K", "threads": count, "weight_bytes": path.stat().st_size}
            try:
                for batch in shapes.batches:
                    columns = {"what": "decode", "batch": batch, "tokens": shapes.steps}
                    yield {**named, **columns}, partial(context.decode, batch)
                columns = {"what": "prompt", "batch": 1, "tokens": shapes.prompt}
                yield {**named, **columns}, context.read_prompt
            finally:
                context.free()
    finally:
        library.llama_model_free(model)


class Context:
    """A context of llama.cpp with so many threads; its batch is filled anew for each call."""

    def __init__(self, library: Any, model: Any, shapes: Shapes, threads: int):
        self.library, self.shapes = library, shapes
        most = max(shapes.batches)
        settings = library.llama_context_default_params()
        settings.n_ctx = most * 256 if shapes.prompt <= 256 else most * shapes.prompt
        settings.n_batch = settings.n_ubatch = max(shapes.prompt, most)
        settings.n_seq_max = most
        settings.n_threads = settings.n_threads_batch = threads
        self.context = library.llama_init_from_model(model, settings)
        if not self.context:
            raise OSError("llama.cpp could not make a context for its model")
        self.batch = library.llama_batch_init(settings.n_batch, 0, 1)

    def call(self, places: Sequence[tuple[int, int]], answers: set[int]) -> None:
        """One token at each (text, position); logits are wanted of the numbers in `answers`."""
        batch = self.batch
        batch.n_tokens = len(places)
        for i, (text, position) in enumerate(places):
            batch.token[i] = (7 * position + text) % self.shapes.vocabulary
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = position, 1, text
            batch.logits[i] = i in answers
        if status := self.library.llama_decode(self.context, batch):
            raise OSError(f"llama.cpp could not compute {len(places)} tokens: status {status}")
        self.library.llama_synchronize(self.context)
        logits = self.library.llama_get_logits_ith(self.context, ctypes.c_int32(-1))
        if not abs(logits[0]) < float("inf"):  # NaN fails too
            raise OSError("llama.cpp's logits are not finite, so its times mean nothing")

    def decode(self, texts: int) -> float:
        """Tokens a second of all texts together, after their first token."""
        self.clear()
        every = set(range(texts))
        self.call([(text, 0) for text in range(texts)], every)
        began = time.perf_counter()
        for step in range(self.shapes.steps):
            self.call([(text, step + 1) for text in range(texts)], every)
        return texts * self.shapes.steps / (time.perf_counter() - began)

    def read_prompt(self) -> float:
        """Tokens a second of one prompt, with the logits of its last token."""
        self.clear()
        places = [(0, position) for position in range(self.shapes.prompt)]
        began = time.perf_counter()
        self.call(places, {len(places) - 1})
        return self.shapes.prompt / (time.perf_counter() - began)

    def clear(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def free(self) -> None:
        self.library.llama_batch_free(self.batch)
        self.library.llama_free(self.context)
