// The checks of arguments and the memory that all files with torch share. It includes torch, by its
// stable ABI alone.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace slab {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernels of the instruction set that was chosen, by the environment or for this machine.
const CpuKernels& kernels();

// Like STD_TORCH_CHECK, but without file and line, because the sentence is for whoever called from
// Python.
template <class... Parts>
[[noreturn]] inline void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error("slab_kernels: " + text.str());
}
#define CHECK_ARGUMENT(condition, ...)     \
  do {                                     \
    if (!(condition)) refuse(__VA_ARGS__); \
  } while (false)

inline std::string shape(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline void check_shape(const char* name, const Tensor& t,
                        std::initializer_list<int64_t> expected) {
  bool same = t.dim() == int64_t(expected.size());
  std::string text;
  int64_t i = 0;
  for (int64_t size : expected) {
    same = same && t.size(i) == size;
    text += (i++ ? ", " : "") + std::to_string(size);
  }
  CHECK_ARGUMENT(same, name, " has shape ", shape(t), ", expected [", text, "]");
  CHECK_ARGUMENT(t.is_cpu(), name, " is not on the CPU");
  CHECK_ARGUMENT(t.is_contiguous(), name, " is not contiguous");
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType expected, const char* text) {
  CHECK_ARGUMENT(t.scalar_type() == expected, name, " has another dtype than ", text);
}

constexpr int64_t kHugePage = 1 << 21;

// Asks the system to use huge pages for fresh memory, in which reading a weight misses the address
// cache less often. Nothing changes where it has none.
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

}  // namespace slab
