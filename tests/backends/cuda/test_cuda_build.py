"""The CUDA kernels compile without a GPU, by nvcc and by NVRTC; the cache, the images of setup.py,
and what a wheel holds."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from sass.counter import rows_only

from slab_kernels.backends.cuda import compile as recipe
from slab_kernels.backends.cuda import images, nvrtc

ROOT = Path(__file__).resolve().parents[3]
# Small, with everything that the real source has: format.h, a header beside it, one struct by
# value.
SMALL = {
    "format.h": (ROOT / "csrc/format.h").read_text(encoding="utf-8"),
    "cuda/ptx.cuh": '#pragma once\n#include "../format.h"\n'
    "__device__ inline uint32_t twice(uint32_t n) { return 2 * n; }\n",
    "cuda/small.cu": '#include "ptx.cuh"\nstruct Params { uint32_t* y; int64_t n; };\n'
    'extern "C" __global__ void small_kernel(const __grid_constant__ Params p) {\n'
    "  for (int64_t i = threadIdx.x; i < p.n; i += blockDim.x) p.y[i] = "
    "twice(slab::complement_nibbles(uint32_t(i)));\n}\n",
}
TARGETS = (*recipe.ARCHITECTURES, recipe.FALLBACK)
needs_nvrtc = pytest.mark.skipif(
    nvrtc.find() is None, reason="no libnvrtc: pip install nvidia-cuda-nvrtc"
)


def nvcc_or_none() -> str | None:
    try:
        return recipe.find_nvcc()
    except recipe.Impossible:
        return None


needs_nvcc = pytest.mark.skipif(
    nvcc_or_none() is None, reason="no nvcc: pip install nvidia-cuda-nvcc"
)


def write(folder: Path, sources: dict[str, str]) -> Path:
    for name, text in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def machine(image: bytes) -> int:
    """The architecture number in a cubin's ELF header: the low byte of e_flags, 13.0's second
    byte."""
    flags = int.from_bytes(image[48:52], "little")
    return flags >> 8 & 0xFF if image[7] == 0x41 else flags & 0xFF


@pytest.fixture
def cache(monkeypatch, tmp_path):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SLAB_KERNELS_CACHE", str(folder))
    return folder


@pytest.fixture
def counted(monkeypatch):
    """NVRTC's compilations, without their cost."""
    calls = []

    def compile_unit(sources, unit, architecture, library):
        calls.append((unit, architecture))
        return f"{unit} {architecture} {recipe.digest(sources)}".encode()

    monkeypatch.setattr(nvrtc, "compile_unit", compile_unit)
    return calls


LIBRARY = nvrtc.Nvrtc(None, "", "13.0", frozenset({80, 86, 89, 90, 100, 120, 121}))


def test_no_source_tells_assembled_architectures_apart():
    """They are assembled from one PTX, in which __CUDA_ARCH__ is 800."""
    conditions = [
        line.strip()
        for text in recipe.read_sources(ROOT / "csrc").values()
        for line in text.splitlines()
        if "__CUDA_ARCH__" in line
    ]
    assert conditions and set(conditions) == {"#if __CUDA_ARCH__ >= 900"}


# ---- NVRTC

ONE_OF_EACH_KIND = (
    "narrow_w16_three",
    "narrow_int4_one",
    "wide_int8_one_t16",
    "wide_w16_one_any_t8",
    "linear_int8_any_t64",
    "linear_int4_one_t32",
    "adapter_t32",
    "tall_w16_none_t64",
    "planes_int4_three_t32",
    "planes_w16_any_t32",
    "rebuild_int4_one_t64",
)
ONE_OF_EACH_PREFILL = (
    "one_w16_t256",
    "both_int4_t64",
    "rebuild_int8_one_t128",
    "rebuild_w16_any_t64",
)


