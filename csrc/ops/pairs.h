// Groups pairs of rows into tiles. A row is in one tile only, so its logits are computed once, even
// if it is in many pairs.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

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

// The tiles one after the other, for kernels with one thread block per pair or row.
struct PairPlan {
  // The rows of all tiles; the other tables have places in it.
  std::vector<int64_t> rows;
  // Of each pair: the places of its rows, and its position in the caller's list.
  std::vector<int64_t> left, right, index;
  // Of each row r, at ends[r] : ends[r + 1], its pairs: the place of the other row, and twice the
  // position in the caller's list, plus 1 where r is the right row.
  std::vector<int64_t> ends, other, side;
  // Rows and pairs before each tile; at the end, all of them.
  std::vector<int64_t> tile_rows, tile_pairs;
};

inline PairPlan plan_pairs(const int64_t* left, const int64_t* right, int64_t count,
                           int64_t num_rows, int64_t tile_rows) {
  PairPlan plan;
  for (const PairTile& tile : tile_pairs(left, right, count, num_rows, tile_rows)) {
    const auto first = static_cast<int64_t>(plan.rows.size());
    plan.tile_rows.push_back(first);
    plan.tile_pairs.push_back(static_cast<int64_t>(plan.left.size()));
    plan.rows.insert(plan.rows.end(), tile.rows.begin(), tile.rows.end());
    for (const Pair& pair : tile.pairs) {
      plan.left.push_back(first + pair.left);
      plan.right.push_back(first + pair.right);
      plan.index.push_back(pair.index);
    }
  }
  const size_t rows = plan.rows.size(), pairs = plan.left.size();
  plan.tile_rows.push_back(static_cast<int64_t>(rows));
  plan.tile_pairs.push_back(static_cast<int64_t>(pairs));
  plan.ends.assign(rows + 1, 0);
  for (size_t k = 0; k < pairs; ++k) ++plan.ends[plan.left[k] + 1], ++plan.ends[plan.right[k] + 1];
  std::partial_sum(plan.ends.begin(), plan.ends.end(), plan.ends.begin());
  plan.other.resize(2 * pairs);
  plan.side.resize(2 * pairs);
  std::vector<int64_t> next = plan.ends;
  const auto add = [&](int64_t row, int64_t other, int64_t side) {
    plan.other[next[row]] = other;
    plan.side[next[row]++] = side;
  };
  for (size_t k = 0; k < pairs; ++k) {
    add(plan.left[k], plan.right[k], 2 * plan.index[k]);
    add(plan.right[k], plan.left[k], 2 * plan.index[k] + 1);
  }
  return plan;
}

}  // namespace compact
