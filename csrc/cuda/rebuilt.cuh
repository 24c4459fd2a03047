// W rebuilt in registers, as the A fragment of a dense product (mma.sync or wgmma): the pieces that
// kernels of any frame share. W = S + (sum_r u_r v_r^T) * B, rounded once to the activations' type
// where a value needs it: fp16 and bf16 values stay as they are stored.
//
// Register i = 2 c + h of the stream (params.h) is the kept pair of ONE group of four inputs: of
// row g + 8 h, group 8 step + 4 c + t. So a lane rebuilds whole groups, in four moves:
//
//   two     = load_shared(selectors_at<h>(table, metadata word, shift))   // by the group's nibble
//   pruned  = choose_bytes(v of inputs 0 and 1, v of 2 and 3, two[0] >> 16)
//   pruned  = multiply(pruned, u), its signs flipped       // or any rank's sum, times the level
//   a, b    = choose_bytes(kept, pruned, two[0] and two[1])      // inputs 0 and 1, inputs 2 and 3
//
// mma.sync's B fragment may hold any four inputs in a lane as long as A's holds the same, so its
// lane t keeps both halves of group t. wgmma reads x in its natural order: there lane t keeps one
// half of a group and hands the other to its neighbour, and the odd lanes' table has the two swapped.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace slab {

// ---- selectors ----

// A table in shared memory, aligned to its size. Entry `nibble` is 8 bytes, three PRMT selectors:
//
//   word 0, low   kept and pruned pair -> inputs 0 and 1 of the group (in the odd table: 2 and 3)
//   word 0, high  v of the four inputs -> v of the two pruned ones
//   word 1        kept and pruned pair -> inputs 2 and 3 (in the odd table: 0 and 1)
//
// The odd table's entry of a nibble stands at nibble ^ kOddEntry, where the even one has none: all
// twelve lie in 128 bytes, in banks of their own.
constexpr int kSelectorBytes = 128;
constexpr uint32_t kOddEntry = 11;

namespace detail {
constexpr bool tables_are_apart() {
  for (int one = 0; one < kPatterns; ++one)
    for (int other = 0; other < kPatterns; ++other)
      if (pattern_nibble(one) == (pattern_nibble(other) ^ kOddEntry)) return false;
  return true;
}
}  // namespace detail
static_assert(detail::tables_are_apart(), "both tables' entries fit sixteen places");

// Writes one of the 16 entries.
__device__ __forceinline__ void fill_selectors(uint32_t table, uint32_t entry) {
  const bool odd = pattern_id(entry) < 0;
  const uint32_t nibble = odd ? entry ^ kOddEntry : entry;
  const int first = first_position(nibble), second = second_position(nibble);
  uint32_t halves[2] = {0, 0}, pruned = 0;
  int seen = 0;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    const bool kept = j == first || j == second;
    const uint32_t from = j == first ? 0x10u : j == second ? 0x32u : seen == 0 ? 0x54u : 0x76u;
    halves[j / 2] |= from << (8 * (j % 2));
    if (!kept) pruned |= (0x10u + 0x22u * j) << (8 * seen++);
  }
  const uint32_t near = odd ? halves[1] : halves[0], far = odd ? halves[0] : halves[1];
  const uint32_t words[2] = {near | pruned << 16, far};
  store_shared(table + 8 * entry, words);
}

// How far a metadata word is rotated for its group number `slot`, 0 to 3, in both halves.
__device__ __forceinline__ uint32_t selector_shift(int slot) { return uint32_t(4 * slot - 3) & 31; }

// Where the table has the entry of row g + 8 kHalf's group. An odd lane's table is
// table ^ 8 kOddEntry.
template <int kHalf>
__device__ __forceinline__ uint32_t selectors_at(uint32_t table, uint32_t word, uint32_t shift) {
  return and_xor(__funnelshift_r(word, word, shift + 16 * kHalf), 0x78u, table);
}

// ---- kept values ----

// The A fragment of a step of 32 inputs as it is stored, integer codes as exact 16-bit numbers.
// `words` holds what one load brings for several steps. values_at: the lane's first 16 bytes of a
// row tile. magic: kByteMagic or kNibbleMagic of T, which is cheapest in a register.
template <class T, int kValues, int kStep>
__device__ __forceinline__ void load_kept(uint32_t (&a)[4], uint32_t (&words)[4],
                                          uint32_t values_at, uint32_t magic) {
  if constexpr (kValues == kW16) {
    load_shared(a, values_at + 512 * kStep);
  } else if constexpr (kValues == kI8) {
    if constexpr (kStep % 2 == 0) load_shared(words, values_at + 256 * kStep);
    T::from_int8(a[0], a[1], words[kStep % 2 * 2], magic);
    T::from_int8(a[2], a[3], words[kStep % 2 * 2 + 1], magic);
  } else {
    if constexpr (kStep == 0) load_shared(words, values_at);
    T::from_int4(a, words[kStep], magic);
  }
}