@needs_nvrtc
@pytest.mark.parametrize("target", TARGETS)
def test_nvrtc_compiles_for(target):
    image = nvrtc.compile_unit(SMALL, "small", target)
    assert b"small_kernel" in image
    if target == recipe.FALLBACK:
        assert b".target sm_80" in image and b".visible .entry small_kernel(" in image
    else:
        assert image.startswith(b"\x7fELF") and machine(image) == int(re.sub(r"\D", "", target))


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.skipif(recipe.source_folder() is None, reason="no csrc/cuda/*.cu")
def test_nvrtc_compiles_the_real_source(request):
    """To PTX, one kernel of each kind, or all of them with --full.

    That the assembler takes it is `test_images_of_this_checkout`'s.
    """
    sources = dict(images.kernel_sources())
    if not request.config.getoption("full"):
        sources["cuda/linear.cu"] = rows_only(sources["cuda/linear.cu"], ONE_OF_EACH_KIND)
        sources["cuda/prefill.cu"] = rows_only(sources["cuda/prefill.cu"], ONE_OF_EACH_PREFILL)
    for unit in recipe.units(sources):
        target = recipe.FALLBACK if recipe.is_for(unit, recipe.FALLBACK) else "compute_90a"
        assert b".visible .entry" in nvrtc.compile_unit(sources, unit, target)


@needs_nvrtc
def test_nvrtc_quotes_the_compiler():
    broken = SMALL | {"cuda/ptx.cuh": "#error no such thing\n"}
    with pytest.raises(
        nvrtc.CompileError,
        match=r"(?s)cuda/small.cu for sm_90a: NVRTC_ERROR_COMPILATION.*no such thing",
    ):
        nvrtc.compile_unit(broken, "small", "sm_90a")


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_120a"),
        ((12, 1), "sm_121"),
        ((13, 0), "compute_80"),
    ],
)
def test_what_nvrtc_is_asked_for(capability, target):
    assert nvrtc.target(LIBRARY, capability) == target


def test_libraries_of_torchs_cuda_come_first(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_loader("nvidia", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: spec if name == "nvidia" else real(name)
    )
    for name in (
        "cu13/lib/libnvrtc.so.13",
        "cu13/lib/libnvrtc.alt.so.13",
        "cu13/lib/libnvrtc-builtins.so.13.0",
        "cuda_nvrtc/lib/libnvrtc.so.12",
    ):
        write(tmp_path, {name: ""})
    ours = [path.name for path in nvrtc.places("12") if tmp_path in path.parents]
    assert ours == ["libnvrtc.so.12", "libnvrtc.so.13"]
    assert [path.name for path in nvrtc.places("13") if tmp_path in path.parents] == ours[::-1]


# ---- the cache


def test_cache_hit_miss_and_damage(cache, counted):
    def compiled(**changed):
        return images.compiled(SMALL | changed, "small", "sm_80", LIBRARY)

    first = compiled()
    assert compiled() == first and len(counted) == 1
    (kept,) = cache.iterdir()
    assert kept.name.startswith("small.sm_80.") and kept.suffix == ".cubin"
    for damaged in (kept.read_bytes()[:-1], b"", b"x" + kept.read_bytes()[1:]):
        kept.write_bytes(damaged)
        assert compiled() == first
        assert compiled() == first
    assert len(counted) == 4
    assert compiled(**{"cuda/ptx.cuh": ""}) != first, "any source decides"
    assert len(list(cache.iterdir())) == 2, "and no temporary file is left"
    images.compiled(SMALL, "small", "sm_80", LIBRARY._replace(version="13.1"))
    images.compiled(SMALL, "small", "compute_80", LIBRARY)
    assert len(counted) == 7


@pytest.mark.parametrize("named", ["file/below", "/proc/slab_kernels"])
def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path, counted, named):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLAB_KERNELS_CACHE", str(tmp_path / named))
    assert images.compiled(SMALL, "small", "sm_80", LIBRARY) == images.compiled(
        SMALL, "small", "sm_80", LIBRARY
    )
    assert len(counted) == 2


def test_the_cache_is_its_users_alone_whatever_the_umask(cache, counted):
    before = os.umask(0)
    try:
        images.compiled(SMALL, "small", "sm_80", LIBRARY)
    finally:
        os.umask(before)
    (kept,) = cache.iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (cache, kept)] == [0o700, 0o600]


