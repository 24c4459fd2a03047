// What a warp knows (where it works, what it copies, where it reads, its sums) and what it does.
//
// It is ONE object of plain records, because only so does the compiler keep all of it in registers.
//
// Everywhere, m counts row tiles, n token tiles and i the registers of a fragment (ptx.cuh says
// which element of the matrix each of them holds).
#pragma once

#include "place.cuh"

namespace slab {

// What this lane copies of every K-block, 16 bytes at a time. The warps of a group share the
// copying: of the row pairs of weights, member i takes i, i + members, ...; of the activation
// rows, two at a time because half a warp copies one, 2 i, 2 i + 1, 2 (i + members), ...
//
// Sources are those of the group's first K-block. Targets count from the start of a stage. Those of
// weights are byte kCopyFrom of a block.
template <class Traits>
struct CopyPlan {
  const uint8_t* weights_from[Traits::kPairs];  // at most so many blocks
  const uint8_t* tokens_from;
  const uint8_t* v_from;
  uint32_t weights_to[Traits::kPairs];
  uint32_t token_piece;  // which 16 bytes of a row of activations
  uint32_t v_to;
  int tail_pieces;            // of 16 bytes, behind the head of a block; at most 32
  int token_row, token_step;  // rows token_row, token_row + token_step, ... of v and activations
  // Where W is rebuilt, of activations: rows first_row, first_row + 2, ..., own_rows / 2 of them for
  // the first half warp, as many or one less for the second.
  uint32_t tokens_to;
  int own_rows;
  int inputs;  // from the group's first K-block on
  bool has_block[Traits::kPairs];
  uint64_t l2_policy;  // decides for how long L2 keeps weights
};

// Where this lane reads. Unless said otherwise, offsets count from the start of a stage.
template <class Traits>
struct ReadPlan {
  uint32_t blocks_at[Traits::kPairs];  // blocks of weights, for lane l 16 l bytes further on
  uint32_t signs_at, scales_at;        // count from blocks_at
  uint32_t v_at;                       // for ldmatrix: lane l names a row of matrix l / 8
  uint32_t tokens_at;                  // likewise; the other token tiles follow at a fixed distance
  uint32_t value_magic, level_magic;   // constants of the conversions, in registers
  // Only of kernels that rebuild W. An address: see plan_rebuilding.
  uint32_t metadata_at, powers_at;
  uint32_t selector_shift;
};

// The fp32 sums of a warp: [row tile][token tile][c0 .. c3 of the fragment].
template <class Traits>
struct Accumulators {
  static constexpr bool kLevels = Traits::kLevelOperand;

  float sum[Traits::kRowTiles][Traits::kTokenTiles][4];
  float signs[Traits::kRowTiles][kLevels ? Traits::kTokenTiles : 1][4];  // only with levels

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < Traits::kTokenTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][n][i] = signs[m][kLevels ? n : 0][i] = 0.0f;
  }

  // Adds u times the levels' sums; u[m][h] is of row tile m's rows g (h = 0) and g + 8.
  __device__ __forceinline__ void join_levels(const uint32_t (&u)[Traits::kRowTiles][2]) {
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < Traits::kTokenTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sum[m][n][i] =
              fmaf(Traits::Activation::widen(uint16_t(u[m][i / 2])), signs[m][n][i], sum[m][n][i]);
  }
};

// What a warp keeps of the K-block that it multiplies.
template <class Traits>
struct HeldBlock {
  uint32_t pairs[Traits::kPairs];  // addresses of the blocks, for lane l 16 l bytes further on
  uint32_t tokens;                 // an address for ldmatrix
  uint32_t words[Traits::kRowTiles][4];  // integer values: one load serves several steps
  uint32_t metadata[Traits::kRowTiles][2];
  uint32_t complement[Traits::kRowTiles][2];  // metadata of the pruned positions
  uint32_t signs[Traits::kRowTiles][Traits::kSignWords];
  float group_sum[Traits::kRowTiles][Traits::kScaled ? Traits::kTokenTiles : 1][4];  // of one scale
};

// The same where W is rebuilt.
template <class Traits>
struct RebuiltBlock {
  uint32_t at;         // address of the block, for lane l 16 l bytes further on
  uint32_t v, tokens;  // addresses of this lane's first inputs
  uint32_t words[kBlockTiles][4];
  uint32_t metadata[4][4];  // [2 (step % 2) + c][2 tile + step / 2]
  TileSigns signs[kBlockTiles];
  uint32_t scales[kBlockTiles];  // of rows g (low half) and g + 8
  uint32_t u[4];                 // [2 tile + h], each twice, of the only rank
};

