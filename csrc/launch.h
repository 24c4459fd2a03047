// What the bindings call: raw pointers and sizes, no torch. All matrices are row-major.
//
// The CPU stream is made by cpu_prepare and never saved. A block is 16 output rows x 128 inputs;
// the blocks of a row block follow each other along K, row blocks follow each other along N. Lane n
// of a SIMD vector is an output row. A block is, one part after the other:
//
//   signs   16 x u32, only with rank > 0
//               Lane n, bit 31 - g: the sign of the second pruned position of group g (0 to 31).
//   levels  2 (planes - 1) x 16 x u32, only with planes > 1
//               Lane n has two fields of planes - 1 bits for each group, that of the first pruned
//               position below. A word holds 16 or 8 groups, the first one lowest. A field says how
//               many steps the factor of u v is below the largest: 3/2, 1/2 with two planes and
//               7/4, 5/4, 3/4, 1/4 with three.
//   codes   4 x 16 x u32
//               Word w, lane n, nibble j is of group 8 w + j: the pattern id (3 bits) | r << 3.
//               With one plane, r is the xor of the signs of the two pruned positions; with more,
//               it is the sign of the first one; with rank 0 it is 0.
//   values  32 groups x {16 first kept, 16 second kept}, for fp16, bf16 and int8
//           8 x 16 x u32, for int4
//               Word q, lane n, byte j is of group 4 q + j, the first kept value in the low nibble.
//   scales  128 / group_size x 16 x bf16, only for int8 and int4
//               A scale of a whole row is repeated; group_size is then 128.
//
// fp16 with signs takes 9.25 bits per weight; each further plane takes half a bit, as in the
// canonical form. Rows are padded to 16 and inputs to 128 with zeros.
#pragma once

#include <cstdint>

#include "format.h"
#include "solver.h"

