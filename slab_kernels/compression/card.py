"""The model card of a compressed folder: README.md with the numbers of the run.

A card of the base model is kept beside it under another name. The same run writes the same bytes,
so the card has no times and no paths; slab_run.json has them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ..format import INTEGER_RANGES
from ..models.shards import write_atomically
from ..models.side_files import snapshot
from ..models.source import FolderSource, ModuleSource, Source
from ..models.totals import Totals
from ..terminal import visible
from .job import Job
from .presets import PRESETS
from .record import RunRecord

CARD = "README.md"
LICENCES = ("LICENSE*", "LICENCE*", "COPYING*")
CARRIED = ("license", "license_name", "license_link")  # of the base model's front matter
FRONT = 1 << 16  # bytes in which the front matter of a card must end
VLLM = "vllm serve FOLDER --dtype bfloat16\n"
LONGEST = 500  # characters of a value of the front matter


class Base(NamedTuple):
    """What is known of the model that was compressed.

    name: on the Hugging Face hub if it is known to come from there, else of its folder.
    card: the file in the output folder that holds its card, None if it has none.
    licence: the part of its card's front matter that speaks of the licence.
    """

    name: str
    card: str | None
    licence: dict[str, str]


def write_side_files(out: Path, source: Source, tokenizer: Any) -> Base:
    """Write tokenizer, licence and whatever else belongs to the model into `out`.

    The base model's README.md becomes README.base.md there, which leaves its name to our card.

    Raises: CheckpointError if a file cannot be read or written.
    """
    for left in (CARD, "README.base*.md"):  # of an interrupted run
        for path in out.glob(left):
            path.unlink()
    source.write_side_files(out, tokenizer)
    card: str | None = None
    if (out / CARD).is_file():
        card = next(name for name in _base_cards() if not (out / name).exists())
        (out / CARD).rename(out / card)
    return Base(_base_name(source), card, _licence(out, card))


def write_card(out: Path, base: Base, job: Job, record: RunRecord, totals: Totals) -> None:
    """Write the card. totals: of what `out` stores."""
    text = front_matter(base, record) + body(base, job, record, totals)
    write_atomically(out / CARD, [text.encode()])


def front_matter(base: Base, record: RunRecord) -> str:
    """The YAML block that begins a card on the Hugging Face hub."""
    import yaml

    packed = record.stored == "packed"
    content = {
        "base_model": visible(base.name[:LONGEST]),
        "base_model_relation": "quantized",
        **base.licence,
        "library_name": "slab-kernels" if packed else "transformers",
        "tags": ["slab-kernels", "compressed", record.settings["pattern"], _values(record)],
    }
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---\n\n"


def body(base: Base, job: Job, record: RunRecord, totals: Totals) -> str:
    """The card below its front matter, in Markdown."""
    name = _cell(base.name)
    rows = (
        _method_rows(job, record)
        | _size_rows(job, record, totals)
        | _embedding_rows(job)
        | _quality_rows(record)
        | _origin_rows(record)
    )
    table = "\n".join(f"| {left} | {right} |" for left, right in rows.items())
    stored = "2:4 sparse values plus low-rank signs, from which it runs without being unpacked"
    if record.stored != "packed":
        pattern = _cell(record.settings["pattern"])
        stored = f"a dense weight, pruned by the pattern {pattern}"
    and_head = "" if job.head is None else " and its output head"
    original = "The base model came without a card."
    if base.card:
        original = f"The card of the base model is [{base.card}]({base.card})."
    licence = "Its folder names no licence; the terms of the base model apply."
    if base.licence:
        licence = f"The licence is that of the base model, {_cell(base.licence['license'])}."
    return f"""# {name}, compressed with slab_kernels

This is {name}, with the linear layers of its decoder blocks{and_head} stored as {stored}.

| | |
|---|---|
{table}

Every layer's error, bits and seconds are in `slab_run.json`; `slab-kernels inspect FOLDER` shows
them.

## How to open it

{_opening(record)}
## Base model and licence

{original} {licence}
"""


def _embedding_rows(job: Job) -> dict[str, str]:
    """A row of the card's table for embeddings of int8 rows."""
    if not job.tables:
        return {}
    shared = any(entry.tied for entry in job.tables.values())
    with_head = ", which the output head shares" if shared else ""
    return {"Embeddings": f"int8 rows with one scale each{with_head}"}


