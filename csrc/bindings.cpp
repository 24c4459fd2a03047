// The torch side of the CPU backend, and the only file that includes torch: LibTorch's stable ABI (2.11 and later), so
// one binary serves every later torch. Checks every argument, widens the activations to fp32, and hands ranges of row
// blocks to torch's own thread pool.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace slab;

// A chunk of work below this many weights x tokens is not worth a second thread (about 10 us of one core).
constexpr int64_t kThreadWork = 1 << 17;

// STD_TORCH_CHECK without the file and line: the sentence is for whoever called from Python.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error("slab_kernels: " + text.str());
}
#define CHECK_ARGUMENT(condition, ...)     \
  do {                                     \
    if (!(condition)) refuse(__VA_ARGS__); \
  } while (false)

// ---- instruction set ------------------------------------------------------------------------------------------------

std::string runnable() {
  std::string names;
  for (int i = 0; cpu_kernels(i); ++i) names += (i ? ", " : "") + std::string(cpu_kernels(i)->name);
  return names;
}

const CpuKernels* named(const std::string& name, const char* origin) {
  for (int i = 0; cpu_kernels(i); ++i)
    if (name == cpu_kernels(i)->name) return cpu_kernels(i);
  refuse(origin, "=", name, " is not an instruction set this build runs on this machine; choose one of ", runnable());
}

std::atomic<const CpuKernels*> chosen{nullptr};

const CpuKernels& kernels() {
  const CpuKernels* k = chosen.load(std::memory_order_relaxed);
  if (!k) {
    const char* forced = std::getenv("SLAB_KERNELS_CPU_ISA");
    k = forced && *forced ? named(forced, "SLAB_KERNELS_CPU_ISA") : cpu_kernels(0);
    chosen.store(k, std::memory_order_relaxed);
  }
  return *k;
}

std::string cpu_isa() { return kernels().name; }
std::string cpu_runnable() { return runnable(); }
std::string cpu_use_isa(std::string name) {
  chosen.store(named(name, "isa"), std::memory_order_relaxed);
  return name;
}

// ---- arguments ------------------------------------------------------------------------------------------------------

