// Reads the stream of launch.h, and numbers in and out, over a vector type V of one instruction
// set.
//
// These headers use no templates of the standard library: an inline function that was compiled with
// AVX-512 flags could be the copy that the linker keeps for everyone.
#pragma once

#include <cstdint>
#include <cstring>

#include "../launch.h"

#define SLAB_INLINE inline __attribute__((always_inline))

namespace slab {
namespace {

constexpr int kGroups = kInputs / kGroup;  // of one block

// Where the entries of a group stand, as `Places` (rebuild.h) asks: bits 31 and 30 say whether the
// first pruned position is 1 or 2, bits 29, 28 and 26 whether the first kept one is 0, 1 or 2, and
// bits 27, 25 and 24 whether the second kept one is 1, 2 or 3.
constexpr uint32_t place_word(int first, int second, int first_pruned) {
  constexpr int kFirst[3] = {29, 28, 26}, kSecond[4] = {0, 27, 25, 24};
  return (first_pruned ? 1u << (32 - first_pruned) : 0u) | 1u << kFirst[first] |
         1u << kSecond[second];
}
// By pattern id.
constexpr uint32_t kPlaceWords[8] = {place_word(0, 1, 2),
                                     place_word(0, 2, 1),
                                     place_word(0, 3, 1),
                                     place_word(1, 2, 0),
                                     place_word(1, 3, 0),
                                     place_word(2, 3, 0),
                                     0,
                                     0};

template <class V>
struct Stream {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kStrips = kRows / kLanes;  // vectors that make one row block

  // Where the parts of one strip of one block begin.
  struct Block {
    const uint8_t *signs, *levels, *codes, *values, *scales;
  };
  static SLAB_INLINE Block block_at(const uint8_t* block, int strip, int values, int planes) {
    Block b;
    b.signs = block + 4 * kLanes * strip;
    b.levels = b.signs + sign_bytes(planes);
    b.codes = b.levels + level_bytes(planes);
    b.values = block + sign_bytes(planes) + level_bytes(planes) + code_bytes();
    b.scales = b.values + value_bytes(values) + 2 * kLanes * strip;
    b.values += kLanes * strip * (values == kInt4 ? 4 : values == kInt8 ? 1 : 2);
    return b;
  }

  // The words of one strip, which several groups share. The next group is where `drop` takes from:
  // in the lowest bits, and of `signs` in the highest one. kPlanes is 0 with rank 0.
  template <int kPlanes>
  struct Words {
    static constexpr int kLevelBits = kPlanes > 1 ? 2 * (kPlanes - 1) : 32;  // of a group
    I codes, signs, levels;

    SLAB_INLINE void start(const Block& b) {
      if constexpr (kPlanes > 0) signs = V::load_words(b.signs);
    }
    // Loads the words of the eight groups from 8 * word on.
    SLAB_INLINE void load_eight(const Block& b, int word) {
      codes = V::load_words(b.codes + 64 * word);
      if constexpr (kPlanes > 1)
        if (8 * word * kLevelBits % 32 == 0)
          levels = V::load_words(b.levels + 64 * (8 * word * kLevelBits / 32));
    }
    SLAB_INLINE void drop(int groups) {
      codes = codes >> (4 * groups);
      if constexpr (kPlanes > 0) signs = signs << groups;
      if constexpr (kPlanes > 1) levels = levels >> (kLevelBits * groups);
    }
  };

  template <ValueType kValues>
  static SLAB_INLINE void load_values(const uint8_t* values, int g, F& first, F& second) {
    if constexpr (kValues == kInt4) {
      const I word = V::load_words(values + 64 * (g / 4));
      first = V::from_int4(word, 8 * (g % 4));
      second = V::from_int4(word, 8 * (g % 4) + 4);
    } else {
      constexpr int bytes = kValues == kInt8 ? 1 : 2;
      first = V::template load_values<kValues>(values + g * 32 * bytes);
      second = V::template load_values<kValues>(values + g * 32 * bytes + 16 * bytes);
    }
  }

