// The torch side of the CPU backend. It uses LibTorch's
// stable ABI (2.11 and later), so one binary serves every later torch. It checks every argument,
// widens the activations to fp32, and hands ranges of row blocks to torch's own thread pool.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "linear.h"

namespace {

using namespace slab;

// A chunk of work below this many weights x tokens is not worth a second thread (about 10 us of one
// core).
constexpr int64_t kThreadWork = 1 << 17;

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
std::string cpu_use_isa(std::string name) {
  chosen.store(named(name, "isa"), std::memory_order_relaxed);
  return name;
}

// ---- arguments ----

}  // namespace

int slab::float_type(const char* name, ScalarType type) {
  if (type == ScalarType::Float) return kFloat32;
  if (type == ScalarType::Half) return kFloat16;
  if (type == ScalarType::BFloat16) return kBfloat16;
  refuse(name, " must be float32, float16 or bfloat16");
}

namespace {

constexpr int64_t kMost = int64_t(1) << 24;  // of features and ranks: no product of sizes overflows

void check_sizes(int64_t out_features, int64_t in_features, int64_t values, int64_t group_size,
                 int64_t planes, bool sign_term) {
  CHECK_ARGUMENT(
      out_features > 0 && out_features <= kMost && in_features > 0 && in_features <= kMost,
      "out_features=", out_features, " and in_features=", in_features, " must be between 1 and ",
      kMost);
  CHECK_ARGUMENT(values >= kFp16 && values <= kInt4, "values=", values,
                 " must be 0 (fp16), 1 (bf16), 2 (int8) or 3 (int4)");
  CHECK_ARGUMENT(group_size == 0 || group_size == 32 || group_size == 64 || group_size == 128,
                 "group_size=", group_size, " must be 32, 64, 128 or 0 (one scale a row)");
  const int most_planes = sign_term ? kMaxPlanes : 1;
  CHECK_ARGUMENT(planes >= 1 && planes <= most_planes, "planes=", planes, " must be ",
                 sign_term ? "1, 2 or 3" : "1 without a sign term");
}

using Factor = std::optional<Tensor>;

// ---- the prepared tensor ----
// A weight is one uint8 tensor: this header, then stream, U, V, P and Q (launch.h), each of which
// begins at a multiple of 64 bytes. It is one tensor because every argument of a torch op costs a
// call some 0.3 us: with twelve arguments it takes 5.0 us before any work, with five 3.5, a dense
// linear 3.0.

struct Header {
  uint64_t magic;
  int64_t out_features, in_features, rank, adapter_rank;
  // group_size 0 means one scale per row; planes is 0 with rank 0.
  int32_t values, group_size, planes, adapter_half;
  uint64_t reserved;
};
static_assert(sizeof(Header) == 64);
constexpr uint64_t kMagic = 0x315550436241'4c53;  // "SLAbCPU1"

// Where everything lies, in bytes. Sizes and ranks are below 2^24 each, so nothing overflows.
struct Sections {
  int64_t row_blocks, k_blocks, padded, block_size, adapter_padded;
  int64_t stream, u, v, p, q, end;
  explicit Sections(const Header& h) {
    row_blocks = (h.out_features + kRows - 1) / kRows;
    k_blocks = (h.in_features + kInputs - 1) / kInputs;
    padded = k_blocks * kInputs;
    block_size = block_bytes(h.values, h.group_size ? h.group_size : kInputs, h.planes);
    adapter_padded = round_up(h.adapter_rank, 2 * kRows);
    const int64_t adapter_bytes = h.adapter_half ? 2 : 4;
    stream = sizeof(Header);
    u = round_up(stream + row_blocks * k_blocks * block_size, 64);
    v = round_up(u + row_blocks * h.rank * kRows * 4, 64);
    p = round_up(v + h.rank * padded * 4, 64);
    q = round_up(p + row_blocks * h.adapter_rank * kRows * adapter_bytes, 64);
    end = round_up(q + adapter_padded * padded * adapter_bytes, 64);
  }
};

}  // namespace

