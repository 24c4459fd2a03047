// The torch side of the products with int8 activations.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "int8_linear.h"
#include "linear.h"

namespace {

using namespace slab;

using Bias = std::optional<Tensor>;

// ---- which product runs ----

enum class Way { exact, few, many };
constexpr const char* kWays[] = {"exact", "few", "many"};
std::atomic<int64_t> forced_few{-1};  // for tests: up to so many tokens `few`

Way way(const Int8Kernels& k, int64_t rank, int64_t tokens) {
  const int64_t forced = forced_few.load(std::memory_order_relaxed);
  if (forced >= 0) return tokens <= forced || rank > kManyRank ? Way::few : Way::many;
  if (rank > kManyRank) return Way::exact;
  if (tokens <= k.few_tokens && tokens * (1 + rank) <= k.few_terms) return Way::few;
  return k.runs_many ? Way::many : Way::exact;
}
std::tuple<std::string, std::string, int64_t> cpu_int8(int64_t rank, int64_t tokens) {
  const Int8Kernels& k = int8_kernels(kernels());
  const Way chosen = way(k, rank, tokens);
  const int64_t bits = chosen == Way::exact ? 0 : chosen == Way::many && k.wide ? 13 : 8;
  return {kWays[int(chosen)], k.name, bits};
}
int64_t cpu_use_few(int64_t tokens) {
  forced_few.store(tokens, std::memory_order_relaxed);
  return tokens;
}

// ---- a call ----

// What a call with x [..., K] has, once its arguments are checked.
struct Call {
  Tensor x;               // contiguous
  int type;               // FloatType of x and y
  int64_t tokens, bytes;  // M, bytes of a number of x and y

