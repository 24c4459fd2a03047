// The sweep from left to right within a block of columns, over a vector type V: a lane is a row.
//
// A group's cost is x^T C^-1 x over its errors that are fixed, C being its block of the inverse of
// what is left of the Gram matrix. Without a grid kept entries are free, and C is that of the two
// pruned ones.
#pragma once

#include "states.h"

namespace slab {
namespace {

template <class V>
struct Sweep {
  using F = typename V::F;
  using I = typename V::I;
  using S = States<V>;
  using Grid = typename S::Grid;
  static constexpr int kLanes = V::kLanes;

  struct Best {
    F cost, kept[kMember], value[kMember];  // kept is 1 or 0; value is what a pruned entry becomes
  };

  // How far the entries of a group are from their lower and upper level and, with a grid, from
  // their nearest point.
  struct Group {
    F low[kMember], high[kMember], below[kMember], above[kMember], miss[kMember];
  };

  static SLAB_INLINE void try_state(F cost, const int* pruned, const int* kept, F low, F high,
                                    Best& best) {
    const auto better = cost < best.cost;
    const F one = S::splat(1.0f), none = V::zero();
    best.cost = better ? cost : best.cost;
    best.value[pruned[0]] = better ? low : best.value[pruned[0]];
    best.value[pruned[1]] = better ? high : best.value[pruned[1]];
    best.kept[pruned[0]] = better ? none : best.kept[pruned[0]];
    best.kept[pruned[1]] = better ? none : best.kept[pruned[1]];
    best.kept[kept[0]] = better ? one : best.kept[kept[0]];
    best.kept[kept[1]] = better ? one : best.kept[kept[1]];
  }

  template <bool kGrid, bool kSigns, int kAt>
  static SLAB_INLINE void try_choice(const CpuSweepGroup& known, const Group& g, Best& best) {
    const int *const pruned = kPrunedAt[kAt], *const kept = kKeptAt[kAt];
    const int p = pruned[0], q = pruned[1], k = kept[0], l = kept[1];
    F constant = V::zero(), of_p = V::zero(), of_q = V::zero(), pp, qq, pq;
    if constexpr (kGrid) {
      const auto& C = known.inverse;
      const F two = S::splat(2.0f);
      constant = S::splat(C[k][k]) * g.miss[k] * g.miss[k];
      constant = V::fma(S::splat(C[l][l]) * g.miss[l], g.miss[l], constant);
      constant = V::fma(S::splat(2 * C[k][l]) * g.miss[k], g.miss[l], constant);
      of_p = two * V::fma(S::splat(C[p][k]), g.miss[k], S::splat(C[p][l]) * g.miss[l]);
      of_q = two * V::fma(S::splat(C[q][k]), g.miss[k], S::splat(C[q][l]) * g.miss[l]);
      pp = S::splat(C[p][p]);
      qq = S::splat(C[q][q]);
      pq = S::splat(2 * C[p][q]);
    } else {
      pp = S::splat(known.pruned[kAt][0]);
      qq = S::splat(known.pruned[kAt][1]);
      pq = S::splat(known.pruned[kAt][2]);
    }
    const F x[2] = {g.high[p], g.low[p]}, y[2] = {g.high[q], g.low[q]};
    const F x_value[2] = {g.above[p], g.below[p]}, y_value[2] = {g.above[q], g.below[q]};
    for (int i = 0; i < (kSigns ? 2 : 1); ++i) {
      const F half = V::fma(V::fma(pp, x[i], of_p), x[i], constant);
      const F slope = V::fma(pq, x[i], of_q);
      for (int j = 0; j < (kSigns ? 2 : 1); ++j)
        try_state(V::fma(V::fma(qq, y[j], slope), y[j], half), pruned, kept, x_value[i], y_value[j],
                  best);
    }
  }

  template <bool kGrid, bool kSigns>
  static SLAB_INLINE Best choose(const CpuSweepGroup& known, const float* weight,
                                 const float* magnitude, int planes, const Grid& grid) {
    Group g;
    Best best;
    best.cost = S::splat(3.4e38f);
    for (int i = 0; i < kMember; ++i) {
      const F w = V::load(weight + i * kLanes);
      const F size = kSigns ? V::load(magnitude + i * kLanes) : V::zero();
      S::neighbours(w, size, kSigns ? planes : 0, g.below[i], g.above[i]);
      g.low[i] = w - g.below[i];
      g.high[i] = w - g.above[i];
      g.miss[i] = kGrid ? w - grid.rounded(w) : V::zero();
      best.kept[i] = S::splat(i < 2 ? 1.0f : 0.0f);
      best.value[i] = V::zero();
    }
    try_choice<kGrid, kSigns, 0>(known, g, best);
    try_choice<kGrid, kSigns, 1>(known, g, best);
    try_choice<kGrid, kSigns, 2>(known, g, best);
    try_choice<kGrid, kSigns, 3>(known, g, best);
    try_choice<kGrid, kSigns, 4>(known, g, best);
    try_choice<kGrid, kSigns, 5>(known, g, best);
    return best;
  }

