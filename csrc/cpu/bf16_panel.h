// The panel of bf16 pairs. avx512_bf16.cpp rebuilds it; it is multiplied there and by tiles.
#pragma once

#include "../launch.h"

namespace slab {

// A cell is two inputs, the first one in its low half. Entries are those that the fp32 panel holds,
// rounded to the nearest bf16.
struct Bf16Panel {
  static constexpr int kCellInputs = 2;
  // A panel of 32 KB. With one block the sums would be loaded and stored four times as often.
  static constexpr int kPanelBlocks = 4;
  static constexpr int kPanelCells = kPanelBlocks * kInputs / kCellInputs;
  // Rebuilds 128 inputs of row blocks `first` and `second` as panel[cell][kTileRows].
  static void rebuild(const CpuWeight& w, int64_t first, int64_t second, int64_t k_block,
                      float* panel);
};

}  // namespace slab
