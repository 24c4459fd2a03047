"""PTX text to instructions (PTX ISA 4 "Syntax", 5 "State Spaces", 7.1 kernels).

A kernel is parsed when it is asked for. Only what nvcc and inline assembly produce is understood:
one .entry per kernel, nested `{ }` scopes with their own registers and labels, module-level .shared
/ .const / .global variables with plain initialisers."""

import gc
import re
import struct
from bisect import bisect_right

import numpy as np

from .decode import DECODERS, DTYPE, Address, Imm, Pair, PtxError, Reg, Symbol, TileOperand
from .directives import Directives

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
_STATEMENT = re.compile(
    r"\s*(?:(?P<scope>[{}])|(?P<line>\.(?:loc|file)\b[^\n]*)"
    r"|(?P<label>[A-Za-z_$%][\w$]*)\s*:(?!:)|(?P<text>[^;{}][^;]*);)"
)
_BRACE, _OPENING = re.compile(r"[{}]"), re.compile(r"[{;]")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)")
_TARGET = re.compile(r"^\s*\.target\s+sm_(\d+)", re.M)
_GUARD = re.compile(r"@(!?)([\w$%]+)\s+(.*)", re.S)
_VARIABLE = re.compile(
    r"\.(?P<space>shared|local|global|const|param)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"(?:\.attribute\([^)]*\)\s*)?"
    r"\.(?P<type>[busf]\d+)\s+(?:\.ptr\b(?:\s*\.(?:global|shared|const|local|align\s+\d+))*\s+)?"
    r"(?P<name>[\w$]+)(?P<size>(?:\[\d*\])*)\s*(?:=\s*(?P<init>\{[^}]*\}|[^;,]+))?"
)
SPECIAL = {f"%{name}.{d}" for name in ("tid", "ntid", "ctaid", "nctaid") for d in "xyz"}
SPECIAL |= {
    "%laneid",
    "%warpid",
    "%nwarpid",
    "%smid",
    "%clock",
    "%clock64",
    "%dynamic_smem_size",
    "%total_smem_size",
}
SPECIAL |= {
    f"%{name}.{d}"
    for name in ("clusterid", "nclusterid", "cluster_ctaid", "cluster_nctaid")
    for d in "xyz"
}
SPECIAL |= {"%cluster_ctarank", "%cluster_nctarank"}
SPECIAL |= {f"%lanemask_{c}" for c in ("eq", "lt", "le", "gt", "ge")}


def _blank(match):
    return re.sub(r"[^\n]", " ", match.group(0))  # keeps offsets and line numbers


def _closing(text, start):
    """Offset of the brace that closes the one at `start`."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += 1 if match.group(0) == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxError("unbalanced braces")


def _number(token):
    """Bit pattern of an immediate, or None (ISA 4.5 "Constants")."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", token):
        return int(token[2:], 16)
    if re.fullmatch(r"[+-]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", token):
        body = token.rstrip("U")
        octal = re.fullmatch(r"[+-]?0[0-7]+", body)
        return int(body, 8 if octal else 0)
    if re.fullmatch(r"[+-]?\d+\.\d*([eE][+-]?\d+)?", token):
        return struct.unpack("<Q", struct.pack("<d", float(token)))[0]
    return {"WARP_SZ": 32}.get(token)