std::string shape(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> expected) {
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

void check_dtype(const char* name, const Tensor& t, ScalarType expected, const char* text) {
  CHECK_ARGUMENT(t.scalar_type() == expected, name, " has another dtype than ", text);
}

int float_type(const char* name, ScalarType type) {
  if (type == ScalarType::Float) return kFloat32;
  if (type == ScalarType::Half) return kFloat16;
  if (type == ScalarType::BFloat16) return kBfloat16;
  refuse(name, " must be float32, float16 or bfloat16");
}

void check_sizes(int64_t out_features, int64_t in_features, int64_t values, int64_t group_size, int64_t planes,
                 bool sign_term) {
  constexpr int64_t most = int64_t(1) << 24;
  CHECK_ARGUMENT(out_features > 0 && out_features <= most && in_features > 0 && in_features <= most,
                 "out_features=", out_features, " and in_features=", in_features, " must be between 1 and ", most);
  CHECK_ARGUMENT(values >= kFp16 && values <= kInt4, "values=", values,
                 " must be 0 (fp16), 1 (bf16), 2 (int8) or 3 (int4)");
  CHECK_ARGUMENT(group_size == 0 || group_size == 32 || group_size == 64 || group_size == 128,
                 "group_size=", group_size, " must be 32, 64, 128 or 0 (one scale a row)");
  const int most_planes = sign_term ? kMaxPlanes : 1;
  CHECK_ARGUMENT(planes >= 1 && planes <= most_planes, "planes=", planes, " must be ",
                 sign_term ? "1, 2 or 3" : "1 without a sign term");
}

using Factor = std::optional<Tensor>;

CpuWeight weight_of(const Tensor& stream, const Factor& u, const Factor& v, const Factor& p, const Factor& q,
                    int64_t out_features, int64_t in_features, int64_t values, int64_t group_size, int64_t planes) {
  check_sizes(out_features, in_features, values, group_size, planes, u.has_value());
  CpuWeight w{};
  w.out_features = out_features;
  w.in_features = in_features;
  w.row_blocks = (out_features + kRows - 1) / kRows;
  w.k_blocks = (in_features + kInputs - 1) / kInputs;
  w.values = int(values);
  w.group_size = group_size ? int(group_size) : kInputs;
  CHECK_ARGUMENT(u.has_value() == v.has_value(), "U and V belong together, but only one is given");
  CHECK_ARGUMENT(p.has_value() == q.has_value(), "P and Q belong together, but only one is given");
  const int64_t padded = w.k_blocks * kInputs;
  if (u) {
    w.planes = int(planes);
    w.rank = u->dim() == 3 ? u->size(1) : 0;
    CHECK_ARGUMENT(w.rank > 0, "U has shape ", shape(*u), ", expected [", w.row_blocks, ", rank >= 1, ", kRows, "]");
    check_shape("U", *u, {w.row_blocks, w.rank, kRows});
    check_shape("V", *v, {w.rank, padded});
    check_dtype("U", *u, ScalarType::Float, "float32");
    check_dtype("V", *v, ScalarType::Float, "float32");
    w.u = static_cast<const float*>(u->const_data_ptr());
    w.v = static_cast<const float*>(v->const_data_ptr());
  }
  if (p) {
    w.adapter_rank = p->dim() == 3 ? p->size(1) : 0;
    CHECK_ARGUMENT(w.adapter_rank > 0, "P has shape ", shape(*p), ", expected [", w.row_blocks, ", rank >= 1, ", kRows,
                   "]");
    w.adapter_padded = round_up(w.adapter_rank, 2 * kRows);
    check_shape("P", *p, {w.row_blocks, w.adapter_rank, kRows});
    check_shape("Q", *q, {w.adapter_padded / kRows, padded, kRows});
    w.adapter_half = p->scalar_type() == ScalarType::Half;
    check_dtype("P", *p, w.adapter_half ? ScalarType::Half : ScalarType::Float, "float16 or float32");
    check_dtype("Q", *q, p->scalar_type(), "P's");
    w.p = p->const_data_ptr();
    w.q = q->const_data_ptr();
  }
  w.block_size = block_bytes(w.values, w.group_size, w.planes);
  check_dtype("stream", stream, ScalarType::Byte, "uint8");
  check_shape("stream", stream, {w.row_blocks, w.k_blocks, w.block_size});
  w.stream = static_cast<const uint8_t*>(stream.const_data_ptr());
  return w;
}

struct Scratch {  // fp32, 64-byte aligned, freed with the call
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data;
  explicit Scratch(int64_t n) : data(static_cast<float*>(std::aligned_alloc(64, size_t(round_up(n * 4 + 4, 64))))) {
    CHECK_ARGUMENT(data, "out of memory for ", n, " floats");
  }
  float* get() const { return data.get(); }
};

// ---- ops ------------------------------------------------------------------------------------------------------------

Tensor prepare_cpu(Tensor values_tensor, Tensor metadata, Factor signs, Factor scales, int64_t out_features,
                   int64_t in_features, int64_t values, int64_t group_size, int64_t planes) {
  check_sizes(out_features, in_features, values, group_size, planes, signs.has_value());
  CHECK_ARGUMENT(group_size == 0 || is_integer(int(values)), "group_size=", group_size, " needs int8 or int4 values");
  const int64_t padded = round_up(in_features, group_size > 16 ? group_size : 16);
  static constexpr ScalarType types[] = {ScalarType::Half, ScalarType::BFloat16, ScalarType::Char, ScalarType::Byte};
  check_dtype("values", values_tensor, types[values], "the one that the value type names");
  check_shape("values", values_tensor, {out_features, values == kInt4 ? padded / 4 : padded / 2});
  check_dtype("metadata", metadata, ScalarType::Byte, "uint8");
  check_shape("metadata", metadata, {out_features, padded / 8});
  CpuPacked p{};
  p.out_features = out_features;
  p.in_features = in_features;
  p.padded_in = padded;
  p.values = int(values);
  p.group_size = int(group_size);
  p.values_data = static_cast<const uint8_t*>(values_tensor.const_data_ptr());
  p.metadata = static_cast<const uint8_t*>(metadata.const_data_ptr());
  if (signs) {
    check_dtype("signs", *signs, ScalarType::Byte, "uint8");
    check_shape("signs", *signs, {out_features, padded / 16 * planes});
    p.planes = int(planes);
    p.signs = static_cast<const uint8_t*>(signs->const_data_ptr());
  }
  CHECK_ARGUMENT(scales.has_value() == is_integer(p.values), "scales belong to int8 and int4 values, and to no others");
  if (scales) {
    check_dtype("scales", *scales, ScalarType::BFloat16, "bfloat16");
    check_shape("scales", *scales, {out_features, group_size ? padded / group_size : 1});
    p.scales = static_cast<const uint16_t*>(scales->const_data_ptr());
  }
  const int64_t row_blocks = (out_features + kRows - 1) / kRows, k_blocks = (in_features + kInputs - 1) / kInputs;
  const int stream_group = group_size ? int(group_size) : kInputs;
  Tensor stream =
      torch::stable::new_empty(metadata, {row_blocks, k_blocks, block_bytes(p.values, stream_group, p.planes)});
  auto* const out = static_cast<uint8_t*>(stream.mutable_data_ptr());
  std::atomic<int64_t> illegal{0};
  torch::stable::parallel_for(0, row_blocks, 1 + kThreadWork / (kRows * padded),
                              [&](int64_t begin, int64_t end) { illegal += cpu_prepare(p, out, begin, end); });
  CHECK_ARGUMENT(illegal == 0, "metadata holds ", illegal.load(),
                 " nibbles that are not two ascending positions (legal: 4 8 C 9 D E)");
  return stream;
}

// The tokens [0, count) of x, as fp32 rows padded to whole blocks; x itself when it already is that.
const float* widened(const CpuKernels& run, const void* x, int type, int64_t count, int64_t features, int64_t padded,
                     float* scratch) {
  if (type == kFloat32 && features == padded) return static_cast<const float*>(x);
  const auto* const from = static_cast<const uint8_t*>(x);
  const int64_t bytes = type == kFloat32 ? 4 : 2;
  torch::stable::parallel_for(0, count, 1 + kThreadWork / padded, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      run.widen(from + i * features * bytes, type, scratch + i * padded, features);
      for (int64_t k = features; k < padded; ++k) scratch[i * padded + k] = 0.0f;
    }
  });
  return scratch;
}