@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o722])
def test_what_others_may_write_is_not_run(cache, counted, capsys, what, mode):
    images._tell_once.cache_clear()
    right = images.compiled(SMALL, "small", "sm_80", LIBRARY)
    (kept,) = cache.iterdir()
    planted = b"planted"
    kept.write_bytes(planted + hashlib.sha256(planted).digest())
    (cache if what == "folder" else kept).chmod(mode)
    for _ in range(2):
        assert images.compiled(SMALL, "small", "sm_80", LIBRARY) == right
    assert len(counted) == (3 if what == "folder" else 2)  # the file is replaced by one of ours
    said = capsys.readouterr().err
    assert said.count("may be written by other users") == said.count(f"mode {mode:04o}") == 1


def test_what_belongs_to_somebody_else_is_not_run():
    owned = lambda mode, uid: os.stat_result((mode, 0, 0, 1, uid, 0, 0, 0, 0, 0))  # noqa: E731
    for user in (os.getuid(), 0):
        assert images.distrust(owned(0o40755, user)) is None
    assert "belongs to another user (uid 4321)" in images.distrust(owned(0o40700, 4321))


@pytest.mark.slow
@needs_nvrtc
def test_two_processes_at_once(cache):
    code = (
        "import sys, json, hashlib; from slab_kernels.backends.cuda import images, nvrtc\n"
        "print(hashlib.sha256(images.compiled(json.load(sys.stdin), 'small', 'sm_80', "
        "nvrtc.find())).hexdigest())"
    )
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in pair:
        process.stdin.write(json.dumps(SMALL))
        process.stdin.close()
    sums = {process.stdout.read() for process in pair}
    assert [process.wait() for process in pair] == [0, 0] and len(sums) == 1
    assert len(list(cache.iterdir())) == 1


# ---- images made ahead of time


@pytest.fixture
def ahead(monkeypatch, tmp_path):
    """Images of SMALL for every target, as files that hold their own name."""
    write(tmp_path, {recipe.image_name("small", target): target for target in TARGETS})
    (tmp_path / recipe.RECORD).write_text(
        json.dumps({"sources": recipe.digest(SMALL), "images": ["small.sm_80.cubin"]})
    )
    monkeypatch.setattr(images, "IMAGES", tmp_path)
    monkeypatch.setattr(images, "kernel_sources", lambda: SMALL)
    monkeypatch.setattr(nvrtc, "find", lambda major=None: None)
    return tmp_path


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), ["sm_80", "compute_80"]),
        ((8, 6), ["sm_86", "sm_80", "compute_80"]),
        ((8, 7), ["compute_80"]),
        ((9, 0), ["sm_90a", "compute_80"]),
        ((10, 0), ["compute_80"]),
        ((12, 0), ["sm_120a", "compute_80"]),
    ],
)
def test_image_for(ahead, capability, expected):
    assert [
        image.data.rstrip(b"\0").decode() for image in images.images("small", capability)
    ] == expected
    assert images.missing(capability) is None


def test_ptx_ends_as_the_driver_wants_it(ahead):
    assert [image.data[-1:] == b"\0" for image in images.images("small", (8, 0))] == [False, True]


def test_images_of_other_sources_are_not_used(ahead, monkeypatch):
    """A checkout whose csrc was edited since the last build: NVRTC, or a reason, never stale
    code."""
    monkeypatch.setattr(images, "kernel_sources", lambda: SMALL | {"cuda/ptx.cuh": "edited"})
    assert not list(images.images("small", (9, 0)))
    reason = images.missing((9, 0), "13")
    assert "pip install nvidia-cuda-nvrtc, or install again where nvcc is on PATH" in reason
    assert "nvidia-cuda-nvrtc-cu12" in images.missing((9, 0), "12")
    monkeypatch.setattr(nvrtc, "find", lambda major=None: LIBRARY)
    assert images.missing((9, 0), "13") is None


def test_without_sources_and_images(ahead, monkeypatch):
    monkeypatch.setattr(images, "kernel_sources", dict)
    assert images.kernel_units((9, 0)) == ["small"] and images.missing((9, 0)) is None, (
        "the record names them"
    )
    (ahead / recipe.RECORD).write_text("{")
    assert "sources are not installed" in images.missing((9, 0))


