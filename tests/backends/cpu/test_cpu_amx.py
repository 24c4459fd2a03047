"""AMX: where its kernels run, that they hold the tile instructions and execute them as the emulated
ones do, and how tdpbf16ps rounds. What they compute is tested by test_cpu_bf16.py."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from instruction_sets import EMULATED, PAIRS, RUNNABLE

from slab_kernels import native
from slab_kernels.backends import cpu
from slab_kernels.errors import BackendError
from slab_kernels.format import PackedLayout
from slab_kernels.testing import random_packed

if native.missing_library():
    pytest.skip(f"no native library: {native.missing_library()}", allow_module_level=True)
if platform.machine() != "x86_64":
    pytest.skip("AMX belongs to x86", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[3]
OPS = torch.ops.slab_kernels
AMX = "avx512_amx"
TILES = [name for name in PAIRS if name != "avx512_bf16"]
CPUINFO = Path("/proc/cpuinfo")
linux = pytest.mark.skipif(not CPUINFO.exists(), reason="the CPU's features are read from Linux")
# Registers of the four products: sums, x and weight. By Intel's manual the instruction is VEX.128.
# F3.0F38.W0 5C /r, with the sums in ModRM:reg, x in ModRM:r/m and the weight in VEX.vvvv.
PRODUCTS = ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7))


@pytest.fixture(params=TILES)
def isa(request):
    before = OPS.cpu_isa()
    yield OPS.cpu_use_isa(request.param)
    OPS.cpu_use_isa(before)


@pytest.fixture
def recipe(setup_py):
    """setup.py as a module; skips where no compiler knows AMX."""
    flags = setup_py.BUILD["sources"]["cpu/avx512_amx.cpp"]["newer_x86_flags"]
    try:
        compiler = setup_py.find_compiler()
    except setup_py.Impossible as reason:
        pytest.skip(str(reason))
    if not setup_py.knows(tuple(compiler), tuple(flags)):
        pytest.skip(f"{compiler[0]} does not know {' '.join(flags)}")
    return setup_py


def cpu_features() -> set[str]:
    lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    return set(next(line for line in lines if line.startswith("flags")).split())


def encoded(sums: int, x: int, weight: int) -> bytes:
    return bytes([0xC4, 0xE2, (~weight & 15) << 3 | 2, 0x5C, 0xC0 | sums << 3 | x])


@linux
def test_it_runs_only_where_the_cpu_has_tiles_and_is_first_there():
    """The system may refuse a process that asks for tiles, so having them is not enough."""
    if not {"amx_tile", "amx_bf16"} <= cpu_features():
        assert AMX not in RUNNABLE and OPS.cpu_isa() != AMX
    elif AMX in RUNNABLE:
        assert RUNNABLE[0] == AMX
    assert EMULATED not in RUNNABLE


@pytest.mark.parametrize("name", [AMX, EMULATED])
def test_what_does_not_run_here_cannot_be_forced(name, monkeypatch):
    """In this process by Python, in a fresh one by the library itself."""
    if name in RUNNABLE:
        pytest.skip("this CPU has tiles")
    said = f"{name} is not an instruction set .*choose one of {', '.join(RUNNABLE)}"
    if name != EMULATED:
        with pytest.raises(RuntimeError, match=f"isa={said}"):
            OPS.cpu_use_isa(name)
    monkeypatch.setenv(native.ENVIRONMENT, name)
    with pytest.raises(BackendError, match=f"SLAB_KERNELS_CPU_ISA={said}"):
        native.load_library()
    code = f"import torch; torch.ops.load_library({str(native.LIBRARY)!r});"
    code += "print(torch.ops.slab_kernels.cpu_isa())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and f"SLAB_KERNELS_CPU_ISA={name} is not" in done.stderr


def test_the_library_holds_the_four_products_of_tiles(recipe):
    """If the compiler that is here built it."""
    content = native.LIBRARY.read_bytes()
    assert [registers for registers in PRODUCTS if encoded(*registers) not in content] == []


@linux
@pytest.mark.skipif(EMULATED not in PAIRS, reason="the emulation needs AVX512-BF16")
def test_its_instructions_compute_what_the_emulated_ones_do(recipe, tmp_path):
    """The kernel is compiled as for the library and executed; where the CPU refuses its tile
    instructions, they are read byte by byte and emulated (amx_trap.cpp)."""
    compiler, objects = recipe.find_compiler(), []
    emulated = "cpu/avx512_amx_emulated.cpp"
    command = recipe.compile_command(compiler, emulated, tmp_path)
    here = [*command[:-1], "-I", str(ROOT / "csrc/cpu")]  # the last one is the source
    commands = [recipe.compile_command(compiler, "cpu/avx512_amx.cpp", tmp_path), command]
    commands.append([*here, str(Path(__file__).with_name("amx_trap.cpp"))])
    for number, command in enumerate(commands):
        objects.append(str(tmp_path / f"{number}.o"))
        subprocess.run([*command, "-o", objects[-1]], check=True)
    program = str(tmp_path / "amx_trap")
    subprocess.run([*compiler, *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, f"the program ended with {done.returncode}"
    found = json.loads(done.stdout)
    assert found.pop("cases") == 72 and found.pop("different") == 0
    if AMX not in RUNNABLE and "amx_tile" not in cpu_features():
        assert found["ldtilecfg"] == found["tilerelease"] == 72  # once for each range of rows
        assert min(found.values()) > 0


def ones(K: int):
    """One output whose weight is 1 at the first two inputs of each group of four, 0 elsewhere."""
    packed = random_packed(PackedLayout(1, K, "fp16"))
    packed.metadata.fill_(0x44)
    packed.values.fill_(1.0)
    return cpu.BACKEND.prepare(packed)


@pytest.mark.parametrize(
    "terms, result",
    [
        # Odd inputs of a tile add up before they meet even ones: one by one, 2^24 would swallow
        # them.
        ({0: 2.0**24, 1: 1.0, 5: 1.0, 32: -(2.0**24)}, 2.0),
        # So they do before they meet the inputs of earlier tiles.
        ({0: 2.0**24, 32: 1.0, 33: 1.0, 64: -(2.0**24)}, 2.0),
        # Within the even ones it is one after the other, and a half goes to the even neighbour.
        ({0: 2.0**24, 4: 1.0, 8: 1.0, 32: -(2.0**24)}, 0.0),
        ({0: 2.0**24, 4: 3.0, 32: -(2.0**24)}, 4.0),
        # Denormals are taken as zero, and become zero.
        ({0: 2.0**-127, 1: 2.0**-127}, 0.0),
        ({0: 1.5 * 2.0**-126, 1: -(2.0**-126)}, 0.0),
        ({0: 2.0**-126, 1: 2.0**-126}, 2.0**-125),
    ],
)
def test_how_tdpbf16ps_adds_up_and_rounds(isa, terms, result):
    x = torch.zeros(20, 128, dtype=torch.bfloat16)
    for k, number in terms.items():
        x[7, k] = number
    y = cpu.BACKEND.linear(x, ones(128))[:, 0]
    assert y[7] == result and int((y != 0).sum()) == int(result != 0)


def test_the_settings_of_the_callers_arithmetic_stay(isa):
    """Denormals are flushed by the product alone, not by what the thread computes after it."""
    cpu.BACKEND.linear(torch.ones(4, 128, dtype=torch.bfloat16), ones(128))
    tiny = torch.full((8,), 2.0**-126)
    assert bool((tiny * 0.5 == 2.0**-127).all())
