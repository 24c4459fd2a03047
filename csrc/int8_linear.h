// One call with int8 activations: memory for the quantised tokens, and the ranges that torch's
// threads take.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "int8.h"
#include "memory.h"

namespace slab {

// What the parts of a call share: x as int8. Several weights that read the same x quantise it once;
// x v_r, with which each has its own, is quantised for each.
class Int8Linear {
 public:
  // tokens: at most kManyAtOnce, or kFewAtOnce if `few`; their x may be missing if not. raw: x as
  // it was given, of `type`. rank: the largest of the parts.
  Int8Linear(const CpuKernels& run, const CpuWeight& first, const CpuTokens& tokens,
             const uint8_t* raw, int type, bool few, int64_t rank)
      : run_(run),
        kernels_(int8_kernels(run)),
        few_(few),
        terms_(few ? 1 + rank : 1),
        blocks_(terms_ * first.k_blocks * tokens.count),
        tables_(few && kernels_.reads_tables),
        memory_(blocks_ * (kInputs / 4 + kStepFloats + (tables_ ? 256 : 0)) +
                terms_ * tokens.count + (few ? 0 : rank * first.k_blocks * (kInputs / 2 + 1)) +
                64) {
    float* next = memory_.get();
    const auto take = [&](int64_t n) {
      float* const here = next;
      next += n;
      return here;
    };
    t_.count = tokens.count;
    t_.terms = terms_;
    if (tables_) t_.tables = reinterpret_cast<uint8_t*>(take(blocks_ * 256));
    t_.x = reinterpret_cast<int8_t*>(take(blocks_ * kInputs / 4));
    if (few) {
      t_.step = take(blocks_ * kPieces);
      t_.shift = reinterpret_cast<int32_t*>(take(blocks_ * kPieces));
    } else {
      t_.pieces = reinterpret_cast<Int8Piece*>(take(blocks_ * kManyPieces * kPieceFloats));
      t_.v = reinterpret_cast<int16_t*>(take(rank * first.k_blocks * kInputs / 2));
      t_.v_most = take(rank * first.k_blocks);
    }
    t_.finite = reinterpret_cast<uint8_t*>(take((terms_ * tokens.count + 3) / 4));
    if (tokens.x)
      quantise(first, tokens.x, 0, 1);
    else
      widen_and_quantise(first, raw, type);
  }

  // y of one part, whose tokens are the same but for z and y. Tokens with NaN or too
  // large a number get nothing of use: see `finite`.
  void multiply(const CpuWeight& w, const CpuTokens& tokens) {
    if (few_)
      quantise(w, tokens.x, 1, 1 + w.rank);
    else if (w.rank)
      kernels_.quantise_v(w, t_);
    const Int8End end{&tokens, run_.finish};
    const Int8Product product = few_ ? kernels_.few : kernels_.many;
    const int64_t units = (w.row_blocks + kUnit - 1) / kUnit;
    const int64_t work = kUnit * kRows * w.k_blocks * kInputs * tokens.count;
    torch::stable::parallel_for(0, units, 1 + kWork / work, [&](int64_t begin, int64_t last) {
      product(w, t_, end, begin * kUnit, last * kUnit < w.row_blocks ? last * kUnit : w.row_blocks);
    });
  }
  // Whether token i, and x v_r of it for the part multiplied last, held only numbers.
  bool finite(const CpuWeight& w, int64_t i) const {
    bool all = t_.finite[i] != 0;
    if (few_)
      for (int64_t r = 1; r <= w.rank; ++r) all = all && t_.finite[r * t_.count + i] != 0;
    return all;
  }

 private:
  static constexpr int64_t kPieceFloats = sizeof(Int8Piece) / sizeof(float);
  static constexpr int64_t kStepFloats = kManyPieces * kPieceFloats;  // `few` takes less
  static_assert(kStepFloats >= 2 * kPieces);
  static constexpr int64_t kUnit = 4;           // row blocks that a thread takes whole
  static constexpr int64_t kWork = 1 << 18;     // weights x tokens that are worth a second thread
  static constexpr int64_t kNumbers = 1 << 15;  // numbers to quantise that are

  void quantise(const CpuWeight& w, const float* x, int64_t first, int64_t last) {
    const int64_t padded = w.k_blocks * kInputs, each = last - first;
    torch::stable::parallel_for(
        0, each * t_.count, 1 + kNumbers / padded, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i)
            kernels_.quantise(w, t_, x + i / each * padded, first + i % each, i / each);
        });
  }

  // A row at a time, which stays in cache.
  void widen_and_quantise(const CpuWeight& w, const uint8_t* raw, int type) {
    const int64_t padded = w.k_blocks * kInputs, bytes = type == kFloat32 ? 4 : 2;
    torch::stable::parallel_for(
        0, t_.count, 1 + kNumbers / padded, [&](int64_t begin, int64_t end) {
          const Scratch row(padded);
          for (int64_t k = w.in_features; k < padded; ++k) row.get()[k] = 0.0f;
          for (int64_t i = begin; i < end; ++i) {
            run_.widen(raw + i * w.in_features * bytes, type, row.get(), w.in_features);
            kernels_.quantise(w, t_, row.get(), 0, i);
          }
        });
  }

  const CpuKernels& run_;
  const Int8Kernels& kernels_;
  bool few_;
  int64_t terms_, blocks_;
  bool tables_;
  Scratch memory_;
  Int8Tokens t_{};
};

}  // namespace slab
