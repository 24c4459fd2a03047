// The products with AVX-512 (F, BW, DQ, VL).
#include "../launch.h"

#if defined(__AVX512F__)
#include "avx512.h"
#include "kernel.h"

namespace slab {
namespace {

const CpuKernels kernels = kernel_table<Avx512>();

}  // namespace

const CpuKernels* cpu_kernels_avx512() { return &kernels; }

}  // namespace slab
#else
namespace slab {
const CpuKernels* cpu_kernels_avx512() { return nullptr; }
}  // namespace slab
#endif