CpuWeight slab::weight_of(const Tensor& prepared, int64_t out_features, int64_t in_features) {
  CHECK_ARGUMENT(
      prepared.is_cpu() && prepared.scalar_type() == ScalarType::Byte && prepared.is_contiguous(),
      "prepared must be a contiguous uint8 tensor on the CPU, as prepare_cpu made it");
  Header h{};
  const int64_t bytes = prepared.numel();
  const auto* const base = static_cast<const uint8_t*>(prepared.const_data_ptr());
  if (bytes >= int64_t(sizeof(Header))) std::memcpy(&h, base, sizeof(Header));
  CHECK_ARGUMENT(h.magic == kMagic,
                 "prepared does not begin with the header that prepare_cpu writes");
  CHECK_ARGUMENT(h.out_features == out_features && h.in_features == in_features,
                 "prepared holds a weight of ", h.out_features, "x", h.in_features, ", not ",
                 out_features, "x", in_features);
  check_sizes(h.out_features, h.in_features, h.values, h.group_size, h.planes ? h.planes : 1,
              h.planes > 0);
  CHECK_ARGUMENT(h.rank >= 0 && h.rank <= kMost && h.adapter_rank >= 0 && h.adapter_rank <= kMost &&
                     (h.rank > 0) == (h.planes > 0),
                 "prepared has a header of ranks ", h.rank, " and ", h.adapter_rank, " and ",
                 h.planes, " sign planes");
  const Sections at(h);
  CHECK_ARGUMENT(at.end == bytes, "prepared has ", bytes, " bytes, its header says ", at.end);
  CpuWeight w{};
  w.out_features = out_features;
  w.in_features = in_features;
  w.row_blocks = at.row_blocks;
  w.k_blocks = at.k_blocks;
  w.block_size = at.block_size;
  w.rank = h.rank;
  w.adapter_rank = h.adapter_rank;
  w.adapter_padded = at.adapter_padded;
  w.values = h.values;
  w.group_size = h.group_size ? h.group_size : kInputs;
  w.planes = h.planes;
  w.adapter_half = h.adapter_half != 0;
  w.prefetch = cpu_prefetch();
  w.stream = base + at.stream;
  if (h.rank) {
    w.u = reinterpret_cast<const float*>(base + at.u);
    w.v = reinterpret_cast<const float*>(base + at.v);
  }
  if (h.adapter_rank) {
    w.p = base + at.p;
    w.q = base + at.q;
  }
  return w;
}

