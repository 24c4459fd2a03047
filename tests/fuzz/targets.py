"""What is given a damaged folder, and the judgement of what it made of it."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import slab_kernels
from fuzz.folders import INDEX, Folder
from slab_kernels.cli import console
from slab_kernels.cli import main as cli
from slab_kernels.errors import BAD_FILE, BUG, CANNOT_RUN, DONE, FormatError
from slab_kernels.format import TENSOR_NAMES, PackedLayout, PackedWeight
from slab_kernels.nn import SlabLinear

# Target -> how often. The cheap ones come often.
TARGETS = {"load": 38, "inspect": 22, "from_pretrained": 17, "decompress": 9, "eval": 8, "check": 6}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
LONGEST_MESSAGE = 20_000  # characters; a name from a file may be long


class Fault(Exception):
    """The library did something that it must not do; the first word says what kind of thing."""


@dataclass
class Result:
    """How a case ended.

    outcome: "own weights", "done", "named error", "error of transformers" (before the library was
    asked), "unknown to transformers" (config.json no longer names the library, so nobody asks it),
    or the kind of a fault.
    """

    outcome: str
    message: str = ""
    where: str = ""  # last frames of the traceback
    fault: bool = False


def stored_tensors(path: Path) -> dict[str, list[Tensor]]:
    """Name -> the tensors of that name in a folder's weight files, read by safetensors alone.

    As transformers does: model.safetensors wins over an index.
    """
    if (path / "model.safetensors").is_file():
        files = ["model.safetensors"]
    elif (path / INDEX).is_file():
        files = sorted(
            set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        )
    else:
        files = sorted(p.name for p in path.glob("*.safetensors"))
    found: dict[str, list[Tensor]] = {}
    for file in files:
        with safe_open(path / file, framework="pt") as f:
            for name in f.keys():
                found.setdefault(name, []).append(f.get_tensor(name))
    return found


def read_stored(path: Path) -> dict[str, list[Tensor]]:
    try:
        return stored_tensors(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Fault(
            f"opened a folder that safetensors cannot read: {type(error).__name__}: {error}"
        ) from error


def bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def same(stored: Tensor, opened: Tensor, exact: bool) -> bool:
    """Whether an opened tensor holds the stored numbers; unless `exact`, cast to its type."""
    if stored.shape != opened.shape or (exact and stored.dtype != opened.dtype):
        return False
    return torch.equal(bits(stored.to(opened.dtype)), bits(opened))


def judge_model(model: nn.Module, stored: dict[str, list[Tensor]]) -> None:
    """Every tensor of the model is the stored one of its name, and none is left. Raises: Fault."""
    state, seen = model.state_dict(), set()
    packed = {
        f"{name}.{part}"
        for name, m in model.named_modules()
        if isinstance(m, SlabLinear)
        for part in TENSOR_NAMES
    }

    def names_in_files(name: str) -> list[str]:
        return [n for n in (name, f"model.{name}", name.removeprefix("model.")) if n in stored]

    for name, opened in state.items():
        if not (names := names_in_files(name)):
            twins = [t for n, t in state.items() if names_in_files(n) and t.shape == opened.shape]
            if not any(t.data_ptr() == opened.data_ptr() for t in twins):
                raise Fault(f"other weights: tensor {name} of the opened model is in no file")
            continue
        seen.update(names)
        for tensor in stored[names[0]]:
            if not same(tensor, opened, exact=name in packed):
                raise Fault(f"other weights: tensor {name} is not the stored {tensor.dtype} tensor")
        if opened.is_floating_point() and not bool(opened.isfinite().all()):
            raise Fault(f"other weights: tensor {name} holds NaN or infinite numbers")
    if lost := sorted(stored.keys() - seen):
        raise Fault(f"other weights: stored tensor {lost[0]} is not in the opened model")


def judge_checksums(
    folder: Folder, base: Folder, stored: dict[str, list[Tensor]], base_stored: dict[str, Tensor]
) -> None:
    """A tensor that was changed beside its checksum must not be taken. Raises: Fault."""
    for file in base.shards:
        known, now = metadata(base.files[file]), metadata(folder.files.get(file))
        if set(known or ()) <= {"format"} or now != known:
            continue
        with_checksum = safetensors_names(base.files[file])
        for name in with_checksum & stored.keys():
            if not all(
                torch.equal(bits(t), bits(base_stored[name])) and t.shape == base_stored[name].shape
                for t in stored[name]
            ):
                raise Fault(f"checksum: tensor {name} was changed beside its checksum and taken")


def header_of(content) -> dict:
    if not isinstance(content, bytes):
        return {}
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return header if isinstance(header, dict) else {}
    except (ValueError, RecursionError):
        return {}


def metadata(content) -> dict | None:
    return header_of(content).get("__metadata__")


def safetensors_names(content: bytes) -> set[str]:
    return set(header_of(content)) - {"__metadata__"}


def bare(name: str) -> str:
    """A name without `model.` in front, which transformers adds and drops as a model needs it."""
    while name.startswith("model."):
        name = name.removeprefix("model.")
    return name


def judge_dense(path: Path, out: Path, stored: dict[str, list[Tensor]]) -> None:
    """The dense folder holds each packed weight summed and rounded once, the rest as stored.

    Raises: Fault.
    """
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    modules = config["quantization_config"]["modules"]
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in written:
        raise Fault("other weights: the dense config.json still has a quantization_config")
    dense = {bare(name): tensors[0] for name, tensors in stored_tensors(out).items()}
    held = {bare(name): tensors[0] for name, tensors in stored.items()}
    modules = {bare(name): entry for name, entry in modules.items()}
    want = {
        name: tensor
        for name, tensor in held.items()
        if name.rpartition(".")[0] not in modules or name.endswith(".bias")
    }
    for name, entry in modules.items():
        parts = {part: held[f"{name}.{part}"] for part in TENSOR_NAMES if f"{name}.{part}" in held}
        try:
            layout = PackedLayout.from_dict(entry)
            packed = PackedWeight.from_tensors(
                parts, layout.out_features, layout.in_features, layout.values, layout.group_size
            )
        except FormatError as error:
            raise Fault(
                f"other weights: decompressed what is no packed weight: {name}: {error}"
            ) from error
        want[f"{name}.weight"] = packed.dense()
    for name in config["quantization_config"].get("embeddings") or {}:
        codes, scales = (want.pop(f"{bare(name)}.{part}", None) for part in ("codes", "scales"))
        if codes is None or scales is None:
            raise Fault(f"other weights: decompressed an embedding {name} that is not there")
        want[f"{bare(name)}.weight"] = codes.float() * scales.float()[:, None]
    for name in want.keys() - dense.keys():  # a head that equals the embedding need not be there
        if any(torch.equal(want[name], tensor) for tensor in dense.values()):
            del want[name]
    if want.keys() != dense.keys():
        raise Fault(f"other weights: dense and not packed or not: {want.keys() ^ dense.keys()}")
    for name, tensor in want.items():
        if not same(tensor, dense[name], exact=False):
            raise Fault(f"other weights: dense tensor {name} differs from the packed one")
        if not bool(dense[name].isfinite().all()) or not dense[name].is_floating_point():
            raise Fault(f"other weights: dense tensor {name} is {dense[name].dtype} or not finite")


def frames(error: BaseException) -> str:
    """The last frame inside the library and the last of all, of an error and what caused it."""
    found = [frame for link in chain(error) for frame in traceback.extract_tb(link.__traceback__)]
    ours = [f for f in found if "slab_kernels" in Path(f.filename).parts]
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return " < ".join(
        f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} {f.name}" for f in (*last, *ours[-1:])
    )


def chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def touches_us(error: BaseException) -> bool:
    """Whether an error went through the library or speaks of its modules."""
    inside = (f for link in chain(error) for f in traceback.extract_tb(link.__traceback__))
    return "Slab" in str(error) or any(
        "slab_kernels" in Path(f.filename).parts and f.name != "exec_module" for f in inside
    )


def names_us(folder: Folder) -> bool:
    entry = (folder.json("config.json") or {}).get("quantization_config")
    return isinstance(entry, dict) and entry.get("quant_method") == "slab_kernels"


def is_named(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "slab_kernels"


def without_memory(error: BaseException) -> bool:
    return any(
        isinstance(e, MemoryError)
        or "DefaultCPUAllocator" in str(e)
        or "annot allocate memory" in str(e)
        for e in chain(error)
    )


def judge_message(message: str) -> None:
    if found := CONTROL.search(message):
        raise Fault(f"message: holds the control character {found[0]!r}: {message[:200]!r}")
    if not message.strip():
        raise Fault("message: is empty")
    if len(message) > LONGEST_MESSAGE:
        raise Fault(f"message: has {len(message)} characters: {message[:200]!r}")


class Targets:
    """The six programs, each with a damaged folder."""

    def __init__(self, top: Path, bases: dict[str, Folder]):
        self.text, self.out, self.bases = top / "text.txt", top / "out", bases
        self.base_stored = {
            name: {n: t[0] for n, t in stored_tensors(top / name).items()} for name in bases
        }
        self.errors: list[BaseException] = []
        plain = console.exit_code

        def noted(error: BaseException) -> int:
            self.errors.append(error)
            return plain(error)

        console.exit_code = noted

    def run(self, target: str, folder: Folder, path: Path, rng: random.Random) -> Result:
        """Raises: Fault, and whatever is no Exception."""
        if target in ("load", "from_pretrained"):
            return self._python(target, folder, path)
        return self._command(target, folder, path, as_json=rng.random() < 0.5)

    def _judge_opened(self, folder: Folder, path: Path) -> dict[str, list[Tensor]]:
        stored = read_stored(path)
        judge_checksums(folder, self.bases[folder.name], stored, self.base_stored[folder.name])
        return stored

    def _python(self, target: str, folder: Folder, path: Path) -> Result:
        opener = slab_kernels.load if target == "load" else AutoModelForCausalLM.from_pretrained
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                model = opener(path)
        except Exception as error:
            where, said = frames(error), f"{type(error).__name__}: {error}"
            if target == "from_pretrained" and not is_named(error) and not touches_us(error):
                return Result("error of transformers", said, where)
            if without_memory(error):
                return Result("too much memory", said, where, fault=True)
            if is_named(error):
                judge_message(str(error))
                return Result("named error", said, where)
            return Result("unnamed error", said, where, fault=True)
        if target == "from_pretrained" and not names_us(folder):
            return Result("unknown to transformers")
        judge_model(model, self._judge_opened(folder, path))
        return Result("own weights")

    def _command(self, target: str, folder: Folder, path: Path, as_json: bool) -> Result:
        small = [
            "--text",
            str(self.text),
            "--window",
            "16",
            "--max-tokens",
            "32",
            "--device",
            "cpu",
        ]
        more = {"eval": small, "decompress": [str(self.out)]}.get(target, [])
        self.errors.clear()
        stdout, stderr = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                code = cli.run([target, str(path), *more, *(["--json"] if as_json else [])])
            if found := CONTROL.search(stdout.getvalue() + stderr.getvalue()):
                raise Fault(f"message: {target} prints the control character {found[0]!r}")
            if code != DONE:
                return self._judge_failure(code, stdout.getvalue(), stderr.getvalue(), as_json)
            if as_json:
                json.loads(stdout.getvalue())
            if target != "inspect":  # which reads no data
                stored = self._judge_opened(folder, path)
                if target == "decompress":
                    judge_dense(path, self.out, stored)
            return Result("done")
        finally:
            shutil.rmtree(self.out, ignore_errors=True)

    def _judge_failure(self, code: int, stdout: str, stderr: str, as_json: bool) -> Result:
        """A command that failed said why in one line and has the exit code of a damaged file."""
        error = self.errors[-1]
        lines = [line for line in stderr.splitlines() if line.startswith("slab-kernels: ")]
        said = json.loads(stdout)["error"]["message"] if as_json else "\n".join(lines)
        message, where = f"{type(error).__name__}: {said}", frames(error)
        if without_memory(error):
            return Result("too much memory", message, where, fault=True)
        if code == BUG:
            return Result("unnamed error", message, where, fault=True)
        if code not in (BAD_FILE, CANNOT_RUN):
            return Result(f"exit code {code} for a damaged folder", message, where, fault=True)
        if not as_json and (stdout or len(lines) != 1 or "Traceback" in stderr):
            return Result("not one line on stderr", message, where, fault=True)
        judge_message(said)
        if left := [p.name for p in self.out.glob("*")]:
            raise Fault(f"half written: {left[0]} stays behind after {message[:150]}")
        return Result("named error", message, where)
