// The torch side of the solvers' steps within a block of columns (solver.h). They check every
// argument and hand ranges of rows to torch's own thread pool; a row's numbers depend on no thread
// count.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "memory.h"

namespace {

using namespace slab;
using Maybe = std::optional<Tensor>;

constexpr int64_t kThreadRows = 32;  // fewer rows than this are not worth a second thread

const float* floats(const char* name, const Tensor& t, std::initializer_list<int64_t> expected) {
  check_dtype(name, t, ScalarType::Float, "float32");
  check_shape(name, t, expected);
  return static_cast<const float*>(t.const_data_ptr());
}

float* writable(const char* name, const Tensor& t, std::initializer_list<int64_t> expected) {
  floats(name, t, expected);
  return static_cast<float*>(t.mutable_data_ptr());
}

uint8_t* flags(const char* name, const Tensor& t, std::initializer_list<int64_t> expected) {
  check_dtype(name, t, ScalarType::Bool, "bool");
  check_shape(name, t, expected);
  return static_cast<uint8_t*>(t.mutable_data_ptr());
}

struct Block {
  CpuColumns columns;
  int64_t rows, width;
};

// What both ops say about a block of columns of matrices like `like` [N,K].
Block block_of(const Tensor& like, const Maybe& magnitude, const Tensor& groups, int64_t numbers,
               int64_t start, int64_t end, int64_t planes, const Maybe& scales,
               int64_t scale_inputs, int64_t lowest, int64_t highest) {
  CHECK_ARGUMENT(like.dim() == 2, "a weight has two dimensions, not ", like.dim());
  const int64_t N = like.size(0), K = like.size(1);
  CHECK_ARGUMENT(0 <= start && start < end && end <= K && end - start <= kMostColumns &&
                     start % kMember == 0 && end % kMember == 0,
                 "columns ", start, " to ", end, " of ", K, " are not a block of groups of ",
                 kMember, ", at most ", kMostColumns, " wide");
  CHECK_ARGUMENT(planes >= 0 && planes <= kMaxPlanes && magnitude.has_value() == (planes > 0),
                 "planes=", planes, " must be 1 to 3 with a magnitude and 0 without one");
  Block b{};
  b.rows = N;
  b.width = end - start;
  CpuColumns& c = b.columns;
  c.in_features = K;
  c.start = start;
  c.end = end;
  c.planes = int(planes);
  c.lowest = float(lowest);
  c.highest = float(highest);
  if (magnitude) c.magnitude = floats("magnitude", *magnitude, {N, K});
  c.groups = floats("groups", groups, {K / kMember, numbers});
  if (scales) {
    CHECK_ARGUMENT(scale_inputs >= kMember && scale_inputs % kMember == 0 && highest > 0,
                   "scale_inputs=", scale_inputs, " must be a multiple of ", kMember,
                   ", and highest=", highest, " above 0");
    c.scale_inputs = scale_inputs;
    c.scale_columns = (K + scale_inputs - 1) / scale_inputs;
  }
  return b;
}

// Runs a kernel over all rows, with memory of its own in every thread.
template <class Kernel>
void over_rows(int64_t rows, const Kernel& kernel) {
  constexpr int64_t unit = kRows;
  torch::stable::parallel_for(0, (rows + unit - 1) / unit, kThreadRows / unit,
                              [&](int64_t begin, int64_t end) {
                                const Scratch memory(kMostColumns * kMostColumns);
                                const int64_t last = end * unit < rows ? end * unit : rows;
                                kernel(memory.get(), begin * unit, last);
                              });
}

Tensor descend_cpu(Tensor error, Tensor gradient, Tensor kept, Tensor target, Maybe magnitude,
                   Maybe scales, Tensor gram, Tensor groups, int64_t start, int64_t end,
                   int64_t planes, int64_t scale_inputs, int64_t lowest, int64_t highest,
                   int64_t passes) {
  const Block b = block_of(error, magnitude, groups, sizeof(CpuDescentGroup) / sizeof(float), start,
                           end, planes, scales, scale_inputs, lowest, highest);
  const int64_t N = b.rows, K = b.columns.in_features;
  CpuDescent d{};
  d.columns = b.columns;
  d.passes = int(passes);
  if (scales) d.scales = floats("scales", *scales, {N, b.columns.scale_columns});
  d.target = floats("target", target, {N, K});
  d.gram = floats("gram", gram, {K, K});
  d.error = writable("error", error, {N, K});
  d.gradient = writable("gradient", gradient, {N, K});
  d.kept = flags("kept", kept, {N, K});
  Tensor change = torch::stable::new_empty(error, {N, b.width});
  d.change = static_cast<float*>(change.mutable_data_ptr());
  const CpuKernels& run = kernels();
  over_rows(N, [&](float* memory, int64_t from, int64_t to) { run.descend(d, memory, from, to); });
  return change;
}

Tensor sweep_cpu(Tensor remaining, Tensor fixed, Tensor kept, Maybe scales, Maybe likely,
                 Maybe magnitude, Tensor factor, Tensor groups, Maybe fractions, Tensor weight,
                 int64_t start, int64_t end, int64_t planes, int64_t scale_inputs, int64_t lowest,
                 int64_t highest) {
  const Block b = block_of(remaining, magnitude, groups, sizeof(CpuSweepGroup) / sizeof(float),
                           start, end, planes, scales, scale_inputs, lowest, highest);
  const int64_t N = b.rows, K = b.columns.in_features;
  CpuSweep s{};
  s.columns = b.columns;
  s.factor = floats("factor", factor, {K, K});
  s.weight = floats("weight", weight, {K});
  s.remaining = writable("remaining", remaining, {N, K});
  s.fixed = writable("fixed", fixed, {N, K});
  s.kept = flags("kept", kept, {N, K});
  if (scales) s.scales = writable("scales", *scales, {N, b.columns.scale_columns});
  CHECK_ARGUMENT(fractions.has_value() == likely.has_value() && (!fractions || scales),
                 "fractions and likely belong together, beside scales");
  if (fractions) {
    CHECK_ARGUMENT(fractions->dim() == 1, "fractions must have one dimension");
    s.fraction_count = fractions->size(0);
    s.fractions = floats("fractions", *fractions, {s.fraction_count});
    s.likely = flags("likely", *likely, {N, K});
  }
  Tensor pushed = torch::stable::new_empty(remaining, {N, b.width});
  s.pushed = static_cast<float*>(pushed.mutable_data_ptr());
  const CpuKernels& run = kernels();
  over_rows(N, [&](float* memory, int64_t from, int64_t to) { run.sweep(s, memory, from, to); });
  return pushed;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slab_kernels, m) {
  m.def(
      "descend_cpu(Tensor(a!) error, Tensor(b!) gradient, Tensor(c!) kept, Tensor target, "
      "Tensor? magnitude, Tensor? scales, Tensor gram, Tensor groups, int start, int end, "
      "int planes, int scale_inputs, int lowest, int highest, int passes) -> Tensor");
  m.def(
      "sweep_cpu(Tensor(a!) remaining, Tensor(b!) fixed, Tensor(c!) kept, Tensor(d!)? scales, "
      "Tensor? likely, Tensor? magnitude, Tensor factor, Tensor groups, Tensor? fractions, "
      "Tensor weight, int start, int end, int planes, int scale_inputs, int lowest, int highest) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(slab_kernels, CPU, m) {
  m.impl("descend_cpu", TORCH_BOX(&descend_cpu));
  m.impl("sweep_cpu", TORCH_BOX(&sweep_cpu));
}
