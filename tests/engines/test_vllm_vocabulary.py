"""Int8 rows and packed heads in layers of vLLM, without an engine.

These tests run only where vLLM is installed (`make test-vllm`).
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from slab_kernels import reference
from slab_kernels.errors import ArchitectureError, CheckpointError, UnsupportedError
from slab_kernels.format import Int8Table, PackedLayout, int8_table
from slab_kernels.models.tables import TableEntry
from slab_kernels.testing import random_packed

vocabulary = pytest.importorskip("slab_kernels.engines.vllm_vocabulary", exc_type=ImportError)

V, D = 90, 64  # padded to 128: two ranks have 64 and 26 rows
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
LAYOUT = PackedLayout(V, D, "int4", group_size=32, rank=1)


def table(seed: int) -> Int8Table:
    return int8_table(torch.randn(V, D, generator=torch.Generator().manual_seed(seed)))


def tensors(seed: int, head: bool = False) -> dict[str, torch.Tensor]:
    """Of a folder: the int8 rows, and a packed head."""
    rows = table(seed)
    found = {f"{EMBEDDING}.codes": rows.codes, f"{EMBEDDING}.scales": rows.scales}
    if head:
        packed = random_packed(LAYOUT, seed=seed).tensors()
        found |= {f"{HEAD}.{name}": tensor for name, tensor in packed.items()}
    return found


class Model(nn.Module):
    """An embedding and a head as a model of vLLM has them, tied or not."""

    def __init__(self, tied: bool, packed: bool = False):
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )
        from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

        from slab_kernels.engines.vllm import SlabVllmConfig

        super().__init__()
        entry = TableEntry(HEAD if tied else None)
        self.quant_config = SlabVllmConfig({HEAD: LAYOUT} if packed else {}, {EMBEDDING: entry})
        self.model = nn.Module()
        self.model.embed_tokens = VocabParallelEmbedding(V, D)
        self.lm_head = ParallelLMHead(V, D, quant_config=self.quant_config, prefix=HEAD)
        if tied:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        record_metadata_for_reloading(self)

    def load_weights(self, weights) -> None:
        for name, tensor in weights:
            parameter = self.get_parameter(name)
            parameter.weight_loader(parameter, tensor)

    def prepare(self) -> None:
        for layer in (self.lm_head, self.model.embed_tokens):
            layer.quant_method.process_weights_after_loading(layer)


@pytest.fixture(params=[(0, 1), (0, 2), (1, 2)], ids=str)
def rank(request, monkeypatch) -> slice:
    """The rows of one rank; layers are built for it."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import vocab_parallel_embedding as layers

    number, world = request.param
    monkeypatch.setattr(layers, "get_tensor_model_parallel_rank", lambda: number)
    monkeypatch.setattr(layers, "get_tensor_model_parallel_world_size", lambda: world)
    monkeypatch.setattr(vocabulary, "is_pp_missing_parameter", lambda name, model: False)
    with set_current_vllm_config(VllmConfig()):
        yield slice(0, V) if world == 1 else slice(64 * number, min(64 * number + 64, V))


first_rank = pytest.mark.parametrize("rank", [(0, 1)], ids=str, indirect=True)


def probed(tied: bool, packed: bool = False) -> Model:
    from slab_kernels.engines.vllm_probe import probe_model

    model = Model(tied, packed)
    probe_model(model, model.load_weights)
    return model


def assert_right(model: Model, rank: slice, seed: int, packed: bool = False) -> None:
    dense = table(seed).dense()[rank]
    count, embedding, head = len(dense), model.model.embed_tokens, model.lm_head
    ids = torch.arange(count)
    assert torch.equal(embedding.quant_method.embedding(embedding, ids), dense)
    x = torch.randn(3, D)
    logits = head.quant_method.apply(head, x)
    assert logits.shape == (3, head.num_embeddings_per_partition)
    if packed:
        want = reference.linear(x.double(), random_packed(LAYOUT, seed=seed))[:, rank]
    else:
        want = x.double() @ dense.double().T
    torch.testing.assert_close(logits[:, :count].double(), want, atol=1e-3, rtol=1e-3)
    assert not logits[:, count:].any()


@pytest.mark.parametrize("dense_copy", [False, True])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "packed"])
def test_loaded_and_loaded_anew_into_the_same_storage(rank, tied, dense_copy, monkeypatch):
    """A reload makes its tensors anew, with whatever lay in that memory in the rows of padding."""
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        meta,
    )

    monkeypatch.setattr(vocabulary, "keeps_dense_copy", lambda device: dense_copy)
    empty = meta.materialize_meta_tensor

    def poisoned(tensor):
        return empty(tensor).fill_(float("nan") if tensor.is_floating_point() else -128)

    model, packed = probed(tied, not tied), not tied
    model.load_weights(tensors(1, packed).items())
    model.prepare()
    assert_right(model, rank, 1, packed)
    kept = [parameter.data_ptr() for parameter in model.parameters()]
    if dense_copy and tied:
        kept.append(model.model.embed_tokens.slab_dense.data_ptr())
    monkeypatch.setattr(meta, "materialize_meta_tensor", poisoned)
    for seed in (2, 3):
        initialize_layerwise_reload(model)
        model.load_weights(tensors(seed, packed).items())
        finalize_layerwise_reload(model, None)
        assert_right(model, rank, seed, packed)
        found = [parameter.data_ptr() for parameter in model.parameters()]
        if dense_copy and tied:
            found.append(model.model.embed_tokens.slab_dense.data_ptr())
        assert found == kept