def test_a_unit_for_one_architecture(ahead, cache, counted, monkeypatch):
    """Its images are of that one alone, by nvcc and by NVRTC, and no other device misses it."""
    monkeypatch.setattr(recipe, "ONLY_FOR", {"small": ("sm_90a",)})

    def found(capability):
        return [each.data.rstrip(b"\0").decode() for each in images.images("small", capability)]

    assert images.kernel_units((9, 0)) == ["small"] and found((9, 0)) == ["sm_90a"]
    for other in ((8, 0), (8, 6), (10, 0), (12, 0)):
        assert images.kernel_units(other) == [] and found(other) == []
    (ahead / recipe.image_name("small", "sm_90a")).unlink()
    assert "pip install nvidia-cuda-nvrtc" in images.missing((9, 0), "13")
    monkeypatch.setattr(nvrtc, "find", lambda major=None: LIBRARY)
    assert images.missing((9, 0)) is None and len(found((9, 0))) == 1
    assert not found((8, 0)) and counted == [("small", "sm_90a")]
    old = LIBRARY._replace(version="11.7", architectures=frozenset({80, 86}))
    monkeypatch.setattr(nvrtc, "find", lambda major=None: old)
    assert found((9, 0)) == []
    words = "no CUDA kernels of small were built at installation, and NVRTC 11.7 does not compile "
    assert images.missing((9, 0)) == words + "for sm_90a; install a newer nvidia-cuda-nvrtc"


def test_only_the_images_that_a_unit_is_for_are_built(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "ONLY_FOR", {"other": ("sm_90a",)})
    nvcc = stub_of_nvcc(tmp_path, "compute_80 compute_86 compute_89 compute_90 compute_120")
    sources = SMALL | {"cuda/other.cu": SMALL["cuda/small.cu"]}
    recipe.build(tmp_path / "out", write(tmp_path / "csrc", sources), nvcc)
    built = recipe.record(tmp_path / "out")["images"]
    assert [name for name in built if "other" in name] == ["other.sm_90a.cubin"]
    assert len(built) == 1 + len(TARGETS)


@needs_nvcc
def test_nvcc_builds_once_and_again_when_a_source_changes(tmp_path):
    csrc, out = write(tmp_path / "csrc", SMALL), tmp_path / "cubins"
    write(out, {"gone.sm_80.cubin": ""})
    assert recipe.build(out, csrc) == []
    names = {recipe.image_name("small", target) for target in TARGETS}
    assert {path.name for path in out.iterdir()} == {*names, recipe.RECORD}
    for target in recipe.ARCHITECTURES:
        image = (out / recipe.image_name("small", target)).read_bytes()
        assert (
            machine(image) == int(re.sub(r"\D", "", target)) and str(tmp_path).encode() not in image
        )
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    recipe.build(out, csrc)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    (csrc / "cuda/ptx.cuh").write_text("#error edited\n")
    with pytest.raises(recipe.Impossible, match=r"(?s)small.cu .* failed:.*edited"):
        recipe.build(out, csrc)
    assert not recipe.record(out), "half-built images are not taken for new ones"


def stub_of_nvcc(folder: Path, architectures: str) -> str:
    """A program that lists these architectures and writes a file instead of compiling."""
    nvcc = folder / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --list-gpu-arch ] && echo {architectures} && exit\n'
        '[ "$1" = --version ] && exit\n'
        'while [ "$2" ]; do shift; done\necho made >"$1"\n'
    )
    nvcc.chmod(0o755)
    return str(nvcc)


