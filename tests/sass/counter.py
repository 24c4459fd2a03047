"""The machine code of the CUDA kernels: compiled for one architecture, disassembled, cut into
loops, counted by pipe.

nvcc (or the images that a build left) gives a cubin, nvdisasm its text, cuobjdump registers and
stack. No GPU is asked.

The *main loop* of a kernel is the smallest natural loop that issues both a matrix product and an
asynchronous
copy: one K-block of 32 rows x 128 inputs a warp. The prologue copies but multiplies nothing, the
rank loops of `any` kernels multiply but copy nothing, the adapter's and the final loops do not
copy. Natural loops are found by dominators, not by the order of addresses, because ptxas moves
unlikely blocks out of a loop's range.

`python tests/sass/counter.py [JSON]` prints the instruction budget for the README and writes it as
JSON.
"""

from __future__ import annotations

import collections
import functools
import gc
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

# pytest puts this folder on the path itself; a plain `python` does not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kept import kept

from slab_kernels.backends.cuda import compile as recipe

ROOT = Path(__file__).resolve().parents[2]
UNIT = "linear"
# Warps that copy a group's activations: the most frequent tile of tiles.py has 64 rows, two warps.
# Where W is rebuilt it has 128 rows, four.
SHARING, REBUILD_SHARING = 2, 4

# Opcode (up to its first dot) -> what executes it. An opcode that is not here fails the count by
# name. IMAD is the shift, move and add that ptxas puts where the ALU is full; uniform instructions
# take an issue slot of their warp too.
PIPES = {
    "tensor": "HMMA IMMA QMMA HGMMA",
    "alu": "LOP3 PLOP3 IADD3 IADD VIADD SHF PRMT ISETP SEL LEA MOV IABS IMNMX VIMNMX VIADDMNMX "
    "VIMNMX3 SGXT BMSK CS2R FSEL FSETP FMNMX P2R R2P VOTE ICMP LOP",
    "fma": "IMAD FFMA FMUL FADD HFMA2 HADD2 HMUL2",
    "xu": "MUFU I2F F2I F2F I2FP F2FP POPC FLO",
    "shared": "LDS LDSM STS LDGSTS SHFL",
    "global": "LDG STG LDC ATOM LD ST LDL STL",
    "control": "BRA BRX BRXU BSSY BSYNC BREAK BAR WARPSYNC DEPBAR LDGDEPBAR NOP EXIT CALL RET "
    "YIELD S2R CCTL ERRBAR MEMBAR ACQBULK PREEXIT BMOV ELECT NANOSLEEP SYNCS WARPGROUP",
    "uniform": "S2UR R2UR VOTEU LDCU",  # and whatever begins with U
}
PIPE = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}


class Instruction(NamedTuple):
    address: int
    predicate: str  # "" or @P0, @!UP1, ...
    opcode: str  # with its modifiers
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def pipe(self) -> str:
        """What executes it. Raises: KeyError for an opcode that PIPES does not know."""
        if (
            self.predicate == "@!PT"
        ):  # ptxas puts three loads that never run before a group of LDGSTS: issue slots only
            return "control"
        if self.base.startswith("U") and self.base not in PIPE:
            return "uniform"
        return PIPE[self.base]


class Loop(NamedTuple):
    header: int
    blocks: frozenset[int]


class Usage(NamedTuple):
    registers: int
    stack: int
    local: int


