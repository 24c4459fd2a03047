// The kernels of avx512_amx.cpp with emulated tile registers. Tests choose them by their name on
// CPUs that have AVX512-BF16; nothing else does.
#include "../launch.h"

#if defined(__AVX512BF16__)
#include "amx.h"
#include "amx_emulated.h"

namespace slab {

const CpuKernels* cpu_kernels_avx512_amx_emulated() {
  static const CpuKernels kernels = tile_kernels<EmulatedTiles>("avx512_amx_emulated");
  return &kernels;
}

}  // namespace slab
#else
namespace slab {
const CpuKernels* cpu_kernels_avx512_amx_emulated() { return nullptr; }
}  // namespace slab
#endif