def test_what_the_compiler_warns_of_is_kept_and_compiles_nothing_again(tmp_path):
    nvcc = Path(stub_of_nvcc(tmp_path, "compute_80 compute_90"))
    said = "ptxas info    : (C7510) Potential Performance Loss\n"
    nvcc.write_text(nvcc.read_text() + f"printf '%s' '{said}Used 7 registers' >&2\n")
    csrc, out = write(tmp_path / "csrc", SMALL), tmp_path / "out"
    recipe.build(out, csrc, str(nvcc))
    found = recipe.record(out)
    assert found["warnings"] == {name: [said.strip()] for name in found["images"]}
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    recipe.build(out, csrc, str(nvcc))
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_an_old_nvcc_drops_architectures_with_a_remark(tmp_path):
    nvcc = stub_of_nvcc(tmp_path, "compute_80 compute_90")
    (remark,) = recipe.build(tmp_path / "out", write(tmp_path / "csrc", SMALL), nvcc)
    assert remark == f"{nvcc} is too old for sm_86, sm_89, sm_120a"
    assert recipe.record(tmp_path / "out")["images"] == [
        "small.compute_80.ptx",
        "small.sm_80.cubin",
        "small.sm_90a.cubin",
    ]


@pytest.mark.skipif(not recipe.record(recipe.IMAGES), reason="installed without nvcc")
def test_images_of_this_checkout():
    built = recipe.record(recipe.IMAGES)
    if built["sources"] != recipe.digest(images.kernel_sources()):
        pytest.skip(
            "csrc changed since; python slab_kernels/backends/cuda/compile.py builds them again"
        )
    for name in built["images"]:
        target = name.split(".")[1]
        image = (recipe.IMAGES / name).read_bytes()
        assert f".target {target.replace('compute', 'sm')}".encode() in image or machine(
            image
        ) == int(re.sub(r"\D", "", target))
        assert str(ROOT).encode() not in image


# ---- setup.py


def test_switched_off_or_without_nvcc_an_install_goes_on(setup_py, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SLAB_KERNELS_CUDA", "0")
    assert not setup_py.build_cuda(tmp_path)
    assert "compiles them on first use: SLAB_KERNELS_CUDA=0" in capsys.readouterr().err
    monkeypatch.delenv("SLAB_KERNELS_CUDA")
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "nvcc").write_text("#!/bin/sh\necho no toolkit here >&2\nexit 1\n")
    (bare / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # a wrapper on PATH whose toolkit is gone
    assert not setup_py.build_cuda(tmp_path)
    assert "no toolkit here" in capsys.readouterr().err
    monkeypatch.setenv("SLAB_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="(?s)SLAB_KERNELS_CUDA=1, but .*no toolkit here"):
        setup_py.build_cuda(tmp_path)


def test_wheel_without_native_parts_holds_the_sources(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    for name in ("slab_kernels", "csrc"):
        shutil.copytree(
            ROOT / name,
            source / name,
            ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.tmp", "cubins"),
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(out),
        str(source),
    ]
    environment = {**os.environ, "SLAB_KERNELS_NATIVE": "0", "SLAB_KERNELS_CUDA": "0"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    (wheel,) = out.glob("*-py3-none-any.whl")
    archive = zipfile.ZipFile(wheel)
    packed = {
        name.removeprefix("slab_kernels/csrc/"): archive.read(name).decode()
        for name in archive.namelist()
        if "/csrc/" in name
    }
    assert packed == recipe.read_sources(ROOT / "csrc")
    assert not [name for name in archive.namelist() if name.endswith((".cubin", ".ptx", ".so"))]
    assert "slab_kernels/backends/cuda/driver.py" in archive.namelist()


def test_no_cuda_library_is_linked():
    library = ROOT / "slab_kernels" / "_C.so"
    if not library.exists() or shutil.which("readelf") is None:
        pytest.skip("no native library, or no readelf")
    dynamic = subprocess.run(
        ["readelf", "-d", library], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert needed and not [name for name in needed if re.match(r"libcu|libnv", name)]


def test_importing_opens_nothing():
    code = (
        "import sys, torch, importlib; from pathlib import Path\n"
        "def note(event, given):\n"
        "    if event in ('ctypes.dlopen', 'subprocess.Popen') or (event == 'open' and not "
        "str(given[0]).endswith(('.py', '.pyc'))):\n"
        "        sys.exit(f'{event} {given[:1]}')\n"
        "sys.addaudithook(note)\n"
        "for name in ('compile', 'nvrtc', 'images', 'driver'): "
        "importlib.import_module('slab_kernels.backends.cuda.' + name)\n"
        "assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
