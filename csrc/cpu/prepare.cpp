// Turns canonical packed tensors into the row-interleaved CPU stream of launch.h, once per layer,
// after loading.
#include <cstring>

#include "../launch.h"

namespace slab {
namespace {

template <class T>
void put(uint8_t* at, T value) {
  std::memcpy(at, &value, sizeof(T));
}

struct Pruned {
  uint32_t signs = 0;  // one bit per plane, the largest plane's highest

  uint32_t negative(int planes) const { return signs >> (planes - 1); }
  // How many steps the magnitude is below the largest one: each further plane takes away from it
  // where it differs from the first.
  uint32_t level(int planes) const {
    return (signs ^ (0u - negative(planes))) & ((1u << (planes - 1)) - 1u);
  }
};

struct Group {
  uint32_t nibble = kPadNibble;
  Pruned first, second;
};

Group read_group(const CpuPacked& p, int64_t row, int64_t group) {
  Group g;
  g.nibble = p.metadata[row * (p.padded_in / 8) + group / 2] >> (group % 2 * 4) & 0xFu;
  for (int plane = 0; plane < p.planes; ++plane) {
    const uint8_t byte = p.signs[(row * (p.padded_in / 16) + group / 4) * p.planes + plane];
    g.first.signs = g.first.signs << 1 | (byte >> (group % 4 * 2) & 1u);
    g.second.signs = g.second.signs << 1 | (byte >> (group % 4 * 2 + 1) & 1u);
  }
  return g;
}

// Writes one row's lane of one block and returns how many of its nibbles are illegal. `groups` of
// its 32 groups exist, the rest are padding.
int64_t write_lane(const CpuPacked& p, int64_t row, int64_t first_group, int lane, int64_t groups,
                   uint8_t* block) {
  int64_t illegal = 0;
  uint32_t signs = 0, levels[2 * (kMaxPlanes - 1)] = {}, codes[4] = {}, nibbles[8] = {};
  const int level_bits = p.planes > 1 ? 2 * (p.planes - 1) : 0,
            levels_a_word = level_bits ? 32 / level_bits : 1;
  uint8_t* const code_words = block + sign_bytes(p.planes) + level_bytes(p.planes);
  uint8_t* const values = code_words + code_bytes();
  for (int64_t g = 0; g < groups; ++g) {
    const Group group = read_group(p, row, first_group + g);
    int id = pattern_id(group.nibble);
    if (id < 0) {
      ++illegal;
      id = 0;
    }
    uint32_t r = 0;
    if (p.planes) {
      const uint32_t first = group.first.negative(p.planes),
                     second = group.second.negative(p.planes);
      r = p.planes == 1 ? first ^ second : first;
      signs |= second << (31 - g);
    }
    codes[g / 8] |= (uint32_t(id) | r << 3) << (g % 8 * 4);
    if (level_bits)
      levels[g / levels_a_word] |=
          (group.first.level(p.planes) | group.second.level(p.planes) << (p.planes - 1))
          << (g % levels_a_word * level_bits);
    const int64_t entry = row * (p.padded_in / 2) + 2 * (first_group + g);
    if (p.values == kInt4) {
      nibbles[g / 4] |= uint32_t(p.values_data[entry / 2]) << (g % 4 * 8);
    } else if (p.values == kInt8) {
      values[g * 32 + lane] = p.values_data[entry];
      values[g * 32 + 16 + lane] = p.values_data[entry + 1];
    } else {
      std::memcpy(values + g * 64 + lane * 2, p.values_data + entry * 2, 2);
      std::memcpy(values + g * 64 + 32 + lane * 2, p.values_data + entry * 2 + 2, 2);
    }
  }
  if (p.planes) put(block + 4 * lane, signs);
  for (int w = 0; w < level_bits; ++w)
    put(block + sign_bytes(p.planes) + 64 * w + 4 * lane, levels[w]);
  for (int w = 0; w < 4; ++w) put(code_words + 64 * w + 4 * lane, codes[w]);
  if (p.values == kInt4)
    for (int q = 0; q < 8; ++q) put(values + 64 * q + 4 * lane, nibbles[q]);
  return illegal;
}

}  // namespace

int64_t cpu_prepare(const CpuPacked& p, uint8_t* stream, int64_t begin, int64_t end) {
  const int64_t k_blocks = (p.in_features + kInputs - 1) / kInputs,
                all_groups = p.padded_in / kGroup;
  const int stream_group = p.group_size ? p.group_size : kInputs;
  const int64_t bytes = block_bytes(p.values, stream_group, p.planes);
  const int64_t scale_columns = p.group_size ? p.padded_in / p.group_size : 1;
  int64_t illegal = 0;
  for (int64_t rb = begin; rb < end; ++rb) {
    for (int64_t kb = 0; kb < k_blocks; ++kb) {
      uint8_t* const block = stream + (rb * k_blocks + kb) * bytes;
      std::memset(block, 0, size_t(bytes));
      const int64_t first_group = kb * (kInputs / kGroup);
      const int64_t left = all_groups - first_group,
                    groups = left < kInputs / kGroup ? left : kInputs / kGroup;
      for (int lane = 0; lane < kRows; ++lane) {
        const int64_t row = rb * kRows + lane;
        if (row >= p.out_features) break;
        illegal += write_lane(p, row, first_group, lane, groups, block);
        if (!p.scales) continue;
        uint8_t* const scales = block + bytes - scale_bytes(p.values, stream_group);
        for (int s = 0; s < kInputs / stream_group; ++s) {
          const int64_t column = p.group_size ? kb * (kInputs / p.group_size) + s : 0;
          if (column < scale_columns)
            put(scales + 32 * s + 2 * lane, p.scales[row * scale_columns + column]);
        }
      }
    }
  }
  return illegal;
}

}  // namespace slab
