#pragma once

#include "wide_traits.cuh"

namespace slab {

template <class T, int kSel>
__device__ __forceinline__ void first_product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t m) {
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9,%10,%11},{%12,%12,%12,%12},%13,%14;"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "f"(0.0f), "r"(m), "n"(kSel));
}

template <int kOff> __device__ __forceinline__ void lds4(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4+%5];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a), "n"(kOff));
}
template <int kOff> __device__ __forceinline__ void lds2(uint32_t (&r)[2], uint32_t a) {
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2+%3];" : "=r"(r[0]), "=r"(r[1]) : "r"(a), "n"(kOff));
}
template <int kOff> __device__ __forceinline__ void ldsm(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4+%5];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a), "n"(kOff));
}
template <int kAt>
__device__ __forceinline__ void copy16_to(bool yes, uint32_t to, const void* from) {
  asm volatile(
      "{\n.reg .pred yes;\nsetp.ne.b32 yes, %2, 0;\n@yes cp.async.cg.shared.global [%0 + %3], [%1], "
      "16;\n}" ::"r"(to),
      "l"(from), "r"(int(yes)), "n"(kAt)
      : "memory");
}

__device__ __forceinline__ const uint8_t* kept_pointer(const uint8_t* p) {
  asm volatile("mov.b64 %0, %0;" : "+l"(p));
  return p;
}
__device__ __forceinline__ const uint8_t* ahead(const uint8_t* from, uint32_t count, uint32_t bytes) {
  const uint8_t* to;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(to) : "r"(count), "r"(bytes), "l"(from));
  return to;
}
template <int kDepth>
__device__ __forceinline__ void copies_wait_until() { asm volatile("cp.async.wait_group %0;" ::"n"(kDepth) : "memory"); }

template <class Traits>
struct WideWarp {
  using T = typename Traits::Activation;
  const LinearParams& params;
  int lane, member, members, group;
  // copies
  const uint8_t *weights_from, *x_from, *v_from;
  uint32_t weights_to, x_to[4], v_to, x_mask;
  bool x_exists[8], copies_v;
  int block_bytes, tail_pieces;
  // reads
  uint32_t values_at, signs_at, scales_at, x_at[Traits::kTokenTiles], x_odd[Traits::kTokenTiles], v_at;
  uint32_t magic, one;
  float kept[2][Traits::kTokenTiles][4], low[2][Traits::kTokenTiles][4];

  template <int kAt>
  __device__ __forceinline__ void fetch_head(uint32_t to, const uint8_t* from, bool yes) const {
    if constexpr (kAt < Traits::kHeadBytes) {
      copy16_if<kAt>(yes, to, from, policy);
      fetch_head<kAt + 512>(to, from, yes);
    }
  }
  uint64_t policy;
  __device__ __forceinline__ void fetch_weights(uint32_t stage, uint32_t k, bool yes) const {
    const uint8_t* const from = ahead(weights_from, k, block_bytes);
    fetch_head<0>(stage + weights_to, from, yes);
    if constexpr (Traits::kHasTail)
      copy16_if<Traits::kHeadBytes>(yes && lane < tail_pieces, stage + weights_to, from, policy);
    if constexpr (Traits::kSigned) {
      copy16_to<0>(copies_v, stage + v_to, ahead(v_from, k, 256));
    }
  }
  template <int kPair>
  __device__ __forceinline__ void fetch_pair(uint32_t stage, const uint8_t* from, uint32_t mask) const {
    constexpr int q = kPair / 2, n = kPair % 2;
    copy16_to<512 * q + 2048 * n>(x_exists[kPair], stage + x_to[q], ahead(from, uint32_t(params.token_stride), 2 * (2 * q + 8 * n)));
  }
  __device__ __forceinline__ void fetch_x(uint32_t stage, uint32_t k, bool yes) const {
    const uint32_t mask = x_mask;
    const uint8_t* const from = ahead(x_from, k, 256);
    fetch_pair<0>(stage, from, mask), fetch_pair<1>(stage, from, mask);
    fetch_pair<2>(stage, from, mask), fetch_pair<3>(stage, from, mask);
    fetch_pair<4>(stage, from, mask), fetch_pair<5>(stage, from, mask);
    fetch_pair<6>(stage, from, mask), fetch_pair<7>(stage, from, mask);
  }