namespace slab {

constexpr int kRows = 16;      // output rows of a block
constexpr int kInputs = 128;   // inputs of a block
constexpr int kMaxPlanes = 3;  // signs of a pruned entry
// The most tokens that a call of `tile` takes. Their fp32 sums, 64 KB, live on its stack.
constexpr int kTileTokens = 512;

enum FloatType : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
constexpr int64_t sign_bytes(int planes) { return planes ? 4 * kRows : 0; }
constexpr int64_t level_bytes(int planes) { return planes > 1 ? 4 * kRows * 2 * (planes - 1) : 0; }
constexpr int64_t code_bytes() { return 4 * 4 * kRows; }
constexpr int64_t value_bytes(int values) {
  return int64_t(kInputs / 2) * kRows * (values == kInt4 ? 1 : values == kInt8 ? 2 : 4) / 2;
}
constexpr int64_t scale_bytes(int values, int group_size) {
  return is_integer(values) ? int64_t(kInputs / group_size) * kRows * 2 : 0;
}
constexpr int64_t block_bytes(int values, int group_size, int planes) {
  return sign_bytes(planes) + level_bytes(planes) + code_bytes() + value_bytes(values) +
         scale_bytes(values, group_size);
}

struct CpuWeight {
  int64_t out_features, in_features;  // N, K
  int64_t row_blocks, k_blocks;       // ceil(N / 16), ceil(K / 128)
  int64_t block_size;                 // bytes of one block of the stream
  int64_t rank, adapter_rank;         // R, R'
  int64_t adapter_padded;             // R' rounded up to 32
  int values, group_size;
  int planes;         // 0 with rank 0
  int prefetch;       // bytes that lookup asks for ahead of where it reads, 0 for none
  bool adapter_half;  // P and Q panels are fp16, else fp32
  const uint8_t* stream;
  const float* u;     // [row_blocks][R][16]
  const float* v;     // [R][k_blocks * 128]
  const void* p;      // [row_blocks][R'][16]
  const void* q;      // [adapter_padded / 16][k_blocks * 128][16]
  const float* bias;  // [row_blocks * 16] or null
};

// M tokens in blocks of nearly equal size, none larger than `most`.
struct TokenBlocks {
  int64_t tokens, count;
  constexpr TokenBlocks(int64_t tokens, int64_t most)
      : tokens(tokens), count((tokens + most - 1) / most) {}
  constexpr int64_t begin(int64_t block) const { return tokens * block / count; }
  // Tokens of the largest blocks, of which the last one is one.
  constexpr int64_t largest() const { return (tokens + count - 1) / count; }
};

// x and z are in TokenBlocks of block_tokens, pairs in those of pair_tokens: block after block,
// [cells][tokens of the block], so in a block of one token a row is as it was. A cell takes 4
// bytes. Tiles (cpu/amx.h) take pairs as [cells / 16][tokens of the block][16].
struct CpuTokens {
  int64_t count;         // M
  int64_t block_tokens;  // 1 for lookup
  int64_t pair_tokens;
  const float* x;      // k_blocks * 128 inputs a token; null if pairs is read instead
  const float* pairs;  // k_blocks * 64 pairs of bf16 inputs a token, read by tile_bf16 only
  const float* xv;     // [M][R][k_blocks * 128]: x * v, read by lookup only
  float* z;            // adapter_padded numbers a token or null: x Q, written by adapter_in
  void* y;             // [M][N], rows y_stride numbers apart
  int64_t y_stride;
  int y_type;  // FloatType
};

// One table per instruction set; ranges are half-open and disjoint ranges may run at the same time.
struct CpuKernels {
  const char* name;
  // Turns n numbers of a type into float32.
  void (*widen)(const void* in, int type, float* out, int64_t n);
  void (*multiply)(const float* a, const float* b, float* out, int64_t n);
  // Puts the rows of one block of tokens into cells, those of `features` inputs and zeros after
  // them: fp32 inputs, or pairs of bf16 ones.
  void (*arrange)(const void* rows, int type, int64_t features, int64_t tokens, int64_t cells,
                  bool pairs, float* out);
  // z = x Q for columns [32 * begin, 32 * end)
  void (*adapter_in)(const CpuWeight& w, const CpuTokens& t, int64_t begin, int64_t end);
  // y for row blocks [begin, end) by table lookup: any number of tokens, rank 0, 1, 2 or 4
  void (*lookup)(const CpuWeight& w, const CpuTokens& t, int64_t begin, int64_t end);
  // y for row blocks [begin, end) by rebuilding fp32 tiles: at most kTileTokens tokens, any rank
  void (*tile)(const CpuWeight& w, const CpuTokens& t, int64_t begin, int64_t end);
  // The same by rebuilding pairs of bf16, which rounds the weight to bf16; null where the
  // instruction set has no product of bf16
  void (*tile_bf16)(const CpuWeight& w, const CpuTokens& t, int64_t begin, int64_t end);
  // Stores the rows of y of a row block, whose sums [count][16], `stride` apart, another product
  // made: adds adapter and bias to those of tokens [token, token + count).
  void (*finish)(const CpuWeight& w, const CpuTokens& t, int64_t row_block, int64_t token,
                 int64_t count, const float* sums, int64_t stride);
  // W[N][K] in out_type for row blocks [begin, end), with the adapter
  void (*dequantize)(const CpuWeight& w, void* out, int out_type, int64_t begin, int64_t end);
  int lookup_tokens;        // below this many tokens lookup is faster than tile
  int lookup_tokens_rank0;  // the same without signs, of which a lookup has less to do
  int lookup_tokens_bf16;   // below this many tokens lookup is faster than tile_bf16
  int block_tokens;         // of the blocks that `tile` and the adapter take
  int pair_tokens;          // and tile_bf16
  // Rows [begin, end) of a block of columns; `memory` holds kMostColumns^2 numbers of its own.
  void (*descend)(const CpuDescent& d, float* memory, int64_t begin, int64_t end);
  void (*sweep)(const CpuSweep& s, float* memory, int64_t begin, int64_t end);
};

const CpuKernels* cpu_kernels_scalar();
const CpuKernels* cpu_kernels_avx2();         // null when built without
const CpuKernels* cpu_kernels_avx512();       // null when built without
const CpuKernels* cpu_kernels_avx512_bf16();  // null when built without
const CpuKernels* cpu_kernels_avx512_amx();   // null when built without
// For tests: avx512_amx with emulated tile registers (cpu/amx_emulated.h).
const CpuKernels* cpu_kernels_avx512_amx_emulated();  // null when built without

// The instruction sets that this build holds and this machine runs, best first; null after the last
// of them, which are at most 5. The emulated one is not among them.
const CpuKernels* cpu_kernels(int index);
// The emulated one, or null where this machine does not run it.
const CpuKernels* cpu_emulated_kernels();
// Bytes that lookup asks for ahead of where it reads, on this machine.
int cpu_prefetch();

// The canonical packed tensors of one weight, as the format specification lays them out.
struct CpuPacked {
  int64_t out_features, in_features, padded_in;
  int values, group_size;  // group_size 0: one scale a row
  int planes;              // 0 without a low-rank term
  const uint8_t* values_data;
  const uint8_t* metadata;
  const uint8_t* signs;    // null without a low-rank term
  const uint16_t* scales;  // bf16, null for floating-point values
};
// Writes row blocks [begin, end) of the stream and returns how many groups have an illegal nibble.
int64_t cpu_prepare(const CpuPacked& p, uint8_t* stream, int64_t begin, int64_t end);

}  // namespace slab
