// y[M,N] = x S^T + sum_r ((x * v_r) B^T) * u_r + (x Q) P^T + bias in one pass over the packed bits.
//
// Weights are the tensor core's A operand (16 output rows), tokens its n8. S runs as mma.sp on its metadata, the signs
// as mma.sp on the complement metadata, and both add into ONE accumulator, whatever the rank: the sign operand of rank
// r is not +-1 but +-u_ir, the stored u of its row with a sign bit flipped by one LOP3, against the activations times
// v_r. (Against the normalised form, diag(u) M diag(v) with M = S / (u v): no kept value is rounded a second time, u =
// 0 and v = 0 need no care, integer S keeps its codes and scales, and rank R needs no R accumulators. Its price is one
// product of x and v per fragment, shared by all row tiles of a warp.)
//
// A CTA is warp_rows x warp_tokens x warp_inputs warps. A warp holds 16 kRowTiles rows (one activation fragment serves
// all of its row tiles) x 8 kTiles tokens; warps that differ only in rows or tokens form a group, share a ring of `stages`
// K-blocks in shared memory and a named barrier. Groups take K-blocks in turn (group w: w, w + warp_inputs, ...); their
// sums are added in that order at the end, so the result depends on no timing, and a token's result on no other token.
//
// At 4 bits a weight decoding is a race against the issue rate (README, "Instruction budget"): what does not change
// from K-block to K-block is made once and kept in registers (`keep`), copies are predicated, never branched around.
#pragma once

#include "place.cuh"

namespace slab {

constexpr int kRankNone = 0, kRankOne = 1, kRankAny = -1;
constexpr int kPlanesAny = -1;  // two or three, known at run time

template <class T, int kValues, int kRank, int kRowTiles, int kTiles, int kPlanes = 1>
struct Linear {
  static constexpr int kWarpRows = kRowTiles * kBlockRows;
  static constexpr int kTokens = 8 * kTiles;  // of a warp
  static constexpr bool kScaled = kValues == kI8 || kValues == kI4;
  static constexpr bool kSparse = kValues != kDense;
  // Token tiles that go through a K-block together: scales need a second set of sums, and 64 tokens at once would
  // spill.
  static constexpr int kPass = kScaled && kTiles == 8 ? (kValues == kI8 ? 2 : 4) : kTiles;
  static constexpr int kWindow = kPass < 4 ? kPass : 4;  // activation fragments held at once: 16 registers
  static constexpr bool kWide = kTiles >= 4;  // a whole tile of tokens is staged; below that only those that exist
  static constexpr int kValueBytes = stream_value_bytes(kValues);
  static constexpr int kSignsAt = kValueBytes + stream_metadata_bytes(kValues);
  static constexpr int kWholeBytes = kPlanes == 1 ? kValueBytes : kSignsAt + 2 * kSignBytes;  // copied by all lanes
  static constexpr bool kThird = kPlanes == 3 || kPlanes == kPlanesAny;
  // With several planes the sign operand of one rank is the level (an odd multiple of the last plane's unit), not the level
  // times u: u multiplies its sums once, at the end. Levels of several ranks are multiplied by their u, and rounded.
  static constexpr bool kLevels = kPlanes > 1;
  // Sparse products of few tokens are a chain of dependent mma, 33 cycles each: the signs get a chain of their own.
  static constexpr bool kTwoChains = (kValues == kW16 && kTiles <= 2) || kLevels;
  static_assert(kPlanes == 1 || (kWholeBytes % 512 == 0 && kRank == (kPlanes == kPlanesAny ? kRankAny : kRankOne)));

  // Tiles of 64 tokens and the loop over ranks have no register to spare, and their products hide a few additions.
  static constexpr bool kHolds = kTiles < 8 && kRank == kRankOne;
  static __device__ __forceinline__ uint32_t held(uint32_t value) { return kHolds ? keep(value) : value; }

  const LinearParams& p;
  const Place at;
  const Role my;
  int rank, planes, tokens;  // tokens: of this CTA, that exist
  uint32_t ring, ring_end, stage_bytes, read, write;
  // What this lane copies: up to kRowTiles weight blocks, rows 2 members apart of the activations, a row of v
  const uint8_t *weights_from[kRowTiles], *x_from;     // of this group's first K-block
  uint32_t weights_to[kRowTiles], x_to, v_from, v_to;  // v_from: bytes after p.v
  int tail, copy_row, x_step, whole;                   // whole: K-blocks, from this group's first on, that need no care
  bool copies[kRowTiles];
  uint64_t policy;
  // Where this lane reads, from the start of a stage
  uint32_t values_at[kRowTiles], metadata_at, signs_at, scales_at, v_at, x_at[kWide ? 1 : kTiles], magic, level_magic;
  float acc[kRowTiles][kTiles][4], low[kRowTiles][kTwoChains ? kTiles : 1][4];