namespace {

// ---- ops ----

// Makes the stream and copies the factors behind it. They are in the kernels' order already: U [row
// blocks, R, 16] and V [R, K padded to 128] in fp32, P [row blocks, R', 16] and Q [R' padded to 32
// / 16, K padded to 128, 16] in fp16 or fp32.
Tensor prepare_cpu(Tensor values_tensor, Tensor metadata, Factor signs, Factor scales, Factor u,
                   Factor v, Factor p, Factor q, int64_t out_features, int64_t in_features,
                   int64_t values, int64_t group_size, int64_t planes) {
  check_sizes(out_features, in_features, values, group_size, planes, signs.has_value());
  CHECK_ARGUMENT(group_size == 0 || is_integer(int(values)), "group_size=", group_size,
                 " needs int8 or int4 values");
  const int64_t padded = round_up(in_features, group_size > 16 ? group_size : 16);
  static constexpr ScalarType types[] = {ScalarType::Half, ScalarType::BFloat16, ScalarType::Char,
                                         ScalarType::Byte};
  check_dtype("values", values_tensor, types[values], "the one that the value type names");
  check_shape("values", values_tensor, {out_features, values == kInt4 ? padded / 4 : padded / 2});
  check_dtype("metadata", metadata, ScalarType::Byte, "uint8");
  check_shape("metadata", metadata, {out_features, padded / 8});
  CpuPacked packed{};
  packed.out_features = out_features;
  packed.in_features = in_features;
  packed.padded_in = padded;
  packed.values = int(values);
  packed.group_size = int(group_size);
  packed.values_data = static_cast<const uint8_t*>(values_tensor.const_data_ptr());
  packed.metadata = static_cast<const uint8_t*>(metadata.const_data_ptr());
  if (signs) {
    check_dtype("signs", *signs, ScalarType::Byte, "uint8");
    check_shape("signs", *signs, {out_features, padded / 16 * planes});
    packed.planes = int(planes);
    packed.signs = static_cast<const uint8_t*>(signs->const_data_ptr());
  }
  CHECK_ARGUMENT(scales.has_value() == is_integer(packed.values),
                 "scales belong to int8 and int4 values, and to no others");
  if (scales) {
    check_dtype("scales", *scales, ScalarType::BFloat16, "bfloat16");
    check_shape("scales", *scales, {out_features, group_size ? padded / group_size : 1});
    packed.scales = static_cast<const uint16_t*>(scales->const_data_ptr());
  }
  Header h{kMagic,          out_features,        in_features,   0, 0,
           int32_t(values), int32_t(group_size), packed.planes, 0, 0};
  CHECK_ARGUMENT(u.has_value() == v.has_value() && u.has_value() == signs.has_value(),
                 "signs, U and V belong together, but only some are given");
  CHECK_ARGUMENT(p.has_value() == q.has_value(), "P and Q belong together, but only one is given");
  if (u) h.rank = u->dim() == 3 ? u->size(1) : 0;
  if (p) h.adapter_rank = p->dim() == 3 ? p->size(1) : 0;
  CHECK_ARGUMENT(!u || (h.rank > 0 && h.rank <= kMost), "U has shape ", shape(*u),
                 ", expected [row blocks, rank, 16]");
  CHECK_ARGUMENT(!p || (h.adapter_rank > 0 && h.adapter_rank <= kMost), "P has shape ", shape(*p),
                 ", expected [row blocks, rank, 16]");
  if (p) h.adapter_half = p->scalar_type() == ScalarType::Half;
  const Sections at(h);
  Tensor prepared = torch::stable::new_empty(metadata, {at.end});
  auto* const out = static_cast<uint8_t*>(prepared.mutable_data_ptr());
  prefer_huge_pages(out, at.end);
  std::memset(out, 0, size_t(at.stream));
  std::memcpy(out, &h, sizeof(Header));
  const auto copy = [&](const char* name, const Factor& t, std::initializer_list<int64_t> expected,
                        ScalarType type, const char* type_name, int64_t from, int64_t to) {
    int64_t bytes = 0;
    if (t) {
      check_shape(name, *t, expected);
      check_dtype(name, *t, type, type_name);
      bytes = t->numel() * (type == ScalarType::Half ? 2 : 4);
      std::memcpy(out + from, t->const_data_ptr(), size_t(bytes));
    }
    std::memset(out + from + bytes, 0, size_t(to - from - bytes));
  };
  const ScalarType adapters = h.adapter_half ? ScalarType::Half : ScalarType::Float;
  const char* const adapters_name =
      h.adapter_half ? "float16, as P" : "float32 or float16, both the same";
  copy("U", u, {at.row_blocks, h.rank, kRows}, ScalarType::Float, "float32", at.u, at.v);
  copy("V", v, {h.rank, at.padded}, ScalarType::Float, "float32", at.v, at.p);
  copy("P", p, {at.row_blocks, h.adapter_rank, kRows}, adapters, adapters_name, at.p, at.q);
  copy("Q", q, {at.adapter_padded / kRows, at.padded, kRows}, adapters, adapters_name, at.q,
       at.end);
  const int64_t stream_bytes = at.row_blocks * at.k_blocks * at.block_size;
  std::memset(out + at.stream + stream_bytes, 0, size_t(at.u - at.stream - stream_bytes));
  std::atomic<int64_t> illegal{0};
  torch::stable::parallel_for(0, at.row_blocks, 1 + kThreadWork / (kRows * padded),
                              [&](int64_t begin, int64_t end) {
                                illegal += cpu_prepare(packed, out + at.stream, begin, end);
                              });
  CHECK_ARGUMENT(illegal == 0, "metadata holds ", illegal.load(),
                 " nibbles that are not two ascending positions (legal: 4 8 C 9 D E)");
  return prepared;
}

}  // namespace

const float* slab::widened(const CpuKernels& run, const void* x, int type, int64_t count,
                           int64_t features, int64_t padded, float* scratch) {
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

void slab::run_adapter(const CpuKernels& run, const CpuWeight& w, const CpuTokens& t) {
  if (w.adapter_rank)
    torch::stable::parallel_for(
        0, w.adapter_padded / (2 * kRows),
        1 + kThreadWork / (2 * kRows * w.k_blocks * kInputs * t.count),
        [&](int64_t begin, int64_t end) { run.adapter_in(w, t, begin, end); });
}

namespace {

// The tokens of x in blocks of cells (launch.h).
void arrange(const CpuKernels& run, const void* x, int type, const CpuTokens& t, int64_t features,
             int64_t cells, bool pairs, float* out) {
  const auto* const from = static_cast<const uint8_t*>(x);
  const int64_t row_bytes = features * (type == kFloat32 ? 4 : 2);
  const TokenBlocks blocks(t.count, t.block_tokens);
  torch::stable::parallel_for(
      0, blocks.count, 1 + kThreadWork / (t.block_tokens * cells), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          const int64_t first = blocks.begin(b), tokens = blocks.begin(b + 1) - first;
          run.arrange(from + first * row_bytes, type, features, tokens, cells, pairs,
                      out + first * cells);
        }
      });
}

