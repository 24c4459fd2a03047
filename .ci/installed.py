"""Checks what an installed slab_kernels must do; `.ci/packages` runs it in a fresh environment.

The argument says what was installed: a wheel with CUDA kernels, a native one, or a pure one.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path


def main(kind: str) -> None:
    import slab_kernels

    home = Path(slab_kernels.__file__).parent
    assert Path(sys.prefix) in home.parents, f"{home} is not of this environment"
    assert "torch" not in sys.modules, "importing the package imported torch"
    assert not any(shutil.which(tool) for tool in ("g++", "c++", "clang++", "nvcc")), (
        "a compiler is on PATH"
    )
    assert (home / "_C.so").exists() == (kind != "pure")
    assert bool(list(home.glob("cubins/*"))) == (kind == "cuda")
    assert (home / "csrc" / "linear.cu").exists() or list(home.glob("csrc/**/linear.cu")), (
        "the CUDA sources for NVRTC are missing"
    )

    import torch

    from slab_kernels.backends import dispatch
    from slab_kernels.backends.base import LinearProblem
    from slab_kernels.testing import error_bound, oracle, random_packed

    layout = slab_kernels.PackedLayout(200, 300, "int4", 32, rank=2, adapter_rank=3)
    packed, x = random_packed(layout), torch.randn(5, 300)
    layer = slab_kernels.SlabLinear.from_packed(packed).prepare(activations="exact")
    exact, magnitude = oracle(x, packed)
    assert bool(
        (
            (layer(x).double() - exact).abs() <= error_bound(magnitude, exact, torch.float32, 300)
        ).all()
    )
    assert layer.backend == ("reference" if kind == "pure" else "cpu"), layer.backend
    reasons = dispatch.explain(LinearProblem.of(layout, 1, torch.float32, "cpu"))
    assert kind != "pure" or "was not built" in reasons["cpu"][0]
    on_gpu = dispatch.explain(LinearProblem.of(layout, 1, torch.float16, "cuda"))
    assert torch.cuda.is_available() or (on_gpu["cuda"] and on_gpu["triton"])

    command = [str(Path(sys.executable).parent / "slab-kernels")]
    found = json.loads(
        subprocess.run(
            [*command, "info", "--json"], capture_output=True, text=True, check=True
        ).stdout
    )
    refused = subprocess.run([*command, "inspect", "/nowhere"], capture_output=True, text=True)
    assert refused.returncode == 3 and "Traceback" not in refused.stderr, refused

    from importlib.metadata import entry_points

    assert [
        e.value for e in entry_points(group="vllm.general_plugins") if e.name == "slab_kernels"
    ] == ["slab_kernels.engines:register_with_vllm"]
    size = sum(
        file.stat().st_size
        for file in home.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    )
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    versions |= {name: found["versions"][name] for name in ("transformers", "triton")}
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{kind:24} {named}: {layer.backend} runs, {size / 1e6:.1f} MB installed")


main(sys.argv[1])
