// What a lane of a kernel for many tokens keeps of its two rows, and the integer codes as 16-bit
// numbers.
#pragma once

#include "prefill_place.cuh"
#include "prefill_traits.cuh"
#include "rebuilt.cuh"

namespace slab {

// Rows g and g + 8 of a warp's 16.
template <class Traits>
struct PrefillRows {
  using T = typename Traits::Activation;
  // fp16 does not reach as far down as the stream's scales do: a row's scales and u are multiplied
  // by a power of two, and its sums are divided by it. bf16 does, and its scales are bf16 as well.
  static constexpr bool kPowers = Traits::kScaled && T::kMantissaBits == 10;

  // 16 bits each: row g in the low half, row g + 8 in the high one. Powers are bf16, as the
  // stream's scales are.
  uint32_t u, scale, power;
  int row;  // row g

  // Rank one's u is kept; of any rank, `row` finds it.
  __device__ __forceinline__ void begin(const PrefillParams& params, const PrefillPlace& place,
                                        int warp, int lane) {
    const int pair = min(place.first_pair + warp / kBlockTiles, place.end_pair - 1);
    row = pair * kBlockRows + warp % kBlockTiles * kTileRows + lane / 4;
    if constexpr (kPowers) {
      float near = 1.0f, far = 1.0f;
      if (params.powers) near = __ldg(params.powers + row), far = __ldg(params.powers + row + 8);
      power = choose_bytes(__float_as_uint(near), __float_as_uint(far), 0x7632);
    }
    if constexpr (Traits::kSigns && !Traits::kAny)
      u = powered_pair(__ldg(params.u + row), __ldg(params.u + row + 8));
  }

  // u of both rows, words of the same number twice, as `u` has them.
  __device__ __forceinline__ uint32_t powered_pair(uint32_t near, uint32_t far) const {
    if constexpr (!kPowers) return choose_bytes(near, far, 0x5410);
    return T::pack(T::widen(uint16_t(near)) * __uint_as_float(power << 16),
                   T::widen(uint16_t(far)) * __uint_as_float(power & 0xFFFF0000u));
  }

  // The inverse of a row's power: its exponent is the opposite.
  __device__ __forceinline__ float inverse(int h) const {
    const uint32_t bits = h ? power & 0xFFFF0000u : power << 16;
    return __uint_as_float(0x7F000000u - bits);
  }

  // Those of a step, where they change, from the stream's word of the scale group. Within a loop
  // there is no branch about it, which would make ptxas wait for every product. `at`: the block's
  // first scale of row g.
  template <int kStep>
  __device__ __forceinline__ void load_scales(uint32_t at, int scale_shift) {
    if constexpr (!Traits::kScaled || (Traits::kGroupSteps == kSteps && kStep > 0)) return;
    // kStep / group_steps, which is 1, 2 or 4
    const uint32_t word = load_shared32(at + (kStep >> scale_shift) * kScaleBytes);
    scale = word;  // bf16 as it is
    if constexpr (kPowers) {
      const uint32_t scaled = Bf16::multiply(word, power);  // exactly
      scale = T::pack(__uint_as_float(scaled << 16), __uint_as_float(scaled & 0xFFFF0000u));
    }
  }
};

// The kept values of a step of 32 inputs, with their scales.
template <class Traits>
struct PrefillKept {
  using T = typename Traits::Activation;
  // What one load takes. It serves several steps of integers, half as many where registers are few.
  static constexpr int kWords = Traits::kHolds || !Traits::kScaled ? 4 : 2;
  static constexpr int kStepWords = Traits::kValues == kW16 ? 4 : Traits::kValues == kI8 ? 2 : 1;
  static constexpr int kLoadSteps = kWords / kStepWords;
  static constexpr int kPieceSteps = 4 / kStepWords;  // of a lane's 16 bytes

  uint32_t words[kWords];
  // In a register that the compiler cannot see through: a LOP3 takes one immediate operand only.
  uint32_t magic;

  explicit __device__ __forceinline__ PrefillKept(int never_negative)
      : magic(Traits::held((Traits::kValues == kI8 ? T::kByteMagic : T::kNibbleMagic) +
                           opaque_zero(never_negative))) {}

  // at: of the lane's first 16 bytes.
  template <int kStep>
  __device__ __forceinline__ void load(uint32_t at) {
    if (kStep % kLoadSteps == 0)
      load_shared(words, at + 512 * (kStep / kPieceSteps) + 4 * kStepWords * (kStep % kPieceSteps));
  }

  // Of a k16: registers 2 kColumn and 2 kColumn + 1 of an A fragment.
  template <int kStep, int kColumn>
  __device__ __forceinline__ void convert(uint32_t (&a)[2], const PrefillRows<Traits>& rows) const {
    constexpr int kWord = kStep % kLoadSteps * kStepWords;
    if constexpr (Traits::kValues == kW16) {
      a[0] = words[2 * kColumn], a[1] = words[2 * kColumn + 1];
    } else if constexpr (Traits::kValues == kI8) {
      T::from_int8(a[0], a[1], words[kWord + kColumn], magic);
    } else {
      uint32_t all[4];
      T::from_int4(all, words[kWord], magic);
      a[0] = all[2 * kColumn], a[1] = all[2 * kColumn + 1];
    }
    if constexpr (Traits::kScaled) {
#pragma unroll
      for (int h = 0; h < 2; ++h) a[h] = T::multiply(a[h], twice(rows.scale, h));
    }
  }
};

}  // namespace slab