// The methods are listed by the file that defines them.
template <class Traits>
struct Warp {
  using T = typename Traits::Activation;
  using Block = HeldBlock<Traits>;
  using Fragment = uint32_t[4];                          // of a matrix, for one mma
  using Weights = Fragment[Traits::kRowTiles];           // A fragments
  using Activations = Fragment[Traits::kHeldFragments];  // B fragments of some token tiles
  using Factors = uint32_t[Traits::kRowTiles][2];        // u of rows g and g + 8 of each row tile
  using SignWords = uint32_t[Traits::kSignWords];        // of one row tile

  const LinearParams& params;
  const Place place;
  const WarpRole role;
  int rank, planes;  // of the sign term
  int tokens;        // activation rows of this CTA that exist
  Ring ring;
  uint32_t read_stage, write_stage;  // which is multiplied next, and where the next K-block goes
  CopyPlan<Traits> copy;
  ReadPlan<Traits> read;
  uint32_t tables;  // where W is rebuilt: an address, see rebuild.cuh
  Accumulators<Traits> sums;

  // plan.cuh: what no K-block changes is computed once. The rings stand `tables` bytes behind shared.
  __device__ Warp(const LinearParams& params, uint32_t shared, int table_bytes = 0);
  __device__ StageLayout plan_stage(int staged);
  __device__ void plan_weights(const StageLayout& layout, int first_k_block);
  __device__ void plan_activations(const StageLayout& layout, int first_k_block, int staged);
  __device__ void plan_reads(const StageLayout& layout);

  // linear.cuh: all K-blocks of this group.
  __device__ __forceinline__ int first_k_block() const {
    return first_k_block_of(params, place.split) + role.group;
  }
  __device__ void multiply_k_blocks();

  // copy.cuh: one K-block, counted from the group's first one, into the stage write_stage.
  __device__ void fetch_weights(int k_block) const;
  template <int kAt>
  __device__ void fetch_head(uint32_t to, const uint8_t* from) const;
  __device__ void fetch_activations(int k_block) const;
  __device__ void fetch_whole_activations(const uint8_t* from) const;
  __device__ void fetch_own_rows(const uint8_t* from) const;
  template <int kRow>
  __device__ void fetch_rows(uint32_t to, const uint8_t* from, int left) const;
  __device__ void fetch_activations_at_edge(const uint8_t* from, int left) const;

  // mainloop.cuh: one K-block,
  __device__ void load_u(Factors& u, int r) const;
  __device__ void multiply_stage(const Factors& u);
  __device__ void open(Block& block) const;
  __device__ void load_signs(Block& block, int pair) const;
  // and one step of it, or of that the held fragments of token tiles from `first` on.
  template <int kStep>
  __device__ void step(Block& block, const Factors& u);
  template <int kStep>
  __device__ void load_activations(Activations& b, const Block& block, int first) const;
  template <int kStep>
  __device__ void add_values(Block& block, const Weights& a, const Activations& b, int first);
  template <int kStep>
  __device__ void add_sign_term(const Block& block, const Activations& b, int first,
                                const Factors& u, const Fragment& v);
  template <int kStep>
  __device__ void add_signs(const Block& block, const Activations& b, int first, const Factors& u,
                            const Fragment& v);
  template <int kStep>
  __device__ void load_sign_operand(Fragment& a, const SignWords& signs,
                                    const uint32_t (&u)[2]) const;
  template <int kStep, int kColumn, int kHalf>
  __device__ uint32_t levels(const SignWords& signs) const;
  template <int kStep>
  __device__ void apply_scales(Block& block);
  template <int kStep>
  __device__ void add_dense(const Block& block, const Activations& b, int first);

  // rebuild.cuh: the same, where W is rebuilt.
  using Rebuilt = RebuiltBlock<Traits>;
  using Selectors = uint32_t[Traits::kRowTiles][4][2];  // of each register's group
  __device__ void plan_rebuilding(const StageLayout& layout);
  __device__ void fill_tables() const;
  __device__ uint32_t u_at() const;
  __device__ void rebuild_stage();
  __device__ void open(Rebuilt& block) const;
  __device__ void load_signs(Rebuilt& block) const;
  template <int kStep>
  __device__ void rebuild_step(Rebuilt& block);
  template <int kStep>
  __device__ void load_scales(Rebuilt& block) const;
  template <int kStep, int kColumn>
  __device__ void load_selectors(Selectors& two, const Rebuilt& block) const;
  template <int kStep, int kColumn>
  __device__ void load_pruned(Weights& pruned, const Rebuilt& block, const Selectors& two) const;
  __device__ void add_ranks(Weights& pruned, uint32_t v, const Selectors& two) const;
  template <int kStep>
  __device__ void apply_levels(Weights& pruned, const Rebuilt& block) const;
  template <int kStep, int kColumn>
  __device__ void add_rebuilt(const Rebuilt& block, const Weights& kept, const Weights& pruned,
                              const Selectors& two);
  __device__ void divide_by_powers();

  // epilogue.cuh: after the last K-block.
  __device__ void add_adapter();
  __device__ void write_result(float* shared);
};

}  // namespace slab
