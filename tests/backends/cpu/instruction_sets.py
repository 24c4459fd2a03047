"""The instruction sets that the tests of the exact CPU kernels go through."""

from __future__ import annotations

from slab_kernels import native

# Kernels for AMX whose tile registers are emulated; the library never chooses them by itself.
EMULATED = "avx512_amx_emulated"
RUNNABLE = [] if native.missing_library() else native.runnable()
# Those that multiply bf16 by pairs, and the emulated one where it runs.
PAIRS = [name for name in RUNNABLE if name in ("avx512_bf16", "avx512_amx")]
PAIRS += [EMULATED] if "avx512_bf16" in RUNNABLE else []
ALL = RUNNABLE + [name for name in PAIRS if name not in RUNNABLE]
