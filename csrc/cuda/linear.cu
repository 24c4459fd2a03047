// Every kernel of the CUDA backend that is compiled for all architectures, one row each; prefill.cu
// has those for Hopper alone. Device code only, without CUDA or standard headers: nvcc and NVRTC
// compile the same text.
#include "bias.cuh"
#include "dense.cuh"
#include "linear.cuh"
#include "narrow.cuh"
#include "rebuild.cuh"
#include "wide.cuh"

namespace slab {

// y = the sum of the splits, in their order, + bias. The y index of a CTA is its token.
template <class Activation>
__device__ __forceinline__ void reduce(const LinearParams& params) {
  let_successor_start();
  wait_for_predecessor();
  const int feature = blockIdx.x * blockDim.x + threadIdx.x;
  if (feature >= params.out_features) return;
  const int64_t to = int64_t(blockIdx.y) * params.out_features + feature;
  float sum = 0.0f;
  for (int split = 0; split < params.splits; ++split) {
    // A plain load, not through the read-only cache: partial was written while this kernel ran.
    const float* const from =
        params.partial + int64_t(split) * params.tokens * params.out_features + to;
    sum += *static_cast<const volatile float*>(from);
  }
  reinterpret_cast<uint16_t*>(params.y)[to] = Activation::narrow(sum + bias_of(params, feature));
}

// Each row defines two kernels, <family>_fp16_<name> and <family>_bf16_<name>:
//
//   linear   the fused linear of one sign plane: three value types, rank one or any
//   adapter  z = x Q of an adapter, launched before it (partial sums in fp32); t16 is a wide kernel
//   tall     the fused linear with 64 rows a warp, where registers allow it: half as many reads and
//            products of activations
//   planes   the fused linear of two or three sign planes of rank one, or any of any rank
//
// t32 and t64 are the tokens of a warp. A CTA has at most 256 threads, so that each may take 255
// registers.
//
// clang-format off
//      family   name            values   rank       planes   row pairs, token tiles of a warp
#define SLAB_LINEAR_KERNELS(KERNEL)                                        \
  KERNEL(linear,  w16_one_t32,    kW16,    kRankOne,  1,          1, 4)    \
  KERNEL(linear,  w16_any_t32,    kW16,    kRankAny,  1,          1, 4)    \
  KERNEL(linear,  int8_one_t32,   kI8,     kRankOne,  1,          1, 4)    \
  KERNEL(linear,  int8_any_t32,   kI8,     kRankAny,  1,          1, 4)    \
  KERNEL(linear,  int4_one_t32,   kI4,     kRankOne,  1,          1, 4)    \
  KERNEL(linear,  int4_any_t32,   kI4,     kRankAny,  1,          1, 4)    \
  KERNEL(adapter, t32,            kDense,  kRankAny,  1,          1, 4)    \
  KERNEL(linear,  w16_one_t64,    kW16,    kRankOne,  1,          1, 8)    \
  KERNEL(linear,  w16_any_t64,    kW16,    kRankAny,  1,          1, 8)    \
  KERNEL(linear,  int8_one_t64,   kI8,     kRankOne,  1,          1, 8)    \
  KERNEL(linear,  int8_any_t64,   kI8,     kRankAny,  1,          1, 8)    \
  KERNEL(linear,  int4_one_t64,   kI4,     kRankOne,  1,          1, 8)    \
  KERNEL(linear,  int4_any_t64,   kI4,     kRankAny,  1,          1, 8)    \
  KERNEL(adapter, t64,            kDense,  kRankAny,  1,          1, 8)    \
  KERNEL(tall,    w16_one_t32,    kW16,    kRankOne,  1,          2, 4)    \
  KERNEL(tall,    w16_none_t64,   kW16,    kRankNone, 1,          2, 8)    \
  KERNEL(planes,  w16_two_t32,    kW16,    kRankOne,  2,          1, 4)    \
  KERNEL(planes,  w16_three_t32,  kW16,    kRankOne,  3,          1, 4)    \
  KERNEL(planes,  w16_any_t32,    kW16,    kRankAny,  kPlanesAny, 1, 4)    \
  KERNEL(planes,  int8_two_t32,   kI8,     kRankOne,  2,          1, 4)    \
  KERNEL(planes,  int8_three_t32, kI8,     kRankOne,  3,          1, 4)    \
  KERNEL(planes,  int8_any_t32,   kI8,     kRankAny,  kPlanesAny, 1, 4)    \
  KERNEL(planes,  int4_two_t32,   kI4,     kRankOne,  2,          1, 4)    \
  KERNEL(planes,  int4_three_t32, kI4,     kRankOne,  3,          1, 4)    \
  KERNEL(planes,  int4_any_t32,   kI4,     kRankAny,  kPlanesAny, 1, 4)

// The kernels for up to 16 tokens, <family>_fp16_<name> and <family>_bf16_<name>. A CTA has at most
// 512 threads. none, one, two, three: sign planes. groups: scale groups of 32 or 64 inputs; kernels
// of several planes take all of them.
//
//   narrow  few tokens, of any rank if there is one
//   wide    t16: up to 16 tokens of rank one or none; any_t8: up to 8 tokens of any rank
//
//      family  name             values  planes  steps of a scale group
#define SLAB_DECODE_KERNELS(KERNEL)                                     \
  KERNEL(narrow, w16_none,         kW16,   0,      kSteps)              \
  KERNEL(narrow, w16_one,          kW16,   1,      kSteps)              \
  KERNEL(narrow, w16_two,          kW16,   2,      kSteps)              \
  KERNEL(narrow, w16_three,        kW16,   3,      kSteps)              \
  KERNEL(narrow, int8_none,        kI8,    0,      kSteps)              \
  KERNEL(narrow, int8_one,         kI8,    1,      kSteps)              \
  KERNEL(narrow, int8_none_groups, kI8,    0,      kGroupStepsAny)      \
  KERNEL(narrow, int8_one_groups,  kI8,    1,      kGroupStepsAny)      \
  KERNEL(narrow, int8_two,         kI8,    2,      kGroupStepsAny)      \
  KERNEL(narrow, int8_three,       kI8,    3,      kGroupStepsAny)      \
  KERNEL(narrow, int4_none,        kI4,    0,      kSteps)              \
  KERNEL(narrow, int4_one,         kI4,    1,      kSteps)              \
  KERNEL(narrow, int4_none_groups, kI4,    0,      kGroupStepsAny)      \
  KERNEL(narrow, int4_one_groups,  kI4,    1,      kGroupStepsAny)      \
  KERNEL(narrow, int4_two,         kI4,    2,      kGroupStepsAny)      \
  KERNEL(narrow, int4_three,       kI4,    3,      kGroupStepsAny)

//      family   name                  values  planes  steps of a scale group, any rank
#define SLAB_WIDE_KERNELS(KERNEL) \
  KERNEL(wide,    w16_none_t16,         kW16,   0,      kSteps,         false) \
  KERNEL(wide,    w16_one_t16,          kW16,   1,      kSteps,         false) \
  KERNEL(wide,    w16_two_t16,          kW16,   2,      kSteps,         false) \
  KERNEL(wide,    w16_three_t16,        kW16,   3,      kSteps,         false) \
  KERNEL(wide,    int8_none_t16,        kI8,    0,      kSteps,         false) \
  KERNEL(wide,    int8_one_t16,         kI8,    1,      kSteps,         false) \
  KERNEL(wide,    int8_none_t16_groups, kI8,    0,      kGroupStepsAny, false) \
  KERNEL(wide,    int8_one_t16_groups,  kI8,    1,      kGroupStepsAny, false) \
  KERNEL(wide,    int8_two_t16,         kI8,    2,      kGroupStepsAny, false) \
  KERNEL(wide,    int8_three_t16,       kI8,    3,      kGroupStepsAny, false) \
  KERNEL(wide,    int4_none_t16,        kI4,    0,      kSteps,         false) \
  KERNEL(wide,    int4_one_t16,         kI4,    1,      kSteps,         false) \
  KERNEL(wide,    int4_none_t16_groups, kI4,    0,      kGroupStepsAny, false) \
  KERNEL(wide,    int4_one_t16_groups,  kI4,    1,      kGroupStepsAny, false) \
  KERNEL(wide,    int4_two_t16,         kI4,    2,      kGroupStepsAny, false) \
  KERNEL(wide,    int4_three_t16,       kI4,    3,      kGroupStepsAny, false) \
  KERNEL(wide,    w16_one_any_t8,       kW16,   1,      kSteps,         true) \
  KERNEL(wide,    w16_two_any_t8,       kW16,   2,      kSteps,         true) \
  KERNEL(wide,    w16_three_any_t8,     kW16,   3,      kSteps,         true) \
  KERNEL(wide,    int8_one_any_t8,      kI8,    1,      kGroupStepsAny, true) \
  KERNEL(wide,    int8_two_any_t8,      kI8,    2,      kGroupStepsAny, true) \
  KERNEL(wide,    int8_three_any_t8,    kI8,    3,      kGroupStepsAny, true) \
  KERNEL(wide,    int4_one_any_t8,      kI4,    1,      kGroupStepsAny, true) \
  KERNEL(wide,    int4_two_any_t8,      kI4,    2,      kGroupStepsAny, true) \
  KERNEL(wide,    int4_three_any_t8,    kI4,    3,      kGroupStepsAny, true) \
  KERNEL(adapter, t16,                  kDense, 0,      kSteps,         false)

// The fused linear that rebuilds W in registers: rank one and one plane, or `any` rank and planes.
//
//      family   name           values  any    token tiles of a warp
#define SLAB_REBUILD_KERNELS(KERNEL)             \
  KERNEL(rebuild, w16_one_t64,   kW16,   false, 8)  \
  KERNEL(rebuild, w16_any_t64,   kW16,   true,  8)  \
  KERNEL(rebuild, int8_one_t64,  kI8,    false, 8)  \
  KERNEL(rebuild, int8_any_t64,  kI8,    true,  8)  \
  KERNEL(rebuild, int4_one_t64,  kI4,    false, 8)  \
  KERNEL(rebuild, int4_any_t64,  kI4,    true,  8)  \
  KERNEL(rebuild, w16_one_t128,  kW16,   false, 16) \
  KERNEL(rebuild, w16_any_t128,  kW16,   true,  16) \
  KERNEL(rebuild, int8_one_t128, kI8,    false, 16) \
  KERNEL(rebuild, int8_any_t128, kI8,    true,  16) \
  KERNEL(rebuild, int4_one_t128, kI4,    false, 16) \
  KERNEL(rebuild, int4_any_t128, kI4,    true,  16)

// dense rebuilds the weight, for cuBLAS. `any` takes any rank and planes, the others at most rank
// one and one plane.
//
//      name      values  any   CTAs per SM
#define SLAB_DENSE_KERNELS(KERNEL) \
  KERNEL(w16,      kW16, false, 4) \
  KERNEL(w16_any,  kW16, true,  2) \
  KERNEL(int8,     kI8,  false, 4) \
  KERNEL(int8_any, kI8,  true,  2) \
  KERNEL(int4,     kI4,  false, 4) \
  KERNEL(int4_any, kI4,  true,  2)
// clang-format on

#define SLAB_KERNEL_OF(threads, name, ctas_per_sm, body)             \
  extern "C" __global__ void __launch_bounds__(threads, ctas_per_sm) \
      name(const __grid_constant__ LinearParams params) {            \
    body;                                                            \
  }
#define SLAB_KERNEL(name, ctas_per_sm, body) SLAB_KERNEL_OF(256, name, ctas_per_sm, body)

#define SLAB_LINEAR(kernel, T, values, rank, planes, pairs, token_tiles) \
  SLAB_KERNEL(kernel, 1,                                                 \
              (linear<LinearTraits<T, values, rank, planes, pairs, token_tiles>>(params)))

#define SLAB_LINEAR_PAIR(family, name, ...)            \
  SLAB_LINEAR(family##_fp16_##name, Fp16, __VA_ARGS__) \
  SLAB_LINEAR(family##_bf16_##name, Bf16, __VA_ARGS__)

#define SLAB_DECODE(kernel, family, T, values, planes, group_steps) \
  SLAB_KERNEL_OF(512, kernel, 1, (family<DecodeTraits<T, values, planes, group_steps>>(params)))

#define SLAB_DECODE_PAIR(family, name, ...)                    \
  SLAB_DECODE(family##_fp16_##name, family, Fp16, __VA_ARGS__) \
  SLAB_DECODE(family##_bf16_##name, family, Bf16, __VA_ARGS__)

#define SLAB_WIDE(kernel, T, values, planes, group_steps, any_rank) \
  SLAB_KERNEL_OF(512, kernel, 1,                                    \
                 (wide<WideTraits<T, values, planes, group_steps, any_rank>>(params)))

#define SLAB_WIDE_PAIR(family, name, ...)            \
  SLAB_WIDE(family##_fp16_##name, Fp16, __VA_ARGS__) \
  SLAB_WIDE(family##_bf16_##name, Bf16, __VA_ARGS__)

#define SLAB_REBUILD(kernel, T, values, any, token_tiles) \
  SLAB_KERNEL(kernel, 1, (rebuild_linear<RebuildTraits<T, values, any, token_tiles>>(params)))

#define SLAB_REBUILD_PAIR(family, name, ...)            \
  SLAB_REBUILD(family##_fp16_##name, Fp16, __VA_ARGS__) \
  SLAB_REBUILD(family##_bf16_##name, Bf16, __VA_ARGS__)

#define SLAB_DENSE_PAIR(name, values, any, ctas)                             \
  SLAB_KERNEL(dense_fp16_##name, ctas, (rebuild<Fp16, values, any>(params))) \
  SLAB_KERNEL(dense_bf16_##name, ctas, (rebuild<Bf16, values, any>(params)))

SLAB_DECODE_KERNELS(SLAB_DECODE_PAIR)
SLAB_WIDE_KERNELS(SLAB_WIDE_PAIR)
SLAB_LINEAR_KERNELS(SLAB_LINEAR_PAIR)
SLAB_REBUILD_KERNELS(SLAB_REBUILD_PAIR)
SLAB_DENSE_KERNELS(SLAB_DENSE_PAIR)
SLAB_KERNEL(reduce_fp16, 4, reduce<Fp16>(params))
SLAB_KERNEL(reduce_bf16, 4, reduce<Bf16>(params))

}  // namespace slab