  template <int kStep>
  __device__ __forceinline__ void step(uint32_t stage, const uint32_t (&metadata)[4], const uint32_t (&pruned)[4], const uint32_t (&signs)[2], uint32_t (&words)[2][4], float (&sum)[2][Traits::kTokenTiles][4]) {
    uint32_t b[Traits::kTokenTiles][4], v[4], xv[Traits::kTokenTiles][4];
    ldsm<64 * kStep>(v, stage + v_at);
#pragma unroll
    for (int n = 0; n < Traits::kTokenTiles; ++n) ldsm<(kStep / 2 << 7)>(b[n], stage + (kStep % 2 ? x_odd[n] : x_at[n]));
#pragma unroll
    for (int n = 0; n < Traits::kTokenTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) xv[n][i] = T::multiply(b[n][i], v[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t a[4], q[4];
      if constexpr (Traits::kValues == kW16) {
        if (r == 0) lds4<512 * kStep>(a, stage + values_at); else lds4<2048 + 512 * kStep>(a, stage + values_at);
      } else if constexpr (Traits::kValues == kI8) {
        if constexpr (kStep % 2 == 0) { if (r == 0) lds4<256 * kStep>(words[0], stage + values_at); else lds4<1024 + 256 * kStep>(words[1], stage + values_at); }
        T::from_int8(a[0], a[1], words[r][kStep % 2 * 2], magic);
        T::from_int8(a[2], a[3], words[r][kStep % 2 * 2 + 1], magic);
      } else {
        T::from_int4(a, words[r][kStep], magic);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = and_or(signs[r] << (4 * kStep + i), 0x80008000u, one);
#pragma unroll
      for (int n = 0; n < Traits::kTokenTiles; ++n) {
        if constexpr (!Traits::kScaled) T::template mma_sparse<kStep % 2>(kept[r][n], a, b[n], metadata[2 * r + kStep / 2]);
        else if constexpr (kStep == 0) first_product<T, 0>(sum[r][n], a, b[n], metadata[2 * r]);
        else T::template mma_sparse<kStep % 2>(sum[r][n], a, b[n], metadata[2 * r + kStep / 2]);
        T::template mma_sparse<kStep % 2>(low[r][n], q, xv[n], pruned[2 * r + kStep / 2]);
      }
    }
  }
  __device__ __forceinline__ void multiply(uint32_t stage) {
    uint32_t metadata[4], pruned[4], signs[2], words[2][4], scales[2];
    float sum[2][Traits::kTokenTiles][4];
    lds4<Traits::kMetadataAt>(metadata, stage + values_at);
    lds2<Traits::kSignsAt>(signs, stage + signs_at);
    if constexpr (Traits::kValues == kI4) lds4<0>(words[0], stage + values_at), lds4<512>(words[1], stage + values_at);
    if constexpr (Traits::kScaled) lds2<Traits::kScalesAt>(scales, stage + scales_at);
#pragma unroll
    for (int i = 0; i < 4; ++i) pruned[i] = complement_nibbles(metadata[i]);
    step<0>(stage, metadata, pruned, signs, words, sum);
    step<1>(stage, metadata, pruned, signs, words, sum);
    step<2>(stage, metadata, pruned, signs, words, sum);
    step<3>(stage, metadata, pruned, signs, words, sum);
    if constexpr (Traits::kScaled) {
#pragma unroll
          for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int n = 0; n < Traits::kTokenTiles; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i)
                kept[r][n][i] = fmaf(__uint_as_float(i < 2 ? scales[r] << 16 : scales[r] & 0xFFFF0000u), sum[r][n][i], kept[r][n][i]);
    }
  }
};

#ifndef UNI
#define UNI 1
#endif
__device__ __forceinline__ int uniform(int x) { return UNI ? __shfl_sync(~0u, x, 0) : x; }

template <class Traits>
__device__ __forceinline__ void wide(const LinearParams& params) {
  extern __shared__ __align__(256) uint8_t shared[];
  let_successor_start();
  WideWarp<Traits> w{params};
  w.lane = threadIdx.x, w.member = uniform(threadIdx.y), w.group = uniform(threadIdx.z), w.members = params.warp_rows;
  const int lane = w.lane;
  const int groups = params.warp_inputs;
  const int first_token = blockIdx.x * params.tile_tokens, tokens = min(params.tile_tokens, params.tokens - first_token);
  const int split = blockIdx.z;
  const int first_k = split * params.k_share + min(split, params.k_more), k_blocks = params.k_share + (split < params.k_more);
  const int group_steps = Traits::kGroups == kGroupsWhole ? kSteps : params.group_steps;
  w.block_bytes = Traits::kScalesAt + stream_scale_bytes(Traits::kValues, group_steps);
  w.tail_pieces = (w.block_bytes - Traits::kHeadBytes) / 16;
  const int v_at = tokens * kTokenRow, weights_at = v_at + kTokenRow * (Traits::kSigned ? 1 : 0);
  const uint32_t stage_bytes = (weights_at + w.members * w.block_bytes + 127) & ~127u;
  const uint32_t ring = shared_address(shared) + w.group * params.stages * stage_bytes;
  const int pair = blockIdx.y * w.members + w.member;
  w.weights_from = kept_pointer(params.stream + (int64_t(pair) * params.num_k_blocks + first_k) * w.block_bytes + 16 * lane);
  w.policy = weight_policy(params.token_tiles == 1);
  w.weights_to = ring + weights_at + w.member * w.block_bytes + 16 * lane;
  const int piece = lane % 16, half = lane / 16;
  w.v_from = kept_pointer(params.v + first_k * kTokenRow + 16 * piece);
  w.v_to = ring + v_at + 16 * piece;
  const int share = max(4 >> (31 - __clz(w.members)), 1), q0 = (w.member * share) & 3, row = 2 * q0 + half;
  w.x_from = kept_pointer(params.x + 2 * ((first_token + row) * params.token_stride + int64_t(first_k) * kBlockInputs + piece * 8));
  #pragma unroll
  for (int q = 0; q < 4; ++q) w.x_to[q] = (ring + row * kTokenRow + ((piece ^ row) << 4)) ^ (q << 5);
  w.copies_v = w.member == 0 && lane < 16;
  w.x_mask = 0;
#pragma unroll
  for (int p = 0; p < 8; ++p) if (p / 2 < share && row + 2 * (p / 2) + 8 * (p % 2) < tokens) w.x_mask |= 1u << p;
#pragma unroll
  for (int p = 0; p < 8; ++p) w.x_exists[p] = w.x_mask >> p & 1;
  w.values_at = w.weights_to;
  w.signs_at = w.values_at - 8 * lane;
  w.scales_at = w.values_at - 16 * lane + lane / 4 * 8;
  w.v_at = ring + v_at + lane / 8 * 16;
#pragma unroll
  for (int n = 0; n < Traits::kTokenTiles; ++n) {
    const int r = min(8 * n + lane % 8, tokens - 1);
    w.x_at[n] = ring + r * kTokenRow + ((lane / 8 ^ (r & 7)) << 4);
    w.x_odd[n] = keep(w.x_at[n] ^ 64);
  }
  const uint32_t opaque = uint32_t(params.tokens) >> 31;
  w.magic = (Traits::kValues == kI8 ? Traits::Activation::kByteMagic : Traits::Activation::kNibbleMagic) + opaque;
  w.one = Traits::Activation::kOne + opaque;
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int n = 0; n < Traits::kTokenTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) w.kept[r][n][i] = w.low[r][n][i] = 0;
  int next = w.group;
  uint32_t to = 0;
  for (int s = 0; s < params.stages - 1; ++s, next += groups, to += stage_bytes) if (next < k_blocks) w.fetch_weights(to, next, true);
  wait_for_predecessor();
  next = w.group, to = 0;
  for (int s = 0; s < params.stages - 1; ++s, next += groups, to += stage_bytes) {if (next < k_blocks) w.fetch_x(to, next, true); copies_commit();}
  uint32_t read = 0, end = params.stages * stage_bytes;
#pragma unroll 1
  for (int k = w.group; k < k_blocks; k += groups) {
    if (w.members == 1) {
      if (params.stages == 2) copies_wait_until<0>(); else if (params.stages == 3) copies_wait_until<1>(); else copies_wait_until<2>();
      __syncwarp();
    } else {
      if (params.stages == 2) copies_wait_until<0>(); else if (params.stages == 3) copies_wait_until<1>(); else copies_wait_until<2>();
      barrier(1 + w.group, 32 * w.members);
    }
    if (next < k_blocks) {
      w.fetch_weights(to, next, true);
      w.fetch_x(to, next, true);
    }
    copies_commit();
    w.multiply(read);
    next += groups;
    to = read;
    read = read + stage_bytes == end ? 0 : read + stage_bytes;
  }
  float* y = reinterpret_cast<float*>(params.partial) + threadIdx.z * 1000 + threadIdx.y*100+lane;
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int n = 0; n < Traits::kTokenTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) y[(r*8+n*4+i)*32] = w.kept[r][n][i] + w.low[r][n][i];
}

}  // namespace slab