  __device__ __forceinline__ Linear(const LinearParams& params, uint32_t shared)
      : p(params), at(place_of<kRowTiles>(params)), my(role_of(params)) {
    const int lane = my.lane, member = my.member, members = my.members;
    rank = kRank != kRankAny ? kRank : kSparse ? p.rank : 0;
    planes = kPlanes != kPlanesAny ? kPlanes : p.planes;
    const int staged = p.warp_tokens * kTokens, first_token = at.token * staged;
    tokens = min(staged, p.tokens - first_token);
    scales_at = kSignsAt + (rank ? planes * kSignBytes : 0);
    const int block_bytes = scales_at + stream_scale_bytes(kValues, kScaled ? p.group_steps : kSteps);
    const int v_rows_at = (kWide ? staged : min(staged, p.tokens)) * kTokenRow,
              weights_at = v_rows_at + rank * kTokenRow;
    stage_bytes = (weights_at + p.warp_rows * kRowTiles * block_bytes + 255) / 256 * 256;
    ring = shared + my.group * p.stages * stage_bytes;
    ring_end = held(ring + p.stages * stage_bytes);
    read = write = held(ring);

    const int first = first_block();
    whole = p.whole_blocks - first;
    tail = (block_bytes - kWholeBytes) / 16;  // metadata, signs, scales: at most 32 pieces of 16 bytes
    policy = weight_policy(p.token_tiles == 1);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const int b = member + m * members;
      copies[m] = b < p.warp_rows * kRowTiles;
      const int block = min(at.first_block + b, at.end_block - 1);  // past the part's end: read twice, stored never
      weights_from[m] = p.stream + (int64_t(block) * p.k_blocks + first) * block_bytes + 16 * lane;
      weights_to[m] = held(weights_at + b * block_bytes + 16 * lane);
      values_at[m] = held(weights_at + (my.row_warp * kRowTiles + m) * block_bytes + 16 * lane);
    }
    // Rows of 16 pieces of 16 bytes; piece c of token row r lies at c ^ (r % 8), so that ldmatrix meets no bank twice.
    copy_row = lane / 16 + 2 * member;
    x_step = 2 * members;
    x_from = p.x + 2 * ((first_token + copy_row) * p.token_stride + int64_t(first) * kBlockInputs + lane % 16 * 8);
    x_to = held(lane % 16);
    v_from = (at.part * rank * p.k_blocks + first) * kTokenRow + lane % 16 * 16;
    v_to = held(v_rows_at + 16 * (lane % 16));
    v_at = held(v_rows_at + lane / 8 * 16);
    metadata_at = kValueBytes - 8 * lane;  // the others are relative to values_at, which holds 16 lane
    // Of one plane, or the third; the words of the first two planes lie like those of the metadata.
    signs_at = kSignsAt + (kThird ? 2 * kSignBytes : 0) - 12 * lane;
    scales_at += lane / 4 * 4 - 16 * lane;
    metadata_at = held(metadata_at), signs_at = held(signs_at), scales_at = held(scales_at);
#pragma unroll
    for (int n = 0; n < (kWide ? 1 : kTiles); ++n) {
      int row = my.token_warp * kTokens + 8 * n + lane % 8;
      if (!kWide) row = min(row, tokens - 1);  // a column of the product that is not stored
      x_at[n] = held(row * kTokenRow + ((lane / 8 ^ (row & 7)) << 4));
    }
    // A LOP3 takes one immediate. In a register that no compiler can know (the sign of p.tokens is 0), the magic number
    // lets mask and magic be one instruction.
    magic = (kValues == kI8 ? T::kByteMagic : T::kNibbleMagic) | (kHolds ? uint32_t(p.tokens) >> 31 : 0u);
    level_magic = T::kNibbleMagic | (kHolds ? uint32_t(p.tokens) >> 31 : 0u);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n][i] = low[m][kTwoChains ? n : 0][i] = 0.0f;
  }

  // K-blocks of this CTA's share, and the first of this group
  __device__ __forceinline__ int share(int split) const {
    return int(unsigned(p.k_blocks) * unsigned(split) / unsigned(p.splits));
  }
  __device__ __forceinline__ int first_block() const { return share(at.split) + my.group; }

  // ---- copies: one K-block of weights, activations and v into a stage ----

  template <int kAt>
  __device__ __forceinline__ void copy_pieces(bool yes, uint32_t to, const uint8_t* from) const {
    copy16_if<kAt>(yes, to, from, policy);
    if constexpr (kAt + 512 < kWholeBytes) copy_pieces<kAt + 512>(yes, to, from);
  }

  __device__ __forceinline__ void copy(int n) {  // n: K-blocks after this group's first
    const uint32_t block_bytes = 16 * tail + kWholeBytes;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      // base + n * size: one multiply-add into a register pair that LDGSTS can take
      const uint8_t* const from = weights_from[m] + uint64_t(uint32_t(n)) * block_bytes;
      copy_pieces<0>(copies[m], write + weights_to[m], from);
      if constexpr (kSparse && (kScaled || kPlanes == 1 || kThird))
        copy16_if<kWholeBytes>(copies[m] && my.lane < tail, write + weights_to[m], from, policy);
    }
    const uint64_t along = uint64_t(uint32_t(n)) * kTokenRow;
    if (kRank == kRankOne) copy16_if(copy_row == 0, write + v_to, p.v + v_from + along);
    if (n < whole)
      copy_activations(x_from + along);
    else
      copy_edge(n, x_from + along);
    if (kRank == kRankAny)
      for (int r = copy_row; r < rank; r += x_step)
        copy16_if(true, write + v_to + r * kTokenRow, p.v + v_from + along + r * p.k_blocks * kTokenRow);
    write = write + stage_bytes == ring_end ? ring : write + stage_bytes;
  }

  __device__ __forceinline__ void copy_activations(const uint8_t* from) const {
    constexpr int kUnroll = 4;
    const uint32_t to = write + copy_row * kTokenRow + ((x_to ^ (copy_row & 7)) << 4);
    if (tokens <= x_step) return copy16_if(copy_row < tokens, to, from);
    const int64_t step = 2 * x_step * p.token_stride;
    for (int first = 0; first < tokens; first += kUnroll * x_step) {
#pragma unroll
      for (int j = 0; j < kUnroll; ++j, from += step) {
        const int row = first + j * x_step;  // x_step is a power of two above copy_row: their bits are apart
        copy16_if(row + copy_row < tokens, (to ^ ((row & 7) << 4)) + row * kTokenRow, from);
      }
    }
  }
  // The last K-block where K is no multiple of 128, and every block of rows that are not 16-byte aligned.
  __device__ __forceinline__ void copy_edge(int n, const uint8_t* x_from) const {
    // inputs of this piece that exist
    const int left = p.in_features - (p.whole_blocks - whole + n) * kBlockInputs - my.lane % 16 * 8;
    const uint8_t* from = left > 0 ? x_from : p.x;
    for (int row = copy_row; row < tokens; row += x_step, from += left > 0 ? 2 * x_step * p.token_stride : 0) {
      const uint32_t to = write + row * kTokenRow + ((x_to ^ (row & 7)) << 4);
      if (!p.x_ragged) {
        copy16_zero_filled(to, from, 2 * max(0, min(left, 8)));
      } else {
        uint32_t r[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (j < left) r[j / 2] |= uint32_t(reinterpret_cast<const uint16_t*>(from)[j]) << (16 * (j % 2));
        store_shared(to, r);
      }
    }
  }

  // ---- one K-block ----

  struct Block {                                        // what a warp keeps of one K-block
    uint32_t values[kRowTiles], x[kWide ? 1 : kTiles];  // addresses
    uint32_t words[kRowTiles][4], metadata[kRowTiles][2], pruned[kRowTiles][2], signs[kRowTiles][kThird ? 3 : kPlanes];
    float sum[kRowTiles][kScaled ? kPass : 1][4];  // of the current scale group
  };

  // The A fragment of a step; words holds what a 16-byte load brings for several steps.
  template <int kStep>
  __device__ __forceinline__ void load_values(uint32_t (&a)[4], uint32_t (&words)[4], uint32_t values) const {
    if constexpr (kValues == kW16) {
      load_shared(a, values + 512 * kStep);
    } else if constexpr (kValues == kI8) {
      if (kStep % 2 == 0) load_shared(words, values + 256 * kStep);
      T::from_int8(a[0], a[1], words[kStep % 2 * 2], magic);
      T::from_int8(a[2], a[3], words[kStep % 2 * 2 + 1], magic);
    } else {
      if (kStep == 0) load_shared(words, values);
      T::from_int4(a, words[kStep], magic);
    }
  }

  template <int kStep>
  __device__ __forceinline__ static void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                  const uint32_t (&metadata)[2]) {
    T::template mma_sparse<kStep % 2>(c, a, b, metadata[kStep / 2]);
  }

  template <int kStep>
  __device__ __forceinline__ void step(Block& k, const uint32_t (&u)[kRowTiles][2], int pass) {
    uint32_t a[kRowTiles][4], v[4];
    if constexpr (kSparse) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) load_values<kStep>(a[m], k.words[m], k.values[m]);
      if constexpr (kRank == kRankOne) load_matrices(v, read + v_at + 64 * kStep);
    }
