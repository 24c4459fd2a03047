// The consumer: how a warp multiplies one stage of the ring into its accumulators.
//
// A K-block is four steps of 32 inputs. In step `kStep`, mma.sp multiplies
//
//   S:              the stored values, placed by the metadata, with the activations
//   the sign term:  the signs times u, placed by the complement metadata, with the activations
//                   times v
#pragma once

#include "warp.cuh"

namespace slab {

// c += a b for one step of 32 inputs. The metadata says to which two of four inputs a pair of a
// belongs.
template <class T, int kStep>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4], const uint32_t (&metadata)[2]) {
  T::template mma_sparse<kStep % 2>(c, a, b, metadata[kStep / 2]);
}

// u of rank r: twice the same 16-bit number in each register.
template <class Traits>
__device__ __forceinline__ void Warp<Traits>::load_u(Factors& u, int r) const {
#pragma unroll
  for (int p = 0; p < Traits::kPairs; ++p) {
    const int pair = min(place.first_pair + role.row_warp * Traits::kPairs + p, place.end_pair - 1);
    const uint32_t first = uint32_t(pair * kBlockRows + role.lane / 4) * uint32_t(rank) + r;
    const uint32_t* const from = params.u + first;
#pragma unroll
    for (int tile = 0; tile < kBlockTiles; ++tile)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        u[kBlockTiles * p + tile][h] =
            __ldg(from + uint64_t(uint32_t(rank)) * (kTileRows * tile + 8 * h));
  }
}

template <class Traits>
__device__ __forceinline__ void Warp<Traits>::multiply_stage(const Factors& u) {
  Block block;
  open(block);
  step<0>(block, u);
  step<1>(block, u);
  step<2>(block, u);
  step<3>(block, u);
  read_stage = ring.after(read_stage);
}

// Loads what all steps of the K-block use.
template <class Traits>
__device__ __forceinline__ void Warp<Traits>::open(Block& block) const {
  block.tokens = read_stage + read.tokens_at;
#pragma unroll
  for (int p = 0; p < Traits::kPairs; ++p) {
    block.pairs[p] = read_stage + read.blocks_at[p];
    if constexpr (Traits::kSparse) {
      uint32_t words[4];
      load_shared(words, block.pairs[p] + Traits::kMetadataAt);
#pragma unroll
      for (int i = 0; i < 4; ++i) block.metadata[kBlockTiles * p + i / 2][i % 2] = words[i];
      if (Traits::kRank == kRankOne || rank) load_signs(block, p);
    }
  }
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < (Traits::kScaled ? Traits::kTokenTiles : 1); ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) block.group_sum[m][n][i] = 0.0f;
}

template <class Traits>
__device__ __forceinline__ void Warp<Traits>::load_signs(Block& block, int pair) const {
  uint32_t own[2] = {0, 0};  // of the only plane, or of the third
  if (Traits::kPlanes == 1 || planes == 3) load_shared(own, block.pairs[pair] + read.signs_at);
  uint32_t two[4];  // of the first two planes of several
  if constexpr (Traits::kPlanes != 1) load_shared(two, block.pairs[pair] + Traits::kSignsAt);
#pragma unroll
  for (int tile = 0; tile < kBlockTiles; ++tile) {
    const int m = kBlockTiles * pair + tile;
    if constexpr (Traits::kPlanes != 1)
      block.signs[m][0] = two[2 * tile], block.signs[m][1] = two[2 * tile + 1];
    if constexpr (Traits::kPlanes == 1 || Traits::kThirdPlane)
      block.signs[m][Traits::kSignWords - 1] = own[tile];
#pragma unroll
    for (int h = 0; h < 2; ++h) block.complement[m][h] = complement_nibbles(block.metadata[m][h]);
  }
}

// One step of 32 inputs.
template <class Traits>
template <int kStep>
__device__ __forceinline__ void Warp<Traits>::step(Block& block, const Factors& u) {
  Weights a;
  Fragment v;
  if constexpr (Traits::kSparse) {
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m)
      load_kept<T, Traits::kValues, kStep>(
          a[m], block.words[m],
          block.pairs[m / kBlockTiles] + m % kBlockTiles * uint32_t(Traits::kValueBytes),
          read.value_magic);
    if constexpr (Traits::kRank == kRankOne) load_matrices(v, read_stage + read.v_at + 64 * kStep);
  }
#pragma unroll
  for (int first = 0; first < Traits::kTokenTiles; first += Traits::kHeldFragments) {
    Activations b;
    load_activations<kStep>(b, block, first);
    if constexpr (Traits::kSparse) {
      add_values<kStep>(block, a, b, first);
      add_sign_term<kStep>(block, b, first, u, v);
    } else {
      add_dense<kStep>(block, b, first);
    }
  }
  if constexpr (Traits::kScaled) {
    // Where a scale group ends. The last step always is, which the compiler sees by the first
    // condition.
    if (kStep == kSteps - 1 || ((kStep + 1) & (params.group_steps - 1)) == 0)
      apply_scales<kStep>(block);
  }
}

template <class Traits>
template <int kStep>
__device__ __forceinline__ void Warp<Traits>::load_activations(Activations& b, const Block& block,
                                                               int first) const {
#pragma unroll
  for (int n = 0; n < Traits::kHeldFragments; ++n) {
    // Step s is the pieces 4 s to 4 s + 3 of a row. Bit 2 of a piece's number is the lowest of s,
    // and the swizzle may have flipped it, so it is XORed; the others are added.
    load_matrices(
        b[n], (block.tokens ^ (kStep % 2 << 6)) + (kStep / 2 << 7) + (first + n) * 8 * kTokenRow);
  }
}

