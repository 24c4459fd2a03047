"""The linears of well-known models, for `bench --layers`.

Inference engines fuse q, k and v into one linear and gate and up into another. Those fused shapes
are what a kernel meets, so they are the default. Sizes are those of the models' published
config.json files.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ArgumentError

Shapes = tuple[tuple[int, int], ...]  # (out_features, in_features) of each linear


@dataclass(frozen=True)
class Decoder:
    """The widths of one block of a decoder."""

    hidden: int  # of the residual stream
    ffn: int  # of the MLP
    kv: int  # of all key heads together
    attention: int  # of all query heads together

    def separate(self) -> Shapes:
        """q, k and v, o, gate and up, down as transformers holds them; equal ones once."""
        q, kv, o = (
            (self.attention, self.hidden),
            (self.kv, self.hidden),
            (self.hidden, self.attention),
        )
        return tuple(dict.fromkeys((q, kv, o, (self.ffn, self.hidden), (self.hidden, self.ffn))))

    def fused(self) -> Shapes:
        """qkv, o, gate_up, down as engines run them; equal ones once."""
        qkv, gate_up = (self.attention + 2 * self.kv, self.hidden), (2 * self.ffn, self.hidden)
        return tuple(
            dict.fromkeys((qkv, (self.hidden, self.attention), gate_up, (self.hidden, self.ffn)))
        )


def _decoder(hidden: int, ffn: int, kv: int, attention: int | None = None) -> Decoder:
    return Decoder(hidden, ffn, kv, attention or hidden)


MODELS = {
    "llama-2-7b": _decoder(4096, 11008, 4096),
    "llama-2-13b": _decoder(5120, 13824, 5120),
    "llama-2-70b": _decoder(8192, 28672, 1024),
    "llama-3-8b": _decoder(4096, 14336, 1024),
    "llama-3-70b": _decoder(8192, 28672, 1024),
    "llama-3.2-1b": _decoder(2048, 8192, 512),
    "llama-3.2-3b": _decoder(3072, 8192, 1024),
    "mistral-7b": _decoder(4096, 14336, 1024),
    "qwen2.5-0.5b": _decoder(896, 4864, 128),
    "qwen2.5-1.5b": _decoder(1536, 8960, 256),
    "qwen2.5-3b": _decoder(2048, 11008, 256),
    "qwen2.5-7b": _decoder(3584, 18944, 512),
    "qwen2.5-14b": _decoder(5120, 13824, 1024),
    "qwen2.5-32b": _decoder(5120, 27648, 1024),
    "qwen2.5-72b": _decoder(8192, 29568, 1024),
    "qwen3-8b": _decoder(4096, 12288, 1024),
    "gemma-2-2b": _decoder(2304, 9216, 1024, attention=2048),
}


def layers(name: str, fused: bool = True) -> Shapes:
    """The shapes of a model's linears, fused as engines run them or separate.

    Raises: ArgumentError with the known names.
    """
    if name.lower() not in MODELS:
        raise ArgumentError(
            f"no layer table for {name!r}; known models: {', '.join(MODELS)}; or give --shape NxK"
        )
    model = MODELS[name.lower()]
    return model.fused() if fused else model.separate()
