// The torch side of the CPU backend's exact products, and the choice of the instruction set. Like
// all files with torch it uses LibTorch's stable ABI (2.11 and later), so one binary serves every
// later torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "linear.h"

namespace {

using namespace slab;

// ---- instruction set ----

std::string runnable() {
  std::string names;
  for (int i = 0; cpu_kernels(i); ++i) names += (i ? ", " : "") + std::string(cpu_kernels(i)->name);
  return names;
}

const CpuKernels* named(const std::string& name, const char* origin) {
  for (int i = 0; cpu_kernels(i); ++i)
    if (name == cpu_kernels(i)->name) return cpu_kernels(i);
  refuse(origin, "=", name,
         " is not an instruction set this build runs on this machine; choose one of ", runnable());
}

std::atomic<const CpuKernels*> chosen{nullptr};

}  // namespace

const CpuKernels& slab::kernels() {
  const CpuKernels* k = chosen.load(std::memory_order_relaxed);
  if (!k) {
    const char* forced = std::getenv("SLAB_KERNELS_CPU_ISA");
    k = forced && *forced ? named(forced, "SLAB_KERNELS_CPU_ISA") : cpu_kernels(0);
    chosen.store(k, std::memory_order_relaxed);
  }
  return *k;
}

namespace {

std::string cpu_isa() { return kernels().name; }
std::string cpu_runnable() { return runnable(); }
// For tests, which may also take the kernels whose tile instructions are emulated.
std::string cpu_use_isa(std::string name) {
  const CpuKernels* const emulated = cpu_emulated_kernels();
  const bool takes = emulated && name == emulated->name;
  chosen.store(takes ? emulated : named(name, "isa"), std::memory_order_relaxed);
  return name;
}

}  // namespace

int slab::float_type(const char* name, ScalarType type) {
  if (type == ScalarType::Float) return kFloat32;
  if (type == ScalarType::Half) return kFloat16;
  if (type == ScalarType::BFloat16) return kBfloat16;
  refuse(name, " must be float32, float16 or bfloat16");
}

// It is made through the shim, which takes 1.6 us less than the dispatcher's new_empty.
Tensor slab::empty_output(const Tensor& x, int64_t out_features) {
  const int64_t dims = x.dim();
  std::vector<int64_t> sizes(2 * size_t(dims));
  int64_t* const strides = sizes.data() + dims;
  for (int64_t i = 0; i < dims; ++i) sizes[size_t(i)] = i + 1 < dims ? x.size(i) : out_features;
  for (int64_t i = dims - 1, stride = 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[size_t(i)] > 1 ? sizes[size_t(i)] : 1;
  }
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle y = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides, dtype,
                                                         aoti_torch_device_type_cpu(), 0, &y));
  return Tensor(y);
}

namespace {

Tensor linear_cpu(Tensor x, Tensor prepared, std::optional<Tensor> bias, int64_t out_features,
                  int64_t in_features) {
  CHECK_ARGUMENT(x.dim() >= 1, "x must have at least one dimension");
  CHECK_ARGUMENT(x.is_cpu(), "x is not on the CPU");
  const int type = float_type("x", x.scalar_type());
  CHECK_ARGUMENT(x.size(x.dim() - 1) == in_features, "x has ", x.size(x.dim() - 1),
                 " features, the weight ", in_features);
  CpuWeight w = weight_of(prepared, out_features, in_features);
  const CpuKernels& run = kernels();
  Tensor y = empty_output(x, out_features);
  const int64_t tokens = x.numel() / in_features;
  if (tokens == 0) return y;
  const Scratch wide_bias(bias ? w.row_blocks * kRows : 0);
  if (bias) {
    check_shape("bias", *bias, {out_features});
    for (int64_t n = out_features; n < w.row_blocks * kRows; ++n) wide_bias.get()[n] = 0.0f;
    run.widen(bias->const_data_ptr(), float_type("bias", bias->scalar_type()), wide_bias.get(),
              out_features);
    w.bias = wide_bias.get();
  }
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  run_exact(run, w, x.const_data_ptr(), type, tokens, y.mutable_data_ptr(), out_features);
  return y;
}

Tensor dequantize_cpu(Tensor prepared, int64_t out_features, int64_t in_features) {
  const CpuWeight w = weight_of(prepared, out_features, in_features);
  const CpuKernels& run = kernels();
  Tensor dense = torch::stable::new_empty(prepared, {out_features, in_features}, ScalarType::Float);
  auto* const out = static_cast<float*>(dense.mutable_data_ptr());
  // Most of the time goes to the system, which fills fresh memory with zeros. In small pages that
  // takes four times as long. Stores that bypass the caches gain nothing, since a page has just
  // come into them with its zeros.
  prefer_huge_pages(out, dense.numel() * 4);
  torch::stable::parallel_for(
      0, w.row_blocks, 1 + kThreadWork / (kRows * in_features),
      [&](int64_t begin, int64_t end) { run.dequantize(w, out, kFloat32, begin, end); });
  return dense;
}

}  // namespace

#define LINEAR_ARGUMENTS \
  "Tensor x, Tensor prepared, Tensor? bias, int out_features, int in_features"

STABLE_TORCH_LIBRARY_FRAGMENT(slab_kernels, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_runnable() -> str");
  m.def("cpu_use_isa(str name) -> str");
  // The same kernel has two names, because Python registers autograd for linear_cpu, which costs
  // every call of it some 10 us, with or without gradients. linear_cpu_frozen is for calls that
  // need none.
  m.def("linear_cpu(" LINEAR_ARGUMENTS ") -> Tensor");
  m.def("linear_cpu_frozen(" LINEAR_ARGUMENTS ") -> Tensor");
  m.def("dequantize_cpu(Tensor prepared, int out_features, int in_features) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(slab_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_runnable", TORCH_BOX(&cpu_runnable));
  m.impl("cpu_use_isa", TORCH_BOX(&cpu_use_isa));
}

STABLE_TORCH_LIBRARY_IMPL(slab_kernels, CPU, m) {
  m.impl("linear_cpu", TORCH_BOX(&linear_cpu));
  m.impl("linear_cpu_frozen", TORCH_BOX(&linear_cpu));
  m.impl("dequantize_cpu", TORCH_BOX(&dequantize_cpu));
}
