// What a lane of a kernel for many tokens keeps of its two rows, and the integer codes as 16-bit
// numbers.
#pragma once

#include "prefill_place.cuh"
#include "prefill_traits.cuh"

namespace slab {

// The low or the high half in both halves. Where a product takes it, that costs no instruction.
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

// Rows g and g + 8 of a warp's 16.
template <class Traits>
struct PrefillRows {
  using T = typename Traits::Activation;
  // fp16 does not reach as far down as the stream's scales do: a row's scales and u are multiplied
  // by a power of two, and its sums are divided by it. bf16 does, and its scales are bf16 as well.
  static constexpr bool kPowers = Traits::kScaled && T::kMantissaBits == 10;

  // 16 bits each: row g in the low half, row g + 8 in the high one. Powers are bf16, as the stream's
  // scales are.
  uint32_t u, scale, power;
  int64_t row;

  // Rank one's u is kept; of any rank, `row` finds them.
  __device__ __forceinline__ void begin(const PrefillParams& params, const PrefillPlace& place,
                                        int warp, int lane) {
    const int pair = min(place.first_pair + warp / kBlockTiles, place.end_pair - 1);
    row = pair * kBlockRows + warp % kBlockTiles * kTileRows + lane / 4;
    float near_power = 1.0f, far_power = 1.0f;
    if constexpr (kPowers) {
      if (params.powers)
        near_power = __ldg(params.powers + row), far_power = __ldg(params.powers + row + 8);
      power = choose_bytes(__float_as_uint(near_power), __float_as_uint(far_power), 0x7632);
    }
    if constexpr (Traits::kSigns && !Traits::kAny) {
      const uint32_t near = __ldg(params.u + row), far = __ldg(params.u + row + 8);
      u = choose_bytes(near, far, 0x5410);
      if constexpr (kPowers)
        u = T::pack(T::widen(uint16_t(near)) * near_power, T::widen(uint16_t(far)) * far_power);
    }
  }

  // The inverse of a row's power: its exponent is the opposite.
  __device__ __forceinline__ float inverse(int h) const {
    const uint32_t bits = h ? power & 0xFFFF0000u : power << 16;
    return __uint_as_float(0x7F000000u - bits);
  }

  // Those of a step, where they change, from the stream's word of the scale group. Within a loop
  // there is no branch about it, which would make ptxas wait for every product. `at`: the block's
  // first scale of row g.
  template <int kGroupSteps, int kStep>
  __device__ __forceinline__ void load_scales(uint32_t at, int scale_shift) {
    if constexpr (!Traits::kScaled || (kGroupSteps == kSteps && kStep > 0)) return;
    // kStep / group_steps, which is 1, 2 or 4
    const uint32_t word = load_shared32(at + (kStep >> scale_shift) * kScaleBytes);
    scale = word;  // bf16 as it is
    if constexpr (kPowers) {
      const uint32_t scaled = Bf16::multiply(word, power);  // exactly
      scale = T::pack(__uint_as_float(scaled << 16), __uint_as_float(scaled & 0xFFFF0000u));
    }
  }
};

// The kept values of a step of 32 inputs: register i of an A fragment, with their scales.
template <class Traits>
struct PrefillKept {
  using T = typename Traits::Activation;

  // Integer values: one load serves several steps, half as many where registers are few.
  static constexpr int kWords = Traits::kHolds ? 4 : 2;
  static constexpr int kStepWords = Traits::kValues == kI8 ? 2 : 1;
  static constexpr int kLoadSteps = kWords / kStepWords;
  uint32_t words[kWords];
  // In a register that the compiler cannot see through: a LOP3 takes one immediate operand only.
  uint32_t magic;

  explicit __device__ __forceinline__ PrefillKept(int never_negative)
      : magic(Traits::held((Traits::kValues == kI8 ? T::kByteMagic : T::kNibbleMagic) +
                           opaque_zero(never_negative))) {}

  // at: of the lane's first 16 bytes.
  template <int kStep>
  __device__ __forceinline__ void load(uint32_t (&a)[4], uint32_t at,
                                       const PrefillRows<Traits>& rows) {
    if constexpr (Traits::kValues == kW16) {
      load_shared(a, at + 512 * kStep);
    } else {
      // A lane's 16 bytes are two steps of int8, or four of int4.
      constexpr int kPerPiece = 4 / kStepWords, kPiece = kStep / kPerPiece, kIn = kStep % kPerPiece;
      if (kStep % kLoadSteps == 0) load_shared(words, at + 512 * kPiece + 4 * kStepWords * kIn);
      constexpr int kWord = kStep % kLoadSteps * kStepWords;
      if constexpr (Traits::kValues == kI8) {
        T::from_int8(a[0], a[1], words[kWord], magic);
        T::from_int8(a[2], a[3], words[kWord + 1], magic);
      } else {
        T::from_int4(a, words[kWord], magic);
      }
    }
    if constexpr (Traits::kScaled) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = T::multiply(a[i], twice(rows.scale, i % 2));
    }
  }
};

}  // namespace slab
