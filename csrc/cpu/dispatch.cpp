// Which instruction sets this machine runs. __builtin_cpu_supports reads CPUID, and checks that the
// operating system saves the registers.
#include <cstring>

#include "../int8.h"

namespace slab {

const CpuKernels* cpu_kernels(int index) {
  const CpuKernels* found[5] = {};
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (cpu_kernels_avx512() && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (cpu_kernels_avx512_bf16() && __builtin_cpu_supports("avx512bf16"))
      found[count++] = cpu_kernels_avx512_bf16();
    found[count++] = cpu_kernels_avx512();
  }
  if (cpu_kernels_avx2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    found[count++] = cpu_kernels_avx2();
#endif
  found[count++] = cpu_kernels_scalar();
  return index < count ? found[index] : nullptr;
}

int cpu_prefetch() {
#if defined(__x86_64__)
  // Two blocks of fp16: 2048, 4096 and 8192 were equally good on Intel Xeons. On AMD's Zen 4 every
  // distance makes decoding slower, by up to 1.9 times.
  static const int ahead = (__builtin_cpu_init(), __builtin_cpu_is("intel")) ? 4096 : 0;
  return ahead;
#else
  return 0;
#endif
}

const Int8Kernels& int8_kernels(const CpuKernels& chosen) {
#if defined(__x86_64__)
  const bool avx512 = std::strncmp(chosen.name, "avx512", 6) == 0;
  if (avx512 && int8_kernels_vnni() && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bitalg") &&
      __builtin_cpu_supports("avx512vpopcntdq"))
    return *int8_kernels_vnni();
  if ((avx512 || &chosen == cpu_kernels_avx2()) && int8_kernels_avx2()) return *int8_kernels_avx2();
#endif
  (void)chosen;
  return *int8_kernels_scalar();
}

}  // namespace slab
