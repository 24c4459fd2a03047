// y[M, N] = x S^T + sum_r ((x * v_r) B^T) * u_r + (x Q) P^T + bias in one pass over the packed
// bits, for 17 tokens and more. rebuild.cuh has another main loop for the same frame, and prefill.cu
// Hopper's own kernels; the plan chooses among them.
//
// As a pseudo-kernel, for one CTA (its tile: `rows` of the weight, `tokens` of x, `k_blocks` of K):
//
//   sums = 0
//   for each group of warps, at the same time:                // linear(), below
//     for k in k_blocks[group :: warp_inputs]:
//       wait_for_stage(k)
//       fetch_weights, fetch_activations(k + stages - 1)      // copy.cuh, asynchronous
//       for step in the 4 steps of 32 inputs of k:            // mainloop.cuh
//         b = activations(tokens, step)                       // ldmatrix
//         a = values(rows, step)                              // dequantised in registers
//         sums += mma.sp(a, metadata, b)                      // S
//         for r in ranks:
//           a = u_r with the signs of (rows, step)            // one LOP3 a register
//           sums += mma.sp(a, complement(metadata), b * v_r)  // the sign term
//         where a scale group ends: sums += scale * its sums  // int8, int4
//   if adapter: sums += z P^T                                 // epilogue.cuh; z = x Q was a kernel
//   sums = the groups' sums, added in their order
//   y = sums + bias                                           // or the partial sums of a K-split
//
//      A CTA of 8 warps: warp_rows = 2, warp_tokens = 1, warp_inputs = 4, so four groups of two
//
//                    group 0         group 1         group 2         group 3
//                  +---------+     +---------+     +---------+     +---------+
//      rows 0..31  | warp 0  |     | warp 2  |     | warp 4  |     | warp 6  |
//      rows 32..63 | warp 1  |     | warp 3  |     | warp 5  |     | warp 7  |
//                  +---------+     +---------+     +---------+     +---------+
//      K-blocks    0, 4, 8 ..      1, 5, 9 ..      2, 6, 10 ..     3, 7, 11 ..
//      barrier     1               2               3               4        (none for one warp)
//
//      The ring of a group, in shared memory; stages = 4:
//
//         stage 0       stage 1       stage 2       stage 3
//      +-------------+-------------+-------------+-------------+  a stage, from its start
//      | K-block 0   | K-block 4   | K-block 8   | K-block 12  |   activations, 256 bytes per token
//      +-------------+-------------+-------------+-------------+   v, 256 bytes per rank
//        multiplied    copied in the background    copied next     weights, blocks of 32 rows
//
// Weights are the tensor core's A operand (16 output rows), tokens its n8. S and the signs both add
// into ONE accumulator, whatever the rank: the sign operand of rank r is not +-1 but +-u_ir, the
// stored u of its row with a sign bit flipped, against the activations times v_r. (The normalised
// form, diag(u) M diag(v) with M = S / (u v), would round kept values a second time, fail for u = 0
// and v = 0, take integer values their codes and scales, and need R accumulators for rank R. The
// price of this form is one product of x and v per fragment, which all row tiles of a warp share.)
//
// The groups' sums are added in a fixed order, so the result depends on no timing, and a token's
// result on no other token.
//
// Programmatic dependent launch: the kernel may run while the one before it in the stream still
// does. It asks for weights at once, and waits before it reads activations, z or a bias, or writes
// anything: its y may lie where the kernel before it still reads.
//
// The issue rate bounds it: what does not change from K-block to K-block is computed once and kept
// in a register (`kept`, traits.cuh).
#pragma once

#include "copy.cuh"
#include "epilogue.cuh"
#include "mainloop.cuh"
#include "plan.cuh"

namespace slab {

// Waits until the oldest stage is here, copied by every warp of the group. All of them have then
// also finished with the stage that they multiplied last, so it may be overwritten.
__device__ __forceinline__ void wait_for_stage(int stages, const WarpRole& role) {
  copies_wait(stages);
  __syncwarp();
  if (role.members > 1) barrier(1 + role.group, 32 * role.members);
}

// All K-blocks of this group.
template <class Traits>
__device__ __forceinline__ void Warp<Traits>::multiply_k_blocks() {
  const int end = first_k_block_of(params, place.split + 1) - first_k_block(),
            stride = params.warp_inputs;
  Factors u = {};
  if constexpr (Traits::kRank == kRankOne && !Traits::kRebuilds) load_u(u, 0);
  // While a K-block is multiplied, the copies of the stages - 1 after it are on their way.
  const int ahead = (params.stages - 1) * stride;
  // K-blocks are counted from the group's first. Weights are asked for while the kernel before this
  // one may still write the activations.
  for (int k_block = 0; k_block < ahead; k_block += stride, write_stage += ring.stage_bytes)
    if (k_block < end) fetch_weights(k_block);
  write_stage = ring.begin;
  if constexpr (Traits::kRebuilds) {
    fill_tables();
    __syncthreads();
  }
  wait_for_predecessor();
  int next = 0;
  for (; next < ahead; next += stride, write_stage += ring.stage_bytes) {
    if (next < end) fetch_activations(next);
    copies_commit();
  }
  for (; next < end + ahead; next += stride) {
    wait_for_stage(params.stages, role);
    if (next < end) {
      fetch_weights(next);
      fetch_activations(next);
    }
    copies_commit();
    write_stage = ring.after(write_stage);
    if constexpr (Traits::kRebuilds)
      rebuild_stage();
    else
      multiply_stage(u);
  }
  if constexpr (Traits::kLevelOperand) sums.join_levels(u);
}

template <class Traits>
__device__ __forceinline__ void linear(const LinearParams& params) {
  extern __shared__ __align__(256) uint8_t shared[];
  let_successor_start();
  if (token_tile_of(params) >= params.token_tiles) return;  // behind the last token
  Warp<Traits> warp(params, shared_address(shared));
  warp.multiply_k_blocks();
  if (Traits::kSparse && params.adapter_steps && warp.place.split == 0) warp.add_adapter();
  warp.write_result(reinterpret_cast<float*>(shared));
}

}  // namespace slab