class Kernel:
    """One kernel's instructions as basic blocks and natural loops."""

    def __init__(
        self, name: str, instructions: list[Instruction], labels: dict[str, int], usage: Usage
    ):
        self.name, self.instructions, self.usage = name, instructions, usage
        self.blocks, self.successors = _blocks(instructions, labels)
        self.dominators = _dominators(self.successors)
        self.loops = _loops(self.successors, self.dominators)

    def of(self, blocks) -> list[Instruction]:
        return [i for b in sorted(blocks) for i in self.blocks[b]]

    def has(self, blocks, *bases: str) -> bool:
        return any(i.base in bases and i.predicate != "@!PT" for i in self.of(blocks))

    @functools.cached_property
    def main(self) -> Loop:
        """Raises: ValueError if no loop both multiplies and copies."""
        found = [
            x
            for x in self.loops
            if self.has(x.blocks, "HMMA", "IMMA", "HGMMA") and self.has(x.blocks, "LDGSTS")
        ]
        if not found:
            raise ValueError(
                f"{self.name}: no loop has both a matrix product and an asynchronous copy"
            )
        return min(found, key=lambda x: len(self.of(x.blocks)))

    @functools.cached_property
    def inner(self) -> list[Loop]:
        """Loops inside the main loop, without those inside another of them."""
        inside = [x for x in self.loops if x.blocks < self.main.blocks]
        return [x for x in inside if not any(x.blocks < other.blocks for other in inside)]

    @property
    def rank_loops(self) -> list[Loop]:
        return [x for x in self.inner if self.has(x.blocks, "HMMA")]

    @functools.cached_property
    def edge(self) -> set[int]:
        """Blocks of the copy at an edge, the last K-block where K is no multiple of 128.

        It alone fills up with zeros. Going up its dominators, it begins below the first that other
        copies are in, or the wait for them.
        """
        edge: set[int] = set()
        for filled in (b for b in self.main.blocks if self.copies_at_edge([b])):
            for root in (b for b in self.main.blocks if self.dominators[filled] >> b & 1):
                below = {b for b in self.main.blocks if self.dominators[b] >> root & 1}
                if not self.copies_whole(below) and not self.has(below, "LDGDEPBAR", "HMMA"):
                    edge |= below
        return edge

    def copies_at_edge(self, blocks) -> bool:
        return any(i.base == "LDGSTS" and ".ZFILL" in i.opcode for i in self.of(blocks))

    def copies_whole(self, blocks) -> bool:
        return any(i.base == "LDGSTS" and ".ZFILL" not in i.opcode for i in self.of(blocks))

    def trips(self, loop: Loop, tokens: int) -> int:
        """How often a loop inside the main loop runs for one K-block with rank 1 and every token of
        the tile.

        A loop that copies x has several copies a trip, of two token rows each; one with a single
        copy takes v, a rank each trip, and so does one that rebuilds W.
        Raises: ValueError for a loop of an unknown kind.
        """
        copies = [i for i in self.of(loop.blocks) if i.base == "LDGSTS"]
        rebuilds = self.name.startswith("rebuild_")
        a_rank = self.has(loop.blocks, "HMMA") or (rebuilds and not copies)
        if a_rank or len(copies) == 1:  # or its row of v
            return 1
        if copies:
            sharing = REBUILD_SHARING if rebuilds else SHARING
            return -(-tokens // (2 * len(copies) * sharing))
        raise ValueError(
            f"{self.name}: what is the loop at {self.blocks[loop.header][0].address:#x}?"
        )

    @functools.cached_property
    def times(self) -> dict[int, float]:
        """Block of the main loop -> how often it runs for one K-block, an upper bound.

        Blocks of the main loop count once, whichever way a branch goes, but for three kinds: inner
        loops by their trips, the copy at an edge never, and of several places that add a scale
        group (FFMA) the last only, of those that convert scales where W is rebuilt (F2FP) the
        first: a group is 128 inputs, shorter ones are an option.
        """
        found = re.search(r"_t(\d+)", self.name)
        tokens = int(found[1]) if found else 0  # The narrow loop copies no tokens.
        times = dict.fromkeys(self.main.blocks, 1.0)
        for loop in self.inner:
            if not loop.blocks <= self.edge:
                times |= dict.fromkeys(loop.blocks, self.trips(loop, tokens))
        times |= dict.fromkeys(self.edge, 0.0)
        scaling = sorted(b for b in times if self.has([b], "FFMA"))[:-1]
        if self.name.startswith("rebuild_"):
            scaling = sorted(b for b in times if self.has([b], "F2FP"))[1:]
        return times | {b: 0.0 for b in scaling if not self.has([b], "HMMA")}

    def executed(self) -> collections.Counter[str]:
        """Opcode with its modifiers -> warp instructions a K-block; the never executed ones as
        `@!PT`.
        """
        counts: collections.Counter[str] = collections.Counter()
        for block, times in self.times.items():
            for i in self.blocks[block]:
                counts["@!PT" if i.predicate == "@!PT" else i.opcode] += times
        return +counts

    def by_pipe(self) -> dict[str, float]:
        counts = dict.fromkeys(PIPES, 0.0)
        for block, times in self.times.items():
            for i in self.blocks[block]:
                counts[i.pipe] += times
        return counts


def _blocks(
    code: list[Instruction], labels: dict[str, int]
) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks and the blocks that may follow each."""
    jumps: dict[int, list[int]] = {}
    for at, i in enumerate(code):
        base = i.base
        if base in ("BRA", "BRX", "BRXU", "CALL", "WARPSYNC"):
            targets = [labels[x] for x in re.findall(r"\.L_x_\d+", i.operands) if x in labels]
            if targets or base.startswith("BR"):
                always = (
                    base.startswith("BR")
                    and not i.predicate
                    and not re.match(r"[!~]?U?[PR]", i.operands)
                )
                jumps[at] = targets if always or base == "BRXU" else [*targets, at + 1]
        elif base in ("EXIT", "RET"):
            jumps[at] = [at + 1] if i.predicate else []
    starts = sorted(
        {0, *(t for targets in jumps.values() for t in targets), *(at + 1 for at in jumps)}
        - {len(code)}
    )
    index = {start: n for n, start in enumerate(starts)}
    blocks, successors = [], []
    for start, end in zip(starts, [*starts[1:], len(code)], strict=True):
        blocks.append(code[start:end])
        successors.append([index[t] for t in jumps.get(end - 1, [end]) if t in index])
    return blocks, successors


def _dominators(successors: list[list[int]]) -> list[int]:
    """Of each block, the bit set of those on every way to it; 0 where no way leads.

    To the fixed point.
    """
    order, seen = [], {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        block, rest = stack[-1]
        for following in rest:
            if following not in seen:
                seen.add(following)
                stack.append((following, iter(successors[following])))
                break
        else:
            order.append(block)
            stack.pop()
    predecessors: list[list[int]] = [[] for _ in successors]
    for block in seen:
        for following in set(successors[block]):
            predecessors[following].append(block)
    dominators = [
        (1 << len(successors)) - 1 if block in seen else 0 for block in range(len(successors))
    ]
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for block in order[-2::-1]:
            common = (
                functools.reduce(int.__and__, (dominators[p] for p in predecessors[block]))
                | 1 << block
            )
            changed |= common != dominators[block]
            dominators[block] = common
    return dominators


def _loops(successors: list[list[int]], dominators: list[int]) -> list[Loop]:
    """Natural loops; those of one header are one."""
    bodies: dict[int, set[int]] = {}
    predecessors: list[list[int]] = [[] for _ in successors]
    for block, following in enumerate(successors):
        if dominators[block]:
            for to in following:
                predecessors[to].append(block)
    for block, following in enumerate(successors):
        for header in following:
            if dominators[block] >> header & 1:  # a way back
                body, todo = bodies.setdefault(header, {header}), [block]
                while todo:
                    inside = todo.pop()
                    if inside not in body:
                        body.add(inside)
                        todo += predecessors[inside]
    return [Loop(header, frozenset(body)) for header, body in bodies.items()]


# ---- tools --------------------------------------------------------------------------------------


def tool(name: str) -> str:
    """nvdisasm or cuobjdump, of the pip packages or PATH.

    Raises: recipe.Impossible, in one sentence.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = (spec.submodule_search_locations or []) if spec else []
    found = [str(p) for folder in folders for p in Path(folder).glob(f"cu*/bin/{name}")]
    found += filter(None, [shutil.which(name)])
    if not found:
        raise recipe.Impossible(f"no {name} here: pip install nvidia-cuda-{name}")
    return found[0]


def built(architecture: str, unit: str = UNIT) -> Path | None:
    """A unit's image that a build left, if it is of these sources, this nvcc and these options.

    Raises: recipe.Impossible without nvcc.
    """
    record, version = recipe.record(recipe.IMAGES), recipe.run([recipe.find_nvcc(), "--version"])
    path = recipe.IMAGES / recipe.image_name(unit, architecture)
    same = (record.get("sources"), record.get("compiler")) == (
        recipe.digest(recipe.read_sources(ROOT / "csrc")),
        recipe.digest({}, version, *recipe.NVCC_OPTIONS),
    )
    return path if same and path.is_file() else None


def image(architecture: str, only: tuple[str, ...] = (), unit: str = UNIT) -> bytes:
    """A unit compiled for it: the image of an up-to-date build, or nvcc's, kept for next time.

    PTX for an architecture that begins with `compute_`, else a cubin. `only`: the rows that
    `rows_only` leaves, which makes the compiler faster by as much.
    Raises: recipe.Impossible without nvcc, or with what it printed.
    """
    nvcc, name = recipe.find_nvcc(), recipe.image_name(unit, architecture)
    if not only and (path := built(architecture, unit)):
        return path.read_bytes()
    sources, version = recipe.read_sources(ROOT / "csrc"), recipe.run([nvcc, "--version"])
    if only:
        sources[f"cuda/{unit}.cu"] = rows_only(sources[f"cuda/{unit}.cu"], only)

    key = (recipe.digest(sources, version, *recipe.NVCC_OPTIONS), name)
    return kept("image", key, lambda: _compile(sources, unit, architecture)[0])


def warnings(architecture: str, unit: str) -> list[str]:
    """What the compiler warns of in a unit: kept by an up-to-date build, else it compiles.

    Raises: recipe.Impossible without nvcc, or with what it printed.
    """
    name = recipe.image_name(unit, architecture)
    if built(architecture, unit):
        known = recipe.record(recipe.IMAGES).get("warnings")
        if isinstance(known, dict) and name in known:
            return known[name]
    sources = recipe.read_sources(ROOT / "csrc")
    version = recipe.run([recipe.find_nvcc(), "--version"])
    digest = recipe.digest(sources, version, *recipe.NVCC_OPTIONS)

    def said() -> bytes:
        made, text = _compile(sources, unit, architecture)
        kept("image", (digest, name), lambda: made)
        return text.encode()

    return recipe.warnings_in(kept("messages", (digest, name), said).decode())


def _compile(sources: dict[str, str], unit: str, architecture: str) -> tuple[bytes, str]:
    """The image of a unit, and what the compiler printed."""
    nvcc = recipe.find_nvcc()
    with tempfile.TemporaryDirectory() as folder:
        for path, text in sources.items():
            Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, path).write_text(text, encoding="utf-8")
        output = Path(folder, recipe.image_name(unit, architecture))
        command = recipe.nvcc_command(nvcc, Path(folder, f"cuda/{unit}.cu"), architecture, output)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise recipe.Impossible(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        return output.read_bytes(), done.stdout + done.stderr


def rows_only(text: str, only: tuple[str, ...]) -> str:
    """linear.cu or prefill.cu with these rows alone of its tables of kernels.

    A row is named by what it begins with: "linear_w16_one_t32" of KERNEL(linear, w16_one_t32, ...),
    "w16_any_kW16" of KERNEL(w16_any, kW16, ...). Each row but the last ends in a backslash.
    """
    rows = re.compile(r"^ *KERNEL\((\w+), *(\w+),.*\n", re.MULTILINE)
    return rows.sub(lambda row: row[0] if f"{row[1]}_{row[2]}" in only else "  \\\n", text)


def listing(program: str, option: str, cubin: bytes) -> str:
    """What a program of `tool`, or the one at this path, prints of a cubin."""
    program = program if "/" in program else tool(program)

    def printed() -> bytes:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            return recipe.run([program, option, file.name]).encode()

    status = Path(program).stat()
    key = (program, str(status.st_size), str(status.st_mtime_ns), option, cubin)
    return kept("listing", key, printed).decode()


_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][A-Z0-9_.]*)\s*(.*)")