template <class Traits>
template <int kStep>
__device__ __forceinline__ void Warp<Traits>::add_values(Block& block, const Weights& a,
                                                         const Activations& b, int first) {
#pragma unroll
  for (int n = 0; n < Traits::kHeldFragments; ++n)
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m) {
      if constexpr (Traits::kScaled)
        multiply<T, kStep>(block.group_sum[m][first + n], a[m], b[n], block.metadata[m]);
      else
        multiply<T, kStep>(sums.sum[m][first + n], a[m], b[n], block.metadata[m]);
    }
}

template <class Traits>
template <int kStep>
__device__ __forceinline__ void Warp<Traits>::add_sign_term(const Block& block,
                                                            const Activations& b, int first,
                                                            const Factors& u, const Fragment& v) {
  if constexpr (Traits::kRank == kRankOne) {
    add_signs<kStep>(block, b, first, u, v);
  } else if constexpr (Traits::kRank == kRankAny) {
#pragma unroll 1
    for (int r = 0; r < rank; ++r) {
      Factors u_r;
      Fragment v_r;
      load_u(u_r, r);
      load_matrices(v_r, read_stage + read.v_at + r * kTokenRow + 64 * kStep);
      add_signs<kStep>(block, b, first, u_r, v_r);
    }
  }
}

// The sign term of one rank.
template <class Traits>
template <int kStep>
__device__ __forceinline__ void Warp<Traits>::add_signs(const Block& block, const Activations& b,
                                                        int first, const Factors& u,
                                                        const Fragment& v) {
  Weights a;
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m) load_sign_operand<kStep>(a[m], block.signs[m], u[m]);
#pragma unroll
  for (int n = 0; n < Traits::kHeldFragments; ++n) {
    Fragment scaled;
#pragma unroll
    for (int i = 0; i < 4; ++i) scaled[i] = T::multiply(b[n][i], v[i]);
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m) {
      if constexpr (Traits::kLevelOperand)
        multiply<T, kStep>(sums.signs[m][first + n], a[m], scaled, block.complement[m]);
      else
        multiply<T, kStep>(sums.sum[m][first + n], a[m], scaled, block.complement[m]);
    }
  }
}

// The A fragment of the sign term: u with its sign flipped where the sign is -1, or levels.
template <class Traits>
template <int kStep>
__device__ __forceinline__ void Warp<Traits>::load_sign_operand(Fragment& a, const SignWords& signs,
                                                                const uint32_t (&u)[2]) const {
  if constexpr (Traits::kPlanes == 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = and_xor(signs[0] << (4 * kStep + i), 0x80008000u, u[i % 2]);
  } else {
    a[0] = levels<kStep, 0, 0>(signs), a[1] = levels<kStep, 0, 1>(signs);
    a[2] = levels<kStep, 1, 0>(signs), a[3] = levels<kStep, 1, 1>(signs);
    if constexpr (!Traits::kLevelOperand) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = T::multiply(a[i], u[i % 2]);
    }
  }
}

// The levels of register i = 2 kColumn + kHalf.
template <class Traits>
template <int kStep, int kColumn, int kHalf>
__device__ __forceinline__ uint32_t Warp<Traits>::levels(const SignWords& signs) const {
  const uint32_t two[2] = {signs[0], signs[1]};
  return level_pair<T, kStep, kColumn, kHalf, Traits::kThirdPlane>(
      two, Traits::kThirdPlane ? signs[Traits::kSignWords - 1] : 0, read.level_magic, planes);
}

// Adds the sums of a scale group, times the scale, and clears them.
template <class Traits>
template <int kStep>
__device__ __forceinline__ void Warp<Traits>::apply_scales(Block& block) {
  // This is kStep / group_steps, because group_steps is 1, 2 or 4.
  const int group = kStep >> (params.group_steps >> 1);
  const uint32_t group_at = read.scales_at + group * kScaleBytes;
  uint32_t scales[Traits::kPairs][kBlockTiles];
#pragma unroll
  for (int p = 0; p < Traits::kPairs; ++p) load_shared(scales[p], block.pairs[p] + group_at);
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m) {
    const uint32_t both = scales[m / kBlockTiles][m % kBlockTiles];
    const float near = __uint_as_float(both << 16), far = __uint_as_float(both & 0xFFFF0000u);
#pragma unroll
    for (int n = 0; n < Traits::kTokenTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& sum = sums.sum[m][n][i];
        sum = fmaf(i < 2 ? near : far, block.group_sum[m][n][i], sum);
        block.group_sum[m][n][i] = 0.0f;
      }
  }
}

// P Q^T's Q as a dense weight, for the kernel that computes z = x Q.
template <class Traits>
template <int kStep>
__device__ __forceinline__ void Warp<Traits>::add_dense(const Block& block, const Activations& b,
                                                        int first) {
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Fragment a;
      load_shared(a, block.pairs[m / kBlockTiles] + m % kBlockTiles * Traits::kValueBytes +
                         1024 * kStep + 512 * h);
#pragma unroll
      for (int n = 0; n < Traits::kHeldFragments; ++n)
        T::mma_dense(sums.sum[m][first + n], a, b[n][2 * h], b[n][2 * h + 1]);
    }
}

}  // namespace slab