  // Rounds to bf16, as a scale is stored; 1 for what is not above 0.
  static SLAB_INLINE F stored(F scale) {
    const I bits = (I)scale;
    const F rounded = (F)((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
    return rounded > V::zero() ? rounded : S::splat(1.0f);
  }

  // Searches the step size of the columns [a, last) of the block: the one that rounds the entries
  // which are likely to be kept with the least weighted error.
  static SLAB_INLINE F search(const CpuSweep& s, const float* weights, const float* likely,
                              int64_t a, int64_t last) {
    F largest = V::zero();
    alignas(64) float x[kMostColumns * kLanes];
    for (int64_t j = a; j < last; ++j) {
      const F w = V::load(weights + j * kLanes) * V::load(likely + j * kLanes);
      V::store(x + j * kLanes, w);
      largest = S::more(largest, S::more(w, V::zero() - w));
    }
    largest = largest / S::splat(s.columns.highest);
    F best = stored(largest), least = S::splat(3.4e38f);
    for (int64_t f = 0; f < s.fraction_count; ++f) {
      Grid grid;
      grid.set(s.columns, stored(S::splat(s.fractions[f]) * largest));
      F loss = V::zero();
      for (int64_t j = a; j < last; ++j) {
        const F w = V::load(x + j * kLanes), miss = grid.rounded(w) - w;
        loss = V::fma(S::splat(s.weight[s.columns.start + j]) * miss, miss, loss);
      }
      best = loss < least ? grid.step : best;
      least = S::less(loss, least);
    }
    return best;
  }

  // One vector of rows. ahead: the block of the factor as [width / 4][width][4].
  template <bool kGrid, bool kSigns>
  static void rows(const CpuSweep& s, const float* ahead, int64_t row, int64_t count) {
    const CpuColumns& c = s.columns;
    const int64_t K = c.in_features, width = c.end - c.start, at = row * K + c.start;
    alignas(64) float weights[kMostColumns * kLanes], magnitude[kMostColumns * kLanes],
        fixed[kMostColumns * kLanes], kept[kMostColumns * kLanes], step[kLanes];
    S::read(s.remaining + at, K, count, width, 0.0f, weights);
    if (kSigns) S::read(c.magnitude + at, K, count, width, 0.0f, magnitude);
    if (s.fraction_count) S::read(s.likely + at, K, count, width, 0.0f, kept);
    Grid grid;
    grid.set(c, S::splat(1.0f));
    const auto* const groups = reinterpret_cast<const CpuSweepGroup*>(c.groups);
    for (int64_t a = 0; a < width; a += kMember) {
      if (kGrid && (a == 0 || (c.start + a) % c.scale_inputs == 0)) {
        float* const scales = s.scales + row * c.scale_columns + (c.start + a) / c.scale_inputs;
        if (s.fraction_count) {
          const int64_t last = a + c.scale_inputs < width ? a + c.scale_inputs : width;
          V::store(step, search(s, weights, kept, a, last));
          S::write(step, c.scale_columns, count, 1, scales);
        } else {
          S::read(scales, c.scale_columns, count, 1, 1.0f, step);
        }
        grid.set(c, V::load(step));
      }
      float* const group = weights + a * kLanes;
      const Best best =
          choose<kGrid, kSigns>(groups[(c.start + a) / kMember], group,
                                kSigns ? magnitude + a * kLanes : nullptr, c.planes, grid);
      const float* const column = ahead + a * width;
      F pushed[kMember], taken[kMember];
      for (int i = 0; i < kMember; ++i) {
        const F w = V::load(group + i * kLanes);
        const F value = best.kept[i] > V::zero() ? (kGrid ? grid.rounded(w) : w) : best.value[i];
        pushed[i] = (w - value) / V::broadcast(column + (a + i) * kMember + i);
        taken[i] = V::zero() - pushed[i];
        V::store(fixed + (a + i) * kLanes, value);
        V::store(kept + (a + i) * kLanes, best.kept[i]);
        for (int k = i + 1; k < kMember; ++k) {
          const F left = V::load(group + k * kLanes);
          V::store(group + k * kLanes,
                   V::fma(V::broadcast(column + (a + k) * kMember + i), taken[i], left));
        }
      }
      for (int64_t j = a + kMember; j < width; ++j) {
        F w = V::load(weights + j * kLanes);
        for (int i = 0; i < kMember; ++i)
          w = V::fma(V::broadcast(column + j * kMember + i), taken[i], w);
        V::store(weights + j * kLanes, w);
      }
      for (int i = 0; i < kMember; ++i) V::store(group + i * kLanes, pushed[i]);
    }
    S::write(fixed, K, count, width, s.fixed + at);
    S::write(kept, K, count, width, s.kept + at);
    S::write(weights, width, count, width, s.pushed + row * width);
  }

  // Rows [begin, end). ahead: memory for kMostColumns^2 numbers.
  static void sweep(const CpuSweep& s, float* ahead, int64_t begin, int64_t end) {
    const CpuColumns& c = s.columns;
    const int64_t width = c.end - c.start;
    for (int64_t a = 0; a < width; a += kMember)
      for (int64_t j = 0; j < width; ++j)
        for (int64_t i = 0; i < kMember; ++i)
          ahead[a * width + j * kMember + i] =
              s.factor[(c.start + a + i) * c.in_features + c.start + j];
    for (int64_t row = begin; row < end; row += kLanes) {
      const int64_t count = end - row < kLanes ? end - row : kLanes;
      if (s.scales)
        c.planes ? rows<true, true>(s, ahead, row, count) : rows<true, false>(s, ahead, row, count);
      else
        c.planes ? rows<false, true>(s, ahead, row, count)
                 : rows<false, false>(s, ahead, row, count);
    }
  }
};

}  // namespace
}  // namespace slab
