// What a CUDA kernel is called with, and the prepared stream it reads. Plain C, mirrored by backends/cuda/launch.py.
//
// The CUDA stream (made by backends/cuda/layout.py, never saved). A block is 16 output rows x 128 inputs, in the order in
// which lanes want it: lane = 4 g + t holds rows g and g + 8. Blocks of one row block follow each other along K.
//
//   values    w16 (fp16 or bf16, the activations' type): 4 steps of 32 inputs x 32 lanes x 16 bytes: a0 a1 a2 a3
//             int8: 2 x 32 lanes x 16 bytes, two steps each, bytes q + 128; a word is a0.lo a1.lo a0.hi a1.hi, or a2, a3
//             int4: 32 lanes x 4 words, one a step: nibble i is q + 8 of a_i's low half, nibble i + 4 of its high half
//             dense (P Q^T's Q): 4 steps x 2 x 32 lanes x 16 bytes: a0 a1 a2 a3 of two m16n8k16
//   metadata  32 lanes x 2 words: word h serves steps 2h (selector 0) and 2h + 1 (selector 1)
//   signs     only with rank > 0: 32 lanes x 1 word, one bit a pruned entry, laid out so that a left shift by 4 step + i
//             brings the signs of a_i's halves to bits 15 and 31
//             two or three planes: 32 lanes x 2 words, word h serves steps 2h and 2h + 1. A pruned entry's bits of the first
//             two planes, the larger one above, are the index of its level, 3/2 - index; those of a_i's halves (i = 2c + h)
//             stand 8 (step % 2) + 2 i above bits 0 and 16. Then the third plane: 32 lanes x 1 word, 4 step + c + 2 h above
//             bits 0 and 16
//   scales    int8, int4: 128 / group x 8 x {row g, row g + 8} x bf16
//
// w16 with signs: 2432 bytes = 9.5 bits a weight. Every block is a multiple of 16 bytes.
#pragma once

#include "../format.h"

namespace slab {

constexpr int kBlockRows = 16;
constexpr int kBlockInputs = 128;
constexpr int kSteps = 4;     // mma.sp steps of 32 inputs a block
constexpr int kMaxParts = 4;  // fused projections in one launch: q, k, v and one more
constexpr int kTokenRow = 2 * kBlockInputs;  // bytes of one token's 128 inputs

enum StreamValues : int { kW16 = 0, kI8 = 1, kI4 = 2, kDense = 3 };

constexpr SLAB_HD int stream_value_bytes(int values) {
  return values == kW16 ? 2048 : values == kI8 ? 1024 : values == kI4 ? 512 : 4096;
}
constexpr SLAB_HD int stream_metadata_bytes(int values) { return values == kDense ? 0 : 256; }
constexpr int kSignBytes = 128;  // of a plane
constexpr SLAB_HD int stream_scale_bytes(int values, int group_steps) {
  return values == kI8 || values == kI4 ? kSteps / group_steps * 2 * kBlockRows : 0;
}

struct LinearParams {
  const uint8_t* x;  // [tokens][token_stride] activations; rows are 16-byte aligned unless x_ragged
  const uint8_t* stream;  // [row blocks][num_k_blocks] blocks
  const uint8_t* v;       // [parts][rank][128 num_k_blocks], activations' type
  const uint32_t* u;      // [16 row blocks][rank], twice the same 16-bit number
  const uint8_t*
      adapter_p;  // [row blocks][adapter_steps][32 lanes][16 bytes]: a0 a1 a2 a3 of m16n8k16
  const float* adapter_z;  // [z_splits][tokens][parts][16 adapter_steps]: sums of x Q
  const void* bias;        // [out_features]
  uint8_t* y;              // [tokens][out_features] in the activations' type, unless there is
  float*
      partial;  // [splits][tokens][out_features], which `reduce` adds up; null where y is written
  int64_t token_stride;  // elements
  int tokens, in_features, out_features, num_k_blocks;
  int whole_blocks;   // K-blocks whose activations are copied 16 bytes at a time; 0 if x_ragged
  int rank, planes;   // of the sign term; planes: 1, 2 or 3
  int group_steps;    // steps of 32 inputs that a scale covers: 1, 2 or 4
  int adapter_steps;  // steps of 16 that the adapter's rank takes
  int z_splits;       // K-splits of the kernel that summed z
  int bias_type;      // 0: no bias, 1: fp32, 2: fp16, 3: bf16
  int x_ragged;       // 1 if rows of x are not 16-byte aligned: they are copied element by element
  int warp_rows;      // warps of a CTA along rows (a warp has 32, a tall one 64),
  int warp_tokens;    // along tokens (8 token tiles' worth each),
  int warp_inputs;    // and along K: the groups
  int stages;         // of a group's ring: 2, 3 or 4
  int row_tiles, token_tiles, splits;  // of the grid: CTAs along rows, tokens and K
  int parts;                           // fused projections
  int part_tile[kMaxParts + 1];   // first row tile of each part, and behind the last their number
  int part_block[kMaxParts + 1];  // first row block
  int part_row[kMaxParts + 1];    // first output feature
};

}  // namespace slab
