// Puts the rows of x into the cells that the tiles read (launch.h).
#pragma once

#include "stream.h"

namespace slab {
namespace {

template <class V>
struct Tokens {
  static constexpr int kCells = 16;  // that are put into place at once

  // `together` puts the 16 cells of a token side by side, and not those of all tokens.
  static SLAB_INLINE void place(const void* rows, int type, int64_t features, int64_t tokens,
                                int64_t cells, bool pairs, bool together, float* out) {
    const auto* const x = static_cast<const uint8_t*>(rows);
    const int64_t bytes = type == kFloat32 ? 4 : 2, inputs = pairs ? 2 * kCells : kCells;
    for (int64_t c = 0; c < cells; c += kCells, out += kCells * tokens)
      for (int64_t i = 0; i < tokens; ++i) {
        float some[kCells] = {0};
        const int64_t k = c * (pairs ? 2 : 1), left = features - k;
        const int64_t n = left < 0 ? 0 : left < inputs ? left : inputs;
        const uint8_t* const from = x + (i * features + k) * bytes;
        if (pairs)
          std::memcpy(some, from, size_t(n) * 2);
        else
          Stream<V>::widen(from, type, some, n);
        for (int j = 0; j < kCells; ++j) out[together ? i * kCells + j : j * tokens + i] = some[j];
      }
  }
  static void arrange(const void* rows, int type, int64_t features, int64_t tokens, int64_t cells,
                      bool pairs, float* out) {
    place(rows, type, features, tokens, cells, pairs, false, out);
  }
  // The same, with pairs as tiles take them.
  static void arrange_tiles(const void* rows, int type, int64_t features, int64_t tokens,
                            int64_t cells, bool pairs, float* out) {
    place(rows, type, features, tokens, cells, pairs, pairs, out);
  }
};

}  // namespace
}  // namespace slab
