// The states of a group of four columns, over a vector type V: a lane is a row of the weight.
#pragma once

#include "../solver.h"
#include "stream.h"

namespace slab {
namespace {

// The two pruned and the two kept columns of every choice, in the order of itertools.combinations.
constexpr int kPrunedAt[kChoices][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
constexpr int kKeptAt[kChoices][2] = {{2, 3}, {1, 3}, {1, 2}, {0, 3}, {0, 2}, {0, 1}};

template <class V>
struct States {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int kLanes = V::kLanes;

  static SLAB_INLINE F splat(float value) { return V::broadcast(&value); }
  static SLAB_INLINE F less(F a, F b) { return a < b ? a : b; }
  static SLAB_INLINE F more(F a, F b) { return a > b ? a : b; }
  // The nearest integer, halves to even, of a number below 2^22.
  static SLAB_INLINE F nearest(F x) {
    const F magic = splat(12582912.0f);
    return (x + magic) - magic;
  }
  static SLAB_INLINE F floor(F x) {
    const F near = nearest(x);
    return near > x ? near - splat(1.0f) : near;
  }

  // The grid of one vector of rows.
  struct Grid {
    F lowest, highest, step, per_step;

    SLAB_INLINE void set(const CpuColumns& c, F size) {
      lowest = splat(c.lowest);
      highest = splat(c.highest);
      step = size;
      per_step = splat(1.0f) / size;
    }
    SLAB_INLINE F rounded(F x) const {
      return nearest(less(more(x * per_step, lowest), highest)) * step;
    }
  };

  // The two levels next to w, the lower one first. With planes = 0 both are zero.
  static SLAB_INLINE void neighbours(F w, F magnitude, int planes, F& below, F& above) {
    if (planes == 0) {
      below = above = V::zero();
      return;
    }
    if (planes == 1) {
      below = V::zero() - magnitude;
      above = magnitude;
      return;
    }
    const float unit = 1.0f / float(1 << (planes - 1)), most = float((1 << planes) - 1);
    const F size = splat(unit) * magnitude, tiny = splat(1.17549435e-38f);
    const F half = (w / more(size, tiny) - splat(1.0f)) * splat(0.5f);
    const F at = floor(less(more(half, splat(-0.5f * (most + 1))), splat(0.5f * (most - 3))));
    below = (at + at + splat(1.0f)) * size;
    above = below + size + size;
  }

  // Columns [start, start + width) of up to kLanes rows, turned so that a column is a vector. Lanes
  // without a row get `otherwise`.
  template <class T>
  static SLAB_INLINE void read(const T* from, int64_t stride, int64_t rows, int64_t width,
                               float otherwise, float* to) {
    for (int64_t n = 0; n < kLanes; ++n)
      for (int64_t j = 0; j < width; ++j)
        to[j * kLanes + n] = n < rows ? float(from[n * stride + j]) : otherwise;
  }
  template <class T>
  static SLAB_INLINE void write(const float* from, int64_t stride, int64_t rows, int64_t width,
                                T* to) {
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t j = 0; j < width; ++j) to[n * stride + j] = T(from[j * kLanes + n]);
  }
};

}  // namespace
}  // namespace slab
