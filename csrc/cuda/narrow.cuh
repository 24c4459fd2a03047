// y[M, N] = x S^T + sum_r ((x * v_r) B^T) * u_r + (x Q) P^T + bias for few tokens: all columns that
// a CTA multiplies, x of its tokens and v_r x of each rank and token, fit ONE n8 tile of the tensor
// core, T (1 + R) <= 8.
//
// Decoding is a race against the issue rate, so a warp does nothing in its loop but copy, decode
// and multiply:
//
//   let_successor_start()
//   ask for the first stages of weights
//   v; wait_for_predecessor(); x and v_r x of the CTA's share of K into shared memory: `columns`
//   __syncthreads()
//   for k in k_blocks[group :: warp_inputs]:          // each warp by itself
//     wait for its oldest stage
//     for step in 0 .. 3:
//       b = 32 inputs of all columns                  // one ldmatrix
//       kept += mma.sp(values, metadata, b)           // right in the columns of x
//       signs += mma.sp(+-1, pruned metadata, b)      // right in the columns of v_r x
//     ask for K-block k + stages * warp_inputs
//   the end: decode_end.cuh
//
// A warp owns 32 rows and one K group, and its ring of weights: no barrier stands in the loop.
//
// Shared memory, in this order, in bytes:
//
//   u        128 warp_rows rank
//   rings    warps x stages x bytes of a block
//   columns  K-blocks of the largest share x T (1 + R) x 272 (narrow_columns.cuh)
//
// The sums of the end (decode_end.cuh) take the place of rings and columns.
#pragma once

#include "decode_end.cuh"
#include "decode_operands.cuh"
#include "narrow_columns.cuh"

namespace slab {

// What a warp copies of each K-block, 16 bytes a lane at a time.
template <class Traits>
struct WeightCopies {
  // Copies that every lane takes part in, and behind them one for some lanes.
  static constexpr int kWhole = Traits::kLeastBytes / 512;
  static constexpr bool kTail = Traits::kMostBytes > 512 * kWhole;
  static_assert(Traits::kMostBytes <= 512 * (kWhole + 1));

  // LDGSTS adds -2048 to 2047 to an address, so that one serves 4096 bytes.
  static constexpr int kReach = 2048;

  const uint8_t* from;  // this lane's first 16 bytes of the share's first K-block, + kReach
  int block_bytes;
  int end;       // K-blocks of the share
  int tail_end;  // the same for lanes that take part in the last copy, else 0
  uint64_t policy;

  __device__ __forceinline__ void plan(const LinearParams& params, const DecodePlace& place,
                                       int pair) {
    const int lane = threadIdx.x;
    block_bytes = Traits::block_bytes(params.group_steps);
    const uint32_t block = pair * params.num_k_blocks + place.first_k_block;
    const uint8_t* const first =
        params.stream + (uint64_t(block) * uint32_t(block_bytes) + uint32_t(16 * lane + kReach));
    from = keep(first);
    end = place.k_blocks;
    tail_end = 16 * lane < block_bytes - 512 * kWhole ? end : 0;
    policy = read_once_policy();
  }
  // Asks for K-block k of the share; if there is none, for nothing.
  __device__ __forceinline__ void fetch(int k, uint32_t to) const {
    const uint8_t* const block = from + uint64_t(uint32_t(k)) * uint32_t(block_bytes);
    const uint8_t* far = block;  // + 2 kReach; what no instruction's offset reaches counts from it
    if constexpr (Traits::kMostBytes > 2 * kReach) far = keep(block + 2 * kReach);
    fetch_whole<0>(k < end, to, block, far);
    if constexpr (kTail) copy<kWhole>(k < tail_end, to, block, far);
    copies_commit();
  }
  template <int kNumber>
  __device__ __forceinline__ void fetch_whole(bool yes, uint32_t to, const uint8_t* block,
                                              const uint8_t* far) const {
    copy<kNumber>(yes, to, block, far);
    if constexpr (kNumber + 1 < kWhole) fetch_whole<kNumber + 1>(yes, to, block, far);
  }
  template <int kNumber>
  __device__ __forceinline__ void copy(bool yes, uint32_t to, const uint8_t* block,
                                       const uint8_t* far) const {
    constexpr int kAt = 512 * kNumber;
    if constexpr (kAt < 2 * kReach)
      copy16_if<kAt, kAt - kReach>(yes, to, block, policy);
    else
      copy16_if<kAt, kAt - 3 * kReach>(yes, to, far, policy);
  }
};

// The loop of a warp over its K-blocks.
template <class Traits>
struct NarrowWarp {
  using T = typename Traits::Activation;

  WeightCopies<Traits> weights;
  int next;       // the K-block of the share to ask for
  uint32_t ring;  // this lane's first 16 bytes of the first stage
  KeptSums<Traits, 1> kept;
  float signs[2][1][4];

