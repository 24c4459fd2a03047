// What a CUDA kernel is called with, and the prepared stream that it reads. Plain C;
// backends/cuda/launch.py mirrors the struct.
//
// The CUDA stream is made by backends/cuda/layout.py and never saved. A block is 16 output rows x
// 128 inputs, in the order in which lanes want it: lane = 4 g + t holds rows g and g + 8. The
// blocks of a row block follow each other along K. A block is, one part after the other:
//
//   values    w16 (fp16 or bf16, as the activations): 4 steps of 32 inputs x 32 lanes x 16 bytes,
//                 which are a0 a1 a2 a3
//             int8: 2 x 32 lanes x 16 bytes, for two steps each. Bytes hold q + 128; a word holds
//                 the low halves of a0 and a1 and then their high ones, or those of a2 and a3
//             int4: 32 lanes x 4 words, one for each step. Nibble i holds q + 8 of a_i's low half,
//                 nibble i + 4 that of its high half
//             dense (Q of P Q^T): 4 steps x 2 x 32 lanes x 16 bytes, a0 a1 a2 a3 of two m16n8k16
//   metadata  32 lanes x 2 words; word h serves steps 2 h (selector 0) and 2 h + 1 (selector 1)
//   signs     only with rank > 0. One plane: 32 lanes x 1 word, one bit per pruned entry. A left
//                 shift by 4 step + i brings the signs of a_i's halves to bits 15 and 31
//             Two or three planes: 32 lanes x 2 words; word h serves steps 2 h and 2 h + 1. The
//                 bits of a pruned entry in the first two planes, that of the larger plane above,
//                 are the index of its level, 3/2 - index. Those of a_i's halves, i = 2 c + h,
//                 stand 8 (step % 2) + 2 i above bits 0 and 16. The third plane: 32 lanes x 1
//                 word: its bits stand 4 step + c + 2 h above bits 0 and 16
//   scales    int8, int4: 128 / group x 8 x {row g, row g + 8} x bf16
//
// w16 with signs takes 2432 bytes, 9.5 bits per weight. Every block is a multiple of 16 bytes.
#pragma once

#include "../format.h"

namespace slab {

constexpr int kBlockRows = 16;
constexpr int kBlockInputs = 128;
constexpr int kSteps = 4;     // steps of 32 inputs in a block, one mma.sp each
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
