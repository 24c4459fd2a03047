// Calls of the product for many tokens with 16-bit integers (int16.h).
#include <torch/csrc/stable/ops.h>

#include "linear.h"

using namespace slab;

namespace {

// x of a call as integers. Whether token i held numbers only is in finite()[i].
class Quantised {
 public:
  Quantised(const CpuKernels& run, const Int16Kernels& kernels, const CpuWeight& w,
            const TokenBlocks& blocks, const uint8_t* x, int type)
      : cells_(blocks.tokens * w.k_blocks * kInputs / 2),
        steps_(blocks.tokens * w.k_blocks),
        finite_((blocks.tokens + 3) / 4) {
    const int64_t padded = w.k_blocks * kInputs, bytes = type == kFloat32 ? 4 : 2;
    const int64_t grain = 1 + kThreadWork / (blocks.largest() * padded);
    torch::stable::parallel_for(0, blocks.count, grain, [&](int64_t begin, int64_t end) {
      const Scratch row(padded);
      for (int64_t k = w.in_features; k < padded; ++k) row.get()[k] = 0.0f;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = blocks.begin(b), tokens = blocks.begin(b + 1) - first;
        for (int64_t i = 0; i < tokens; ++i) {
          run.widen(x + (first + i) * w.in_features * bytes, type, row.get(), w.in_features);
          finite()[first + i] =
              kernels.quantise(row.get(), w.k_blocks, first + i, blocks.tokens, i, tokens,
                               cells_.get() + first * padded / 2, steps_.get());
        }
      }
    });
  }
  Int16Tokens tokens() const { return {cells_.get(), steps_.get()}; }
  uint8_t* finite() const { return reinterpret_cast<uint8_t*>(finite_.get()); }

 private:
  Scratch cells_, steps_, finite_;
};

// At most kTileTokens tokens.
void run_tokens(const CpuKernels& run, const Int16Kernels& kernels, const CpuWeight& w, CpuTokens t,
                const uint8_t* x, int type) {
  const int64_t padded = w.k_blocks * kInputs, bytes = type == kFloat32 ? 4 : 2;
  t.block_tokens = run.block_tokens;
  const TokenBlocks blocks(t.count, t.block_tokens);
  const Scratch wide(w.adapter_rank ? t.count * padded : 0), z(t.count * w.adapter_padded);
  t.x = wide.get();
  t.z = z.get();
  if (w.adapter_rank)
    arrange_tokens(run, x, type, blocks, w.in_features, padded, false, wide.get());
  run_adapter(run, w, t);
  const Quantised quantised(run, kernels, w, blocks, x, type);
  const Scratch v(w.rank * padded / 2), most(w.rank * w.k_blocks);
  const Int16Factors factors{reinterpret_cast<const int16_t*>(v.get()), most.get()};
  kernels.quantise_factors(w, reinterpret_cast<int16_t*>(v.get()), most.get());
  constexpr int64_t unit = 4;  // row blocks that a thread takes whole
  torch::stable::parallel_for(
      0, (w.row_blocks + unit - 1) / unit, 1 + kThreadWork / (unit * kRows * padded * t.count),
      [&](int64_t begin, int64_t end) {
        const int64_t last = end * unit < w.row_blocks ? end * unit : w.row_blocks;
        kernels.tile(w, t, quantised.tokens(), factors, begin * unit, last);
      });
  for (int64_t i = 0; i < t.count; ++i)
    if (!quantised.finite()[i])
      run_exact(run, w, x + i * w.in_features * bytes, type, 1,
                static_cast<uint8_t*>(t.y) + i * t.y_stride * bytes, t.y_stride);
}

}  // namespace

void slab::run_int16(const CpuKernels& run, const Int16Kernels& kernels, const CpuWeight& w,
                     const void* x, int type, int64_t tokens, void* y, int64_t y_stride) {
  in_calls(w, x, type, tokens, y, y_stride, [&](const CpuTokens& t, const uint8_t* from) {
    run_tokens(run, kernels, w, t, from, type);
  });
}
