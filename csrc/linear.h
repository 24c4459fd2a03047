// What the bindings of the products share: bindings.cpp defines types and outputs, weight_of is in
// prepared_bindings.cpp, the products are in exact_linear.cpp.
#pragma once

#include "int16.h"
#include "memory.h"

namespace slab {

// A chunk of work below this many weights x tokens is not worth a second thread (about 10 us of one
// core).
constexpr int64_t kThreadWork = 1 << 17;

int float_type(const char* name, ScalarType type);

// The weight in a prepared tensor, whose header and size are checked.
CpuWeight weight_of(const Tensor& prepared, int64_t out_features, int64_t in_features);

// The tokens [0, count) of x as fp32 rows, padded to whole blocks; x itself if it already is that.
const float* widened(const CpuKernels& run, const void* x, int type, int64_t count,
                     int64_t features, int64_t padded, float* scratch);

// The tokens of x in blocks of cells (launch.h).
void arrange_tokens(const CpuKernels& run, const void* x, int type, const TokenBlocks& blocks,
                    int64_t features, int64_t cells, bool pairs, float* out);

// Calls run(t, x) with at most kTileTokens tokens at a time; of t their number and their y are set.
template <class Run>
void in_calls(const CpuWeight& w, const void* x, int type, int64_t tokens, void* y,
              int64_t y_stride, const Run& run) {
  const int64_t bytes = type == kFloat32 ? 4 : 2;
  const TokenBlocks calls(tokens, kTileTokens);
  for (int64_t i = 0; i < calls.count; ++i) {
    const int64_t first = calls.begin(i);
    CpuTokens t{};
    t.count = calls.begin(i + 1) - first;
    t.y = static_cast<uint8_t*>(y) + first * y_stride * bytes;
    t.y_stride = y_stride;
    t.y_type = type;
    run(t, static_cast<const uint8_t*>(x) + first * w.in_features * bytes);
  }
}

// z = x Q, for the kernels to add P z.
void run_adapter(const CpuKernels& run, const CpuWeight& w, const CpuTokens& t);

// y of any number of tokens by the exact products; rows of y are y_stride numbers apart.
void run_exact(const CpuKernels& run, const CpuWeight& w, const void* x, int type, int64_t tokens,
               void* y, int64_t y_stride);

// y of any number of tokens with 16-bit integers; a token with NaN, infinity or numbers from 2^108
// on as run_exact has it.
void run_int16(const CpuKernels& run, const Int16Kernels& kernels, const CpuWeight& w,
               const void* x, int type, int64_t tokens, void* y, int64_t y_stride);

// A contiguous tensor of x's shape with another last size.
Tensor empty_output(const Tensor& x, int64_t out_features);

}  // namespace slab
