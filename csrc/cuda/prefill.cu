// Every kernel for many tokens on Hopper, one row each: compiled for sm_90a alone. Device code
// only, without CUDA or standard headers: nvcc and NVRTC compile the same text.
#include "prefill_kernel.cuh"
#include "prefill_reduce.cuh"

namespace slab {

// Each row defines two kernels, prefill_<kind>_fp16_<name> and prefill_<kind>_bf16_<name>:
//
//   one      a weight without a sign term
//   both     rank one and one plane, for few tokens
//   rebuild  one: rank one and one plane; any: any rank from one on, and planes
//
// t: tokens of a CTA. groups: scale groups of 32 or 64 inputs; kernels of any rank take all of
// them.
//
// clang-format off
//      kind and name                  what it computes values any rank and planes; tokens,
//      warpgroups, CTAs of a cluster and of a multiprocessor, steps of a scale group
#define SLAB_PREFILL_KERNELS(KERNEL) \
  KERNEL(one, w16_t64,                 kPrefillOne,     kW16, false,  64, 2, 1, 2, kSteps)         \
  KERNEL(one, w16_t128,                kPrefillOne,     kW16, false, 128, 2, 1, 1, kSteps)         \
  KERNEL(one, w16_t256,                kPrefillOne,     kW16, false, 256, 2, 2, 1, kSteps)         \
  KERNEL(one, int8_t64,                kPrefillOne,     kI8,  false,  64, 2, 1, 2, kSteps)         \
  KERNEL(one, int8_t64_groups,         kPrefillOne,     kI8,  false,  64, 2, 1, 2, kGroupStepsAny) \
  KERNEL(one, int8_t128,               kPrefillOne,     kI8,  false, 128, 2, 1, 1, kSteps)         \
  KERNEL(one, int8_t128_groups,        kPrefillOne,     kI8,  false, 128, 2, 1, 1, kGroupStepsAny) \
  KERNEL(one, int8_t256,               kPrefillOne,     kI8,  false, 256, 2, 2, 1, kSteps)         \
  KERNEL(one, int8_t256_groups,        kPrefillOne,     kI8,  false, 256, 2, 2, 1, kGroupStepsAny) \
  KERNEL(one, int4_t64,                kPrefillOne,     kI4,  false,  64, 2, 1, 2, kSteps)         \
  KERNEL(one, int4_t64_groups,         kPrefillOne,     kI4,  false,  64, 2, 1, 2, kGroupStepsAny) \
  KERNEL(one, int4_t128,               kPrefillOne,     kI4,  false, 128, 2, 1, 1, kSteps)         \
  KERNEL(one, int4_t128_groups,        kPrefillOne,     kI4,  false, 128, 2, 1, 1, kGroupStepsAny) \
  KERNEL(one, int4_t256,               kPrefillOne,     kI4,  false, 256, 2, 2, 1, kSteps)         \
  KERNEL(one, int4_t256_groups,        kPrefillOne,     kI4,  false, 256, 2, 2, 1, kGroupStepsAny) \
  KERNEL(both, w16_t64,                kPrefillBoth,    kW16, false,  64, 2, 1, 2, kSteps)         \
  KERNEL(both, int8_t64,               kPrefillBoth,    kI8,  false,  64, 2, 1, 2, kSteps)         \
  KERNEL(both, int8_t64_groups,        kPrefillBoth,    kI8,  false,  64, 2, 1, 2, kGroupStepsAny) \
  KERNEL(both, int4_t64,               kPrefillBoth,    kI4,  false,  64, 2, 1, 2, kSteps)         \
  KERNEL(both, int4_t64_groups,        kPrefillBoth,    kI4,  false,  64, 2, 1, 2, kGroupStepsAny) \
  KERNEL(rebuild, w16_one_t64,         kPrefillRebuild, kW16, false,  64, 2, 1, 2, kSteps)         \
  KERNEL(rebuild, w16_one_t128,        kPrefillRebuild, kW16, false, 128, 4, 1, 1, kSteps)         \
  KERNEL(rebuild, w16_one_t256,        kPrefillRebuild, kW16, false, 256, 2, 2, 1, kSteps)         \
  KERNEL(rebuild, int8_one_t64,        kPrefillRebuild, kI8,  false,  64, 2, 1, 2, kSteps)         \
  KERNEL(rebuild, int8_one_t64_groups, kPrefillRebuild, kI8,  false,  64, 2, 1, 2, kGroupStepsAny) \
  KERNEL(rebuild, int8_one_t128,       kPrefillRebuild, kI8,  false, 128, 4, 1, 1, kSteps)         \
  KERNEL(rebuild, int8_one_t128_groups, kPrefillRebuild, kI8,  false, 128, 4, 1, 1, kGroupStepsAny)\
  KERNEL(rebuild, int8_one_t256,       kPrefillRebuild, kI8,  false, 256, 2, 2, 1, kSteps)         \
  KERNEL(rebuild, int8_one_t256_groups, kPrefillRebuild, kI8,  false, 256, 2, 2, 1, kGroupStepsAny)\
  KERNEL(rebuild, int4_one_t64,        kPrefillRebuild, kI4,  false,  64, 2, 1, 2, kSteps)         \
  KERNEL(rebuild, int4_one_t64_groups, kPrefillRebuild, kI4,  false,  64, 2, 1, 2, kGroupStepsAny) \
  KERNEL(rebuild, int4_one_t128,       kPrefillRebuild, kI4,  false, 128, 4, 1, 1, kSteps)         \
  KERNEL(rebuild, int4_one_t128_groups, kPrefillRebuild, kI4,  false, 128, 4, 1, 1, kGroupStepsAny)\
  KERNEL(rebuild, int4_one_t256,       kPrefillRebuild, kI4,  false, 256, 2, 2, 1, kSteps)         \
  KERNEL(rebuild, int4_one_t256_groups, kPrefillRebuild, kI4,  false, 256, 2, 2, 1, kGroupStepsAny)\
  KERNEL(rebuild, w16_any_t64,         kPrefillRebuild, kW16, true,   64, 2, 1, 2, kSteps)         \
  KERNEL(rebuild, w16_any_t128,        kPrefillRebuild, kW16, true,  128, 2, 1, 1, kSteps)         \
  KERNEL(rebuild, int8_any_t64,        kPrefillRebuild, kI8,  true,   64, 2, 1, 2, kGroupStepsAny) \
  KERNEL(rebuild, int8_any_t128,       kPrefillRebuild, kI8,  true,  128, 2, 1, 1, kGroupStepsAny) \
  KERNEL(rebuild, int4_any_t64,        kPrefillRebuild, kI4,  true,   64, 2, 1, 2, kGroupStepsAny) \
  KERNEL(rebuild, int4_any_t128,       kPrefillRebuild, kI4,  true,  128, 2, 1, 1, kGroupStepsAny)
// clang-format on

#define SLAB_PREFILL(kernel, pair, ...)                                            \
  extern "C" __global__ void __cluster_dims__(pair) __launch_bounds__(             \
      PrefillTraits<__VA_ARGS__>::kThreads, PrefillTraits<__VA_ARGS__>::kResident) \
      kernel(const __grid_constant__ PrefillParams params) {                       \
    prefill<PrefillTraits<__VA_ARGS__>>(params);                                   \
  }
#define SLAB_PREFILL_PAIR(kind, name, what, values, any, tokens, groups, pair, ctas, steps)       \
  SLAB_PREFILL(prefill_##kind##_fp16_##name, pair, Fp16, what, values, any, tokens, groups, pair, \
               ctas, steps)                                                                       \
  SLAB_PREFILL(prefill_##kind##_bf16_##name, pair, Bf16, what, values, any, tokens, groups, pair, \
               ctas, steps)

#define SLAB_PREFILL_REDUCE(kernel, T)                       \
  extern "C" __global__ void __launch_bounds__(128, 8)       \
      kernel(const __grid_constant__ PrefillParams params) { \
    prefill_reduce<T>(params);                               \
  }

SLAB_PREFILL_KERNELS(SLAB_PREFILL_PAIR)
SLAB_PREFILL_REDUCE(prefill_reduce_fp16, Fp16)
SLAB_PREFILL_REDUCE(prefill_reduce_bf16, Bf16)

}  // namespace slab