def _opening(record: RunRecord) -> str:
    """How the folder is opened, in Markdown; FOLDER stands for its path."""
    if record.stored != "packed":
        return """Any program that opens the base model opens this one, for example transformers:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
```

"""
    also = "transformers" if record.experts else "transformers and vLLM"
    return f"""Install `slab_kernels` first, also for {also}. From Python:

```python
import slab_kernels

model = slab_kernels.load("FOLDER")
```

With transformers, where the import teaches `from_pretrained` the format:

```python
import slab_kernels
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
```

{_for_vllm(record)}

```sh
{"" if record.experts else VLLM}slab-kernels generate FOLDER --prompt "Once upon a time"
slab-kernels eval FOLDER
slab-kernels decompress FOLDER DENSE_FOLDER
```

"""


def _for_vllm(record: RunRecord) -> str:
    if not record.experts:
        return "With vLLM, which finds the plug-in by itself, and on the command line:"
    return (
        "vLLM runs no packed experts and refuses this folder; it opens the dense one that "
        "`decompress` writes. On the command line:"
    )


def _method_rows(job: Job, record: RunRecord) -> dict[str, str]:
    """Rows of the card's table: how the model was compressed."""
    usual, settings = job.plan.usual, record.settings
    rows = {"Method": _cell(usual.method), "Pattern": _cell(usual.pattern)}
    if settings["preset"] is not None:
        preset = settings["preset"]
        rows["Preset"] = f"{preset}: {PRESETS[preset].meaning}"
    if settings["bits"] is not None:
        rows["Budget"] = f"{settings['bits']:g} stored bits per weight, spent layer by layer"
    rows["Kept values"] = _values(record)
    rows["Group size"] = _group_sizes(record)
    rows["Rank of the magnitudes"] = _spread(layer.rank for layer in record.layers)
    rows["Sign planes"] = _spread(layer.planes for layer in record.layers)
    adapters = _spread(layer.adapter_rank for layer in record.layers)
    kinds = {job.plan.layer(layer.name).adapter_values for layer in record.layers}
    adapter = f"rank {adapters}, {' or '.join(sorted(kinds))}"
    rows["Adapter P Qᵀ"] = "none" if adapters == "0" else adapter
    for pattern, own in job.plan.by_pattern.entries:
        listed = ", ".join(f"{name}={value}" for name, value in own.items())
        rows[f"Layers {_cell(pattern)}"] = _cell(listed)
    if settings.get("permute"):
        rows["Order of channels"] = "chosen for the pattern; the dense model computes the same"
    if usual.options:
        options = (f"{name}={value}" for name, value in sorted(usual.options.items()))
        rows["Options of the method"] = _cell(", ".join(options))
    rows["Stored bits per weight"] = f"{record.bits_per_weight:.3f}, of the compressed layers"
    return rows


def _size_rows(job: Job, record: RunRecord, totals: Totals) -> dict[str, str]:
    """Rows of the card's table: what the whole folder stores."""
    before = sum(
        math.prod(shape) * dtype.itemsize
        for dtype, shape in (job.source.spec(name) for name in job.source.names)
    )
    inside = sum(math.prod(layer.shape) * layer.bits_per_weight / 8 for layer in record.layers)
    left = dict(totals.dense)
    if record.stored != "packed":  # the pruned linears are stored as dense ones are
        left["linears"] = left.get("linears", 0) - round(inside)
    parts = [f"{part} {_mb(size)}" for part, size in left.items() if size > 0]
    parts += [f"`{_cell(pattern)}`" for pattern in record.settings["skip"]]
    head = f", the output head with {_mb(totals.head_bytes)} among them"
    bits = totals.bits_per_parameter
    return {
        "Size": f"{_mb(totals.bytes)}, before {_mb(before)}",
        "Bits per parameter": "none" if bits is None else f"{bits:.3f}, of the whole folder",
        "Of that in compressed layers": f"{_mb(inside)} in {len(record.layers)} linears"
        + (head if totals.head_bytes else ""),
        "Of that left dense": f"{_mb(totals.bytes - inside)}: {', '.join(parts) or 'nothing'}",
    }


def _quality_rows(record: RunRecord) -> dict[str, str]:
    """Errors are ||X (W - W')ᵀ|| / ||X Wᵀ||."""
    when = " before matching" if record.matching else ""
    name, rows = f"Mean relative error of a layer's output{when}", {}
    heldout = record.mean_heldout_error
    if heldout is not None:
        rows[f"{name}, on held-out text"] = f"{heldout:.4f}"
    rows[f"{name}, on the calibration text"] = f"{record.mean_error:.4f}"
    if record.matching:
        before, after = (fmean(getattr(m, k) for m in record.matching) for k in ("before", "after"))
        rows["Transformer matching"] = (
            f"{record.settings['matching']['epochs']} epochs; mean distance of a block's output "
            f"from its target {before:.4f}, afterwards {after:.4f}"
        )
    return rows


