// Coordinate descent within a block of columns, over a vector type V: a lane is a row.
//
// With H the group's block, C = H^-1 and o the errors that would be best without any constraint,
// the loss of errors e is (e - o)^T H (e - o). Where only the pruned errors are given and the kept
// ones follow, it is x^T C_pp^-1 x with x = e_p - o_p; a kept error that misses its optimum by m
// adds `first` or `second` times m^2.
#pragma once

#include "states.h"

namespace slab {
namespace {

template <class V>
struct Descent {
  using F = typename V::F;
  using S = States<V>;
  using Grid = typename S::Grid;
  static constexpr int kLanes = V::kLanes;

  // The best state so far of one group: its loss, its errors, and its choice, -1 for the old state.
  struct Best {
    F loss, choice, error[kMember];
  };

  // A group whose unconstrained optimum is the error `free` and the weight `wanted`; below and
  // above [4] are how far the two levels are from it.
  struct Group {
    F target[kMember], free[kMember], wanted[kMember], below[kMember], above[kMember];
  };

  template <bool kGrid>
  static SLAB_INLINE void try_state(const CpuDescentChoice& c, const int* pruned, const int* kept,
                                    const Group& g, const Grid& grid, F p, F q, float index,
                                    Best& best) {
    F loss = S::splat(c.pruned[0]) * p * p;
    loss = V::fma(S::splat(c.pruned[1]) * q, q, loss);
    loss = V::fma(S::splat(c.pruned[2]) * p, q, loss);
    const F first = V::fma(S::splat(c.answer[0][0]), p, S::splat(c.answer[0][1]) * q);
    F second = V::fma(S::splat(c.answer[1][0]), p, S::splat(c.answer[1][1]) * q);
    F one = first;
    if constexpr (kGrid) {
      const F want_one = g.wanted[kept[0]] - first;
      const F miss_one = want_one - grid.rounded(want_one);
      one = first + miss_one;
      second = V::fma(S::splat(c.shift), miss_one, second);
      const F want_two = g.wanted[kept[1]] - second;
      const F miss_two = want_two - grid.rounded(want_two);
      second = second + miss_two;
      loss = V::fma(S::splat(c.first) * miss_one, miss_one, loss);
      loss = V::fma(S::splat(c.second) * miss_two, miss_two, loss);
    }
    const auto better = loss < best.loss;
    best.loss = better ? loss : best.loss;
    best.choice = better ? S::splat(index) : best.choice;
    best.error[pruned[0]] = better ? p + g.free[pruned[0]] : best.error[pruned[0]];
    best.error[pruned[1]] = better ? q + g.free[pruned[1]] : best.error[pruned[1]];
    best.error[kept[0]] = better ? one + g.free[kept[0]] : best.error[kept[0]];
    best.error[kept[1]] = better ? second + g.free[kept[1]] : best.error[kept[1]];
  }

  template <bool kGrid, bool kSigns, int kAt>
  static SLAB_INLINE void try_choice(const CpuDescentGroup& known, const Group& g, const Grid& grid,
                                     Best& best) {
    const CpuDescentChoice& c = known.choices[kAt];
    const int *const pruned = kPrunedAt[kAt], *const kept = kKeptAt[kAt];
    const F *const low = g.below, *const high = g.above;
    const int p = pruned[0], q = pruned[1];
    try_state<kGrid>(c, pruned, kept, g, grid, high[p], high[q], kAt, best);
    if constexpr (!kSigns) return;
    try_state<kGrid>(c, pruned, kept, g, grid, high[p], low[q], kAt, best);
    try_state<kGrid>(c, pruned, kept, g, grid, low[p], high[q], kAt, best);
    try_state<kGrid>(c, pruned, kept, g, grid, low[p], low[q], kAt, best);
  }

  // Moves one group of a vector of rows to its best state. error, gradient, target and magnitude
  // are the group's [4][kLanes].
  template <bool kGrid, bool kSigns>
  static SLAB_INLINE Best improve(const CpuDescentGroup& known, const float* error,
                                  const float* gradient, const float* target,
                                  const float* magnitude, int planes, const Grid& grid) {
    Group g;
    F outside[kMember];
    Best best;
    for (int i = 0; i < kMember; ++i) {
      best.error[i] = V::load(error + i * kLanes);
      g.target[i] = V::load(target + i * kLanes);
    }
    for (int i = 0; i < kMember; ++i) {
      outside[i] = V::load(gradient + i * kLanes);
      for (int k = 0; k < kMember; ++k)
        outside[i] = V::fma(S::splat(-known.own[i][k]), best.error[k], outside[i]);
    }
    best.loss = V::zero();
    best.choice = S::splat(-1.0f);
    for (int i = 0; i < kMember; ++i) {
      F free = V::zero();
      for (int k = 0; k < kMember; ++k)
        free = V::fma(S::splat(-known.inverse[i][k]), outside[k], free);
      g.free[i] = free;
      g.wanted[i] = g.target[i] - free;
      F below, above;
      const F size = kSigns ? V::load(magnitude + i * kLanes) : V::zero();
      S::neighbours(g.wanted[i], size, kSigns ? planes : 0, below, above);
      g.below[i] = g.wanted[i] - below;
      g.above[i] = g.wanted[i] - above;
    }
    for (int i = 0; i < kMember; ++i) {
      F pull = V::zero();
      for (int k = 0; k < kMember; ++k)
        pull = V::fma(S::splat(known.own[i][k]), best.error[k] - g.free[k], pull);
      best.loss = V::fma(pull, best.error[i] - g.free[i], best.loss);
    }
    try_choice<kGrid, kSigns, 0>(known, g, grid, best);
    try_choice<kGrid, kSigns, 1>(known, g, grid, best);
    try_choice<kGrid, kSigns, 2>(known, g, grid, best);
    try_choice<kGrid, kSigns, 3>(known, g, grid, best);
    try_choice<kGrid, kSigns, 4>(known, g, grid, best);
    try_choice<kGrid, kSigns, 5>(known, g, grid, best);
    return best;
  }

