// The prepared tensor: how a weight lies in it, how it is made and how it is checked.
//
// A weight is one uint8 tensor: a header, then stream, U, V, P and Q (launch.h), each of which
// begins at a multiple of 64 bytes. It is one tensor because every argument of a torch op costs a
// call some 0.3 us: with twelve arguments it takes 5.0 us before any work, with five 3.5, a dense
// linear 3.0.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstring>
#include <optional>

#include "linear.h"

namespace {

using namespace slab;

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

using Factor = std::optional<Tensor>;

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
  Tensor prepared = fresh_bytes(metadata, at.end);
  auto* const out = static_cast<uint8_t*>(prepared.mutable_data_ptr());
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

STABLE_TORCH_LIBRARY_FRAGMENT(slab_kernels, m) {
  m.def(
      "prepare_cpu(Tensor values, Tensor metadata, Tensor? signs, Tensor? scales, Tensor? U, "
      "Tensor? V, Tensor? P, "
      "Tensor? Q, int out_features, int in_features, int value_type, int group_size, int planes) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(slab_kernels, CPU, m) { m.impl("prepare_cpu", TORCH_BOX(&prepare_cpu)); }