#pragma unroll
    for (int first = pass; first < pass + kPass; first += kWindow) {
      uint32_t b[kWindow][4];
#pragma unroll
      for (int n = 0; n < kWindow; ++n) {
        const uint32_t row = kWide ? k.x[0] : k.x[n];
        load_matrices(b[n], (row ^ (kStep % 2 << 6)) + (kStep / 2 << 7) + (kWide ? (first + n) * 8 * kTokenRow : 0));
      }
      if constexpr (!kSparse) {
        add_dense<kStep>(k, b, first);
      } else {
#pragma unroll
        for (int n = 0; n < kWindow; ++n)
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            if constexpr (kScaled)
              multiply<kStep>(k.sum[m][first - pass + n], a[m], b[n], k.metadata[m]);
            else
              multiply<kStep>(acc[m][first + n], a[m], b[n], k.metadata[m]);
          }
        if constexpr (kRank == kRankOne) {
          add_signs<kStep>(k, b, first, u, v);
        } else if constexpr (kRank == kRankAny) {
#pragma unroll 1
          for (int r = 0; r < rank; ++r) {
            uint32_t u_r[kRowTiles][2];
            load_u(u_r, r);
            load_matrices(v, read + v_at + r * kTokenRow + 64 * kStep);
            add_signs<kStep>(k, b, first, u_r, v);
          }
        }
      }
    }
    if constexpr (kScaled) {
      // The first condition is the second's for the last step, known to the compiler.
      if (kStep == kSteps - 1 || ((kStep + 1) & (p.group_steps - 1)) == 0) add_scaled<kStep>(k, pass);
    }
  }

  template <int kStep>
  __device__ __forceinline__ void add_dense(const Block& k, const uint32_t (&b)[kWindow][4], int first) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t a[4];
        load_shared(a, k.values[m] + 1024 * kStep + 512 * h);
