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

// The bits of 2^108. Tokens with numbers from there on are left to the exact product, as those with
// NaN and infinity are: a sum of integers times their step could overflow where y does not.
constexpr uint32_t kTooLarge = 0x75800000u;
// The bits of the largest magnitude of n numbers; not below kTooLarge if one is NaN or infinite.
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

// A power of two that keeps quotients finite where `most`, the largest magnitude, is tiny.
inline float lift_of(float most) { return most < 0x1p-60f ? 0x1p100f : 1.0f; }

// A shift as `Int8Tokens` has it.
constexpr int32_t shift_word(int32_t shift) { return shift & 0xFFFF; }

// The largest sum of two magnitudes of a group.
inline float largest_pair(const float* x) {
  float most = 0.0f;
  const auto size = [](float a) { return float_of(bits_of(a) & 0x7FFFFFFFu); };
  const auto larger = [](float a, float b) { return a > b ? a : b; };
  for (int i = 0; i < kPiece; i += kGroup) {
    const float a = size(x[i]), b = size(x[i + 1]), c = size(x[i + 2]), d = size(x[i + 3]);
    most = larger(most, larger(larger(a, b) + larger(c, d), larger(a + b, c + d)));
  }
  return most;
}

// What the integers of a piece cover: all between its smallest and its largest number, and 0; as
// much on either side of 0; or so much that the sum of two integers of a group stays within 127.
enum class Cover { range, symmetric, pairs };

// One piece of 32 numbers, for `few`. Returns whether all are below kTooLarge, and the sums of
// `pairs` too; if not, it becomes zeros.
inline bool quantise_piece(const float* x, Cover cover, int8_t* q, float* step, int32_t* shift) {
  uint32_t bits = largest_bits(x, kPiece);
  if (cover == Cover::pairs && bits < kTooLarge) bits = bits_of(largest_pair(x));
  if (bits >= kTooLarge) {
    std::memset(q, 0, kPiece);
    *step = 0.0f;
    *shift = 0;
    return false;
  }
  const float most = float_of(bits), lift = lift_of(most);
  const bool range = cover == Cover::range;
  float low = range ? 0.0f : -most, high = range ? 0.0f : most;
  for (int i = 0; i < kPiece; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  // With an integer of 253 steps between them, rounding ends at 127 on either side.
  const float half = (high * lift - low * lift) * 0.5f;
  const float middle = (high * lift + low * lift) * 0.5f;
  const float limit = range ? 126.5f : cover == Cover::symmetric ? 127.0f : 126.0f;
  const float factor = half > 0.0f ? limit / half : 0.0f;
  const int32_t centre = nearest(middle * factor);
  *step = half / limit / lift;
  *shift = shift_word(centre);
  for (int i = 0; i < kPiece; ++i) q[i] = int8_t(nearest(x[i] * lift * factor) - centre);
  return true;
}

// One piece of 64 numbers, for `many`. Returns the place of the largest one, or -1 if that is not
// below kTooLarge: then it becomes zeros. offset: what the kernels add to every weight.
inline int quantise_around_largest(const float* x, int offset, int8_t* q, Int8Piece& piece) {
  const uint32_t bits = largest_bits(x, kManyPiece);
  if (bits >= kTooLarge) {
    std::memset(q, 0, kManyPiece);
    piece = Int8Piece{};
    return -1;
  }
  int at = kManyPiece;  // the first one of that magnitude
  for (int i = 0; i < kManyPiece; ++i) {
    const int here = (bits_of(x[i]) & 0x7FFFFFFFu) == bits ? i : kManyPiece;
    at = here < at ? here : at;
  }
  uint32_t second = 0;
  for (int i = 0; i < kManyPiece; ++i) {
    const uint32_t size = i == at ? 0u : bits_of(x[i]) & 0x7FFFFFFFu;
    second = size > second ? size : second;
  }
  const float lift = lift_of(float_of(second)), most = float_of(second) * lift;
  const float factor = most > 0.0f ? 127.0f / most : 0.0f;
  piece.step = most / 127.0f / lift;
  piece.largest = x[at];
  for (int i = 0; i < kManyPiece; ++i) q[i] = int8_t(nearest(x[i] * lift * factor));
  q[at] = 0;
  for (int half = 0; half < 2; ++half) {
    int32_t total = 0;
    for (int i = 0; i < kManyPiece / 2; ++i) total += q[half * kManyPiece / 2 + i];
    piece.start[half] = -offset * total;
  }
  return at;
}

// place: sets the two fields of a piece that say where the weights of its input `at` are.
template <class Place>
void quantise_many(const CpuWeight& w, const Int8Tokens& t, const float* x, int64_t token,
                   int offset, Place place) {
  bool finite = true;
  for (int64_t kb = 0; kb < w.k_blocks; ++kb)
    for (int p = 0; p < kManyPieces; ++p) {
      const int64_t to = kb * t.count + token;
      Int8Piece& piece = t.pieces[to * kManyPieces + p];
      const int at = quantise_around_largest(x + kb * kInputs + p * kManyPiece, offset,
                                             t.x + to * kInputs + p * kManyPiece, piece);
      finite = finite && at >= 0;
      place(piece, at < 0 ? 0 : at);
    }
  t.finite[token] = finite;
}

inline void quantise_few(const CpuWeight& w, const Int8Tokens& t, const float* x, int64_t term,
                         int64_t token) {
  const Cover cover = !term ? Cover::range : w.planes == 1 ? Cover::pairs : Cover::symmetric;
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
    for (int p = 0; p < kPieces; ++p) {
      const int64_t piece = at * kPieces + p;
      finite = quantise_piece(from + p * kPiece, cover, t.x + piece * kPiece, t.step + piece,
                              t.shift + piece) &&
               finite;
    }
  }
  t.finite[term * t.count + token] = finite;
}

inline void quantise_v(const CpuWeight& w, const Int8Tokens& t) {
  for (int64_t at = 0; at < w.rank * w.k_blocks; ++at) {
    const float* const v = w.v + at * kInputs;
    const float most = float_of(largest_bits(v, kInputs));
    const float lift = lift_of(most), factor = most > 0.0f ? 32767.0f / (most * lift) : 0.0f;
    t.v_most[at] = most;
    for (int i = 0; i < kInputs; ++i) {
      const int place = (i & ~3) + (i % 4 % 2 * 2) + i % 4 / 2;  // of 0 1 2 3: 0 2 1 3
      t.v[at * kInputs + place] = int16_t(nearest(v[i] * lift * factor));
    }
  }
}

}  // namespace
}  // namespace slab
