"""backends/cuda/driver.py against a libcuda that only remembers (fake_cuda.c): what is packed,
loaded, allowed and said."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from slab_kernels.backends.cuda import driver, images, layout, plan
from slab_kernels.backends.cuda import launch as launching
from slab_kernels.backends.cuda.gpus import GPUS
from slab_kernels.backends.cuda.images import Image
from slab_kernels.backends.cuda.launch import CudaDevice
from slab_kernels.format import PackedLayout
from slab_kernels.testing import random_packed

SOURCE = Path(__file__).with_name("fake_cuda.c")
compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(compiler is None, reason="no C compiler")


class Params(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("tokens", ctypes.c_int), ("scale", ctypes.c_float)]


class Last(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("count", ctypes.c_uint),
        ("attribute", ctypes.c_int),
        ("value", ctypes.c_int),
        ("launches", ctypes.c_int),
        ("stream", ctypes.c_uint64),
        ("function", ctypes.c_uint64),
        ("context", ctypes.c_uint64),
        ("params", ctypes.c_ubyte * 64),
        ("name", ctypes.c_char * 64),
        ("image", ctypes.c_char * 64),
    ]


class Launched(ctypes.Structure):
    _fields_ = [
        ("stream", ctypes.c_uint64),
        ("kernel", ctypes.c_int),
        ("count", ctypes.c_uint),
        ("attribute", ctypes.c_int),
        ("value", ctypes.c_int),
    ]


class Fake:
    """The library's own memory: `fake.last`, and its counters and switches as attributes."""

    def __init__(self, path: Path):
        object.__setattr__(self, "library", ctypes.CDLL(str(path)))
        object.__setattr__(self, "last", Last.in_dll(self.library, "last"))

    def launches(self) -> list[tuple[str, tuple[int, int, int]]]:
        """Every launch: the kernel's name, and number, id and value of its attributes."""
        assert self.last.launches <= 64
        names = (ctypes.c_char * 64 * 64).in_dll(self.library, "names")
        launched = (Launched * 64).in_dll(self.library, "launched")
        return [
            (names[each.kernel].value.decode(), (each.count, each.attribute, each.value))
            for each in launched[: self.last.launches]
        ]

    def __getattr__(self, name):
        return ctypes.c_int.in_dll(self.library, name).value

    def __setattr__(self, name, value):
        ctypes.c_int.in_dll(self.library, name).value = value


@pytest.fixture
def fresh(monkeypatch):
    """The driver as at the start of a process; what it learns here is forgotten afterwards."""
    for name in ("_modules", "_loaded", "_functions"):
        monkeypatch.setattr(driver, name, {})
    monkeypatch.setattr(driver, "_thread", None)
    monkeypatch.setattr(driver, "_usable", set())
    cached = (
        driver.library,
        driver._properties,
        driver._ordinal,
        driver._primary,
        driver._version,
    )
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda") / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", str(SOURCE), "-o", str(path)], check=True)
    return path


@pytest.fixture
def fake(library, fresh, monkeypatch):
    """A machine with four devices: 0 and 1 of capability 9.0, the others 8.6; one image, of one
    unit."""
    monkeypatch.setattr(driver, "LIBRARY", str(library))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(images, "kernel_units", lambda _: ["linear"])
    monkeypatch.setattr(
        images,
        "images",
        lambda *_: iter([Image("first", b"first image"), Image("second", b"second image")]),
    )
    fake = Fake(library)
    fake.library.clear()
    yield fake
    fake.library.clear()


def properties(device):
    major, minor = (9, 0) if device < 2 else (8, 6)
    return SimpleNamespace(
        name="Fake",
        major=major,
        minor=minor,
        multi_processor_count=132,
        shared_memory_per_block_optin=232448,
    )


def launch(name="linear_w16", shared=0, device=0, params=None, **more):
    driver.launch(
        name,
        (7, 2, 1),
        (128, 1, 1),
        shared,
        params or Params(0x123456789ABC, 5, 0.5),
        device=device,
        stream=0xABCDEF012345,
        **more,
    )


@needs_compiler
def test_everything_arrives(fake):
    launch(shared=4096)
    last = fake.last
    assert (list(last.grid), list(last.block), last.shared) == ([7, 2, 1], [128, 1, 1], 4096)
    assert last.stream == 0xABCDEF012345 and last.function > 2**32 and last.context == 0x1000
    assert bytes(last.params[:16]) == bytes(Params(0x123456789ABC, 5, 0.5))
    assert (last.name, last.image) == (b"linear_w16", b"first image")
    assert last.count == 0