  // One vector of rows. own: the block of the Gram matrix as [width / 4][width][4].
  template <bool kGrid, bool kSigns>
  static void rows(const CpuDescent& d, const float* own, int64_t row, int64_t count) {
    const CpuColumns& c = d.columns;
    const int64_t K = c.in_features, width = c.end - c.start, at = row * K + c.start;
    alignas(64) float error[kMostColumns * kLanes], gradient[kMostColumns * kLanes],
        target[kMostColumns * kLanes], magnitude[kMostColumns * kLanes],
        change[kMostColumns * kLanes], chosen[kMostColumns / kMember * kLanes];
    S::read(d.error + at, K, count, width, 0.0f, error);
    S::read(d.gradient + at, K, count, width, 0.0f, gradient);
    S::read(d.target + at, K, count, width, 0.0f, target);
    if (kSigns) S::read(c.magnitude + at, K, count, width, 0.0f, magnitude);
    for (int64_t j = 0; j < width * kLanes; ++j) change[j] = 0.0f;
    for (int64_t j = 0; j < width / kMember * kLanes; ++j) chosen[j] = -1.0f;
    Grid grid;
    grid.set(c, S::splat(1.0f));
    const auto* const groups = reinterpret_cast<const CpuDescentGroup*>(c.groups);
    for (int pass = 0; pass < d.passes; ++pass)
      for (int64_t a = 0; a < width; a += kMember) {
        if (kGrid && (a == 0 || (c.start + a) % c.scale_inputs == 0)) {
          alignas(64) float step[kLanes];
          S::read(d.scales + row * c.scale_columns + (c.start + a) / c.scale_inputs,
                  c.scale_columns, count, 1, 1.0f, step);
          grid.set(c, V::load(step));
        }
        const int64_t first = a * kLanes;
        const Best best = improve<kGrid, kSigns>(
            groups[(c.start + a) / kMember], error + first, gradient + first, target + first,
            kSigns ? magnitude + first : nullptr, c.planes, grid);
        F moved[kMember];
        for (int i = 0; i < kMember; ++i) {
          const int64_t place = first + i * kLanes;
          moved[i] = best.error[i] - V::load(error + place);
          V::store(error + place, best.error[i]);
          V::store(change + place, V::load(change + place) + moved[i]);
        }
        float* const choice = chosen + a / kMember * kLanes;
        V::store(choice, best.choice < V::zero() ? V::load(choice) : best.choice);
        const float* const column = own + a * width;
        for (int64_t j = 0; j < width; ++j) {
          F g = V::load(gradient + j * kLanes);
          for (int i = 0; i < kMember; ++i)
            g = V::fma(V::broadcast(column + j * kMember + i), moved[i], g);
          V::store(gradient + j * kLanes, g);
        }
      }
    S::write(error, K, count, width, d.error + at);
    S::write(gradient, K, count, width, d.gradient + at);
    S::write(change, width, count, width, d.change + row * width);
    for (int64_t n = 0; n < count; ++n)
      for (int64_t a = 0; a < width / kMember; ++a) {
        const int choice = int(chosen[a * kLanes + n]);
        if (choice < 0) continue;
        uint8_t* const kept = d.kept + at + n * K + a * kMember;
        for (int i = 0; i < kMember; ++i)
          kept[i] = i == kKeptAt[choice][0] || i == kKeptAt[choice][1];
      }
  }

  // Rows [begin, end). own: memory for kMostColumns^2 numbers.
  static void descend(const CpuDescent& d, float* own, int64_t begin, int64_t end) {
    const CpuColumns& c = d.columns;
    const int64_t width = c.end - c.start;
    for (int64_t a = 0; a < width; a += kMember)
      for (int64_t j = 0; j < width; ++j)
        for (int64_t i = 0; i < kMember; ++i)
          own[a * width + j * kMember + i] =
              d.gram[(c.start + j) * c.in_features + c.start + a + i];
    for (int64_t row = begin; row < end; row += kLanes) {
      const int64_t count = end - row < kLanes ? end - row : kLanes;
      if (d.scales)
        c.planes ? rows<true, true>(d, own, row, count) : rows<true, false>(d, own, row, count);
      else
        c.planes ? rows<false, true>(d, own, row, count) : rows<false, false>(d, own, row, count);
    }
  }
};

}  // namespace
}  // namespace slab
