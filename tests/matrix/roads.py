"""One model type on every road: compressed, loaded, opened, saved, opened again, decompressed."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import slab_kernels
from matrix.configs import VOCABULARY, tiny
from slab_kernels.errors import ArchitectureError, CalibrationError
from slab_kernels.models.experts import STACKS, is_stacked, stacked_weights, unstack_named
from slab_kernels.nn import SlabLinear

LARGEST = 4_000_000  # weights; a config that stays above it is not tiny
RIGHT, WRONG, NOT_BUILT = "right", "wrong", "not built"
REFUSED, LATE = "refused", "late"  # in words: by `compress`, and on a later road


@dataclass
class Outcome:
    """What came of one type: the outcome, the road on which it ended, and what was said there."""

    type: str
    outcome: str
    road: str = ""
    message: str = ""
    packed: int = 0
    linears: int = 0
    skip: tuple[str, ...] = ()


class Different(Exception):
    """Two roads lead to two models."""


def tokens() -> Tensor:
    """Calibration ids [4, 16]."""
    return torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))


def build(model_type: str) -> nn.Module:
    """A random model whose every part matters to its output.

    Raises: what transformers raises, ValueError if the model is large.
    """
    config = tiny(model_type)
    if CONFIG_MAPPING[model_type].model_type != model_type:
        raise ValueError(f"is {CONFIG_MAPPING[model_type].model_type} under another name")
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} weights are left")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() in (2, 3):
                parameter.copy_(torch.randn_like(parameter) * 0.15)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    if not bool(logits(model).isfinite().all()):
        raise ValueError("its logits are not finite")
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=tokens(), use_cache=False).logits.float()


def same_function(first: Tensor, second: Tensor, which: str) -> None:
    """Raises: Different if they are further apart than sums in another order are."""
    bound = 1e-4 * max(1.0, float(first.abs().max()))
    apart = float((first - second).abs().max())
    if not apart <= bound:
        raise Different(f"{which}: logits are apart by {apart:.2g}")


def same_tensors(first: nn.Module, second: nn.Module, which: str) -> None:
    """Raises: Different unless both have the same tensors, bit by bit."""
    one, two = first.state_dict(), second.state_dict()
    if one.keys() != two.keys():
        raise Different(f"{which}: {sorted(one.keys() ^ two.keys())[0]} is in one of them only")
    for name, tensor in one.items():
        if tensor.dtype != two[name].dtype or not torch.equal(tensor, two[name]):
            raise Different(f"{which}: tensor {name} differs")


def matrices(module: nn.Module) -> int:
    """The linears that a module is, or holds as stacked experts."""
    if is_stacked(module):
        stacks = stacked_weights(module).items()
        return sum(len(stack) * len(STACKS.get(name, [name])) for name, stack in stacks)
    return int(isinstance(module, nn.Linear))


def compress(dense: Path, packed: Path) -> tuple[str, ...]:
    """Compress; where a refusal names a `skip`, do what it says. Returns what was skipped."""
    skip: list[str] = []
    while True:
        try:
            slab_kernels.compress(
                dense, packed, method="magnitude", calibration=tokens(), skip=skip, progress=False
            )
            return tuple(skip)
        except (ArchitectureError, CalibrationError) as error:
            advised = re.search(r"skip='([^']+)'", str(error))
            if advised is None or advised[1] in skip or len(skip) > 8:
                raise
            skip.append(advised[1])


def travel(model_type: str, top: Path) -> Outcome:
    """Take one type along every road; folders are written below `top`."""
    found = Outcome(model_type, RIGHT)
    try:
        model = build(model_type)
    except Exception as error:  # of a config class that asks for what a tiny model has not
        return Outcome(model_type, NOT_BUILT, message=first_line(error))
    try:
        found.road = "save_pretrained of the dense model"
        model.save_pretrained(top / "dense")
        found.linears = sum(map(matrices, model.modules()))
        found.road = "compress"
        found.skip = compress(top / "dense", top / "packed")
        found.road = "from_pretrained of the dense folder"  # which may blank a padding row
        model = AutoModelForCausalLM.from_pretrained(top / "dense").eval()
        found.road = "load"
        loaded = slab_kernels.load(top / "packed")
        layers = {name: m for name, m in loaded.named_modules() if isinstance(m, SlabLinear)}
        found.packed, ours = len(layers), logits(loaded)
        unstack_named(model, layers)
        with torch.no_grad():
            for name, layer in layers.items():
                model.get_submodule(name).weight.copy_(layer.packed().dense())
        same_function(
            logits(model), ours, "the dense model with the packed weights in it, and load"
        )
        found.road = "from_pretrained"
        opened = AutoModelForCausalLM.from_pretrained(top / "packed")
        same_tensors(loaded, opened, "load and from_pretrained")
        same_function(ours, logits(opened), "load and from_pretrained")
        writers = {
            "save_pretrained": opened.save_pretrained,
            "save_pretrained of what load gave": loaded.save_pretrained,
            "save": lambda out: slab_kernels.save(opened, out),
        }
        for number, (road, write) in enumerate(writers.items()):
            found.road, saved = road, top / f"saved{number}"
            write(saved)
            for opener, open_again in (
                ("load", slab_kernels.load),
                ("from_pretrained", AutoModelForCausalLM.from_pretrained),
            ):
                found.road = f"{opener} after {road}"
                again = open_again(saved)
                same_tensors(loaded, again, found.road)
                same_function(ours, logits(again), found.road)
        found.road = "decompress"
        slab_kernels.decompress(top / "packed", top / "decompressed")
        found.road = "from_pretrained of the decompressed folder"
        plain, report = AutoModelForCausalLM.from_pretrained(
            top / "decompressed", output_loading_info=True
        )
        if lost := [
            *report["missing_keys"],
            *report["unexpected_keys"],
            *report["mismatched_keys"],
        ]:
            raise Different(
                f"decompress: transformers finds {lost[0]} missing, unexpected or misshapen"
            )
        same_function(ours, logits(plain), "load and the decompressed folder")
    except Different as error:
        found.outcome, found.message = WRONG, str(error)
    except Exception as error:
        ours = type(error).__module__.startswith("slab_kernels")
        found.outcome = WRONG if not ours else REFUSED if found.road == "compress" else LATE
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = (
            ""
            if ours
            else f" ({'/'.join(Path(where.filename).parts[-2:])}:{where.lineno} {where.name})"
        )
        found.message = f"{type(error).__name__}: {first_line(error)}{place}".replace(
            str(top), "DIR"
        )
    return found


def first_line(error: Exception) -> str:
    lines = (str(error).strip() or repr(error)).splitlines()
    return lines[-1].strip() if "StrictDataclass" in type(error).__name__ else lines[0]
