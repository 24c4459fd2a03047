// What a lane of a kernel for many tokens keeps of its two rows, and the integer codes as 16-bit
// numbers.
#pragma once

#include "prefill_place.cuh"
#include "prefill_traits.cuh"

namespace slab {

// Rows g and g + 8 of a warp's 16.
template <class Traits>
struct PrefillRows {
  using T = typename Traits::Activation;
  // fp16 does not reach as far down as the stream's scales do: a row's scales and u are multiplied
  // by a power of two, and its sums are divided by it. bf16 does, and its scales are bf16 as well.
  static constexpr bool kPowers = Traits::kScaled && T::kMantissaBits == 10;

  float power[kPowers ? 2 : 1];
  uint32_t u[2], scale[2];  // twice the same 16-bit number
  int64_t row;

  // Rank one's u is kept; of any rank, `row` finds them.
  __device__ __forceinline__ void begin(const PrefillParams& params, const PrefillPlace& place,
                                        int warp, int lane) {
    const int pair = min(place.first_pair + warp / kBlockTiles, place.end_pair - 1);
    row = pair * kBlockRows + warp % kBlockTiles * kTileRows + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (kPowers) power[h] = params.powers ? __ldg(params.powers + row + 8 * h) : 1.0f;
      if constexpr (Traits::kSigns && !Traits::kAny) {
        u[h] = __ldg(params.u + row + 8 * h);
        if constexpr (kPowers) {
          const float scaled = T::widen(uint16_t(u[h])) * power[h];
          u[h] = T::pack(scaled, scaled);
        }
      }
    }
  }

  // The inverse of a row's power: its exponent is the opposite.
  __device__ __forceinline__ float inverse(int h) const {
    if constexpr (kPowers) return __uint_as_float(0x7F000000u - __float_as_uint(power[h]));
    return 1.0f;
  }

  // From the stream's word of a scale group. There is no branch about it: one that depends on
  // params.group_steps would make ptxas wait for every product.
  __device__ __forceinline__ void set_scales(uint32_t word) {
    if constexpr (kPowers) {
      const float near = __uint_as_float(word << 16) * power[0],
                  far = __uint_as_float(word & 0xFFFF0000u) * power[1];
      scale[0] = T::pack(near, near), scale[1] = T::pack(far, far);
    } else {
      scale[0] = choose_bytes(word, 0, 0x1010), scale[1] = choose_bytes(word, 0, 0x3232);
    }
  }
};

// The kept values of a step of 32 inputs: register i of an A fragment, with their scales.
template <class Traits>
struct PrefillKept {
  using T = typename Traits::Activation;

  uint32_t words[4];  // integer values: one load serves several steps
  // In a register that the compiler cannot see through: a LOP3 takes one immediate operand only.
  uint32_t magic;

  explicit __device__ __forceinline__ PrefillKept(int never_negative)
      : magic((Traits::kValues == kI8 ? T::kByteMagic : T::kNibbleMagic) +
              opaque_zero(never_negative)) {}

  // at: of the lane's first 16 bytes.
  template <int kStep>
  __device__ __forceinline__ void load(uint32_t (&a)[4], uint32_t at,
                                       const PrefillRows<Traits>& rows) {
    if constexpr (Traits::kValues == kW16) {
      load_shared(a, at + 512 * kStep);
    } else if constexpr (Traits::kValues == kI8) {
      if (kStep % 2 == 0) load_shared(words, at + 256 * kStep);
      T::from_int8(a[0], a[1], words[kStep % 2 * 2], magic);
      T::from_int8(a[2], a[3], words[kStep % 2 * 2 + 1], magic);
    } else {
      if (kStep == 0) load_shared(words, at);
      T::from_int4(a, words[kStep], magic);
    }
    if constexpr (Traits::kScaled) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = T::multiply(a[i], rows.scale[i % 2]);
    }
  }
};

}  // namespace slab