  Call(Tensor given, int64_t in_features) : x(std::move(given)) {
    CHECK_ARGUMENT(x.dim() >= 1, "x must have at least one dimension");
    CHECK_ARGUMENT(x.is_cpu(), "x is not on the CPU");
    type = float_type("x", x.scalar_type());
    CHECK_ARGUMENT(x.size(x.dim() - 1) == in_features, "x has ", x.size(x.dim() - 1),
                   " features, the weight ", in_features);
    tokens = x.numel() / in_features;
    bytes = type == kFloat32 ? 4 : 2;
    if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  }
  const uint8_t* row(int64_t token) const {
    return static_cast<const uint8_t*>(x.const_data_ptr()) + token * x.size(x.dim() - 1) * bytes;
  }
};

// The parts' bias as fp32, each padded to whole row blocks, given to their weights.
Scratch wide_bias(const CpuKernels& run, const Bias& bias, std::vector<CpuWeight>& parts) {
  int64_t rows = 0, padded = 0;
  for (const CpuWeight& w : parts) rows += w.out_features, padded += w.row_blocks * kRows;
  Scratch wide(bias ? padded : 0);
  if (!bias) return wide;
  check_shape("bias", *bias, {rows});
  const int type = float_type("bias", bias->scalar_type());
  const auto* from = static_cast<const uint8_t*>(bias->const_data_ptr());
  float* to = wide.get();
  for (CpuWeight& w : parts) {
    run.widen(from, type, to, w.out_features);
    for (int64_t n = w.out_features; n < w.row_blocks * kRows; ++n) to[n] = 0.0f;
    w.bias = to;
    from += w.out_features * (type == kFloat32 ? 4 : 2);
    to += w.row_blocks * kRows;
  }
  return wide;
}

// A weight, and where its columns of y begin.
struct Part {
  const CpuWeight& w;
  int64_t column;
};

// The columns of parts that read the same x and have the same product. A token with NaN or infinity
// is computed by the exact kernels, so that they reach y as they do there.
void multiply_parts(const CpuKernels& run, const Call& call, const std::vector<Part>& parts,
                    bool few, uint8_t* y, int64_t columns) {
  if (parts.empty()) return;
  int64_t rank = 0, adapter = 0;
  for (const Part& part : parts) {
    rank = part.w.rank > rank ? part.w.rank : rank;
    adapter = part.w.adapter_padded > adapter ? part.w.adapter_padded : adapter;
  }
  const CpuWeight& any = parts[0].w;
  const int64_t features = any.in_features, padded = any.k_blocks * kInputs;
  const int64_t at_once = few ? kFewAtOnce : kManyAtOnce;
  const int64_t most = call.tokens < at_once ? call.tokens : at_once;
  const bool rows_of_x = few || adapter;  // as fp32, beside the integers
  const bool copy = rows_of_x && !(call.type == kFloat32 && features == padded);
  const Scratch copied(copy ? most * padded : 0), z(most * adapter);
  for (int64_t first = 0; first < call.tokens; first += at_once) {
    CpuTokens t{};
    t.count = call.tokens - first < at_once ? call.tokens - first : at_once;
    t.block_tokens = 1;
    if (rows_of_x)
      t.x = widened(run, call.row(first), call.type, t.count, features, padded, copied.get());
    t.z = z.get();
    t.y_stride = columns;
    t.y_type = call.type;
    Int8Linear linear(run, any, t, call.row(first), call.type, few, rank);
    for (const Part& part : parts) {
      uint8_t* const to = y + (first * columns + part.column) * call.bytes;
      t.y = to;
      run_adapter(run, part.w, t);
      linear.multiply(part.w, t);
      for (int64_t i = 0; i < t.count; ++i)
        if (!linear.finite(part.w, i))
          run_exact(run, part.w, call.row(first + i), call.type, 1, to + i * columns * call.bytes,
                    columns);
    }
  }
}

// y of several weights that read the same x, side by side, with int8 activations. Each has the
// product that it would have alone, so a fused layer and its parts agree.
Tensor linear_int8(const Call& call, std::vector<CpuWeight>& weights, const Bias& bias) {
  const CpuKernels& run = kernels();
  int64_t columns = 0;
  for (const CpuWeight& w : weights) {
    CHECK_ARGUMENT(is_integer(w.values),
                   "int8 activations need int8 or int4 values, this weight's are 16-bit numbers");
    columns += w.out_features;
  }
  Tensor y = empty_output(call.x, columns);
  if (call.tokens == 0) return y;
  const Scratch wide = wide_bias(run, bias, weights);
  auto* const out = static_cast<uint8_t*>(y.mutable_data_ptr());
  std::vector<Part> few, many;
  int64_t column = 0;
  for (const CpuWeight& w : weights) {
    const Way chosen = way(int8_kernels(run), w.rank, call.tokens);
    const Int16Kernels* const int16 = int8_kernels(run).wide;
    uint8_t* const to = out + column * call.bytes;
    if (chosen == Way::exact)
      run_exact(run, w, call.row(0), call.type, call.tokens, to, columns);
    else if (chosen == Way::many && int16)
      run_int16(run, *int16, w, call.row(0), call.type, call.tokens, to, columns);
    else
      (chosen == Way::few ? few : many).push_back({w, column});
    column += w.out_features;
  }
  multiply_parts(run, call, few, true, out, columns);
  multiply_parts(run, call, many, false, out, columns);
  return y;
}

Tensor linear_cpu_int8(Tensor x, Tensor prepared, Bias bias, int64_t out_features,
                       int64_t in_features) {
  std::vector<CpuWeight> parts{weight_of(prepared, out_features, in_features)};
  return linear_int8(Call(x, in_features), parts, bias);
}

Tensor linear_cpu_int8_parts(Tensor x, std::vector<Tensor> prepared, Bias bias,
                             std::vector<int64_t> out_features, int64_t in_features) {
  CHECK_ARGUMENT(!prepared.empty() && prepared.size() == out_features.size(), "prepared has ",
                 prepared.size(), " weights, out_features ", out_features.size(), " sizes");
  std::vector<CpuWeight> parts;
  for (size_t i = 0; i < prepared.size(); ++i)
    parts.push_back(weight_of(prepared[i], out_features[i], in_features));
  return linear_int8(Call(x, in_features), parts, bias);
}

}  // namespace

#define LINEAR_ARGUMENTS \
  "Tensor x, Tensor prepared, Tensor? bias, int out_features, int in_features"

STABLE_TORCH_LIBRARY_FRAGMENT(slab_kernels, m) {
  // exact, few or many: the product that runs; the kernels' name; bits of the integers of x, or 0.
  m.def("cpu_int8(int rank, int tokens) -> (str, str, int)");
  m.def("cpu_use_few(int tokens) -> int");  // for tests and measurements; -1: as it was
  m.def("linear_cpu_int8(" LINEAR_ARGUMENTS ") -> Tensor");
  m.def("linear_cpu_int8_frozen(" LINEAR_ARGUMENTS ") -> Tensor");
  m.def(
      "linear_cpu_int8_parts(Tensor x, Tensor[] prepared, Tensor? bias, int[] out_features, "
      "int in_features) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(slab_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_int8", TORCH_BOX(&cpu_int8));
  m.impl("cpu_use_few", TORCH_BOX(&cpu_use_few));
}

STABLE_TORCH_LIBRARY_IMPL(slab_kernels, CPU, m) {
  m.impl("linear_cpu_int8", TORCH_BOX(&linear_cpu_int8));
  m.impl("linear_cpu_int8_frozen", TORCH_BOX(&linear_cpu_int8));
  m.impl("linear_cpu_int8_parts", TORCH_BOX(&linear_cpu_int8_parts));
}