def _origin_rows(record: RunRecord) -> dict[str, str]:
    settings = record.settings
    names = {name: _text_name(settings[name]) for name in ("calibration", "heldout")}
    rows = {"Calibration": f"{names['calibration']}, {_windows(record)}"}
    if names["heldout"]:
        rows["Held-out text"] = names["heldout"]
    elif record.held_back:
        rows["Held-out text"] = (
            f"{record.held_back} of these windows, which no weight was fitted to"
        )
    versions = (f"{name} {version}" for name, version in record.versions.items())
    if record.dequantised:
        rows["Base model's weights"] = f"{_cell(record.dequantised)}; dequantised, then compressed"
    return rows | {"Made with": f"{', '.join(versions)}, on a {settings['device']} device"}


def _windows(record: RunRecord) -> str:
    """How many windows of how many tokens; token ids are taken as they are, not drawn."""
    settings, read = record.settings, record.texts.get("calibration") or {}
    count, longest = settings["samples"], settings["window"]
    said = f"{count} windows of {longest} tokens"
    if record.tokens != count * longest:
        said = f"{count} windows of at most {longest} tokens, {record.tokens} in all"
    return said if read.get("kind") == "token ids" else f"{said}, seed {settings['seed']}"


def _values(record: RunRecord) -> str:
    return ", ".join(sorted({layer.values for layer in record.layers}))


def _group_sizes(record: RunRecord) -> str:
    """How many inputs share a scale, of all layers whose values are integers."""
    integers = [layer for layer in record.layers if layer.values in INTEGER_RANGES]
    sizes = {layer.group_size for layer in integers}
    by_row = ["one scale per row"] if None in sizes else []
    inputs = [str(size) for size in sorted(size for size in sizes if size)]
    groups = [f"{' or '.join(inputs)} inputs per scale"] if inputs else []
    return ", ".join([*groups, *by_row]) or "none"


def _spread(numbers: Any) -> str:
    """Such as 1, or 1 to 4 where layers differ."""
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _mb(size: float) -> str:
    return f"{size / 1e6:.2f} MB"


def _cell(text: str) -> str:
    """Text that cannot break out of a cell of a Markdown table."""
    return visible(text[:LONGEST]).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")


def _text_name(name: str | None) -> str:
    """A text as the card calls it: of a file the name, without the folder that it lay in."""
    if name is None:
        return ""
    return _cell(Path(name).name if Path(name).is_absolute() or Path(name).exists() else name)


def _base_cards() -> Iterator[str]:
    """Names for the base model's card, the first of which that is free is taken."""
    yield "README.base.md"
    for number in itertools.count(2):
        yield f"README.base.{number}.md"


def _base_name(source: Source) -> str:
    """The model's name on the hub where its path or config tells it, else its own."""
    if isinstance(source, FolderSource):
        cached = snapshot(source.checkpoint.folder.resolve())
        if cached is not None and cached.parent.parent.name.startswith("models--"):
            return cached.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    elif isinstance(source, ModuleSource):
        path = Path(source.tokenizer_path)
        if path.name and not path.exists() and not path.is_absolute():
            return source.tokenizer_path
    return source.name


def _licence(out: Path, card: str | None) -> dict[str, str]:
    """The licence from the front matter of the base model's card, else from a file for it."""
    found = {} if card is None else _front_matter_of(out / card)
    licence = {
        name: visible(value)
        for name in CARRIED
        if isinstance(value := found.get(name), str) and 0 < len(value) <= LONGEST
    }
    if "license" in licence:
        return licence
    files = sorted(path.name for pattern in LICENCES for path in out.glob(pattern))
    return {"license": "other", "license_link": files[0]} if files else {}


def _front_matter_of(card: Path) -> dict[str, Any]:
    """The front matter of a card, empty where there is none that can be read."""
    import yaml

    with card.open("rb") as f:
        head = f.read(FRONT).decode("utf-8", "replace").replace("\r\n", "\n")
    start, _, rest = head.partition("---\n")
    block, end, _ = rest.partition("\n---")
    if start.strip() or not end:
        return {}
    try:
        content = yaml.safe_load(block)
    except Exception:  # A damaged card stops nothing; deep nesting is a RecursionError, for one.
        return {}
    return content if isinstance(content, dict) else {}
