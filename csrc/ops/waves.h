// How many rows of logits a block has, so that its products fill a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/ceil_div.h"

namespace compact {

// Outputs of the tile that a multiprocessor computes at a time, as cuBLAS divides large products.
inline constexpr int64_t kTileRows = 128, kTileColumns = 256;

// The number of waves that `rows` rows take in blocks of `step`. A wave computes one tile on every
// multiprocessor. A wave that is not full takes as long, so the number of waves is the time.
inline int64_t waves(int64_t rows, int64_t step, int64_t columns, int64_t processors) {
  const auto of = [&](int64_t count) {
    return ceil_div(ceil_div(count, kTileRows) * ceil_div(columns, kTileColumns), processors);
  };
  return rows / step * of(step) + (rows % step > 0 ? of(rows % step) : 0);
}

// The number of rows of a block, where `fit` rows fit into its memory. If all rows fit, it is all
// of them. Else it is a multiple of kTileRows that fills at least half of the memory: the one that
// takes the fewest waves, and the largest of equals.
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
