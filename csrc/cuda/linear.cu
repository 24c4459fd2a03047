// Every kernel of the CUDA backend. Device code only, no CUDA or standard headers: nvcc and NVRTC compile the same text.
//
//   linear_<activations>_<values>_<rank>_t<tokens of a warp>   the fused linear: a dozen for each of four token tiles
//   tall_<activations>_<values>_<rank>_t<tokens of a warp>     the same with 64 rows a warp where registers allow it: half
//                                                              the reads and products of activations, a dozen in all
//   planes_<activations>_<values>_<planes>_t<tokens of a warp> two or three sign planes of rank one, or any of any rank
//   adapter_<activations>_t<tokens of a warp>                  z = x Q of an adapter, before it (partial sums, fp32)
//   reduce_<activations>                                       adds the K-splits of a small layer, after it
//   dense_<activations>_<values>[_any]                         the weight rebuilt, for cuBLAS; any: ranks above 1, planes
#include "dense.cuh"
#include "linear.cuh"

namespace slab {

// y = sum of the splits, in their order, + bias. A CTA's y index is its token.
template <class T>
__device__ __forceinline__ void reduce(const LinearParams& p) {
  wait_for_predecessor();
  const int feature = blockIdx.x * blockDim.x + threadIdx.x;
  if (feature >= p.out_features) return;
  const int64_t to = int64_t(blockIdx.y) * p.out_features + feature;
  float sum = 0.0f;
  for (int s = 0; s < p.splits; ++s)  // plain loads: written while this kernel ran
    sum += *static_cast<const volatile float*>(p.partial + int64_t(s) * p.tokens * p.out_features + to);
  reinterpret_cast<uint16_t*>(p.y)[to] = T::narrow(sum + bias_of(p, feature));
}

}  // namespace slab

// 256 threads. Up to 16 tokens two CTAs share an SM (128 registers a thread), above that one has it (255).
#define SLAB_KERNEL(name, occupancy, body)                                                                          \
  extern "C" __global__ void __launch_bounds__(256, occupancy) name(const __grid_constant__ slab::LinearParams p) { \
    body;                                                                                                           \
  }

#define SLAB_LINEAR(act, T, values, kValues, tokens, kTiles, occupancy)             \
  SLAB_KERNEL(linear_##act##_##values##_one_t##tokens, occupancy,                   \
              (slab::linear<slab::T, slab::kValues, slab::kRankOne, 2, kTiles>(p))) \
  SLAB_KERNEL(linear_##act##_##values##_any_t##tokens, occupancy,                   \
              (slab::linear<slab::T, slab::kValues, slab::kRankAny, 2, kTiles>(p)))

#define SLAB_VALUES(act, T, tokens, kTiles, occupancy)      \
  SLAB_LINEAR(act, T, w16, kW16, tokens, kTiles, occupancy) \
  SLAB_LINEAR(act, T, int8, kI8, tokens, kTiles, occupancy) \
  SLAB_LINEAR(act, T, int4, kI4, tokens, kTiles, occupancy) \
  SLAB_KERNEL(adapter_##act##_t##tokens, occupancy, (slab::linear<slab::T, slab::kDense, slab::kRankAny, 2, kTiles>(p)))

#define SLAB_TOKENS(tokens, kTiles, occupancy)       \
  SLAB_VALUES(fp16, Fp16, tokens, kTiles, occupancy) \
  SLAB_VALUES(bf16, Bf16, tokens, kTiles, occupancy)

SLAB_TOKENS(8, 1, 2)
SLAB_TOKENS(16, 2, 2)
SLAB_TOKENS(32, 4, 1)
SLAB_TOKENS(64, 8, 1)

#define SLAB_TALL(act, T, values, kValues, rank, kRank, tokens, kTiles) \
  SLAB_KERNEL(tall_##act##_##values##_##rank##_t##tokens, 1,            \
              (slab::linear<slab::T, slab::kValues, slab::kRank, 4, kTiles>(p)))

#define SLAB_PLANES_TILE(act, T, values, kValues, tokens, kTiles, occupancy)           \
  SLAB_KERNEL(planes_##act##_##values##_two_t##tokens, occupancy,                      \
              (slab::linear<slab::T, slab::kValues, slab::kRankOne, 2, kTiles, 2>(p))) \
  SLAB_KERNEL(planes_##act##_##values##_three_t##tokens, occupancy,                    \
              (slab::linear<slab::T, slab::kValues, slab::kRankOne, 2, kTiles, 3>(p))) \
  SLAB_KERNEL(planes_##act##_##values##_any_t##tokens, occupancy,                      \
              (slab::linear<slab::T, slab::kValues, slab::kRankAny, 2, kTiles, slab::kPlanesAny>(p)))

#define SLAB_PLANES(act, T, values, kValues)          \
  SLAB_PLANES_TILE(act, T, values, kValues, 8, 1, 2)  \
  SLAB_PLANES_TILE(act, T, values, kValues, 32, 4, 1) \
  SLAB_KERNEL(dense_##act##_##values##_any, 2, (slab::rebuild<slab::T, slab::kValues, true>(p)))

#define SLAB_REST(act, T)                                                           \
  SLAB_TALL(act, T, int8, kI8, one, kRankOne, 8, 1)                                 \
  SLAB_TALL(act, T, int8, kI8, one, kRankOne, 16, 2)                                \
  SLAB_TALL(act, T, int4, kI4, one, kRankOne, 8, 1)                                 \
  SLAB_TALL(act, T, int4, kI4, one, kRankOne, 16, 2)                                \
  SLAB_TALL(act, T, w16, kW16, one, kRankOne, 32, 4)                                \
  SLAB_TALL(act, T, w16, kW16, none, kRankNone, 64, 8)                              \
  SLAB_PLANES(act, T, w16, kW16)                                                    \
  SLAB_PLANES(act, T, int8, kI8)                                                    \
  SLAB_PLANES(act, T, int4, kI4)                                                    \
  SLAB_KERNEL(reduce_##act, 4, slab::reduce<slab::T>(p))                            \
  SLAB_KERNEL(dense_##act##_w16, 4, (slab::rebuild<slab::T, slab::kW16, false>(p))) \
  SLAB_KERNEL(dense_##act##_int8, 4, (slab::rebuild<slab::T, slab::kI8, false>(p))) \
  SLAB_KERNEL(dense_##act##_int4, 4, (slab::rebuild<slab::T, slab::kI4, false>(p)))
SLAB_REST(fp16, Fp16)
SLAB_REST(bf16, Bf16)
