// int8 activations in plain C++, for any architecture. A panel is [16 rows][128 inputs] here, so
// that a product is one along memory, which compilers turn into whatever the machine has for it.
// Everything is rounded as int8_panel.h does.
#include "int8_tokens.h"

namespace slab {
namespace {

constexpr int kGroups = kInputs / kGroup;
constexpr int kFirst[kPatterns] = {0, 0, 0, 1, 1, 2}, kSecond[kPatterns] = {1, 2, 3, 2, 3, 3};

enum class Entries { kept, levels, merged, pruned };

// The nearest integer, halves to even, as a vector instruction has it.
int16_t rounded(float x) { return int16_t(nearest(x)); }

float bf16(const uint8_t* at) {
  uint16_t half;
  std::memcpy(&half, at, 2);
  return float_of(uint32_t(half) << 16);
}

// One row of one block of the stream.
struct Row {
  const CpuWeight& w;
  const uint8_t* block;
  int lane;

  uint32_t word(const uint8_t* at, int i) const {
    uint32_t word;
    std::memcpy(&word, at + 64 * i + 4 * lane, 4);
    return word;
  }
  const uint8_t* levels() const { return block + sign_bytes(w.planes); }
  const uint8_t* codes() const { return levels() + level_bytes(w.planes); }
  const uint8_t* values() const { return codes() + code_bytes(); }
  float scale(int s) const {
    return bf16(values() + value_bytes(w.values) + 2 * (kRows * s + lane));
  }
  // int4 values are times 16.
  int value(int g, int second) const {
    if (w.values == kInt8) return int8_t(values()[32 * g + 16 * second + lane]);
    return int8_t(word(values(), g / 4) >> (8 * (g % 4) + 4 * second) << 4);
  }
  int level(int g, int second, bool negative) const {
    if (w.planes == 1) return negative ? -1 : 1;
    const int bits = w.planes - 1, groups = 16 / bits;  // of a word
    const uint32_t field = word(levels(), g / groups) >> (2 * bits * (g % groups) + bits * second);
    const int size = most_level(w.planes) - 2 * int(field & ((1u << bits) - 1u));
    return negative ? -size : size;
  }
};

// What the pruned entries of a row are made of: u over the unit of a panel, for each rank.
struct Factors {
  int16_t merged[kManyRank][4], pruned[kManyRank][4];
  float unit[4], pruned_unit;
  bool second;
};

void read_units(const Row& row, Factors& f) {
  for (int s = 0; s < kInputs / row.w.group_size; ++s)
    f.unit[s] = row.scale(s) * (row.w.values == kInt4 ? 0.0625f : 1.0f);
}
void read_factors(const Row& row, const Int8Tokens& t, int64_t rb, int64_t kb, Factors& f) {
  const CpuWeight& w = row.w;
  read_units(row, f);
  f.second = false;
  f.pruned_unit = 0.0f;
  if (!w.planes) return;
  const float* const u = w.u + rb * w.rank * kRows + row.lane;
  const auto size = [](float x) { return x < 0.0f ? -x : x; };
  float most = 0.0f;
  for (int64_t r = 0; r < w.rank; ++r) most += size(u[r * kRows]) * t.v_most[r * w.k_blocks + kb];
  most *= level_unit(w.planes) * float(most_level(w.planes));
  const float other = most * (1.0f / float(kMostUnits));
  f.pruned_unit = other;
  for (int s = 0; s < kInputs / w.group_size; ++s) {
    const float unit = size(f.unit[s]);
    const bool none = most == 0.0f;
    const bool fits = unit > 0x1p-100f && most <= unit * float(kMostUnits) &&
                      most >= unit * float(least_units(w.values));
    const bool padding = kb * kInputs + s * w.group_size >= w.in_features;
    f.second = f.second || !(padding || fits || none);
    for (int64_t r = 0; r < w.rank; ++r) {
      const float product = u[r * kRows] * t.v_most[r * w.k_blocks + kb];
      const float each = level_unit(w.planes) * float(kFraction);
      f.merged[r][s] = fits ? rounded(product / f.unit[s] * each) : int16_t(0);
      f.pruned[r][s] = fits || none ? int16_t(0) : rounded(product / other * each);
    }
  }
}

// The 128 entries of a row's panel. a: `merged` or `pruned` of its factors.
void build(const Row& row, const Int8Tokens& t, int64_t kb, Entries entries, const int16_t (*a)[4],
           int8_t* out) {
  const CpuWeight& w = row.w;
  const bool kept = entries == Entries::kept || entries == Entries::merged;
  const uint32_t signs = w.planes ? row.word(row.block, 0) : 0;
  uint32_t code_word = 0;
  for (int g = 0; g < kGroups; ++g, code_word >>= 4) {
    if (g % 8 == 0) code_word = row.word(row.codes(), g / 8);
    const int id = int(code_word & 7u);
    int8_t* const to = out + kGroup * g;
    std::memset(to, 0, kGroup);
    if (kept) {
      to[kFirst[id]] = int8_t(row.value(g, 0));
      to[kSecond[id]] = int8_t(row.value(g, 1));
    }
    if (!w.planes || entries == Entries::kept) continue;
    const bool two_negative = signs << g >> 31, r = code_word >> 3 & 1u;
    const bool one_negative = w.planes == 1 ? r != two_negative : r;
    for (int p = 0; p < 2; ++p) {
      const int at = p ? kSecond[kPatterns - 1 - id] : kFirst[kPatterns - 1 - id];
      const int level = row.level(g, p, p ? two_negative : one_negative);
      if (entries == Entries::levels) {
        to[at] = int8_t(level);
        continue;
      }
      const int16_t* const v = t.v + kb * kInputs + kGroup * g;
      const int place = at % 2 * 2 + at / 2;
      int total = 0;
      for (int64_t rank = 0; rank < w.rank; ++rank)
        total += (a[rank][kGroup * g / w.group_size] * v[rank * w.k_blocks * kInputs + place] +
                  0x4000) >>
                 15;
      constexpr int half = kFraction / 2;
      to[at] = int8_t(w.planes == 1 ? level * ((total + half) >> 8) : (level * total + half) >> 8);
    }
  }
}

// sums += scale times the product of a piece of the inputs, for all tokens of `few`.
void multiply(const int8_t* panel, int piece, const Int8Tokens& t, int64_t block, float scale,
              float* sums) {
  const int8_t* const row = panel + piece * kPiece;
  int32_t weights = 0;  // their sum
  for (int k = 0; k < kPiece; ++k) weights += row[k];
  for (int64_t i = 0; i < t.count; ++i) {
    const int64_t at = (block * t.count + i) * kPieces + piece;
    const int8_t* const x = t.x + at * kPiece;
    int32_t total = weights * int16_t(t.shift[at]);
    for (int k = 0; k < kPiece; ++k) total += int16_t(row[k]) * int16_t(x[k]);
    // In this order a scale times a step, which may overflow where the total is 0, is never formed.
    sums[i * kRows] += float(total) * t.step[at] * scale;
  }
}
// The same for all tokens of `many`, of the inputs [first, first + inputs) of a piece.
void multiply_many(const int8_t* panel, int first, int inputs, const Int8Tokens& t, int64_t block,
                   float scale, float* sums) {
  const int8_t* const row = panel + first;
  for (int64_t i = 0; i < t.count; ++i) {
    const int64_t token = block * t.count + i;
    const int8_t* const x = t.x + token * kInputs + first;
    const Int8Piece& piece = t.pieces[token * kManyPieces + first / kManyPiece];
    int32_t total = 0;
    for (int k = 0; k < inputs; ++k) total += int16_t(row[k]) * int16_t(x[k]);
    float of_x = float(total) * piece.step;
    const int at = piece.place - first % kManyPiece;
    if (0 <= at && at < inputs) of_x += float(row[at]) * piece.largest;
    sums[i * kRows] += of_x * scale;
  }
}

// Both products; sums [tokens][16] are those of one row block.
template <bool kMany>
void product(const CpuWeight& w, const Int8Tokens& t, const Int8End& end, int64_t begin,
             int64_t last) {
  int8_t panel[kInputs];
  float sums[kManyAtOnce * kRows];
  Factors f;
  for (int64_t rb = begin; rb < last; ++rb) {
    std::memset(sums, 0, size_t(t.count) * kRows * 4);
    for (int64_t kb = 0; kb < w.k_blocks; ++kb)
      for (int lane = 0; lane < kRows; ++lane) {
        const Row row{w, w.stream + (rb * w.k_blocks + kb) * w.block_size, lane};
        float* const to = sums + lane;
        if (kMany)
          read_factors(row, t, rb, kb, f);
        else
          read_units(row, f);
        build(row, t, kb, kMany ? Entries::merged : Entries::kept, f.merged, panel);
        if (kMany) {
          const int span = w.group_size < kManyPiece ? int(w.group_size) : kManyPiece;
          for (int k = 0; k < kInputs; k += span)
            multiply_many(panel, k, span, t, kb, f.unit[k / w.group_size], to);
        } else {
          for (int p = 0; p < kPieces; ++p)
            multiply(panel, p, t, kb, f.unit[p * kPiece / w.group_size], to);
        }
        if (kMany && f.second) {
          build(row, t, kb, Entries::pruned, f.pruned, panel);
          for (int k = 0; k < kInputs; k += kManyPiece)
            multiply_many(panel, k, kManyPiece, t, kb, f.pruned_unit, to);
        }
        if (kMany || !w.planes) continue;
        build(row, t, kb, Entries::levels, nullptr, panel);
        for (int64_t r = 0; r < w.rank; ++r)
          for (int p = 0; p < kPieces; ++p)
            multiply(panel, p, t, (1 + r) * w.k_blocks + kb,
                     w.u[(rb * w.rank + r) * kRows + lane] * level_unit(w.planes), to);
      }
    end.finish(w, *end.tokens, rb, 0, t.count, sums, kRows);
  }
}

void quantise(const CpuWeight& w, const Int8Tokens& t, const float* x, int64_t term,
              int64_t token) {
  if (!t.pieces) return quantise_few(w, t, x, term, token);
  quantise_many(w, t, x, token, 0, [](Int8Piece& piece, int at) {
    piece.place = at;
    piece.shift = 0;
  });
}

const Int8Kernels kernels = {"scalar",      false,   quantise, quantise_v, product<false>,
                             product<true>, nullptr, 0,        0,          false};

}  // namespace

const Int8Kernels* int8_kernels_scalar() { return &kernels; }

}  // namespace slab