@needs_compiler
def test_modules_and_functions_are_loaded_once(fake):
    for name in ("a", "b", "a"):
        launch(name)
    driver.load("a", 0)
    assert fake.loads == 1 and fake.last.launches == 3


@needs_compiler
def test_loading_ahead_launches_nothing(fake):
    driver.load("linear_w16", 1)
    assert fake.loads == 1 and fake.last.launches == 0
    words = "there is no kernel absent_one for capability 9.0 in csrc/cuda"
    with pytest.raises(driver.CudaError, match=words):
        driver.load("absent_one", 1)


@needs_compiler
def test_a_unit_that_is_for_another_device_is_not_looked_into(fake, monkeypatch):
    """It has no image there, which is no fault."""
    asked = []

    def images_of(unit, capability, _):
        asked.append((unit, capability))
        return iter([Image(unit, b"image")])

    monkeypatch.setattr(images, "images", images_of)
    monkeypatch.setattr(
        images, "kernel_units", lambda capability: ["linear", "prefill"][: capability[0] - 7]
    )
    for device, units, known in ((0, ["linear", "prefill"], "linear, prefill"),
                                 (2, ["linear"], "linear")):  # fmt: skip
        asked.clear()
        capability = driver.capability(device)
        number = "{}.{}".format(*capability)
        words = f"no kernel absent_one for capability {number} in csrc/cuda ({known})"
        with pytest.raises(driver.CudaError, match=re.escape(words)):
            driver.load("absent_one", device)
        driver.load("linear_w16", device)
        assert asked == [(unit, capability) for unit in units]


@needs_compiler
@pytest.mark.parametrize(
    ("ptx", "version", "asked", "seen"),
    [
        (90, 13000, True, (1, 6, 1)),
        (90, 12030, True, (1, 6, 1)),
        (90, 12020, True, (0, 0, 0)),
        (90, 13000, False, (0, 0, 0)),
        (80, 13000, True, (0, 0, 0)),
    ],
)
def test_dependent_launch_of_kernels_that_wait(fake, ptx, version, asked, seen):
    """The image decides, not the device: a PTX of compute_80 on a newer device has no
    griddepcontrol.wait in it. And the driver, which must keep the attribute in graphs."""
    fake.ptx_version, fake.version = ptx, version
    launch(device=0, dependent=asked)
    assert (fake.last.count, fake.last.attribute, fake.last.value) == seen


PROGRAMMATIC, ORDINARY = (1, 6, 1), (0, 0, 0)  # number, id and value of attributes


def queued_on(device: int, stream: int = 0xABCDEF012345) -> CudaDevice:
    """The device of `cuda.device_of`, on a stream of that handle."""

    def queue(name, grid, block, shared, params, dependent):
        driver.launch(
            name, grid, block, shared, params, device=device, stream=stream, dependent=dependent
        )

    return CudaDevice(GPUS[3], queue)


def run_linear(device: CudaDevice, M: int, rank: int = 1, adapter_rank: int = 0, N: int = 40):
    packed = random_packed(PackedLayout(N, 4096, "int4", 128, rank, adapter_rank))
    state = layout.prepare((packed,), torch.float16)
    launching.linear(torch.ones(M, 4096).half(), state, None, device)


@needs_compiler
@pytest.mark.parametrize("M", (1, 3, 5, 16, 17, 64, 70))
def test_every_kernel_of_a_linear_is_launched_as_a_dependent_one(fake, monkeypatch, M):
    """The first kernel of a call, too, whoever queued the kernel in front of it: it waits by itself
    before it reads x or writes anything. In graph capture the driver gets the same attribute."""
    monkeypatch.setattr(launching, "choose", split_in_two)
    launching.launches.cache_clear()
    run_linear(queued_on(0), M, adapter_rank=3)
    launching.launches.cache_clear()
    names, attributes = zip(*fake.launches(), strict=True)
    assert names[0].startswith("adapter_fp16_t") and names[-1] == (
        "reduce_fp16" if M <= 64 else names[1]
    )
    assert len(names) == (3 if M <= 64 else 2) and set(attributes) == {PROGRAMMATIC}
    assert fake.last.stream == 0xABCDEF012345


def split_in_two(sizes, M, gpu):
    """A plan in which K is split up to 64 tokens; never the rebuilt weight."""
    splits = 2 if M <= 64 and sizes.values != layout.DENSE else 1
    found = plan.plans(sizes, M, gpu, 4 if M <= 64 else 1, splits)
    return min(found, key=lambda each: each.microseconds)


@needs_compiler
@pytest.mark.parametrize("ptx", (80, 86, 89))
def test_no_kernel_of_an_older_image_is_a_dependent_one(fake, ptx):
    """Their code has no wait in it, whatever device they run on."""
    fake.ptx_version = ptx
    run_linear(queued_on(0), 1, adapter_rank=3)
    assert {attributes for _, attributes in fake.launches()} == {ORDINARY}


