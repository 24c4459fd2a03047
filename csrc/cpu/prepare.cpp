// Canonical packed tensors -> the row-interleaved CPU stream of launch.h. Runs once a layer, after loading.
#include <cstring>

#include "../launch.h"

namespace slab {
namespace {

template <class T>
void put(uint8_t* at, T value) {
  std::memcpy(at, &value, sizeof(T));
}

struct Group {
  uint32_t nibble = kPadNibble;
  bool first_sign = false, second_sign = false;
};

Group read_group(const CpuPacked& p, int64_t row, int64_t group) {
  Group g;
  g.nibble = p.metadata[row * (p.padded_in / 8) + group / 2] >> (group % 2 * 4) & 0xFu;
  if (p.signs) {
    const uint8_t byte = p.signs[row * (p.padded_in / 16) + group / 4];
    g.first_sign = byte >> (group % 4 * 2) & 1;
    g.second_sign = byte >> (group % 4 * 2 + 1) & 1;
  }
  return g;
}

// One row's lane of one block. `groups` of its 32 groups exist, the rest are padding.
int64_t write_lane(const CpuPacked& p, int64_t row, int64_t first_group, int lane, int64_t groups, uint8_t* block) {
  int64_t illegal = 0;
  uint32_t signs = 0, codes[4] = {0, 0, 0, 0}, nibbles[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  uint8_t* const values = block + sign_bytes(p.signs != nullptr) + code_bytes();
  for (int64_t g = 0; g < groups; ++g) {
    const Group group = read_group(p, row, first_group + g);
    int id = pattern_id(group.nibble);
    if (id < 0) {
      ++illegal;
      id = 0;
    }
    codes[g / 8] |= uint32_t(id | (group.first_sign != group.second_sign) << 3) << (g % 8 * 4);
    signs |= uint32_t(group.second_sign) << (31 - g);
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
  if (p.signs) put(block + 4 * lane, signs);
  for (int w = 0; w < 4; ++w) put(block + sign_bytes(p.signs != nullptr) + 64 * w + 4 * lane, codes[w]);
  if (p.values == kInt4)
    for (int q = 0; q < 8; ++q) put(values + 64 * q + 4 * lane, nibbles[q]);
  return illegal;
}

}  // namespace

int64_t cpu_prepare(const CpuPacked& p, uint8_t* stream, int64_t begin, int64_t end) {
  const int64_t k_blocks = (p.in_features + kInputs - 1) / kInputs, all_groups = p.padded_in / kGroup;
  const int stream_group = p.group_size ? p.group_size : kInputs;
  const int64_t bytes = block_bytes(p.values, stream_group, p.signs != nullptr);
  const int64_t scale_columns = p.group_size ? p.padded_in / p.group_size : 1;
  int64_t illegal = 0;
  for (int64_t rb = begin; rb < end; ++rb) {
    for (int64_t kb = 0; kb < k_blocks; ++kb) {
      uint8_t* const block = stream + (rb * k_blocks + kb) * bytes;
      std::memset(block, 0, size_t(bytes));
      const int64_t first_group = kb * (kInputs / kGroup);
      const int64_t left = all_groups - first_group, groups = left < kInputs / kGroup ? left : kInputs / kGroup;
      for (int lane = 0; lane < kRows; ++lane) {
        const int64_t row = rb * kRows + lane;
        if (row >= p.out_features) break;
        illegal += write_lane(p, row, first_group, lane, groups, block);
        if (!p.scales) continue;
        uint8_t* const scales = block + bytes - scale_bytes(p.values, stream_group);
        for (int s = 0; s < kInputs / stream_group; ++s) {
          const int64_t column = p.group_size ? kb * (kInputs / p.group_size) + s : 0;
          if (column < scale_columns) put(scales + 32 * s + 2 * lane, p.scales[row * scale_columns + column]);
        }
      }
    }
  }
  return illegal;
}

}  // namespace slab
