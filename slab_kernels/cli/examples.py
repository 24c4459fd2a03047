"""Command lines to copy: the examples under every --help."""

from __future__ import annotations

EXAMPLES = {
    "compress": (
        "slab-kernels compress meta-llama/Llama-3.2-1B llama-slab",
        "slab-kernels compress ./model ./out --preset small --adapter-rank 16",
        "slab-kernels compress ./model ./out --bits 4.5 --calibration my.txt",
        "slab-kernels compress ./model ./out --calibration my.jsonl --field chat",
        "slab-kernels compress ./model ./out --set 'down_proj:values=int8,planes=1'",
        "slab-kernels compress someone/model ./out --revision v2 --subfolder fp16",
    ),
    "eval": (
        "slab-kernels eval ./out --text wiki.txt --window 2048",
        "slab-kernels eval ./out --against ./model --json > eval.json",
        "slab-kernels eval ./out --tasks arc_easy,piqa --limit 200",
    ),
    "generate": (
        'slab-kernels generate ./out --prompt "def fibonacci(n):" --tokens 99',
        'slab-kernels generate ./out --chat --prompt "Why is the sky blue?"',
        "slab-kernels generate ./out --against ./model --json > beside.json",
    ),
    "bench": (
        "slab-kernels bench --shape 11008x4096 --m 1 --m 16 --values int4",
        "slab-kernels bench --layers llama-3-8b --peers --json > bench.json",
    ),
    "tune": (
        "slab-kernels tune --layers llama-3-8b --m 1 --m 16",
        "slab-kernels tune --shape 14336x4096 --values int4 --out ./configs",
    ),
    "info": (
        "slab-kernels info",
        "slab-kernels info --methods",
        "slab-kernels info --support",
    ),
    "explain": (
        "slab-kernels explain --shape 11008x4096 --m 16 --values int4",
        "slab-kernels explain --shape 4096x4096 --gpu H200",
    ),
    "train": (
        "slab-kernels train ./out ./trained --text my.txt --adapter-rank 16",
        "slab-kernels train ./out ./trained --text my.txt --steps 400 --resume",
    ),
    "inspect": (
        "slab-kernels inspect ./out",
        "slab-kernels inspect ./out --json > layers.json",
    ),
    "check": ("slab-kernels check ./out",),
    "decompress": (
        "slab-kernels decompress ./out ./dense",
        "slab-kernels decompress ./out ./dense --dtype bf16",
    ),
    "report": (
        "slab-kernels report ./out eval.json --dense ./model --out ./report",
        "slab-kernels report bench.json --no-plots",
    ),
}


def epilog(command: str, exit_codes: str) -> str:
    """The text under a command's --help: its examples, then the exit codes. typer ends a line only
    where an empty one follows."""
    return "\n\n".join(["Examples:", *(f"$ {line}" for line in EXAMPLES[command]), exit_codes])
