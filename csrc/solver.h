// What the solvers of the method `slab` do within a block of columns, row by row: raw pointers and
// sizes, no torch. All matrices are row-major. A group is four columns, two of them are kept.
//
// slab_kernels/methods/solvers/ has the same steps in torch, which define them, and carries what a
// block changes to the other columns by products of whole matrices.
#pragma once

#include <cstdint>

namespace slab {

constexpr int kMember = 4;         // columns of a group
constexpr int kChoices = 6;        // ways to prune two of them
constexpr int kMostColumns = 128;  // of a block

// What both solvers know of the columns [start, end) of all rows.
struct CpuColumns {
  int64_t in_features;                  // K: the distance between two rows of every [N][K]
  int64_t start, end;                   // end - start is at most kMostColumns
  int planes;                           // signs of a pruned entry; 0: it becomes zero
  int64_t scale_columns, scale_inputs;  // scales of a row, inputs of a scale; 0 without a grid
  float lowest, highest;                // integers of the grid
  const float* magnitude;               // [N][K]; null with planes = 0
  const float* groups;                  // [K/4][numbers of a group], see the two structs below
};

// What a pass of coordinate descent knows of a choice of two pruned columns p and two kept ones k,
// where H is the group's block of the Gram matrix and C its inverse.
struct CpuDescentChoice {
  float pruned[3];      // the inverse of C_pp: its diagonal, and twice the other entry
  float answer[2][2];   // -H_kk^-1 H_kp: how kept errors answer to pruned ones
  float shift;          // -H_k2k1 / H_k2k2: how the second kept error answers to the first one
  float first, second;  // the loss per squared miss of the first kept one, the second one adapting,
                        // and of the second one
};
struct CpuDescentGroup {
  float own[kMember][kMember], inverse[kMember][kMember];  // H and C
  CpuDescentChoice choices[kChoices];
};

struct CpuDescent {
  CpuColumns columns;
  int passes;           // over the groups of the block
  const float* scales;  // [N][scale_columns] or null
  const float* target;  // [N][K]
  const float* gram;    // [K][K]
  float* error;         // [N][K]
  float* gradient;      // [N][K]: error times gram, kept current within the block
  float* change;        // [N][end - start], written: what was added to error
  uint8_t* kept;        // [N][K]: 0 or 1
};

struct CpuSweepGroup {
  float inverse[kMember]
               [kMember];     // of the group's block of the inverse Gram matrix of what is left
  float pruned[kChoices][3];  // of its part among the pruned columns, as in CpuDescentChoice
};

struct CpuSweep {
  CpuColumns columns;
  const float* factor;     // [K][K]: U, upper triangular
  const float* weight;     // [K]: of squared errors when step sizes are searched
  const float* fractions;  // [fraction_count] of the largest value that are tried as step sizes
  int64_t fraction_count;  // 0: the scales are given
  const uint8_t* likely;   // [N][K] 0 or 1: the entries that step sizes are searched on
  float* remaining;        // [N][K]: the updated weights
  float* fixed;            // [N][K], written
  float* pushed;           // [N][end - start], written: errors over U_jj
  float* scales;           // [N][scale_columns] or null, written where fractions are tried
  uint8_t* kept;           // [N][K], written
};

}  // namespace slab
