"""What the order of a model's channels does to its compressed form, at equal bits and equal speed.

    python benchmarks/channel_orders.py --model FOLDER --calibration FILE --text FILE

Orders of the residual stream, of the MLPs' hidden channels and of the channels of value heads leave
the dense model's function as it is, and decide which four weights of a row share a 2:4 group and
which share a scale. The model is written in every order, compressed without `permute`, and compared
with the dense model in its own order: the mean of KL(dense || compressed) over the first tokens of
the text, and perplexity. Random orders show what has to be beaten; `assigned` is what `permute`
does. A second run with the same --out goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import slab_kernels
from slab_kernels.bench import machine
from slab_kernels.compression.job import Job
from slab_kernels.compression.orders import ROUNDS, find_orders
from slab_kernels.compression.plan import Plan
from slab_kernels.methods import LayerSettings
from slab_kernels.methods.solvers.masks import parse_pattern
from slab_kernels.methods.solvers.orders import assign_groups
from slab_kernels.models.channels import Channels
from slab_kernels.models.source import open_source
from slab_kernels.paths import expanded
from slab_kernels.text import source as texts

RESULTS = Path(__file__).resolve().parent / "results"
PATTERN = parse_pattern("2:4")
KINDS = ("residual", "mlp", "value")
INT4 = {"method": "slab", "values": "int4", "planes": 2, "group_size": 64}
FORMATS = {
    "slab int4, 2 planes": INT4,
    "slab fp16": {"method": "slab", "values": "fp16"},
    "sparsegpt": {"method": "sparsegpt", "values": "fp16"},
}


# ---- orders, from costs [rows,K] of pruning and a seed ----


def as_trained(cost: Tensor, seed: int) -> Tensor:
    return torch.arange(cost.shape[1])


def random(cost: Tensor, seed: int) -> Tensor:
    return torch.randperm(cost.shape[1], generator=torch.Generator().manual_seed(seed))


def costly_first(cost: Tensor, seed: int) -> Tensor:
    return cost.sum(0).argsort(descending=True)


def cheap_first(cost: Tensor, seed: int) -> Tensor:
    return costly_first(cost, seed).flip(0)


def alike_in_groups(cost: Tensor, seed: int) -> Tensor:
    """Four of like cost share a group; the groups lie in random places."""
    groups = costly_first(cost, seed).unflatten(0, (-1, PATTERN.group))
    return groups[random(groups.T, seed)].flatten()


def alike_in_scales(cost: Tensor, seed: int) -> Tensor:
    """64 of like cost share a scale, and lie in a random order within it."""
    parts = costly_first(cost, seed).split(INT4["group_size"])
    return torch.cat([part[random(part[None], seed)] for part in parts])


def dealt(cost: Tensor, seed: int) -> Tensor:
    """Rank channels by cost and give every group of four one from each quarter of the ranking.

    RIA's search for channel orders (ICLR 2024) begins so.
    """
    quarters = costly_first(cost, seed).unflatten(0, (PATTERN.group, -1)).clone()
    quarters[1::2] = quarters[1::2].flip(1)
    return quarters.T.flatten()


def assigned(cost: Tensor, seed: int) -> Tensor:
    return assign_groups(cost, PATTERN, ROUNDS, seed)


def assigned_costly_first(cost: Tensor, seed: int) -> Tensor:
    groups = assigned(cost, seed).unflatten(0, (-1, PATTERN.group))
    return groups[cost.sum(0)[groups].sum(1).argsort(descending=True)].flatten()


ORDERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "as trained": as_trained,
    "random": random,
    "costly first": costly_first,
    "cheap first": cheap_first,
    "like costs in a group": alike_in_groups,
    "like costs share a scale": alike_in_scales,
    "costs dealt out": dealt,
    "assigned": assigned,
    "assigned, costly groups first": assigned_costly_first,
}


def plan() -> list[dict]:
    """All rows, the decisive ones first."""
    first, *others = FORMATS
    rows = [(first, order, 0, KINDS) for order in ("as trained", "assigned", "random")]
    rows += [(first, "random", seed, KINDS) for seed in range(1, 5)]
    tried = ("as trained", "random", "assigned")
    rows += [(first, order, 0, KINDS) for order in ORDERS if order not in tried]
    rows += [(first, "assigned", 0, (kind,)) for kind in KINDS]
    rows += [(form, order, 0, KINDS) for form in others for order in tried]
    return [
        {"format": form, "order": order, "seed": seed, "channels": list(kinds)}
        for form, order, seed, kinds in rows
    ]


def label(row: dict) -> str:
    alone = "" if len(row["channels"]) == len(KINDS) else f", {row['channels'][0]} alone"
    return f"{row['format']}: {row['order']} {row['seed']}{alone}"


# ---- measurement ----


class Reference(NamedTuple):
    """The dense model, its calibration windows, and what it makes of the evaluation text.

    calibration, ids: token ids [windows, window]. hidden: of each of `ids` after the last norm.
    """

    model: PreTrainedModel
    calibration: Tensor
    ids: Tensor
    hidden: list[Tensor]

    def first(self, count: int) -> Reference:
        return self._replace(ids=self.ids[:count], hidden=self.hidden[:count])


def open_reference(args: argparse.Namespace) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    characters = texts.READ_AHEAD * args.samples * args.window * texts.CHARACTERS_PER_TOKEN
    content = texts.read_text(args.calibration, characters)
    calibration = texts.sample_windows(tokenizer, content, args.samples, args.window)
    content = texts.read_text(args.text, args.tokens * texts.CHARACTERS_PER_TOKEN)
    pieces = texts.windows(texts.tokenize(tokenizer, content), args.window, tokenizer.bos_token_id)
    ids = torch.stack(pieces[: args.tokens // args.window])
    return Reference(model, calibration, ids, hidden_states(model, ids))


@torch.no_grad()
def hidden_states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    return [model.model(input_ids=row[None], use_cache=False)[0][0] for row in ids]


@torch.no_grad()
def divergence(reference: Reference, model: PreTrainedModel) -> tuple[float, float]:
    """Mean KL(dense || model) in nats, and perplexity."""
    kl = loss = 0.0
    count = 0
    found = hidden_states(model, reference.ids)
    for ids, dense, hidden in zip(reference.ids, reference.hidden, found, strict=True):
        p = reference.model.lm_head(dense[:-1]).log_softmax(-1)
        q = model.lm_head(hidden[:-1]).log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        loss -= float(q.gather(1, ids[1:, None]).sum(dtype=torch.float64))
        count += len(p)
    return kl / count, math.exp(loss / count)


def in_order(reference: Reference, row: dict, folder: str) -> PreTrainedModel:
    """The dense model of `folder` with its channels in the order of a row."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    job = Job.of(
        open_source(reference.model),
        Plan(LayerSettings.from_keywords(**FORMATS[row["format"]])),
        (),
        torch.device("cpu"),
    )
    seeds = iter(range(1000 * row["seed"], 1000 * (row["seed"] + 1)))

    def choose(channels: Channels, cost: Tensor) -> Tensor:
        order = ORDERS[row["order"] if channels.kind in row["channels"] else "as trained"]
        return order(cost, next(seeds))

    moves = find_orders(job, reference.calibration, print, choose)
    source = open_source(model).in_orders(moves)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.get(name))
    return model