  static SLAB_INLINE F panel(const void* data, bool half, int64_t at) {
    return half ? V::template load_values<kFp16>(static_cast<const uint8_t*>(data) + 2 * at)
                : V::load(static_cast<const float*>(data) + at);
  }
  static void narrow(const float* in, int type, uint8_t* out, int64_t n) {
    if (type == kFloat32) {
      std::memcpy(out, in, size_t(n) * 4);
      return;
    }
    for (int64_t i = 0; i < n; i += kLanes) {
      uint16_t lanes[kLanes];
      float tail[kLanes];
      const int64_t left = n - i < kLanes ? n - i : kLanes;
      const float* from = in + i;
      if (left < kLanes) {
        for (int64_t j = 0; j < kLanes; ++j) tail[j] = j < left ? in[i + j] : 0.0f;
        from = tail;
      }
      if (type == kFloat16)
        V::store_fp16(lanes, V::load(from));
      else
        V::store_bf16(lanes, V::load(from));
      std::memcpy(out + 2 * i, lanes, size_t(left) * 2);
    }
  }
  // This is not inline, because it would be a fifth of the code of every instance of the products.
  static __attribute__((noinline)) void store_rows(const CpuWeight& w, const CpuTokens& t,
                                                   int64_t token, int64_t rb, const float* rows) {
    const int64_t left = w.out_features - rb * kRows;
    uint8_t* const out =
        static_cast<uint8_t*>(t.y) + (token * t.y_stride + rb * kRows) * (t.y_type ? 2 : 4);
    if (left < kRows || t.y_type == kFloat16)
      return narrow(rows, t.y_type, out, left < kRows ? left : kRows);
    for (int h = 0; h < kRows; h += kLanes) {
      const F some = V::load(rows + h);
      if (t.y_type == kFloat32)
        V::store(reinterpret_cast<float*>(out) + h, some);
      else
        V::store_bf16(reinterpret_cast<uint16_t*>(out) + h, some);
    }
  }
  // Adds adapter and bias to the sums of `count` tokens from `token` on, which are `stride` numbers
  // apart, and stores the rows of y.
  static void finish(const CpuWeight& w, const CpuTokens& t, int64_t rb, int64_t token,
                     int64_t count, const float* sums, int64_t stride) {
    for (int64_t i = 0; i < count; ++i) {
      float rows[kRows];
      for (int h = 0; h < kRows; h += kLanes) {
        F y = V::load(sums + i * stride + h);
        const float* const z = t.z + (token + i) * w.adapter_padded;
        for (int64_t j = 0; j < w.adapter_rank; ++j)
          y = V::fma(panel(w.p, w.adapter_half, (rb * w.adapter_rank + j) * kRows + h),
                     V::broadcast(z + j), y);
        if (w.bias) y = y + V::load(w.bias + rb * kRows + h);
        V::store(rows + h, y);
      }
      store_rows(w, t, token + i, rb, rows);
    }
  }
  static void widen(const void* in, int type, float* out, int64_t n) {
    const uint8_t* const from = static_cast<const uint8_t*>(in);
    if (type == kFloat32) {
      std::memcpy(out, from, size_t(n) * 4);
      return;
    }
    const auto wide = [&](const uint8_t* at) __attribute__((always_inline)) {
      return type == kFloat16 ? V::template load_values<kFp16>(at)
                              : V::template load_values<kBf16>(at);
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) V::store(out + i, wide(from + 2 * i));
    if (i < n) {
      uint8_t raw[2 * kLanes] = {0};
      float last[kLanes];
      std::memcpy(raw, from + 2 * i, size_t(n - i) * 2);
      V::store(last, wide(raw));
      std::memcpy(out + i, last, size_t(n - i) * 4);
    }
  }
  static void multiply(const float* a, const float* b, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b[i];
  }
};

template <int kNumber>
struct Constant {
  static constexpr int value = kNumber;
};
// Calls run(values, planes), both of type Constant, for a weight of int8 or int4 values.
template <class Run>
void for_integers(const CpuWeight& w, const Run& run) {
  const auto with = [&](auto values) {
    switch (w.planes) {
      case 0: return run(values, Constant<0>{});
      case 1: return run(values, Constant<1>{});
      case 2: return run(values, Constant<2>{});
      case 3: return run(values, Constant<3>{});
    }
  };
  w.values == kInt4 ? with(Constant<kInt4>{}) : with(Constant<kInt8>{});
}

}  // namespace
}  // namespace slab