// One call of the kernels: tokens that fit one slab.
void run_tokens(const CpuKernels& run, const CpuWeight& w, CpuTokens t, const void* x, int x_type, bool lookup) {
  const int64_t padded = w.k_blocks * kInputs;
  const bool copy = !(x_type == kFloat32 && w.in_features == padded);
  const Scratch rows(copy ? t.count * padded : 0), scaled(lookup ? t.count * w.rank * padded : 0);
  const Scratch z(t.count * w.adapter_padded);
  t.x = widened(run, x, x_type, t.count, w.in_features, padded, rows.get());
  t.xv = scaled.get();
  t.z = z.get();
  if (lookup)
    for (int64_t i = 0; i < t.count; ++i)
      for (int64_t r = 0; r < w.rank; ++r)
        run.multiply(t.x + i * padded, w.v + r * padded, scaled.get() + (i * w.rank + r) * padded, padded);
  if (w.adapter_rank)
    torch::stable::parallel_for(0, w.adapter_padded / (2 * kRows), 1 + kThreadWork / (2 * kRows * padded * t.count),
                                [&](int64_t begin, int64_t end) { run.adapter_in(w, t, begin, end); });
  // Whole groups of four row blocks a thread: lookup shares its tables among four.
  constexpr int64_t unit = 4;
  const int64_t units = (w.row_blocks + unit - 1) / unit;
  torch::stable::parallel_for(0, units, 1 + kThreadWork / (unit * kRows * padded * t.count),
                              [&](int64_t begin, int64_t end) {
                                const int64_t last = end * unit < w.row_blocks ? end * unit : w.row_blocks;
                                (lookup ? run.lookup : run.tile)(w, t, begin * unit, last);
                              });
}

