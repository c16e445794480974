// Groups pairs of rows into tiles. A row is in one tile only, so its logits are computed once, even
// if it is in many pairs.
#pragma once

#include <numeric>
#include <vector>

#include "ops/head.h"

namespace compact {

struct Pair {
  int64_t index;        // position in the caller's list
  int64_t left, right;  // positions in the tile's rows
};

// A tile has whole connected components of the graph of pairs, so a row is in exactly one tile.
struct PairTile {
  std::vector<int64_t> rows;  // rows of the hidden states
  std::vector<Pair> pairs;
};

// Puts components, in order of their first pair, into tiles of up to `tile_rows` rows. A larger
// component is a tile of its own.
inline std::vector<PairTile> tile_pairs(const int64_t* left, const int64_t* right, int64_t count,
                                        int64_t num_rows, int64_t tile_rows) {
  std::vector<int64_t> parent(num_rows);
  std::iota(parent.begin(), parent.end(), 0);
  const auto root = [&](int64_t row) {
    while (parent[row] != row) row = parent[row] = parent[parent[row]];
    return row;
  };
  for (int64_t i = 0; i < count; ++i) parent[root(right[i])] = root(left[i]);
  std::vector<std::vector<int64_t>> members(num_rows);
  std::vector<int64_t> order;
  for (int64_t i = 0; i < count; ++i) {
    std::vector<int64_t>& pairs = members[root(left[i])];
    if (pairs.empty()) order.push_back(root(left[i]));
    pairs.push_back(i);
  }
  std::vector<PairTile> tiles;
  std::vector<int64_t> slot(num_rows, -1), rows;
  for (int64_t component : order) {
    rows.clear();
    for (int64_t i : members[component]) {
      for (int64_t row : {left[i], right[i]}) {
        if (slot[row] >= 0) continue;
        slot[row] = static_cast<int64_t>(rows.size());
        rows.push_back(row);
      }
    }
    const auto size = static_cast<int64_t>(rows.size());
    if (tiles.empty() || static_cast<int64_t>(tiles.back().rows.size()) + size > tile_rows) {
      tiles.emplace_back();
    }
    PairTile& tile = tiles.back();
    const auto first = static_cast<int64_t>(tile.rows.size());
    tile.rows.insert(tile.rows.end(), rows.begin(), rows.end());
    for (int64_t i : members[component]) {
      tile.pairs.push_back({i, first + slot[left[i]], first + slot[right[i]]});
    }
  }
  return tiles;
}

// The hidden states of a tile's rows in the compute type, [rows, H].
template <class T>
Tensor tile_hidden(const Tensor& hidden, const PairTile& tile) {
  const auto count = static_cast<int64_t>(tile.rows.size());
  const Tensor column = strided(tile.rows.data(), ScalarType::Long, count, 1, 1, 1);
  return gather_rows<T>(hidden, torch::stable::flatten(column));
}

}  // namespace compact
