// x and V as small integers. Plain loops, which compilers vectorise; the integers are the same with
// every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "../int8.h"

namespace slab {
namespace {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The bits of the largest magnitude of n numbers; not below kInfinite if one is NaN or infinite.
constexpr uint32_t kInfinite = 0x7F800000u;
inline uint32_t largest_bits(const float* x, int n) {
  uint32_t most = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t size = bits_of(x[i]) & 0x7FFFFFFFu;
    most = size > most ? size : most;
  }
  return most;
}

// The nearest integer, halves to even, of a number below 2^22.
inline int32_t nearest(float x) { return int32_t(bits_of(x + 12582912.0f) - 0x4B400000u); }

// What brings numbers up to `most` to integers up to `limit`, in two factors: the first keeps the
// quotient finite where `most` is tiny, and is a power of two.
struct Quotient {
  float lift, factor;
  Quotient(float most, float limit) {
    lift = most < 0x1p-60f ? 0x1p100f : 1.0f;
    factor = most > 0.0f ? limit / (most * lift) : 0.0f;
  }
};

// One block of 128 numbers. Returns whether all are finite; if not, it becomes zeros.
inline bool quantise_block(const float* x, int8_t* q, float* step, int32_t* excess) {
  const uint32_t bits = largest_bits(x, kInputs);
  const bool finite = bits < kInfinite;
  const float most = finite ? float_of(bits) : 0.0f;
  const Quotient by(most, 127.0f);
  *step = most / 127.0f;
  if (!finite) {
    std::memset(q, 0, kInputs);
    std::memset(excess, 0, 32);
    return false;
  }
  for (int part = 0; part < 4; ++part) {
    int32_t total = 0;
    for (int i = 32 * part; i < 32 * (part + 1); ++i) {
      const int32_t n = nearest(x[i] * by.lift * by.factor);
      q[i] = int8_t(n);
      total += n;
    }
    excess[part] = -128 * total;
  }
  excess[4] = excess[0] + excess[1];
  excess[5] = excess[2] + excess[3];
  excess[6] = excess[4] + excess[5];
  excess[7] = 0;
  return true;
}

inline void quantise(const CpuWeight& w, const Int8Tokens& t, const float* x, int64_t term,
                     int64_t token) {
  bool finite = true;
  for (int64_t kb = 0; kb < w.k_blocks; ++kb) {
    const int64_t at = (term * w.k_blocks + kb) * t.count + token;
    const float* from = x + kb * kInputs;
    float scaled[kInputs];
    if (term) {
      const float* const v = w.v + ((term - 1) * w.k_blocks + kb) * kInputs;
      for (int i = 0; i < kInputs; ++i) scaled[i] = from[i] * v[i];
      from = scaled;
    }
    finite = quantise_block(from, t.x + at * kInputs, t.step + at, t.excess + 8 * at) && finite;
  }
  t.finite[term * t.count + token] = finite;
}

inline void quantise_v(const CpuWeight& w, const Int8Tokens& t) {
  for (int64_t at = 0; at < w.rank * w.k_blocks; ++at) {
    const float* const v = w.v + at * kInputs;
    const float most = float_of(largest_bits(v, kInputs));
    const Quotient by(most, 32767.0f);
    t.v_most[at] = most;
    for (int i = 0; i < kInputs; ++i) {
      const int place = (i & ~3) + (i % 4 % 2 * 2) + i % 4 / 2;  // of 0 1 2 3: 0 2 1 3
      t.v[at * kInputs + place] = int16_t(nearest(v[i] * by.lift * by.factor));
    }
  }
}

}  // namespace
}  // namespace slab