@first_rank
def test_half_a_table_is_refused_at_first_and_at_a_reload(rank):
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    half = {name: t for name, t in tensors(1).items() if name.endswith("codes")}
    message = r"did not load 'model\.embed_tokens\.scales'"
    model = probed(True)
    model.load_weights(half.items())
    with pytest.raises(CheckpointError, match=message):
        model.prepare()
    model.load_weights(tensors(1).items())
    model.prepare()
    initialize_layerwise_reload(model)
    model.load_weights(half.items())
    with pytest.raises(CheckpointError, match=message):
        finalize_layerwise_reload(model, None)


@first_rank
def test_a_table_that_is_damaged_or_misshapen_is_refused(rank):
    model, rows = probed(True), table(1)
    with pytest.raises(CheckpointError, match=r"^model\.embed_tokens: codes is .* \[89, 64\]"):
        model.load_weights([(f"{EMBEDDING}.codes", rows.codes[1:])])
    rows.codes[5, 5] = -128
    model.load_weights([(f"{EMBEDDING}.codes", rows.codes), (f"{EMBEDDING}.scales", rows.scales)])
    with pytest.raises(CheckpointError, match=r"^model\.embed_tokens: codes holds -128"):
        model.prepare()


@first_rank
def test_a_model_that_is_dropped_is_freed(rank):
    """vLLM keeps the loaders of parameters, for reloads, longer than the layers."""
    model = probed(True)
    layer = weakref.ref(model.model.embed_tokens)
    del model
    gc.collect()
    assert layer() is None


@first_rank
def test_an_embedding_has_a_type_and_a_device_for_who_asks_and_no_rows(rank):
    """LoRA asks them for both, and Cohere's class in vLLM whether there is a `weight`."""
    model = probed(True)
    model.load_weights(tensors(1).items())
    model.prepare()
    for layer in (model.model.embed_tokens, model.lm_head):
        assert (layer.weight.dtype, layer.weight.device.type) == (torch.float32, "cpu")
        assert layer.weight.shape == (0, D) and "weight" not in dict(layer.named_parameters())


def another_name(model: Model) -> None:
    model.wte = model.model.embed_tokens
    del model.model.embed_tokens


def no_head_of_vllm(model: Model) -> None:
    model.lm_head = nn.Linear(D, V)


def shared_further(model: Model) -> None:
    model.other_head = nn.Linear(D, V)
    model.other_head.weight = model.model.embed_tokens.weight


def reordered(model: Model) -> None:
    embedding = model.model.embed_tokens
    embedding.weight.weight_loader = lambda param, tensor: param.data.copy_(tensor.flip(0))


def reordered_head(model: Model) -> None:
    head = model.lm_head
    head.weight.weight_loader = lambda param, tensor: param.data.copy_(tensor.flip(0))


@first_rank
@pytest.mark.parametrize(
    ("tied", "change", "message"),
    [
        (True, another_name, r"has no embedding model\.embed_tokens .*embeddings='dense'"),
        (True, no_head_of_vllm, r"runs lm_head as Linear, .*embeddings='dense'"),
        (True, shared_further, r"shares the weight of model\.embed_tokens with other_head"),
        (True, reordered, r"has no embedding model\.embed_tokens .*embeddings='dense'"),
        (False, reordered_head, r"has no output head lm_head .*head=False"),
    ],
)
def test_a_model_that_does_something_else_with_its_vocabulary_is_refused(
    rank, tied, change, message
):
    from slab_kernels.engines.vllm_probe import probe_model

    model = Model(tied, packed=not tied)
    change(model)
    with pytest.raises(ArchitectureError, match=f"^vLLM's Model {message}.*decompress"):
        probe_model(model, model.load_weights)


@first_rank
def test_a_shared_head_on_another_rank_than_its_embedding_is_refused(rank, monkeypatch):
    model = Model(True)
    missing = f"{EMBEDDING}."
    monkeypatch.setattr(vocabulary, "is_pp_missing_parameter", lambda name, model: name == missing)
    with pytest.raises(UnsupportedError, match=r"lm_head shares .*without pipeline parallelism"):
        vocabulary.swap_vocabulary(model, model.quant_config)


@first_rank
def test_names_are_mapped_as_tensors_are(rank):
    from vllm.model_executor.models.utils import WeightsMapper

    config = Model(True, packed=False).quant_config
    config.layouts["model.layers.0.q_proj"] = config.layouts["head"] = LAYOUT
    config.stored |= {"model.layers.0.q_proj": "model.layers.0.q_proj", "head": "head"}
    rules = {
        "lm_head.": "language_model.lm_head.",
        "model.": "language_model.model.",
        "head.": "h.",
    }
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=rules))
    assert set(config.layouts) == {"language_model.model.layers.0.q_proj", "h"}
    assert config.tables == {
        "language_model.model.embed_tokens": TableEntry("language_model.lm_head")
    }
    assert config.stored["language_model.model.embed_tokens"] == EMBEDDING
