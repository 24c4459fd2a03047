"""The faults: where each is planted, and the tests that must see it."""

from __future__ import annotations

from .cpu_exact import CPU_EXACT
from .experts import EXPERTS
from .fault import Fault
from .int8_activations import INT8_ACTIVATIONS
from .lora import LORA
from .many_tokens import MANY_TOKENS
from .quantised import QUANTISED
from .solver import SOLVER
from .whole_model import WHOLE_MODEL

CUDA = ("tests/backends/cuda/test_cuda_kernels.py",)
REGIMES = "tests/backends/cuda/test_cuda_regimes.py"
TILES = (f"{REGIMES}::test_small_integers_are_exact_in_every_tile",)
PLACES = (f"{REGIMES}::test_every_pattern_sign_and_code_at_every_place",)
BESIDE = (f"{REGIMES}::test_what_stands_beside_x_reaches_no_result",)
HOPPER = (f"{REGIMES}::test_on_hopper_every_kernel_waits_for_the_one_ahead",)
PLANS = ("tests/backends/cuda/test_cuda_measured.py",)
CPU = ("tests/backends/cpu/test_cpu_backend.py",)
TRITON = ("tests/backends/triton/test_triton_kernels.py",)
INTERPRETED = ("tests/backends/triton/test_triton_interpreter.py",)
IN_INTERPRETER = (("TRITON_INTERPRET", "1"),)
FORMAT = ("tests/format/test_format.py",)