#pragma unroll
        for (int n = 0; n < kWindow; ++n) T::mma_dense(acc[m][first + n], a, b[n][2 * h], b[n][2 * h + 1]);
      }
  }

  // Levels of row half kHalf: 3/2 or 7/4 less the index that stands from bit kIndexAt + 2 kHalf on, exactly. The third
  // plane's bit stands right below it: half a unit.
  template <int kStep, int kColumn, int kHalf>
  __device__ __forceinline__ uint32_t levels(const uint32_t (&signs)[kThird ? 3 : kPlanes]) const {
    constexpr int kAt = T::kIndexAt + 2 * kHalf, kScale = 0x00010001 * (kAt << T::kMantissaBits);
    constexpr uint32_t kTwo = 0x00030003u << (kAt - 1), kThree = 0x00070007u << (kAt - 2);
    const uint32_t index = shift_down<8 * (kStep % 2) + 4 * kColumn - T::kIndexAt>(signs[kStep / 2]);
    uint32_t word = and_or(index, 0x00030003u << kAt, level_magic);
    if constexpr (kThird)
      word = and_or(shift_down<4 * kStep + kColumn + 1 - T::kIndexAt>(signs[2]), 0x00010001u << (kAt - 1), word);
    return T::fma(word, (T::kOne - kScale) | 0x80008000u, T::kNibbleMagic - kScale + (planes == 2 ? kTwo : kThree));
  }

  template <int kStep>
  __device__ __forceinline__ void add_signs(const Block& k, const uint32_t (&b)[kWindow][4], int first,
                                            const uint32_t (&u)[kRowTiles][2], const uint32_t (&v)[4]) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if constexpr (kPlanes == 1) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = and_xor(k.signs[m][0] << (4 * kStep + i), 0x80008000u, u[m][i % 2]);
      } else {
        a[m][0] = levels<kStep, 0, 0>(k.signs[m]), a[m][1] = levels<kStep, 0, 1>(k.signs[m]);
        a[m][2] = levels<kStep, 1, 0>(k.signs[m]), a[m][3] = levels<kStep, 1, 1>(k.signs[m]);
        if constexpr (!kLevels) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[m][i] = T::multiply(a[m][i], u[m][i % 2]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kWindow; ++n) {
      uint32_t scaled[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) scaled[i] = T::multiply(b[n][i], v[i]);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        if constexpr (kTwoChains)
          multiply<kStep>(low[m][first + n], a[m], scaled, k.pruned[m]);
        else
          multiply<kStep>(acc[m][first + n], a[m], scaled, k.pruned[m]);
      }
    }
  }

  template <int kStep>
  __device__ __forceinline__ void add_scaled(Block& k, int pass) {
    const uint32_t group_at = scales_at + (kStep >> (p.group_steps >> 1)) * 2 * kBlockRows;  // kStep / 1, 2 or 4
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const uint32_t scales = load_shared32(k.values[m] + group_at);
      const float first = __uint_as_float(scales << 16), second = __uint_as_float(scales & 0xFFFF0000u);
#pragma unroll
      for (int n = 0; n < kPass; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc[m][pass + n][i] = fmaf(i < 2 ? first : second, k.sum[m][n][i], acc[m][pass + n][i]);
          k.sum[m][n][i] = 0.0f;
        }
    }
  }

  __device__ __forceinline__ void load_u(uint32_t (&u)[kRowTiles][2], int r) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const int block = min(at.first_block + my.row_warp * kRowTiles + m, at.end_block - 1);
