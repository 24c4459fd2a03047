// The bias, in whatever type it has.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace slab {

// Params is LinearParams or PrefillParams.
template <class Params>
__device__ __forceinline__ float bias_of(const Params& params, int feature) {
  if (params.bias_type == 1) return static_cast<const float*>(params.bias)[feature];
  if (params.bias_type == 2) return widen_fp16(static_cast<const uint16_t*>(params.bias)[feature]);
  if (params.bias_type == 3) return widen_bf16(static_cast<const uint16_t*>(params.bias)[feature]);
  return 0.0f;
}

}  // namespace slab
