"""The linears of well-known models, for `bench --layers`: (out_features, in_features) of one block, equal ones once."""

from __future__ import annotations


def _decoder(hidden: int, ffn: int, kv: int, attention: int | None = None) -> tuple[tuple[int, int], ...]:
    attention = attention or hidden
    linears = ((attention, hidden), (kv, hidden), (hidden, attention), (ffn, hidden), (hidden, ffn))
    return tuple(dict.fromkeys(linears))


LAYERS = {
    "llama-3.2-1b": _decoder(2048, 8192, 512),
    "llama-3.2-3b": _decoder(3072, 8192, 1024),
    "llama-2-7b": _decoder(4096, 11008, 4096),
    "llama-3-8b": _decoder(4096, 14336, 1024),
    "llama-2-13b": _decoder(5120, 13824, 5120),
    "llama-3-70b": _decoder(8192, 28672, 1024),
    "mistral-7b": _decoder(4096, 14336, 1024),
    "qwen2.5-7b": _decoder(3584, 18944, 512),
    "qwen3-8b": _decoder(4096, 12288, 1024),
    "gemma-2-2b": _decoder(2304, 9216, 1024, attention=2048),
}


def layers(name: str) -> tuple[tuple[int, int], ...]:
    """The shapes of that model's linears. Raises ValueError with the known names."""
    if name.lower() not in LAYERS:
        raise ValueError(f"no layer table for {name!r}; known models: {', '.join(LAYERS)}; or give --shape NxK")
    return LAYERS[name.lower()]
