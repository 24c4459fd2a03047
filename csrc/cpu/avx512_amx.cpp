// AVX512-BF16 with AMX: many tokens of bf16 are multiplied by tiles. All else is as in
// avx512_bf16.cpp.
#include "../launch.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "amx.h"
#include "amx_config.h"

namespace slab {
namespace {

// The CPU's registers. In the intrinsics of gcc 12 a register is the digit that is written there,
// and they do not say what memory they read; `ordered` says that they may read all.
class CpuTiles {
 public:
  explicit CpuTiles(int tokens) {
    const TileConfig config(tokens);
    ordered(&config);
    _tile_loadconfig(&config);
  }
  ~CpuTiles() { _tile_release(); }
  CpuTiles(const CpuTiles&) = delete;
  CpuTiles& operator=(const CpuTiles&) = delete;

  template <int kTile>
  SLAB_INLINE void load(const void* from, int64_t stride) {
    ordered(from);
    if constexpr (kTile == 0) _tile_loadd(0, from, stride);
    if constexpr (kTile == 1) _tile_loadd(1, from, stride);
    if constexpr (kTile == 2) _tile_loadd(2, from, stride);
    if constexpr (kTile == 3) _tile_loadd(3, from, stride);
    if constexpr (kTile == 4) _tile_loadd(4, from, stride);
    if constexpr (kTile == 5) _tile_loadd(5, from, stride);
    if constexpr (kTile == 6) _tile_loadd(6, from, stride);
    if constexpr (kTile == 7) _tile_loadd(7, from, stride);
    ordered(from);
  }
  template <int kTile>
  SLAB_INLINE void store(void* to, int64_t stride) {
    static_assert(kTile < 4, "sums are in the first four");
    if constexpr (kTile == 0) _tile_stored(0, to, stride);
    if constexpr (kTile == 1) _tile_stored(1, to, stride);
    if constexpr (kTile == 2) _tile_stored(2, to, stride);
    if constexpr (kTile == 3) _tile_stored(3, to, stride);
    ordered(to);
  }
  template <int kSums, int kX, int kWeight>
  SLAB_INLINE void multiply() {
    static_assert(kSums < 4 && kX == 4 + kSums / 2 && kWeight == 6 + kSums % 2,
                  "a tile of sums has its tile of x and its tile of the weight");
    if constexpr (kSums == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (kSums == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kSums == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kSums == 3) _tile_dpbf16ps(3, 5, 7);
  }

 private:
  static SLAB_INLINE void ordered(const void* at) { __asm__ volatile("" : : "r"(at) : "memory"); }
};

}  // namespace

const CpuKernels* cpu_kernels_avx512_amx() {
  static const CpuKernels kernels = tile_kernels<CpuTiles>("avx512_amx");
  return &kernels;
}

}  // namespace slab
#else
namespace slab {
const CpuKernels* cpu_kernels_avx512_amx() { return nullptr; }
}  // namespace slab
#endif
