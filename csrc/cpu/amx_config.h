// What ldtilecfg reads, in the layout of palette 1 (Intel's manual, volume 2, LDTILECFG).
#pragma once

#include <cstdint>

namespace slab {
namespace {

constexpr int kTileRegisters = 8, kMostTileRows = 16, kMostRowBytes = 64;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;  // where an interrupted load goes on
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};  // of each register; 0 for those that there are not
  uint8_t rows[16] = {};

  // Registers 0 to 5 hold sums and x, which have a row for every token; 6 and 7 hold the weight.
  explicit TileConfig(int tokens) {
    for (int i = 0; i < kTileRegisters; ++i) {
      row_bytes[i] = kMostRowBytes;
      rows[i] = uint8_t(i < 6 ? tokens : kMostTileRows);
    }
  }
};
static_assert(sizeof(TileConfig) == 64, "ldtilecfg reads 64 bytes");

}  // namespace
}  // namespace slab