FAULTS = (
    # CUDA kernels
    Fault(
        "the metadata of the wrong lanes",
        "csrc/cuda/*", "T::template mma_sparse<kStep % 2>(group[tile][n], a, b[n], metadata)",
        "T::template mma_sparse<0>(group[tile][n], a, b[n], metadata)", PLACES,
    ),
    Fault(
        "the metadata of the pair's other tile",
        "csrc/cuda/*", "= block.metadata[tile][kStep / 2]", "= block.metadata[1 - tile][kStep / 2]",
        PLACES,
    ),
    Fault(
        "the values of the pair's other tile",
        "csrc/cuda/*", "values = at + tile * Traits::kTileBytes",
        "values = at + (1 - tile) * Traits::kTileBytes", PLACES,
    ),
    Fault(
        "the scale of the tile's other row",
        "csrc/cuda/*", "fmaf(i < 2 ? near : far, group", "fmaf(i < 2 ? far : near, group", PLACES,
    ),
    Fault(
        "a missing barrier",
        "csrc/cuda/*", '"bar.sync %0, %1;"', '"// %0 %1"', CUDA,
    ),
    Fault(
        "a warp whose lanes do not wait for each other's copies",
        "csrc/cuda/*", "copies_wait<kStages - 1>();\n      __syncwarp();",
        "copies_wait<kStages - 1>();", TILES,
    ),
    Fault(
        "a stage overwritten while other lanes may read it",
        "csrc/cuda/*", "__syncwarp();\n      weights.fetch(next, slot);",
        "weights.fetch(next, slot);", TILES,
    ),
    Fault(
        "one stage of the ring read too early",
        "csrc/cuda/*", "@two cp.async.wait_group 0;", "@two cp.async.wait_group 1;", CUDA,
    ),
    Fault(
        "activations read before the kernel ahead has written them",
        "csrc/cuda/*", "    wait_for_predecessor();\n#pragma unroll 1\n    for (int done",
        "#pragma unroll 1\n    for (int done", HOPPER,
    ),
    Fault(
        "a linear that the kernel ahead does not know of",
        "slab_kernels/backends/cuda/launch.py",
        "plan.grid, plan.block, plan.shared_bytes, args, True)",
        "plan.grid, plan.block, plan.shared_bytes, args, False)", HOPPER,
    ),
    Fault(
        "an input too many at the tail of K",
        "csrc/cuda/*", "min(left - int(copy.token_piece) * 8, 8)",
        "min(left + 1 - int(copy.token_piece) * 8, 8)", CUDA,
    ),
    Fault(
        "what stands behind the last input read with it",
        "csrc/cuda/*", "exists && left >= 8 ? tokens", "exists && left > 0 ? tokens", BESIDE,
    ),
    Fault(
        "an input too many at the tail of K, where x travels in the ring",
        "csrc/cuda/*", "min(left - 32 * j, 8)", "min(left + 1 - 32 * j, 8)", BESIDE,
    ),
    Fault(
        "a K block too many for every longer split",
        "csrc/cuda/*", "(place.split < params.k_more ? 1 : 0)",
        "(place.split <= params.k_more ? 1 : 0)", TILES,
    ),
    Fault(
        "the scale of the group before",
        "csrc/cuda/mainloop.cuh", "kStep >> (params.group_steps >> 1)",
        "kStep >> (params.group_steps >> 2)", CUDA,
    ),
    Fault(
        "two columns of sign planes in the wrong order",
        "csrc/cuda/*", "4 * kColumn - T::kIndexAt>(signs[tile][kStep / 2])",
        "4 * (1 - kColumn) - T::kIndexAt>(signs[tile][kStep / 2])", PLACES,
    ),
    Fault(
        "the products with v of another token and rank",
        "csrc/cuda/*", "store_shared(to + (1 + r) * rank_step + t * kColumnRow,",
        "store_shared(to + (1 + t) * rank_step + r * kColumnRow,", TILES,
    ),
    Fault(
        "the ranks of u in the wrong order",
        "csrc/cuda/*", "u[row * params.rank + r]", "u[row * params.rank + params.rank - 1 - r]",
        TILES,
    ),
    Fault(
        "int4 values off by one in bf16",
        "csrc/cuda/*", "0xC320C320u", "0xC321C321u", PLACES,
    ),
    Fault(
        "activations of the second half read from another row",
        "csrc/cuda/*", "(block.tokens ^ (kStep % 2 << 6)) + (kStep / 2 << 7)",
        "(block.tokens ^ (kStep % 2 << 6)) + (kStep / 2 << 8)", CUDA,
    ),
    Fault(
        "a plan measured on another device",
        "slab_kernels/backends/cuda/*.py", "and row.multiprocessors == gpu.multiprocessors\n",
        "\n", PLANS,
    ),
    Fault(
        "a plan measured on another model",
        "slab_kernels/backends/cuda/*.py", "and is_model(gpu, row.gpu)\n", "\n", PLANS,
    ),
    *MANY_TOKENS,
    # CPU kernels
    Fault(
        "the two signs of a group in the wrong order",
        "csrc/cpu/*", "(byte >> (group % 4 * 2 + 1) & 1u)", "(byte >> (group % 4 * 2) & 1u)", CPU,
    ),
    Fault(
        "the scale of the first group for all of a block",
        "csrc/cpu/*", "kb * (kInputs / p.group_size) + s", "kb * (kInputs / p.group_size)", CPU,
    ),
    Fault(
        "one row too many of the last block",
        "csrc/cpu/*", "if (row >= p.out_features) break;", "if (row > p.out_features) break;", CPU,
    ),
    Fault(
        "three planes counted as two",
        "csrc/cpu/*", "p.planes > 1 ? 2 * (p.planes - 1) : 0", "p.planes > 1 ? 2 : 0", CPU,
    ),
    # Triton kernels
    Fault(
        "a token of the next tile in y",
        "slab_kernels/backends/triton/*.py", "mask=(tokens < M)[None, :] & exists[:, None]",
        "mask=(tokens <= M)[None, :] & exists[:, None]", INTERPRETED, IN_INTERPRETER,
    ),
    Fault(
        "int4 codes off by one",
        "slab_kernels/backends/triton/*.py",
        "bitcast=True) - (8388608.0", "bitcast=True) - (8388609.0",
        INTERPRETED, IN_INTERPRETER,
    ),
    Fault(
        "the levels of two planes in the wrong order",
        "slab_kernels/backends/triton/*.py", "2: (3, 1, -3, -1)", "2: (1, 3, -1, -3)", TRITON,
    ),
    Fault(
        "the adapter's first share added by every split",
        "slab_kernels/backends/triton/*.py", "here = split == 0", "here = split >= 0",
        INTERPRETED, IN_INTERPRETER,
    ),
    # The format in bytes
    Fault(
        "the even group in the high nibble",
        "slab_kernels/format/*.py", "return pairs[..., 0] | pairs[..., 1] << 4",
        "return pairs[..., 1] | pairs[..., 0] << 4", FORMAT,
    ),
    Fault(
        "padding is not looked at",
        "slab_kernels/format/*.py", "    if dirty:", "    if False:", FORMAT,
    ),
    Fault(
        "a row of int8 factors twice as coarse",
        "slab_kernels/format/*.py", "torch.where(mantissa == 0.5, exponent - 1, exponent)",
        "torch.where(mantissa == 0.5, exponent, exponent)", FORMAT,
    ),
    Fault(
        "scales as large as the smallest value",
        "slab_kernels/format/*.py", "groups.abs().amax(-1) / high", "groups.abs().amin(-1) / high",
        FORMAT,
    ),
    Fault(
        "-128 among int8 values is taken",
        "slab_kernels/format/*.py", '(tensors["values"] == -128).any()',
        '(tensors["values"] != tensors["values"]).any()', FORMAT,
    ),
    # Folders
    Fault(
        "a finished shard is not looked at again",
        "slab_kernels/models/*.py", "if not is_whole(", "if False and not is_whole(",
        ("tests/compression/test_resume.py",),
    ),
    Fault(
        "a run goes on with other settings",
        "slab_kernels/models/*.py", "before.get(key) != now.get(key)",
        "before.get(key) != before.get(key)", ("tests/compression",), (),
    ),
    Fault(
        "checksums are not compared",
        "slab_kernels/models/*.py", "checksum(data) != entry.checksum",
        "checksum(data) != checksum(data)", ("tests/models/test_checksums.py",),
    ),
    Fault(
        "tied tensors that differ stay tied",
        "slab_kernels/models/*.py", "return torch.equal(first.to(second.dtype), second)",
        "return first.shape == second.shape", ("tests/models",),
    ),
    # Engines and modules
    Fault(
        "a rank's rows as if every rank had its own",
        "slab_kernels/engines/*.py", "rank // copy * size", "rank * size",
        ("tests/engines/test_sharding.py",),
    ),
    Fault(
        "a rank's inputs counted by its own slice",
        "slab_kernels/format/*.py", "self.first_input * tensor.shape[axis]",
        "self.first_input * shape[axis]", ("tests/engines/test_sharding.py",),
    ),
    Fault(
        "prepared weights that outlive a write",
        "slab_kernels/nn/*.py",
        "return same and (traced or sum(map(_version, self.counting)) == self.writes)",
        "return same",
        ("tests/nn",),
    ),
    Fault(
        "prepared weights that outlive an assignment",
        "slab_kernels/nn/*.py",
        "return same and (traced or sum(map(_version, self.counting)) == self.writes)",
        "return traced or sum(map(_version, self.counting)) == self.writes", ("tests/nn",),
    ),
    Fault(
        "few tokens by the dense copy too",
        "slab_kernels/backends/cuda/*.py", "if takes_dense(sizes_of(state), M, device.gpu):",
        "if M >= 0:", ("tests/nn/test_dense_copy.py",),
    ),
    Fault(
        "copies that auto weighs one by one",
        "slab_kernels/backends/*.py", "kept + size <= AUTO_SHARE * (free(device) + kept)",
        "size <= AUTO_SHARE * free(device)", ("tests/nn",),
    ),
    # Methods
    Fault(
        "the sweep pushes its error the wrong way",
        "slab_kernels/methods/solvers/*.py", "error, alpha=-1)", "error, alpha=1)",
        ("tests/methods/test_sweep.py",),
    ),
    Fault(
        "factors balanced the wrong way",
        "slab_kernels/format/*.py", "(high_v.log2() - high_u.log2()) / 2",
        "(high_u.log2() - high_v.log2()) / 2", FORMAT,
    ),
    Fault(
        "perplexity of the token that is given",
        "slab_kernels/evaluate/*.py", "logits.flatten(0, 1), batch[:, 1:].flatten()",
        "logits.flatten(0, 1), batch[:, :-1].flatten()",
        ("tests/text", "tests/compression"),
    ),
    *CPU_EXACT,
    *SOLVER,
    *INT8_ACTIVATIONS,
    *WHOLE_MODEL,
    *EXPERTS,
    *LORA,
    *QUANTISED,
)  # fmt: skip