Tensor linear_cpu(Tensor x, Tensor stream, Factor u, Factor v, Factor p, Factor q, Factor bias, int64_t out_features,
                  int64_t in_features, int64_t values, int64_t group_size, int64_t planes) {
  CHECK_ARGUMENT(x.dim() >= 1, "x must have at least one dimension");
  CHECK_ARGUMENT(x.is_cpu(), "x is not on the CPU");
  const int type = float_type("x", x.scalar_type());
  CHECK_ARGUMENT(x.size(x.dim() - 1) == in_features, "x has ", x.size(x.dim() - 1), " features, the weight ",
                 in_features);
  CpuWeight w = weight_of(stream, u, v, p, q, out_features, in_features, values, group_size, planes);
  const CpuKernels& run = kernels();
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  Tensor y = torch::stable::new_empty(x, sizes);
  const int64_t tokens = x.numel() / in_features;
  if (tokens == 0) return y;
  const Scratch wide_bias(bias ? w.row_blocks * kRows : 0);
  if (bias) {
    check_shape("bias", *bias, {out_features});
    for (int64_t n = out_features; n < w.row_blocks * kRows; ++n) wide_bias.get()[n] = 0.0f;
    run.widen(bias->const_data_ptr(), float_type("bias", bias->scalar_type()), wide_bias.get(), out_features);
    w.bias = wide_bias.get();
  }
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  const bool lookup = tokens < run.lookup_tokens && (w.rank <= 2 || w.rank == 4);
  const int64_t bytes = type == kFloat32 ? 4 : 2;
  for (int64_t first = 0; first < tokens; first += kTileTokens) {
    CpuTokens t{};
    t.count = tokens - first < kTileTokens ? tokens - first : kTileTokens;
    t.y = static_cast<uint8_t*>(y.mutable_data_ptr()) + first * out_features * bytes;
    t.y_type = type;
    run_tokens(run, w, t, static_cast<const uint8_t*>(x.const_data_ptr()) + first * in_features * bytes, type, lookup);
  }
  return y;
}

Tensor dequantize_cpu(Tensor stream, Factor u, Factor v, int64_t out_features, int64_t in_features, int64_t values,
                      int64_t group_size, int64_t planes) {
  const CpuWeight w =
      weight_of(stream, u, v, std::nullopt, std::nullopt, out_features, in_features, values, group_size, planes);
  const CpuKernels& run = kernels();
  Tensor dense = torch::stable::new_empty(stream, {out_features, in_features}, ScalarType::Float);
  void* const out = dense.mutable_data_ptr();
  torch::stable::parallel_for(0, w.row_blocks, 1 + kThreadWork / (kRows * in_features),
                              [&](int64_t begin, int64_t end) { run.dequantize(w, out, kFloat32, begin, end); });
  return dense;
}

}  // namespace

#define LINEAR_ARGUMENTS                                                                \
  "Tensor x, Tensor stream, Tensor? U, Tensor? V, Tensor? P, Tensor? Q, Tensor? bias, " \
  "int out_features, int in_features, int value_type, int group_size, int planes"

STABLE_TORCH_LIBRARY_FRAGMENT(slab_kernels, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_runnable() -> str");
  m.def("cpu_use_isa(str name) -> str");
  m.def(
      "prepare_cpu(Tensor values, Tensor metadata, Tensor? signs, Tensor? scales, int out_features, int in_features, "
      "int value_type, int group_size, int planes) -> Tensor");
  // Twice the same kernel: Python registers autograd for linear_cpu, which costs every call of it some 10 us, with or
  // without gradients; linear_cpu_frozen is for calls that need none.
  m.def("linear_cpu(" LINEAR_ARGUMENTS ") -> Tensor");
  m.def("linear_cpu_frozen(" LINEAR_ARGUMENTS ") -> Tensor");
  m.def(
      "dequantize_cpu(Tensor stream, Tensor? U, Tensor? V, int out_features, int in_features, int value_type, "
      "int group_size, int planes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(slab_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_runnable", TORCH_BOX(&cpu_runnable));
  m.impl("cpu_use_isa", TORCH_BOX(&cpu_use_isa));
}

STABLE_TORCH_LIBRARY_IMPL(slab_kernels, CPU, m) {
  m.impl("prepare_cpu", TORCH_BOX(&prepare_cpu));
  m.impl("linear_cpu", TORCH_BOX(&linear_cpu));
  m.impl("linear_cpu_frozen", TORCH_BOX(&linear_cpu));
  m.impl("dequantize_cpu", TORCH_BOX(&dequantize_cpu));
}
