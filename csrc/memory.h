// Memory of the bindings, in huge pages where the system has them. Reading a weight in them misses
// the address cache less often.
#pragma once

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <memory>

#include "arguments.h"

namespace slab {

constexpr int64_t kHugePage = 1 << 21;

// Asks the system for huge pages in fresh memory. Memory that was touched before stays in the pages
// that it has.
inline void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(kHugePage);
  const uintptr_t at = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (at + page - 1) / page * page;
  const uintptr_t end = (at + uintptr_t(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// fp32 memory, aligned to 64 bytes, which is freed at the end of the call. From a megabyte on it is
// in huge pages where there are any.
struct Scratch {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data;
  explicit Scratch(int64_t n) {
    const int64_t bytes = n * 4 + 4, alignment = bytes < 1 << 20 ? 64 : kHugePage;
    const int64_t whole = round_up(bytes, alignment);
    data.reset(static_cast<float*>(std::aligned_alloc(size_t(alignment), size_t(whole))));
    CHECK_ARGUMENT(data, "out of memory for ", n, " floats");
    if (alignment == kHugePage) prefer_huge_pages(data.get(), whole);
  }
  float* get() const { return data.get(); }
};

// uint8 [bytes] on the CPU, not initialised. From 2 MB on it is mapped anew, on Linux: what malloc
// hands out may have been touched by earlier tensors, and would then stay in small pages. An int4
// weight of 11008x4096 and one token took 1.14 ms so on an AMD EPYC (Zen 4), and 0.98 ms in huge
// pages.
inline Tensor fresh_bytes(const Tensor& like, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage) {
    // One huge page more, of which the parts before and behind are given back.
    const int64_t whole = round_up(bytes, sysconf(_SC_PAGESIZE));
    const int protection = PROT_READ | PROT_WRITE, kind = MAP_PRIVATE | MAP_ANONYMOUS;
    void* const mapped = mmap(nullptr, size_t(whole + kHugePage), protection, kind, -1, 0);
    if (mapped != MAP_FAILED) {
      uint8_t* const from = static_cast<uint8_t*>(mapped);
      const int64_t before = -reinterpret_cast<intptr_t>(mapped) & (kHugePage - 1);
      if (before) munmap(from, size_t(before));
      munmap(from + before + whole, size_t(kHugePage - before));
      // All of it, so that it stays one mapping, of which a process may have some 65,000. What is
      // behind the last whole huge page lies in small ones.
      madvise(from + before, size_t(whole), MADV_HUGEPAGE);
      const auto unmap = [whole](void* memory) { munmap(memory, size_t(whole)); };
      return torch::stable::from_blob(from + before, {bytes}, {1}, like.device(), ScalarType::Byte,
                                      unmap);
    }
  }
#endif
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

}  // namespace slab
