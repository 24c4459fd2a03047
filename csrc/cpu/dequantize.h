// The dense weight: blocks are rebuilt in fp32, where a lane is a row, and turned into rows.
#pragma once

#include "rebuild.h"

namespace slab {
namespace {

template <class V>
struct Dequantize {
  using F = typename V::F;
  static constexpr int kLanes = V::kLanes;

  // Adds P Q^T to a rebuilt block, tile[k][kTileRows], in sums of 16 ranks.
  static void add_adapter(const CpuWeight& w, int64_t row_block, int64_t k_block, float* tile) {
    const int64_t padded = w.k_blocks * kInputs;
    alignas(64) float right[kInputs * kRows];
    for (int64_t r = 0; r < w.adapter_rank; r += kRows) {
      const int64_t left = w.adapter_rank - r, ranks = left < kRows ? left : kRows;
      const int64_t p = (row_block * w.adapter_rank + r) * kRows,
                    q = (r * padded) + k_block * kInputs * kRows;
      for (int64_t i = 0; i < kInputs * kRows; i += kLanes)
        V::store(right + i, Stream<V>::panel(w.q, w.adapter_half, q + i));
      for (int h = 0; h < kRows; h += kLanes)
        for (int64_t k = 0; k < kInputs; ++k) {
          F sum = V::zero();
          for (int64_t j = 0; j < ranks; ++j)
            sum = sum + Stream<V>::panel(w.p, w.adapter_half, p + j * kRows + h) *
                            V::broadcast(right + k * kRows + j);
          V::store(tile + k * kTileRows + h, V::load(tile + k * kTileRows + h) + sum);
        }
    }
  }

  static void dequantize(const CpuWeight& w, void* out, int out_type, int64_t begin, int64_t end) {
    alignas(64) float tile[kInputs * kTileRows], rows[kRows * kInputs];
    const int64_t bytes = out_type == kFloat32 ? 4 : 2;
    for (int64_t rb = begin; rb < end; ++rb)
      for (int64_t kb = 0; kb < w.k_blocks; ++kb) {
        Rebuild<V>::rebuild_any(w, rb, kb, tile);
        add_adapter(w, rb, kb, tile);
        for (int64_t n = 0; n < kRows; n += kLanes)
          for (int64_t k = 0; k < kInputs; k += kLanes)
            V::turn(tile + k * kTileRows + n, kTileRows, rows + n * kInputs + k, kInputs);
        const int64_t left = w.out_features - rb * kRows, columns = w.in_features - kb * kInputs;
        for (int64_t n = 0; n < kRows && n < left; ++n)
          Stream<V>::narrow(rows + n * kInputs, out_type,
                            static_cast<uint8_t*>(out) +
                                ((rb * kRows + n) * w.in_features + kb * kInputs) * bytes,
                            columns < kInputs ? columns : kInputs);
      }
  }
};

}  // namespace
}  // namespace slab