@needs_compiler
def test_kernels_that_rebuild_a_weight_are_dependent(fake, monkeypatch):
    """They wait before they write over rows that cuBLAS may still read."""
    monkeypatch.setattr(launching, "choose", plan.rebuild)
    launching.launches.cache_clear()
    run_linear(queued_on(0), 3)
    launching.launches.cache_clear()
    assert fake.launches() == [("dense_fp16_int4", PROGRAMMATIC)]


@needs_compiler
def test_shared_memory_is_asked_for_once_and_only_above_48k(fake):
    launch(shared=48 * 1024)
    assert fake.raises == 0
    for shared in (100_000, 200_000, 231_424):
        launch(shared=shared)
    assert (
        fake.raises == 1 and fake.allowed == driver.shared_limit(0) - 1024 == 231_424
    )  # 1024 bytes are static
    with pytest.raises(
        driver.CudaError, match="asks for 231425 bytes of shared memory, device 0 allows it 231424"
    ):
        launch(shared=231_425)


@needs_compiler
def test_a_struct_of_another_size_is_refused(fake):
    fake.parameter_size = 24
    with pytest.raises(
        driver.CudaError, match="kernel linear_w16 takes a struct of 24 bytes, params has 16"
    ):
        launch()
    fake.parameter_size = 16
    launch()


@needs_compiler
def test_a_refused_launch_says_what_was_asked(fake):
    fake.launch_code = 701
    with pytest.raises(driver.CudaError) as caught:
        launch(shared=512)
    assert str(caught.value) == (
        "kernel linear_w16 with grid (7, 2, 1), block (128, 1, 1) and 512 bytes of shared memory "
        "was not launched on device 0: "
        "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (too many resources requested)"
    )
    assert isinstance(caught.value, RuntimeError)
    fake.launch_code = 700
    with pytest.raises(driver.CudaError, match="an earlier kernel may be the cause"):
        launch()


@needs_compiler
def test_an_image_too_new_for_the_driver_gives_way_to_the_next(fake):
    fake.refuse_loads, fake.refuse_code = 1, 222
    launch()
    assert fake.loads == 2 and fake.last.image == b"second image"


@needs_compiler
@pytest.mark.parametrize(
    ("code", "loads"), [(209, 2), (2, 1)]
)  # no binary for the device: the next; out of memory: the end
def test_no_image_will_do(fake, code, loads):
    fake.refuse_loads, fake.refuse_code = 9, code
    with pytest.raises(
        driver.CudaError,
        match=r"kernels of linear were not loaded on device 0, Fake: first: CUDA_ERROR_OTHER",
    ):
        launch()
    assert fake.loads == loads


@needs_compiler
def test_contexts(fake):
    """No context: the primary one, for good. Another device's: switched for the launch and back."""
    launch(device=0)
    launch(device=1)
    assert fake.last.context == 0x1001 and fake.loads == 2
    launch(device=1)
    assert fake.last.context == 0x1001 and fake.loads == 2
    launch(device=0)
    assert fake.last.context == 0x1000 and fake.loads == 2


@needs_compiler
def test_threads_do_not_mix(fake):
    """Each thread has its own argument memory and starts without a context; modules are shared."""
    failed = []

    def work(number):
        try:
            for _ in range(200):
                launch(f"kernel{number}", params=Params(number, number, 0.0))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and fake.loads == 1 and fake.last.launches <= 800


@needs_compiler
def test_properties(fake):
    assert (driver.capability(0), driver.capability(2)) == ((9, 0), (8, 6))
    assert (driver.multiprocessors(0), driver.shared_limit(0)) == (132, 232448)


@needs_compiler
def test_reasons_in_order(fake, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA; install a CUDA build of torch" in driver.missing()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with monkeypatch.context() as patch:
        patch.setattr(driver, "LIBRARY", "libcuda-of-nobody.so.1")
        driver.library.cache_clear()
        reason = (
            "the library libcuda-of-nobody.so.1 of the NVIDIA driver is not found; install the "
            "driver"
        )
        assert driver.missing(0) == reason
        with pytest.raises(driver.CudaError, match=reason):
            launch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert driver.missing() == "torch finds no CUDA device; see nvidia-smi and CUDA_VISIBLE_DEVICES"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(images, "missing", lambda *_: "nothing to run")
    assert driver.missing(0) == "nothing to run"
    monkeypatch.setattr(images, "missing", lambda *_: None)
    assert driver.missing(0) is None
