// How many rows of logits a block has, so that its products fill a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace compact {

// Outputs of the tile that a multiprocessor computes at a time, as cuBLAS divides large products.
inline constexpr int64_t kTileRows = 128, kTileColumns = 256;

inline int64_t tiles(int64_t count, int64_t size) { return (count + size - 1) / size; }

// The time of the products of `rows` rows in blocks of `step`: the number of waves. A wave computes
// a tile on every multiprocessor, and takes as long if it is not full.
inline int64_t waves(int64_t rows, int64_t step, int64_t columns, int64_t processors) {
  const auto of = [&](int64_t count) {
    return tiles(tiles(count, kTileRows) * tiles(columns, kTileColumns), processors);
  };
  return rows / step * of(step) + (rows % step > 0 ? of(rows % step) : 0);
}

// Rows of a block: all of them if `fit` rows fit into the memory for it. Else a multiple of
// kTileRows that takes at least half of the memory: that with the fewest waves, and of these the
// largest.
inline int64_t rows_in_waves(int64_t rows, int64_t fit, int64_t columns, int64_t processors) {
  if (rows <= fit) return std::max<int64_t>(rows, 1);
  if (fit < kTileRows) return std::max<int64_t>(fit, 1);
  const int64_t largest = fit / kTileRows * kTileRows;
  int64_t best = largest;
  for (int64_t step = largest; step > 0 && 2 * step >= largest; step -= kTileRows) {
    if (waves(rows, step, columns, processors) < waves(rows, best, columns, processors))
      best = step;
  }
  return best;
}

}  // namespace compact
