// The checks of arguments that all files with torch share. It includes torch, by its stable ABI
// alone.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

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

}  // namespace slab