#pragma unroll
      for (int h = 0; h < 2; ++h) u[m][h] = __ldg(p.u + int64_t(block * kBlockRows + 8 * h + my.lane / 4) * rank + r);
    }
  }

  __device__ __forceinline__ void multiply_block(const uint32_t (&u)[kRowTiles][2]) {
    Block k;
#pragma unroll
    for (int n = 0; n < (kWide ? 1 : kTiles); ++n) k.x[n] = read + x_at[n];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      k.values[m] = read + values_at[m];
      if constexpr (kSparse) {
        load_shared(k.metadata[m], k.values[m] + metadata_at);
        if (kRank == kRankOne || rank) {
          if constexpr (kPlanes == 1) {
            k.signs[m][0] = load_shared32(k.values[m] + signs_at);
          } else {
            uint32_t two[2];
            load_shared(two, k.values[m] + metadata_at + (kSignsAt - kValueBytes));
            k.signs[m][0] = two[0], k.signs[m][1] = two[1];
            if constexpr (kThird) k.signs[m][2] = planes == 3 ? load_shared32(k.values[m] + signs_at) : 0;
          }
#pragma unroll
          for (int h = 0; h < 2; ++h) k.pruned[m][h] = complement_nibbles(k.metadata[m][h]);
        }
      }
#pragma unroll
      for (int n = 0; n < (kScaled ? kPass : 1); ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) k.sum[m][n][i] = 0.0f;
    }