def parse(text: str, usage: dict[str, Usage]) -> dict[str, Kernel]:
    """`nvdisasm -c` of a cubin -> its kernels by name."""
    kernels, code, labels, name = {}, [], {}, ""

    def close():
        if name:
            kernels[name] = Kernel(name, code, labels, usage[name])

    # Hundreds of thousands of instructions, and no garbage: the collector would visit all of them
    # again and again.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for line in text.splitlines():
            if line.startswith(".text."):
                close()
                name, code, labels = line[len(".text.") : -1], [], {}
            elif line.startswith(".L_x_"):
                labels[line.rstrip(":")] = len(code)
            elif found := _INSTRUCTION.match(line):
                address, predicate, opcode, operands = found.groups("")
                code.append(Instruction(int(address, 16), predicate, opcode, operands))
        close()
    finally:
        if collecting:
            gc.enable()
    return kernels


def disassemble(cubin: bytes) -> dict[str, Kernel]:
    usages = listing("cuobjdump", "--dump-resource-usage", cubin)
    fields = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usages)
    usage = {
        name: Usage(int(registers), int(stack), int(local))
        for name, registers, stack, local in fields
    }
    return parse(listing("nvdisasm", "-c", cubin), usage)


if __name__ == "__main__":
    from sass import instruction_budget

    instruction_budget.main(*sys.argv[1:])