  // Asks for the first stages.
  __device__ __forceinline__ void start(const LinearParams& params, uint32_t rings_at) {
    const DecodePlace place = decode_place(params);
    // Past the end of the part the last rows are read again; their sums are not stored.
    const int pair = min(place.first_pair + int(threadIdx.y), place.end_pair - 1);
    weights.plan(params, place, pair);
    next = threadIdx.z;
    ring = rings_at +
           (threadIdx.z * params.warp_rows + threadIdx.y) * params.stages * weights.block_bytes +
           16 * threadIdx.x;
    uint32_t slot = ring;
    int stages = params.stages;
#pragma unroll 1
    do {
      weights.fetch(next, slot);
      slot += weights.block_bytes, next += params.warp_inputs;
    } while (--stages);
    kept.clear();
#pragma unroll
    for (int i = 0; i < 8; ++i) signs[i / 4][0][i % 4] = 0.0f;
  }

  // x_at: this lane's row of the first K-block's columns, for ldmatrix.
  template <int kStages>
  __device__ __forceinline__ void multiply_k_blocks(const LinearParams& params, int lane,
                                                    uint32_t x_at, uint32_t x_step) {
    BlockOperands<Traits> block(params.tokens, lane);
    const int end = weights.end + kStages * params.warp_inputs;
    const uint32_t ring_end = ring + kStages * weights.block_bytes;
    uint32_t slot = ring;
#pragma unroll 1
    for (; next < end; next += params.warp_inputs, x_at += x_step) {
      copies_wait<kStages - 1>();
      __syncwarp();
      block.open(slot);
      step<0>(block, x_at, params.group_steps);
      step<1>(block, x_at, params.group_steps);
      step<2>(block, x_at, params.group_steps);
      step<3>(block, x_at, params.group_steps);
      __syncwarp();
      weights.fetch(next, slot);
      slot = slot + weights.block_bytes == ring_end ? ring : slot + weights.block_bytes;
    }
  }

  template <int kStep>
  __device__ __forceinline__ void step(BlockOperands<Traits>& block, uint32_t x_at,
                                       int group_steps) {
    uint32_t b[1][4];
    load_matrices(b[0], x_at + 64 * kStep);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      kept.template multiply<kStep>(block, tile, b);
      if constexpr (Traits::kSigns) {
        uint32_t a[4];
        block.template load_signs<kStep>(a, tile);
        T::template mma_sparse<kStep % 2>(signs[tile][0], a, b[0], block.pruned[tile][kStep / 2]);
      }
    }
    kept.template end_step<kStep>(block, group_steps);
  }
};

template <class Traits>
__device__ __forceinline__ void narrow(const LinearParams& params) {
  using T = typename Traits::Activation;
  extern __shared__ __align__(128) uint8_t shared[];
  let_successor_start();
  const int lane = threadIdx.x;
  const int rank = Traits::kSigns ? params.rank : 0;
  const uint32_t u_at = shared_address(shared);
  const uint32_t rings_at = u_at + params.warp_rows * rank * (4 * kBlockRows);
  NarrowWarp<Traits> warp;
  warp.start(params, rings_at);

  const DecodePlace place = decode_place(params);
  if constexpr (Traits::kSigns) fetch_factors(params, place, u_at);
  const int columns = params.tile_tokens * (1 + rank);
  const uint32_t columns_at =
      rings_at + params.warp_inputs * params.warp_rows * params.stages * warp.weights.block_bytes;
  ColumnPieces<Traits>(params, place, columns_at).store(place.k_blocks);
  __syncthreads();

  // The same in all lanes, which the compiler can see only so.
  const int group = __shfl_sync(~0u, int(threadIdx.z), 0);
  warp.next = group + params.stages * params.warp_inputs;
  const uint32_t k_block_bytes = columns * kColumnRow;
  const uint32_t x_at =
      columns_at + group * k_block_bytes + min(lane % 8, columns - 1) * kColumnRow + lane / 8 * 16;
  // A loop for each number of stages: how many copies a warp waits for is part of an instruction.
  const uint32_t x_step = params.warp_inputs * k_block_bytes;
  if (params.stages == 2)
    warp.template multiply_k_blocks<2>(params, lane, x_at, x_step);
  else if (params.stages == 3)
    warp.template multiply_k_blocks<3>(params, lane, x_at, x_step);
  else
    warp.template multiply_k_blocks<4>(params, lane, x_at, x_step);
  prefetch_next(params);

  if (params.adapter_steps && place.split == 0) add_adapter<T>(warp.kept.sum, params, place);
  copies_wait_all();
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(shared + (rings_at - u_at));
  float* const own = own_sums(sums, params, columns);
  store_columns(own, params, warp.kept.sum, 0, 0, 0, params.tile_tokens);
  if constexpr (Traits::kSigns)
    store_columns(own, params, warp.signs, 0, 0, params.tile_tokens, columns);
  __syncthreads();
  write_result<T>(params, sums, reinterpret_cast<const uint32_t*>(shared));
}

}  // namespace slab
