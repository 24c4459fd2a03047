// A call of the exact products: which of them runs, its memory, and the ranges that torch's threads
// take.
#include <torch/csrc/stable/ops.h>

#include "linear.h"

using namespace slab;

const float* slab::widened(const CpuKernels& run, const void* x, int type, int64_t count,
                           int64_t features, int64_t padded, float* scratch) {
  if (type == kFloat32 && features == padded) return static_cast<const float*>(x);
  const auto* const from = static_cast<const uint8_t*>(x);
  const int64_t bytes = type == kFloat32 ? 4 : 2;
  torch::stable::parallel_for(0, count, 1 + kThreadWork / padded, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      run.widen(from + i * features * bytes, type, scratch + i * padded, features);
      for (int64_t k = features; k < padded; ++k) scratch[i * padded + k] = 0.0f;
    }
  });
  return scratch;
}

void slab::run_adapter(const CpuKernels& run, const CpuWeight& w, const CpuTokens& t) {
  if (w.adapter_rank)
    torch::stable::parallel_for(
        0, w.adapter_padded / (2 * kRows),
        1 + kThreadWork / (2 * kRows * w.k_blocks * kInputs * t.count),
        [&](int64_t begin, int64_t end) { run.adapter_in(w, t, begin, end); });
}

void slab::arrange_tokens(const CpuKernels& run, const void* x, int type, const TokenBlocks& blocks,
                          int64_t features, int64_t cells, bool pairs, float* out) {
  const auto* const from = static_cast<const uint8_t*>(x);
  const int64_t row_bytes = features * (type == kFloat32 ? 4 : 2);
  const int64_t grain = 1 + kThreadWork / (blocks.largest() * cells);
  torch::stable::parallel_for(0, blocks.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = blocks.begin(b), tokens = blocks.begin(b + 1) - first;
      run.arrange(from + first * row_bytes, type, features, tokens, cells, pairs,
                  out + first * cells);
    }
  });
}

namespace {

enum class Product { kLookup, kTile, kTileBf16 };

Product choose_product(const CpuKernels& run, const CpuWeight& w, int64_t tokens, int type) {
  const bool bf16 = type == kBfloat16 && run.tile_bf16;
  const int64_t fp32_tokens = w.rank ? run.lookup_tokens : run.lookup_tokens_rank0;
  const int64_t lookup_tokens = bf16 ? run.lookup_tokens_bf16 : fp32_tokens;
  if (tokens < lookup_tokens && (w.rank <= 2 || w.rank == 4)) return Product::kLookup;
  return bf16 && tokens >= lookup_tokens ? Product::kTileBf16 : Product::kTile;
}

// Calls the kernels once, for at most kTileTokens tokens.
void run_tokens(const CpuKernels& run, const CpuWeight& w, CpuTokens t, const void* x, int x_type,
                Product product) {
  const int64_t padded = w.k_blocks * kInputs;
  const bool lookup = product == Product::kLookup, bf16 = product == Product::kTileBf16;
  const bool rows = !bf16 || w.adapter_rank;
  const Scratch wide(rows ? t.count * padded : 0), pairs(bf16 ? t.count * padded / 2 : 0);
  const Scratch scaled(lookup ? t.count * w.rank * padded : 0), z(t.count * w.adapter_padded);
  t.block_tokens = lookup ? 1 : run.block_tokens;
  t.pair_tokens = run.pair_tokens;
  t.pairs = pairs.get();
  t.xv = scaled.get();
  t.z = z.get();
  if (lookup) {
    t.x = widened(run, x, x_type, t.count, w.in_features, padded, wide.get());
    for (int64_t i = 0; i < t.count; ++i)
      for (int64_t r = 0; r < w.rank; ++r)
        run.multiply(t.x + i * padded, w.v + r * padded, scaled.get() + (i * w.rank + r) * padded,
                     padded);
  } else {
    t.x = wide.get();
    const TokenBlocks blocks(t.count, t.block_tokens), of_pairs(t.count, t.pair_tokens);
    if (rows) arrange_tokens(run, x, x_type, blocks, w.in_features, padded, false, wide.get());
    if (bf16)
      arrange_tokens(run, x, x_type, of_pairs, w.in_features, padded / 2, true, pairs.get());
  }
  run_adapter(run, w, t);
  // A thread takes whole groups of four row blocks, because lookup shares its tables among four.
  constexpr int64_t unit = 4;
  const int64_t units = (w.row_blocks + unit - 1) / unit;
  torch::stable::parallel_for(
      0, units, 1 + kThreadWork / (unit * kRows * padded * t.count),
      [&](int64_t begin, int64_t end) {
        const int64_t last = end * unit < w.row_blocks ? end * unit : w.row_blocks;
        (lookup ? run.lookup : bf16 ? run.tile_bf16 : run.tile)(w, t, begin * unit, last);
      });
}

}  // namespace

void slab::run_exact(const CpuKernels& run, const CpuWeight& w, const void* x, int type,
                     int64_t tokens, void* y, int64_t y_stride) {
  const Product product = choose_product(run, w, tokens, type);
  in_calls(w, x, type, tokens, y, y_stride, [&](const CpuTokens& t, const void* from) {
    run_tokens(run, w, t, from, type, product);
  });
}