def measure(reference: Reference, args: argparse.Namespace, row: dict) -> dict:
    """One row: the model written in an order, compressed and compared."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    scratch = Path(tempfile.mkdtemp(prefix="channel-orders-", dir=args.scratch))
    try:
        began = time.process_time()
        model = in_order(reference, row, args.model)
        searched = time.process_time() - began
        model.save_pretrained(scratch / "dense")
        tokenizer.save_pretrained(scratch / "dense")
        rounding, _ = divergence(reference.first(1), model.float())
        began = time.process_time()
        record = slab_kernels.compress(
            scratch / "dense", scratch / "out", calibration=reference.calibration,
            progress=False, device="cpu", permute=False, **FORMATS[row["format"]],
        )  # fmt: skip
        seconds = time.process_time() - began
        compressed = slab_kernels.load(scratch / "out", device="cpu", dtype=torch.float32)
        kl, perplexity = divergence(reference, compressed)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {
        **row, "kl": kl, "perplexity": perplexity, "dense_kl": rounding,
        "layer_error": record.mean_error, "bits_per_weight": record.bits_per_weight,
        "search_seconds": searched, "compress_seconds": seconds,
    }  # fmt: skip


def cut(args: argparse.Namespace, folder: Path) -> None:
    """Write the first blocks, which make a model of their own, and go on with that."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    model.model.layers = model.model.layers[: args.blocks]
    model.config.num_hidden_layers = len(model.model.layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: args.blocks]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(folder)
    args.model = str(folder)


def fill(found: dict, reference: Reference, args: argparse.Namespace) -> None:
    """Measure every row that is not there yet; the file is written after each."""
    blocks = len(reference.model.model.layers)
    done = {(row["blocks"], label(row)) for row in found["rows"]}
    for row in plan():
        if args.only not in label(row) or (blocks, label(row)) in done:
            continue
        row = measure(reference, args, {"blocks": blocks, "tokens": args.tokens, **row})
        found["rows"].append(row)
        text = json.dumps(found).replace("}, {", "},\n {")
        args.out.write_text(text + "\n", encoding="utf-8")
        print(f"{blocks} blocks, {label(row)}: KL {row['kl']:.5f}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a Llama-like model")
    parser.add_argument("--calibration", required=True, help="text that compression reads")
    parser.add_argument("--text", required=True, help="text to compare on")
    parser.add_argument("--blocks", type=int, help="only the first so many blocks; default all")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--tokens", type=int, default=6144, help="of the text to compare on")
    parser.add_argument("--only", default="", help="rows whose label contains this")
    parser.add_argument("--scratch", default=None, help="where models lie meanwhile")
    parser.add_argument("--out", type=expanded, default=RESULTS / "channel-orders.json")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    found = {
        "model": Path(args.model).name,
        "machine": machine.one_line(),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "settings": {"samples": args.samples, "window": args.window},
        "rows": [],
    }
    if args.out.exists():
        found["rows"] = json.loads(args.out.read_text(encoding="utf-8"))["rows"]
    with tempfile.TemporaryDirectory(prefix="channel-orders-", dir=args.scratch) as scratch:
        if args.blocks:
            cut(args, Path(scratch) / "cut")
        fill(found, open_reference(args), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
