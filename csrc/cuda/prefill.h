// What a kernel for many tokens on Hopper (prefill.cu) is called with. Plain C;
// backends/cuda/prefill_launch.py mirrors the struct.
//
// A tile is tile_rows output rows x tile_tokens tokens of a CTA; two of them, one below the other,
// where CTAs work in pairs. Tiles are dealt to clusters: whole ones in turn, and of the rest each
// cluster takes an equal run of K-blocks (prefill_place.cuh).
#pragma once

#include "params.h"

namespace slab {

// A CUtensorMap, which the driver encodes.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

struct PrefillParams {
  // 16-bit matrices [tokens][columns], read in boxes of 64 columns x tile_tokens tokens, or half as
  // many in a pair, with the 128-byte swizzle and zeros outside.
  TensorMap x_map;           // x [tokens][in_features]
  TensorMap z_map;           // z = x Q [tokens][parts][16 adapter_steps], zero without an adapter
  const uint8_t* stream;     // [row pairs][num_k_blocks] blocks (params.h)
  const uint8_t* v;          // [parts][rank][128 num_k_blocks], activations' type
  const uint32_t* u;         // [32 row pairs][rank], twice the same 16-bit number
  const float* powers;       // [32 row pairs] powers of two that bring a row's scales into fp16's
                             // range, or null: one for all
  const uint8_t* adapter_p;  // [row tiles][adapter_steps][32 lanes][16 bytes]: a0 a1 a2 a3 of
                             // m16n8k16
  const void* bias;          // [out_features]
  uint8_t* y;                // [tokens][out_features] in the activations' type
  float* partial;            // slots of tiles that several clusters share (prefill_end.cuh)
  int tokens, out_features, num_k_blocks;
  int rank, planes;                 // of the sign term; planes: 1, 2 or 3
  int group_steps;                  // steps of 32 inputs that a scale covers: 1, 2 or 4
  int adapter_steps;                // steps of 16 that the adapter's rank takes
  int bias_type;                    // 0: no bias, 1: fp32, 2: fp16, 3: bf16
  int tile_tokens, tile_rows;       // of a CTA
  int cluster_ctas;                 // 1, or 2: a pair of CTAs along rows shares x
  int row_tiles, token_tiles;       // row tiles of a CTA over all parts
  int whole_tiles;                  // tiles dealt whole: cluster i takes i, i + clusters, ...
  int tail_share, tail_more;        // K-blocks of the other tiles that a cluster takes; the first
                                    // tail_more clusters take one more
  int clusters;                     // gridDim.x / cluster_ctas
  int weight_stages, token_stages;  // of the two rings: 2 to 8
  int parts;                        // fused projections
  int part_tile[kMaxParts + 1];     // first row tile of each part; behind the last, always, their
                                    // number
  int part_pair[kMaxParts + 1];     // first row pair
  int part_row[kMaxParts + 1];      // first output feature
};

constexpr int kPrefillStages = 8;  // the most that a ring has
constexpr int kStageInputs = 64;   // of a stage of activations: 128 bytes a token

}  // namespace slab
