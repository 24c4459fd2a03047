"""What runs on machines other than this one: which instruction sets are found there.

The sources of the choice are compiled with a made-up machine (fake_machine.h) and made-up tables
(fake_tables.cpp), which refuse to be asked for where the machine lacks their instructions.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from slab_kernels import native

HERE = Path(__file__).parent
DISPATCH = HERE.parents[2] / "csrc" / "cpu" / "dispatch.cpp"
AVX2 = ["avx2", "fma", "f16c"]
AVX512 = [*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl"]
INT8 = ["avx512vnni", "avx512vbmi", "avx512bitalg", "avx512vpopcntdq"]
BF16 = ["avx512bf16"]
MACHINES = {
    "without vectors": ([], "scalar:scalar"),
    "avx2 without fma": (["avx2", "f16c"], "scalar:scalar"),
    "avx2": (AVX2, "avx2:avx2 scalar:scalar"),
    "avx2 without f16c": (["avx2", "fma"], "scalar:scalar"),
    "avx2 with vnni": ([*AVX2, "avx512vnni"], "avx2:avx2 scalar:scalar"),
    "avx512": (AVX512, "avx512:scalar avx2:avx2 scalar:scalar"),
    "avx512 with vnni only": (
        [*AVX512, "avx512vnni"],
        "avx512:scalar avx2:avx2 scalar:scalar",
    ),
    "avx512 with all of vnni": (
        [*AVX512, *INT8],
        "avx512:avx512_vnni avx2:avx2 scalar:scalar",
    ),
    "avx512 with bf16": (
        [*AVX512, *BF16],
        "avx512_bf16:scalar avx512:scalar avx2:avx2 scalar:scalar avx512_amx_emulated",
    ),
    "avx512 with both": (
        [*AVX512, *INT8, *BF16],
        "avx512_bf16:avx512_vnni avx512:avx512_vnni avx2:avx2 scalar:scalar avx512_amx_emulated",
    ),
    "bf16 without avx512vl": (
        [*AVX512[:-1], *BF16],
        "avx2:avx2 scalar:scalar",
    ),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("this needs g++ on x86-64")
    out = tmp_path_factory.mktemp("dispatch") / "dispatch"
    sources = [str(HERE / "fake_tables.cpp"), str(DISPATCH)]
    flags = ["-std=c++17", "-include", str(HERE / "fake_machine.h"), "-o", str(out)]
    subprocess.run(["g++", *flags, *sources], check=True)
    return out


@pytest.mark.parametrize("name", MACHINES)
def test_a_table_is_asked_for_where_the_machine_runs_it(program, name):
    features, expected = MACHINES[name]
    done = subprocess.run([program, *features], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == (expected, 0)


@pytest.mark.skipif(not native.LIBRARY.exists(), reason="it was not built")
@pytest.mark.skipif(not shutil.which("nm"), reason="this needs binutils")
def test_no_instruction_set_has_code_that_runs_when_the_library_is_loaded():
    """Such code would run on every machine; gcc and clang name it after its file."""
    done = subprocess.run(["nm", native.LIBRARY], capture_output=True, text=True, check=True)
    files = set(re.findall(r"_GLOBAL__sub_I_(\w+\.cpp)", done.stdout))
    if not files:  # the bindings register their functions so
        pytest.skip("the library was stripped of its symbols")
    assert not [name for name in files if (DISPATCH.parent / name).exists()]
