// What a CUDA kernel is called with, and the prepared stream that it reads. Plain C;
// backends/cuda/launch.py mirrors the struct.
//
// The CUDA stream is made by backends/cuda/layout.py and never saved. A block is a pair of row
// tiles, 2 x 16 output rows x 128 inputs, in the order in which lanes want it: lane = 4 g + t holds
// rows g and g + 8 of both tiles. The blocks of a row pair follow each other along K. A block is, one part
// after the other (a_i is register i of an A fragment, see ptx.cuh):
//
//   values    of tile 0, then of tile 1:
//             w16 (fp16 or bf16, as the activations): 4 steps of 32 inputs x 32 lanes x 16 bytes,
//                 which are a0 a1 a2 a3
//             int8: 2 x 32 lanes x 16 bytes, for two steps each. Bytes hold q + 128; a word holds
//                 the low halves of a0 and a1 and then their high ones, or those of a2 and a3
//             int4: 32 lanes x 4 words, one for each step. q + 8 of a_i's low half stands at bit
//                 2 + 4 i, that of its high half at bit 18 + 4 i, modulo 32
//             dense (Q of P Q^T): 4 steps x 2 x 32 lanes x 16 bytes, a0 a1 a2 a3 of two m16n8k16
//   metadata  32 lanes x 2 tiles x 2 words; word h serves steps 2 h (selector 0) and 2 h + 1
//             (selector 1)
//   signs     only with rank > 0. One plane: 32 lanes x 2 tiles x 1 word, one bit per pruned entry.
//             A left shift by 4 step + i brings the signs of a_i's halves to bits 15 and 31
//             Two or three planes: 32 lanes x 2 tiles x 2 words; word h serves steps 2 h and
//             2 h + 1. The bits of a pruned entry in the first two planes, that of the larger plane
//             above, are the index of its level, 3/2 - index. Those of a_i's halves, i = 2 c + h,
//             stand 8 (step % 2) + 2 i above bits 0 and 16. The third plane: 32 lanes x 2 tiles x 1
//             word: its bits stand 4 step + c + 2 h above bits 0 and 16
//   scales    int8, int4: 128 / group x 8 g x 2 tiles x {row g, row g + 8} x bf16. Those of int4
//             are divided by what the codes are too large by (from_int4 in ptx.cuh)
//
// w16 with signs takes 4864 bytes, 9.5 bits per weight. Every block is a multiple of 16 bytes.
#pragma once

#include "../format.h"

namespace slab {

constexpr int kTileRows = 16;
constexpr int kBlockTiles = 2;
constexpr int kBlockRows = kTileRows * kBlockTiles;
constexpr int kBlockInputs = 128;
constexpr int kSteps = 4;     // steps of 32 inputs in a block, one mma.sp each
constexpr int kMaxParts = 4;  // fused projections in one launch: q, k, v and one more
constexpr int kTokenRow = 2 * kBlockInputs;  // bytes of one token's 128 inputs

enum StreamValues : int { kW16 = 0, kI8 = 1, kI4 = 2, kDense = 3 };

// Bytes of a tile's values; a block has those of two tiles.
constexpr SLAB_HD int stream_value_bytes(int values) {
  return values == kW16 ? 2048 : values == kI8 ? 1024 : values == kI4 ? 512 : 4096;
}
// Bytes of a block.
constexpr SLAB_HD int stream_metadata_bytes(int values) { return values == kDense ? 0 : 512; }
constexpr int kSignBytes = 256;  // of a plane
constexpr int kScaleBytes = 64;  // of a scale group
constexpr SLAB_HD int stream_scale_bytes(int values, int group_steps) {
  // kSteps / group_steps without a division, because group_steps is 1, 2 or 4.
  return values == kI8 || values == kI4 ? (kSteps >> (group_steps >> 1)) * kScaleBytes : 0;
}

constexpr int kBand = 8;  // token tiles side by side in a grid, which share a weight tile in L2

// A CTA's index is (token tile within a band, row tile, split of K or, if K is not split, band); a
// thread's is (lane, warp of a K group, K group).
struct LinearParams {
  const uint8_t* x;          // [tokens][token_stride] activations; rows are aligned to 16 bytes
  const uint8_t* stream;     // [row pairs][num_k_blocks] blocks
  const uint8_t* v;          // [parts][rank][128 num_k_blocks], activations' type
  const uint32_t* u;         // [32 row pairs][rank], twice the same 16-bit number
  const float* powers;       // [32 row pairs], powers of two; null where all are 1. Kernels that
                             // rebuild W multiply scales and u by it, and divide the sums
  const uint8_t* adapter_p;  // [row tiles][adapter_steps][32 lanes][16 bytes]: a0 a1 a2 a3 of
                             // m16n8k16
  const float* adapter_z;    // [z_splits][tokens][parts][16 adapter_steps]: sums of x Q
  const void* bias;          // [out_features]
  uint8_t* y;                // [tokens][out_features] in the activations' type, unless there is
  float* partial;            // [splits][tokens][out_features], which `reduce` adds up; null where y
                             // is written
  const uint8_t* next;       // what the next linear reads first, to be prefetched into L2, or null
  int64_t token_stride;      // elements
  int64_t next_bytes;
  int tokens, in_features, out_features, num_k_blocks;
  int rank, planes;   // of the sign term; planes: 1, 2 or 3
  int group_steps;    // steps of 32 inputs that a scale covers: 1, 2 or 4
  int adapter_steps;  // steps of 16 that the adapter's rank takes
  int z_splits;       // K-splits of the kernel that summed z
  int bias_type;      // 0: no bias, 1: fp32, 2: fp16, 3: bf16
  int warp_rows;      // warps of a K group along rows (a warp has 32, a tall one 64)
  int warp_tokens;    // and along tokens
  int warp_inputs;    // K groups of a CTA
  int tile_tokens;    // tokens of a CTA
  int stages;         // of a ring: 2, 3 or 4
  int row_tiles, token_tiles, splits;  // CTAs along rows, tokens and K
  int k_share, k_more;                 // K-blocks of a split; the first k_more splits have one more
  int parts;                           // fused projections
  int part_tile[kMaxParts + 1];  // first row tile of each part; behind the last, always, their
                                 // number
  int part_pair[kMaxParts + 1];  // first row pair
  int part_row[kMaxParts + 1];   // first output feature
};

}  // namespace slab