enum class Product { kLookup, kTile, kTileBf16 };

Product choose_product(const CpuKernels& run, const CpuWeight& w, int64_t tokens, int type) {
  const bool bf16 = type == kBfloat16 && run.tile_bf16;
  const int64_t lookup_tokens = bf16 ? run.lookup_tokens_bf16 : run.lookup_tokens;
  if (tokens < lookup_tokens && (w.rank <= 2 || w.rank == 4)) return Product::kLookup;
  return bf16 && tokens >= lookup_tokens ? Product::kTileBf16 : Product::kTile;
}

// Calls the kernels once, for at most kTileTokens tokens.
void run_tokens(const CpuKernels& run, const CpuWeight& w, CpuTokens t, const void* x, int x_type,
                Product product) {
  const int64_t padded = w.k_blocks * kInputs;
  const bool lookup = product == Product::kLookup, bf16 = product == Product::kTileBf16;
  const bool rows = !bf16 || w.adapter_rank;
  const Scratch wide(rows ? t.count * padded : 0), pairs(bf16 ? t.count * padded / 2 : 0);
  const Scratch scaled(lookup ? t.count * w.rank * padded : 0), z(t.count * w.adapter_padded);
  t.block_tokens = lookup ? 1 : run.block_tokens;
  t.pairs = pairs.get();
  t.xv = scaled.get();
  t.z = z.get();
  if (lookup) {
    t.x = widened(run, x, x_type, t.count, w.in_features, padded, wide.get());
    for (int64_t i = 0; i < t.count; ++i)
      for (int64_t r = 0; r < w.rank; ++r)
        run.multiply(t.x + i * padded, w.v + r * padded, scaled.get() + (i * w.rank + r) * padded,
                     padded);
  } else {
    t.x = wide.get();
    if (rows) arrange(run, x, x_type, t, w.in_features, padded, false, wide.get());
    if (bf16) arrange(run, x, x_type, t, w.in_features, padded / 2, true, pairs.get());
  }
  run_adapter(run, w, t);
  // A thread takes whole groups of four row blocks, because lookup shares its tables among four.
  constexpr int64_t unit = 4;
  const int64_t units = (w.row_blocks + unit - 1) / unit;
  torch::stable::parallel_for(
      0, units, 1 + kThreadWork / (unit * kRows * padded * t.count),
      [&](int64_t begin, int64_t end) {
        const int64_t last = end * unit < w.row_blocks ? end * unit : w.row_blocks;
        (lookup ? run.lookup : bf16 ? run.tile_bf16 : run.tile)(w, t, begin * unit, last);
      });
}

}  // namespace

void slab::run_exact(const CpuKernels& run, const CpuWeight& w, const void* x, int type,
                     int64_t tokens, void* y, int64_t y_stride) {
  const Product product = choose_product(run, w, tokens, type);
  const int64_t bytes = type == kFloat32 ? 4 : 2;
  const TokenBlocks calls(tokens, kTileTokens);
  for (int64_t i = 0; i < calls.count; ++i) {
    const int64_t first = calls.begin(i);
    CpuTokens t{};
    t.count = calls.begin(i + 1) - first;
    t.y = static_cast<uint8_t*>(y) + first * y_stride * bytes;
    t.y_stride = y_stride;
    t.y_type = type;
    run_tokens(run, w, t, static_cast<const uint8_t*>(x) + first * w.in_features * bytes, type,
               product);
  }
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

Tensor linear_cpu(Tensor x, Tensor prepared, Factor bias, int64_t out_features,
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
  m.def(
      "prepare_cpu(Tensor values, Tensor metadata, Tensor? signs, Tensor? scales, Tensor? U, "
      "Tensor? V, Tensor? P, "
      "Tensor? Q, int out_features, int in_features, int value_type, int group_size, int planes) "
      "-> Tensor");
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
  m.impl("prepare_cpu", TORCH_BOX(&prepare_cpu));
  m.impl("linear_cpu", TORCH_BOX(&linear_cpu));
  m.impl("linear_cpu_frozen", TORCH_BOX(&linear_cpu));
  m.impl("dequantize_cpu", TORCH_BOX(&dequantize_cpu));
}
