// The products with AVX2, FMA and F16C.
#include "../launch.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "avx2.h"
#include "kernel.h"

namespace slab {
namespace {

const CpuKernels kernels = kernel_table<Avx2>();

}  // namespace

const CpuKernels* cpu_kernels_avx2() { return &kernels; }

}  // namespace slab
#else
namespace slab {
const CpuKernels* cpu_kernels_avx2() { return nullptr; }
}  // namespace slab
#endif