#pragma unroll
    for (int pass = 0; pass < kTiles; pass += kPass) {
      step<0>(k, u, pass);
      step<1>(k, u, pass);
      step<2>(k, u, pass);
      step<3>(k, u, pass);
    }
    read = read + stage_bytes == ring_end ? ring : read + stage_bytes;
  }

  // ---- the whole K range of this CTA ----

  __device__ __forceinline__ void multiply_all() {
    const int end = share(at.split + 1) - first_block(), stride = p.warp_inputs, id = 1 + my.group,
              threads = 32 * my.members;
    uint32_t u[kRowTiles][2] = {};
    if constexpr (kRank == kRankOne) load_u(u, 0);
    int next = 0;  // the K-block to copy, from the group's first; stages - 1 behind it, one is multiplied
    for (int s = 0; s < p.stages - 1; ++s, next += stride) {
      if (next < end) copy(next);
      copies_commit();
    }
    for (const int ahead = (p.stages - 1) * stride; next < end + ahead; next += stride) {
      copies_wait(p.stages);
      barrier(id, threads);  // every warp's copies are here, and the slot freed by the last step is free for all
      if (next < end) copy(next);
      copies_commit();
      multiply_block(u);
    }
    if constexpr (kTwoChains) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if constexpr (kLevels)
              acc[m][n][i] = fmaf(T::widen(uint16_t(u[m][i / 2])), low[m][n][i], acc[m][n][i]);
            else
              acc[m][n][i] += low[m][n][i];
          }
    }
  }

  // z = x Q was summed by the kernel before; its K-steps are dealt to the groups in turn.
  __device__ __forceinline__ void add_adapter() {
    wait_for_predecessor();
    const Place at = place_of<kRowTiles>(p);
    const Role my = role_of(p);
    const int padded = 16 * p.adapter_steps, whole_row = p.parts * padded;
    const int64_t whole = int64_t(whole_row) * p.tokens;
    for (int s = my.group; s < p.adapter_steps; s += p.warp_inputs) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const int block = min(at.first_block + my.row_warp * kRowTiles + m, at.end_block - 1);
        const uint4 words =
            __ldg(reinterpret_cast<const uint4*>(p.p + (int64_t(block) * p.adapter_steps + s) * 512) + my.lane);
        a[m][0] = words.x, a[m][1] = words.y, a[m][2] = words.z, a[m][3] = words.w;
      }
      const int first = (at.token * p.warp_tokens + my.token_warp) * kTokens + my.lane / 4;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int token = min(first + 8 * n, p.tokens - 1);
        const float* const z = p.z + int64_t(token) * whole_row + at.part * padded + 16 * s + 2 * (my.lane % 4);
        float near[2] = {0.0f, 0.0f}, far[2] = {0.0f, 0.0f};
#pragma unroll 1
        for (int i = 0; i < p.z_splits; ++i) {  // plain loads: z was written while this kernel ran
          const volatile float* const part = z + i * whole;
          near[0] += part[0], near[1] += part[1], far[0] += part[8], far[1] += part[9];
        }
        const uint32_t b0 = T::pack(near[0], near[1]), b1 = T::pack(far[0], far[1]);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) T::mma_dense(acc[m][n], a[m], b0, b1);
      }
    }
  }

  // ---- sums of the groups, in their order, and the one store ----

  __device__ __forceinline__ void store(float* sums) {
    const Place at = place_of<kRowTiles>(p);
    const Role my = role_of(p);
    const int rows = p.warp_rows * kWarpRows, all_tokens = p.warp_tokens * kTokens;
    const int pitch = rows + 4;  // 2 tokens apart = 8 banks apart: the fragment's 32 lanes meet 32 banks
    copies_wait_all();
    __syncthreads();  // the ring is free
    float* const mine = sums + (my.group * all_tokens + my.token_warp * kTokens) * pitch + my.row_warp * kWarpRows;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          mine[(8 * n + 2 * (my.lane % 4) + i % 2) * pitch + kBlockRows * m + i / 2 * 8 + my.lane / 4] = acc[m][n][i];
    __syncthreads();
    const int first = at.token * all_tokens, tokens = min(all_tokens, p.tokens - first);
    const int shift = 31 - __clz(rows);  // warp_rows is a power of two
    for (int i = threadIdx.x; i < tokens * rows; i += blockDim.x) {
      const int token = i >> shift, row = i & (rows - 1), feature = at.first_row + row;
      if (feature >= at.end_row) continue;
      float sum = 0.0f;
      for (int g = 0; g < p.warp_inputs; ++g) sum += sums[(g * all_tokens + token) * pitch + row];
      const int64_t to = int64_t(first + token) * p.out_features + feature;
      if (p.partial)
        p.partial[int64_t(at.split) * p.tokens * p.out_features + to] = sum;
      else
        reinterpret_cast<uint16_t*>(p.y)[to] = T::narrow(sum + bias_of(p, feature));
    }
  }
};

template <class T, int kValues, int kRank, int kRowTiles, int kTiles, int kPlanes = 1>
__device__ __forceinline__ void linear(const LinearParams& p) {
  extern __shared__ __align__(256) uint8_t shared[];
  let_successor_start();
  Linear<T, kValues, kRank, kRowTiles, kTiles, kPlanes> work(p, shared_address(shared));
  work.multiply_all();
  if (kValues != kDense && p.adapter_steps && blockIdx.y == 0) work.add_adapter();
  work.store(reinterpret_cast<float*>(shared));
}

}  // namespace slab