// A power of two for each row brings its scales, and u with them, to where fp16 is precise. The sums
// are divided by it. w16 has no scales, and bf16 scales are bf16 numbers already.
template <class T>
struct RowPowers {
  static constexpr bool kNeeded = false;
};
template <>
struct RowPowers<Fp16> {
  static constexpr bool kNeeded = true;
};

// The low or the high half of a word in both halves. Where a product takes it, that costs no
// instruction.
__device__ __forceinline__ uint32_t twice(uint32_t pair, int half) {
  uint32_t r;
  if (half)
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\nmov.b32 %0, {high, high};\n}"
        : "=r"(r)
        : "r"(pair));
  else
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\nmov.b32 %0, {low, low};\n}"
        : "=r"(r)
        : "r"(pair));
  return r;
}

// The scales of rows g and g + 8, a word of the stream, in T's type and times the rows' powers.
template <class T>
__device__ __forceinline__ uint32_t scale_pair(uint32_t both, float near_power, float far_power) {
  if constexpr (!RowPowers<T>::kNeeded) return both;  // bf16 numbers, as they are stored
  return T::pack(__uint_as_float(both << 16) * near_power,
                 __uint_as_float(both & 0xFFFF0000u) * far_power);
}

// u, twice in a word, times its row's power.
template <class T>
__device__ __forceinline__ uint32_t powered(uint32_t u, float power) {
  const float product = T::widen(uint16_t(u)) * power;
  return T::pack(product, product);
}

// 1 / power, exactly, of a power of two from 2^-126 to 2^126.
__device__ __forceinline__ float inverse_power(float power) {
  return __uint_as_float(0x7F000000u - __float_as_uint(power));
}

// ---- pruned entries ----

// Flips the pruned pair of register i = 2 c + h by its bits of a row tile's word of the only plane.
template <int kStep, int kRegister>
__device__ __forceinline__ uint32_t flip(uint32_t pruned, uint32_t signs) {
  return and_xor(signs << (4 * kStep + kRegister), 0x80008000u, pruned);
}

// The levels of register i = 2 kColumn + kHalf of two or three planes, exactly: 3/2 (two planes) or
// 7/4 (three) less the index, which is put into the mantissa at bit kAt. The third plane's bit goes
// right below it, where it counts half a unit.
//
// two: words of the first two planes, one for steps 2 h and 2 h + 1. third: the word of the third
// plane, zero of two planes. magic: kNibbleMagic of T.
template <class T, int kStep, int kColumn, int kHalf, bool kThirdPlane>
__device__ __forceinline__ uint32_t level_pair(const uint32_t (&two)[2], uint32_t third,
                                               uint32_t magic, int planes) {
  constexpr int kAt = T::kIndexAt + 2 * kHalf, kScale = 0x00010001 * (kAt << T::kMantissaBits);
  constexpr uint32_t kTwo = 0x00030003u << (kAt - 1), kThree = 0x00070007u << (kAt - 2);
  const uint32_t index = shift_down<8 * (kStep % 2) + 4 * kColumn - T::kIndexAt>(two[kStep / 2]);
  uint32_t word = and_or(index, 0x00030003u << kAt, magic);
  if constexpr (kThirdPlane) {
    const uint32_t half = shift_down<4 * kStep + kColumn + 1 - T::kIndexAt>(third);
    word = and_or(half, 0x00010001u << (kAt - 1), word);
  }
  return T::fma(word, (T::kOne - kScale) | 0x80008000u,
                T::kNibbleMagic - kScale + (planes == 2 ? kTwo : kThree));
}

// What a lane keeps of the signs of a row tile and K-block, of one to three planes.
struct TileSigns {
  uint32_t two[2];  // the first two of several planes
  uint32_t own;     // the only plane, or the third; zero of two planes
};

// The level of each pruned pair of a step, +-1 of one plane, known at run time only.
template <class T, int kStep>
__device__ __forceinline__ void level_pairs(uint32_t (&levels)[4], const TileSigns& signs,
                                            int planes) {
  if (planes == 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      levels[i] = and_or(signs.own << (4 * kStep + i), 0x80008000u, T::kOne);
  } else {
    levels[0] = level_pair<T, kStep, 0, 0, true>(signs.two, signs.own, T::kNibbleMagic, planes);
    levels[1] = level_pair<T, kStep, 0, 1, true>(signs.two, signs.own, T::kNibbleMagic, planes);
    levels[2] = level_pair<T, kStep, 1, 0, true>(signs.two, signs.own, T::kNibbleMagic, planes);
    levels[3] = level_pair<T, kStep, 1, 1, true>(signs.two, signs.own, T::kNibbleMagic, planes);
  }
}

// Adds one rank to the magnitudes of a pruned pair, in 16 bits. v: of the group's four inputs.
// chooser: the high half of its selectors' word 0, shifted down.
template <class T>
__device__ __forceinline__ uint32_t add_rank(uint32_t sum, const uint32_t (&v)[2], uint32_t chooser,
                                             uint32_t u) {
  return T::fma(choose_bytes(v[0], v[1], chooser), u, sum);
}

}  // namespace slab
