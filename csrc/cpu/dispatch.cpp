// Which instruction sets this machine runs. __builtin_cpu_supports reads CPUID, and checks that the
// operating system saves the registers. What returns an instruction set's table is itself compiled
// for that instruction set, so it is called only where the machine was found to run it.
#include <cstring>

#include "../int8.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace slab {
#if defined(__x86_64__)
namespace {

bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool runs_avx512_bf16() { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Whether a CPU has AMX-TILE and AMX-BF16, and its system saves the tiles' configuration and their
// data: edx is that of CPUID's leaf 7 (Intel's manual, CPUID and the chapter about AMX).
constexpr bool has_tiles(uint32_t edx, uint64_t xcr0) {
  constexpr uint32_t features = 1u << 22 | 1u << 24;
  constexpr uint64_t states = 1u << 17 | 1u << 18;
  return (edx & features) == features && (xcr0 & states) == states;
}
static_assert(has_tiles(0x01400000u, 0x60000u) && !has_tiles(0x01000000u, 0x60000u) &&
                  !has_tiles(0x00400000u, 0x60000u) && !has_tiles(0x01400000u, 0x20000u) &&
                  !has_tiles(0x01400000u, 0x40000u),
              "tiles need both features and both states");

// Whether tile instructions may run here. Linux lets a process use tiles after it has asked
// (arch_prctl(2)'s ARCH_REQ_XCOMP_PERM for component 18, from Linux 5.16 on), because they make
// what it saves of a thread 8 KB larger; it refuses where a signal's alternate stack is too small.
// It is asked once, and the answer holds for all threads.
bool may_use_tiles() {
#if defined(__linux__)
  static const bool may = [] {
    unsigned eax, ebx, ecx, edx;
    if (!runs_avx512_bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    uint32_t low, high;  // Where AVX-512 runs, XGETBV does.
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr int kRequest = 0x1023, kTileData = 18;
    return has_tiles(edx, uint64_t(high) << 32 | low) &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return may;
#else
  return false;
#endif
}

}  // namespace
#endif

const CpuKernels* cpu_kernels(int index) {
  const CpuKernels* found[5] = {};
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto add = [&](const CpuKernels* built) {
    if (built) found[count++] = built;
  };
  if (runs_avx512_bf16()) {
    const CpuKernels* const tiles = cpu_kernels_avx512_amx();
    if (tiles && may_use_tiles()) add(tiles);
    add(cpu_kernels_avx512_bf16());
  }
  if (runs_avx512()) add(cpu_kernels_avx512());
  if (runs_avx2()) add(cpu_kernels_avx2());
#endif
  found[count++] = cpu_kernels_scalar();
  return index < count ? found[index] : nullptr;
}

const CpuKernels* cpu_emulated_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (runs_avx512_bf16()) return cpu_kernels_avx512_amx_emulated();
#endif
  return nullptr;
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
  if (std::strncmp(chosen.name, "avx512", 6) == 0 && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bitalg") &&
      __builtin_cpu_supports("avx512vpopcntdq"))
    if (const Int8Kernels* const built = int8_kernels_vnni()) return *built;
  if (std::strcmp(chosen.name, "avx2") == 0)
    if (const Int8Kernels* const built = int8_kernels_avx2()) return *built;
#endif
  (void)chosen;
  return *int8_kernels_scalar();
}

}  // namespace slab
