// Runs csrc/cpu/avx512_amx.cpp, as the library compiles it, beside the kernels with emulated tiles.
//
// A CPU without tiles refuses their instructions by SIGILL. The handler here reads the bytes of
// such an instruction as Intel's manual encodes it, does its work by EmulatedTiles and goes on
// behind it; where a CPU has tiles, it executes them itself. Panels of the weight are made up, so
// that nothing else of the library is needed.
//
// Prints one JSON object: how many cases there were, in how many of them y differs, and how often
// which instruction was emulated. The program dies where an instruction is none of these or would
// be refused by a CPU with tiles.
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "amx_emulated.h"
#include "bf16_panel.h"

namespace slab {

// The kernels under test take from this table what is no product of pairs: here, nothing.
const CpuKernels* cpu_kernels_avx512_bf16() {
  static const CpuKernels none{};
  return &none;
}

// Numbers from -2 to 2 that row block, input and lane determine, in two halves of a panel.
void Bf16Panel::rebuild(const CpuWeight&, int64_t first, int64_t second, int64_t k_block,
                        float* panel) {
  const int64_t row_block[2] = {first, second};
  for (int cell = 0; cell < kInputs / 2; ++cell)
    for (int n = 0; n < 2 * kRows; ++n) {
      uint32_t pair = 0;
      for (int i = 0; i < 2; ++i) {
        const uint32_t seed = uint32_t(
            ((row_block[n / kRows] * 977 + k_block) * 128 + 2 * cell + i) * 16 + n % kRows);
        const uint32_t mixed = (seed * 2654435761u) ^ (seed * 40503u >> 7);
        pair |= ((mixed >> 9 & 0x80FFu) | 0x3F00u) << (16 * i);
      }
      std::memcpy(panel + cell * 2 * kRows + n, &pair, 4);
    }
}

namespace {

EmulatedTiles tiles;
enum Kind { kConfigure, kRelease, kLoad, kStore, kMultiply, kKinds };
const char* const kNames[kKinds] = {"ldtilecfg", "tilerelease", "tileloadd", "tilestored",
                                    "tdpbf16ps"};
long emulated[kKinds];

// The general registers by their numbers in instructions.
long long general(const ucontext_t* context, int number) {
  static const int kAt[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                              REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                              REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[kAt[number]];
}

// A memory operand: where it is without its index, the index as a distance, and its bytes.
struct Operand {
  long long base, index;
  int bytes;
};
// `at` is the ModRM byte, nothing stands behind the operand, and bits X and B extend the numbers.
Operand operand(const ucontext_t* context, const uint8_t* at, int x, int b) {
  const int mode = at[0] >> 6, low = at[0] & 7;
  Operand found{0, 0, 1};
  int offset_bytes = mode == 1 ? 1 : mode == 2 ? 4 : 0;
  if (low == 4) {
    const int scale = at[1] >> 6, index = (at[1] >> 3 & 7) | x << 3, base = at[1] & 7;
    ++found.bytes;
    if (index != 4) found.index = general(context, index) << scale;
    if (base == 5 && mode == 0)
      offset_bytes = 4;
    else
      found.base = general(context, base | b << 3);
  } else if (low == 5 && mode == 0) {  // relative to what comes behind
    offset_bytes = 4;
    found.base = (long long)(at + 5);
  } else {
    found.base = general(context, low | b << 3);
  }
  int8_t small = 0;
  int32_t large = 0;
  if (offset_bytes == 1) std::memcpy(&small, at + found.bytes, 1);
  if (offset_bytes == 4) std::memcpy(&large, at + found.bytes, 4);
  found.base += small + large;
  found.bytes += offset_bytes;
  return found;
}

// Does the work of a tile instruction and returns its bytes, 0 if it is none. Its form is C4, two
// bytes with inverted R, X, B and vvvv, the opcode and ModRM.
int emulate(const ucontext_t* context, const uint8_t* at) {
  const int r = ~at[1] >> 7 & 1, x = ~at[1] >> 6 & 1, b = ~at[1] >> 5 & 1;
  const int third = ~at[2] >> 3 & 15, prefix = at[2] & 3, mode = at[4] >> 6;
  const int reg = (at[4] >> 3 & 7) | r << 3, low = (at[4] & 7) | b << 3;
  if (at[0] != 0xC4 || (at[1] & 31) != 2 || (at[2] & 0x84)) return 0;  // map 0F38, W0, 128 bits
  if (at[3] == 0x5C && prefix == 2 && mode == 3) {
    ++emulated[kMultiply];
    tiles.multiply(reg, low, third);
    return 5;
  }
  if (third) return 0;
  if (at[3] == 0x49 && prefix == 0 && at[4] == 0xC0) {
    ++emulated[kRelease];
    tiles.release();
    return 5;
  }
  if (mode == 3) return 0;
  const Operand memory = operand(context, at + 4, x, b);
  if (at[3] == 0x49 && prefix == 0 && reg == 0) {
    ++emulated[kConfigure];
    TileConfig config(1);
    std::memcpy(&config, (const void*)(memory.base + memory.index), sizeof config);
    tiles.configure(config);
  } else if (at[3] == 0x4B && prefix == 3 && (at[4] & 7) == 4) {
    ++emulated[kLoad];
    tiles.load(reg, (const void*)memory.base, memory.index);
  } else if (at[3] == 0x4B && prefix == 2 && (at[4] & 7) == 4) {
    ++emulated[kStore];
    tiles.store(reg, (void*)memory.base, memory.index);
  } else {
    return 0;
  }
  return 4 + memory.bytes;
}

void refused(int, siginfo_t*, void* where) {
  ucontext_t* const context = static_cast<ucontext_t*>(where);
  greg_t& next = context->uc_mcontext.gregs[REG_RIP];
  const int bytes = emulate(context, reinterpret_cast<const uint8_t*>(next));
  if (!bytes) signal(SIGILL, SIG_DFL);  // which it meets again, and dies
  next += bytes;
}

// y of some tokens, as a call of the library computes it; numbers that are not written stay NaN.
std::vector<float> product(const CpuKernels& run, int64_t tokens, int64_t out_features,
                           int64_t in_features) {
  CpuWeight w{};
  w.out_features = out_features;
  w.in_features = in_features;
  w.row_blocks = (out_features + kRows - 1) / kRows;
  w.k_blocks = (in_features + kInputs - 1) / kInputs;
  std::vector<uint8_t> nothing(64);
  w.stream = nothing.data();
  std::vector<uint16_t> x(size_t(tokens * in_features));
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = uint16_t((uint32_t(i + 7) * 2654435761u >> 13 & 0x80FF) | 0x3F00);
  const int64_t cells = w.k_blocks * kInputs / 2;
  std::vector<float> pairs(size_t(tokens * cells)), y(size_t(tokens * out_features));
  const TokenBlocks blocks(tokens, run.pair_tokens);
  for (int64_t b = 0; b < blocks.count; ++b)
    run.arrange(x.data() + blocks.begin(b) * in_features, kBfloat16, in_features,
                blocks.begin(b + 1) - blocks.begin(b), cells, true,
                pairs.data() + blocks.begin(b) * cells);
  std::memset(y.data(), 0xFF, y.size() * 4);
  CpuTokens t{};
  t.count = tokens;
  t.pair_tokens = run.pair_tokens;
  t.pairs = pairs.data();
  t.y = y.data();
  t.y_stride = out_features;
  t.y_type = kFloat32;
  run.tile_bf16(w, t, 0, w.row_blocks);
  return y;
}

}  // namespace
}  // namespace slab

int main() {
  using namespace slab;
  syscall(SYS_arch_prctl, 0x1023, 18);  // permission to use tiles, where there are any
  struct sigaction action{};
  action.sa_sigaction = refused;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
  int cases = 0, different = 0;
  for (int64_t tokens : {3, 15, 16, 17, 31, 33, 50, 512})
    for (int64_t out_features : {5, 32, 40})
      for (int64_t in_features : {8, 131, 1000}) {
        const auto ours = product(*cpu_kernels_avx512_amx(), tokens, out_features, in_features);
        const auto theirs =
            product(*cpu_kernels_avx512_amx_emulated(), tokens, out_features, in_features);
        bool written = true;
        for (float number : ours) written = written && number == number;
        different += !written || std::memcmp(ours.data(), theirs.data(), ours.size() * 4) != 0;
        ++cases;
      }
  printf("{\"cases\": %d, \"different\": %d", cases, different);
  for (int kind = 0; kind < kKinds; ++kind) printf(", \"%s\": %ld", kNames[kind], emulated[kind]);
  printf("}\n");
  return 0;
}