def _layout(variables, start=0):
    """Offsets of variables laid out in order with their own alignment; also the end."""
    offsets, end = {}, start
    for name, align, size in variables:
        end = -(-end // align) * align
        offsets[name] = end
        end += size
    return offsets, end


def _variable(match):
    item = DTYPE[match["type"]].itemsize
    count = 1
    for n in re.findall(r"\[(\d*)\]", match["size"]):
        count *= int(n or 0)
    return match["name"], int(match["align"] or item), count * item


class Module:
    """The kernels and variables of one PTX text."""

    def __init__(self, ptx):
        text = _COMMENT.sub(_blank, ptx)
        target = _TARGET.search(text)
        self.target = int(target[1]) if target else 0  # 90 for sm_90 and sm_90a
        self._newlines = [m.start() for m in re.finditer("\n", text)]
        self._kernels, self._found, self.shared, self.data = {}, {}, {}, {}
        outside, last = [], 0
        for match in re.finditer(r"\.(entry|func)\b", text):
            if match.start() < last:
                continue
            opening = _OPENING.search(text, match.start())
            outside.append(text[last : match.start()])
            last = opening.start() + 1
            if opening.group(0) == ";":
                continue
            end = _closing(text, last - 1)
            if match[1] == "entry":
                name = _ENTRY.match(text, match.start())[1]
                self._found[name] = (text[match.start() : last - 1], text[last:end], last)
            last = end + 1
        outside.append(text[last:])
        for match in _VARIABLE.finditer(" ".join(outside)):
            if match["space"] == "shared":
                self.shared[match["name"]] = _variable(match)
            elif match["space"] in ("global", "const"):
                self.data[match["name"]] = self._initialised(match)
        self.names = list(self._found)

    def __getitem__(self, name):
        if name not in self._found:
            raise PtxError(f"no kernel {name!r} in the module; it has {', '.join(self.names)}")
        if name not in self._kernels:
            # Decoding makes tens of closures an instruction and no garbage: the collector would
            # double its time.
            collecting = gc.isenabled()
            gc.disable()
            try:
                self._kernels[name] = Kernel(self, name, *self._found[name])
            finally:
                if collecting:
                    gc.enable()
        return self._kernels[name]

    def line(self, offset):
        return bisect_right(self._newlines, offset) + 1

    @staticmethod
    def _initialised(match):
        """Backing bytes of a .global or .const variable: (array, writable)."""
        dtype, (_, align, size) = DTYPE[match["type"]], _variable(match)
        store = np.zeros(size + align, np.uint8)
        skip = (
            -store.ctypes.data % align
        )  # numpy aligns to 16 or 64 bytes; the variable may ask for more
        data = store[skip : skip + size]
        if match["init"]:
            raw = np.dtype(f"u{dtype.itemsize}")
            values = [
                _number(v.strip()) for v in match["init"].strip("{} \n").split(",") if v.strip()
            ]
            if None in values:
                raise PtxError(f"initialiser of {match['name']} holds more than numbers")
            mask = (1 << 8 * raw.itemsize) - 1
            data.view(raw)[: len(values)] = [v & mask for v in values]
        return data, match["space"] == "global"


class _Scope:
    """Registers and labels of one `{ }` block (ISA 5.1.1).

    Ranges are declarations such as %r<100>.
    """

    def __init__(self, parent=None):
        self.parent, self.names, self.ranges, self.labels, self.tables = parent, {}, {}, {}, {}

    def find(self, kind, name):
        scope = self
        while scope is not None:
            if name in getattr(scope, kind):
                return getattr(scope, kind)[name]
            scope = scope.parent
        return None


class Instruction:
    def __init__(self, text, line, scope):
        self.text, self.line, self.scope = " ".join(text.split()), line, scope
        self.guard = self.kind = self.run = self.width = None  # width: bytes of a shared access
        self.targets = ()

    @property
    def type(self):
        return self.parts[-1]


class Kernel:
    """One .entry: instructions (decoded), register widths, and the layout of its parameters and
    memories.
    """

    def __init__(self, module, name, head, body, offset):
        self.module, self.name = module, name
        self.code, self.widths, self.special = [], [], {}
        head, _, directives = head.rpartition(")")
        self.directives = Directives(directives)
        self.parameters, self.parameter_bytes = _layout(
            [_variable(m) for m in _VARIABLE.finditer(head)]
        )
        self._symbols = {n: Symbol(n, "param", o) for n, o in self.parameters.items()}
        self._place(body)
        self._scan(body, offset)
        for instruction in self.code:
            self._decode(instruction)

    @property
    def asynchronous(self):
        """Whether threads meet, or memory is used, otherwise than by barriers of a CTA."""
        names = {i.parts[0] for i in self.code} & {"mbarrier", "wgmma", "fence", "mapa"}
        return bool(names) or any(i.op == "barrier.cluster" for i in self.code)

    def registers(self, threads):
        """Registers of a thread at the launch, as ptxas allocates them for .maxntid threads and
        .minnctapersm CTAs of a multiprocessor's 65536; None if the directives do not say it.
        """
        ctas, most = self.directives.get("minnctapersm"), self.directives.get("maxntid")
        if not ctas or not most or int(np.prod(most)) != threads:
            return None
        return min(65536 // (ctas[0] * threads) // 8 * 8, 255 // 8 * 8)

    def _place(self, body):
        """Shared memory: the kernel's own and the module's variables that it names; extern (size 0)
        ones start at the end.
        """
        declared = ".shared ." in body or ".local ." in body  # ld.shared.b32 is no declaration
        own = (
            [m for m in _VARIABLE.finditer(body) if m["space"] in ("shared", "local")]
            if declared
            else []
        )
        words = set(re.findall(r"[\w$]+", body))
        shared = [v for n, v in self.module.shared.items() if n in words]
        shared += [_variable(m) for m in own if m["space"] == "shared"]
        offsets, self.static_shared = _layout([v for v in shared if v[2]])
        dynamic = [v for v in shared if not v[2]]
        start = self.static_shared
        for _, align, _ in dynamic:
            start = -(-start // align) * align
        self.dynamic_start = start
        offsets |= {n: start for n, _, _ in dynamic}
        self._symbols |= {n: Symbol(n, "shared", o) for n, o in offsets.items()}
        local, self.local_bytes = _layout([_variable(m) for m in own if m["space"] == "local"])
        self._symbols |= {n: Symbol(n, "local", o) for n, o in local.items()}
        for n, (data, _) in self.module.data.items():
            self._symbols[n] = Symbol(n, "global", data.ctypes.data)

    def _scan(self, body, offset):
        scope, at = _Scope(), 0
        label = None
        while match := _STATEMENT.match(body, at):
            at = match.end()
            if match["scope"] == "{":
                scope = _Scope(scope)
            elif match["scope"]:
                scope = scope.parent
            elif match["label"]:
                label = match["label"]
                scope.labels[label] = len(self.code)
            elif match["text"]:
                text = match["text"].strip()
                if text.startswith(".reg"):
                    self._declare(text, scope)
                elif text.startswith(".branchtargets"):
                    scope.tables[label] = [t.strip() for t in text[14:].split(",")]
                elif not text.startswith("."):
                    self.code.append(
                        Instruction(text, self.module.line(offset + match.start("text")), scope)
                    )
        if body[at:].strip():
            raise PtxError(f"{self.name}: cannot parse {body[at : at + 60].strip()!r}")

    @staticmethod
    def _declare(text, scope):
        ty, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
        width = 0 if ty == "pred" else DTYPE[ty].itemsize
        for name in names.split(","):
            ranged = re.fullmatch(r"([\w$%]+)<(\d+)>", name.strip())
            if ranged:
                scope.ranges[ranged[1]] = width
            else:
                scope.names[name.strip()] = width

    def _register(self, name, scope):
        """The register called `name`, its slot given out at first use; None if there is none."""
        if name in SPECIAL:
            width = 8 if name == "%clock64" else 4
            if name not in self.special:
                self.special[name] = len(self.widths)
                self.widths.append(width)
            return Reg(self.special[name], width)
        known = scope.find("names", name)
        if known is None:
            digits = re.fullmatch(r"(.*?)(\d+)", name)
            width = digits and scope.find("ranges", digits[1])
            if width is None:
                return None
            while digits[1] not in scope.ranges:
                scope = scope.parent
            scope.names[name] = known = width
        if isinstance(known, int):
            while name not in scope.names:
                scope = scope.parent
            scope.names[name] = known = Reg(len(self.widths), known)
            self.widths.append(known.width)
        return known

    def _operand(self, token, scope):
        token = token.strip()
        if "|" in token:
            return Pair(*(self._operand(t, scope) for t in token.split("|")))
        if token[0] == "%":
            register = scope.names.get(token)
            return register if isinstance(register, Reg) else self._name(token, scope)
        if token == "_":
            return None
        if token[0] == "{":
            return [self._operand(t, scope) for t in token.strip("{} ").split(",")]
        if token[0] == "[" and "{" in token:  # [map, {column, row}]
            base, rest = token[1:-1].split(",", 1)
            coordinates = tuple(self._operand(t, scope) for t in rest.strip(" {}").split(","))
            return TileOperand(self._operand(f"[{base.strip()}]", scope), coordinates)
        if token[0] == "[":
            base, sign, offset = re.fullmatch(
                r"\[\s*([\w$%.]+)\s*(?:([+-])\s*([+-]?\w+)\s*)?\]", token
            ).groups()
            offset = (_number(offset) if offset else 0) * (-1 if sign == "-" else 1)
            number = _number(base)
            if number is not None:
                return Address(None, number + offset)
            return Address(self._operand(base, scope), offset)
        if token[0] == "!":
            return self._operand(token[1:], scope)._replace(negated=True)
        number = _number(token)
        if number is not None:
            return Imm(number)
        if sum_ := re.fullmatch(r"([\w$]+)\s*\+\s*(\d+)", token):
            symbol = self._operand(sum_[1], scope)
            return symbol._replace(address=symbol.address + int(sum_[2]))
        return self._name(token, scope)

    def _name(self, token, scope):
        found = self._register(token, scope) or self._symbols.get(token)
        if found is None:
            raise PtxError(f"unknown name {token!r}")
        return found

    def _decode(self, instruction):
        try:
            self._decode_parts(instruction)
        except PtxError as error:
            raise PtxError(
                f"{self.name}: line {instruction.line}: {instruction.text}: {error}"
            ) from None

    def _decode_parts(self, instruction):
        text, scope = instruction.text, instruction.scope
        if match := _GUARD.match(text):
            register = self._register(match[2], scope)
            if register is None:
                raise PtxError(f"unknown predicate {match[2]!r}")
            instruction.guard = (register.slot, match[1] == "!")
            text = match[3]
        name, _, rest = text.partition(" ")
        parts = instruction.parts = [p.replace("::cta", "") for p in name.split(".")]
        instruction.op = _class(parts)
        base = parts[0]
        tokens = [t for t in re.findall(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,]+)\s*,?", rest) if t.strip()]
        if base in ("bra", "brx"):
            names = (
                [tokens[0].strip()] if base == "bra" else scope.find("tables", tokens[1].strip())
            )
            instruction.targets = [scope.find("labels", n) for n in names or [None]]
            if None in instruction.targets:
                raise PtxError("unknown label")
            tokens = tokens[:-1]
        decoder = DECODERS.get(base)
        if decoder is None:
            instruction.kind, instruction.operands = "unknown", ()
            return
        if base == "call":
            tokens = []
        instruction.operands = [self._operand(t, scope) for t in tokens]
        instruction.run = decoder(instruction)


def _class(parts):
    """Name under which executed instructions are counted: the opcode, with the parts that make it
    another instruction.
    """
    base = parts[0]
    if base in ("ld", "st"):
        return f"{base}." + next((p for p in parts if p in WINDOW_NAMES), "generic")
    if base == "mma":
        return "mma.sp" if parts[1].startswith("sp") else "mma.sync"
    if base in ("wgmma", "mbarrier", "setmaxnreg"):
        return ".".join(parts[: 3 if parts[2] in ("sp", "expect_tx") else 2])
    if base == "cp" and "bulk" in parts and "prefetch" not in parts:
        return "cp.async.bulk.tensor" if "tensor" in parts else "cp.async.bulk"
    if base == "cp":
        return ".".join(p for p in parts[:3] if p not in ("ca", "cg"))
    if base in ("bar", "barrier", "griddepcontrol", "createpolicy", "shfl", "vote"):
        return ".".join(parts[:3] if parts[1] == "warp" else parts[:2])
    return base


WINDOW_NAMES = ("global", "shared", "param", "const", "local")
