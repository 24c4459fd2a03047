"""What an engine's loader may do to a packed layer, against the probe that has to see it."""

from __future__ import annotations

import pytest
import torch

from slab_kernels.engines.probe import Probe, TableLayout, refuse_experts
from slab_kernels.errors import ArchitectureError, UnsupportedError
from slab_kernels.format import PackedLayout

LAYOUTS = {
    "h.0.qkv": PackedLayout(
        48, 96, "int4", group_size=32, rank=1, adapter_rank=2, adapter_values="int8"
    ),
    "h.0.q": PackedLayout(48, 96, "fp16", rank=2),
    "h.0.k": PackedLayout(48, 96, "bf16", rank=0),
    "wte": TableLayout(48, 96),
}


def heads_apart(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of (head, q k v) to (q k v, head), as loaders of fused weights do it."""
    return tensor.view(4, 3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def send(change=lambda name, tensor: tensor, rename=lambda layer: layer, leave_out=()) -> Probe:
    """The probe after its stand-ins went through a loader that changes, renames or leaves out."""
    probe = Probe(LAYOUTS, "this engine", heads=("h.0.k",))
    for name, tensor in probe.stand_ins():
        layer, _, part = name.rpartition(".")
        wanted = (torch.int32, (48, 96)) if part == "weight" else LAYOUTS[layer].tensors()[part]
        assert (tensor.dtype, tuple(tensor.shape)) == wanted
        assert tensor.untyped_storage().nbytes() <= 400
        if layer not in leave_out:
            probe.arrive(rename(layer), part, change(name, tensor))
    return probe


@pytest.mark.parametrize("change", [lambda n, t: t, lambda n, t: t[:], lambda n, t: t.clone()])
def test_a_loader_that_passes_tensors_on(change):
    assert send(change).missing() == []


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (lambda n, t: heads_apart(t) if "qkv" in n else t, "qkv.weight"),
        (lambda n, t: heads_apart(t) if n.endswith(".q.weight") else t, "q.weight"),  # dense only
        (lambda n, t: heads_apart(t) if n.endswith("q.values") else t, "q.values"),  # packed only
        (lambda n, t: heads_apart(t) if n.endswith("qkv.V") else t, "qkv.V"),
        (lambda n, t: t.flip(1) if n.endswith("k.metadata") else t, "k.metadata"),
        (lambda n, t: t.flip(1) if n.endswith("k.weight") else t, "k.weight"),
        (lambda n, t: t[:16] if n.endswith("qkv.scales") else t, "qkv.scales"),
        (lambda n, t: t.t() if n.endswith("q.U") else t, "q.U"),
        (lambda n, t: t.flip(0) if n.endswith("wte.weight") else t, "wte.weight"),
        (lambda n, t: t * 2 if n.endswith("wte.codes") else t, "wte.codes"),
        (lambda n, t: t.flip(0) if n.endswith("wte.scales") else t, "wte.scales"),
    ],
)
def test_a_loader_that_changes_the_order_or_splits_is_refused(change, tensor):
    layer = "" if "wte" in tensor else r"h\.0\."
    message = rf"^this engine splits or reorders {layer}{tensor} while it loads.*decompress"
    with pytest.raises(ArchitectureError, match=message):
        send(change)


def test_a_loader_that_takes_one_layer_for_another_is_refused():
    other = {"h.0.q": "h.0.k", "h.0.k": "h.0.q"}
    with pytest.raises(ArchitectureError, match=r"loads h\.0\.q\.weight as h\.0\.k\.weight"):
        send(rename=lambda layer: other.get(layer, layer))


@pytest.mark.parametrize(
    ("layer", "what", "advice"),
    [
        ("h.0.q", "no linear layer h.0.q that takes packed weights", "skip='*.q'"),
        ("h.0.k", "no output head h.0.k that takes packed weights", "head=False"),
        ("wte", "no embedding wte that takes int8 rows", "embeddings='dense'"),
    ],
)
def test_what_a_loader_leaves_out_is_named(layer, what, advice):
    probe = send(leave_out=[layer])
    assert probe.missing() == [layer]
    assert what in str(probe.refuse(layer)) and advice in str(probe.refuse(layer))


def test_packed_experts_are_refused_before_an_engine_starts():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.shared_experts.up_proj"]
    refuse_experts(names)
    with pytest.raises(
        UnsupportedError,
        match=r"^model\.layers\.3\.mlp\.experts\.12\.up_proj is packed.*decompress.*skip=",
    ):
        refuse_experts([*names, "model.layers.3.mlp.experts.12.up_proj"])
