// Groups pairs of rows into tiles, so that the logits of a row are computed once for all of its
// pairs in a tile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace compact {

struct Pair {
  int64_t index;        // position in the caller's list
  int64_t left, right;  // positions in the tile's rows
};

struct PairTile {
  std::vector<int64_t> rows;  // rows of the hidden states
  std::vector<Pair> pairs;
};

// Divides the pairs into tiles of at most `tile_rows` rows (or the two of one pair). Pairs that
// share rows, directly or through other pairs, are a component. The components keep the order of
// their first pairs. A component that fits into a tile is in one tile only, so its rows are too. A
// larger one is cut, and some of its rows are in several tiles.
inline std::vector<PairTile> tile_pairs(const int64_t* left, const int64_t* right, int64_t count,
                                        int64_t num_rows, int64_t tile_rows) {
  std::vector<int64_t> parent(num_rows);
  std::iota(parent.begin(), parent.end(), 0);
  const auto root = [&](int64_t row) {
    while (parent[row] != row) row = parent[row] = parent[parent[row]];
    return row;
  };
  for (int64_t i = 0; i < count; ++i) parent[root(right[i])] = root(left[i]);
  // The component of each pair, and how many pairs and rows each component has.
  std::vector<int64_t> number(num_rows, -1), component(count), pairs, rows;
  std::vector<bool> seen(num_rows);
  for (int64_t i = 0; i < count; ++i) {
    int64_t& mine = number[root(left[i])];
    if (mine < 0) {
      mine = static_cast<int64_t>(pairs.size());
      pairs.push_back(0);
      rows.push_back(0);
    }
    component[i] = mine;
    ++pairs[mine];
    for (int64_t row : {left[i], right[i]}) {
      rows[mine] += !seen[row];
      seen[row] = true;
    }
  }
  std::vector<int64_t> order(count), next(pairs.size());
  std::exclusive_scan(pairs.begin(), pairs.end(), next.begin(), int64_t{0});
  for (int64_t i = 0; i < count; ++i) order[next[component[i]]++] = i;

  std::vector<PairTile> tiles;
  std::vector<int64_t> slot(num_rows, -1);  // the row's position in the last tile
  const auto make_room = [&](int64_t more) {
    if (!tiles.empty()) {
      const auto& held = tiles.back().rows;
      if (held.empty() || static_cast<int64_t>(held.size()) + more <= tile_rows) return;
      for (int64_t row : held) slot[row] = -1;
    }
    tiles.emplace_back();
  };
  for (int64_t k = 0; k < count; ++k) {
    const int64_t i = order[k];
    if (k == 0 || component[i] != component[order[k - 1]]) make_room(rows[component[i]]);
    const int64_t both[] = {left[i], right[i]};
    make_room((slot[both[0]] < 0) + (both[1] != both[0] && slot[both[1]] < 0));
    PairTile& tile = tiles.back();
    for (int64_t row : both) {
      if (slot[row] >= 0) continue;
      slot[row] = static_cast<int64_t>(tile.rows.size());
      tile.rows.push_back(row);
    }
    tile.pairs.push_back({i, slot[both[0]], slot[both[1]]});
  }
  return tiles;
}

// How many rows the pairs have.
inline int64_t rows_in_pairs(const int64_t* left, const int64_t* right, int64_t count,
                             int64_t num_rows) {
  std::vector<bool> seen(num_rows);
  for (int64_t i = 0; i < count; ++i) seen[left[i]] = seen[right[i]] = true;
  return std::count(seen.begin(), seen.end(), true);
}

// The tiles one after the other, for kernels with one thread block per pair or row. A slot is a
// position in `rows`, an index a position in the caller's list of pairs.
struct PairPlan {
  std::vector<int64_t> rows;  // of the hidden states, of all tiles
  // Of each pair: the slots of its rows, and its index.
  std::vector<int64_t> left, right, index;
  // Of slot r, at ends[r] : ends[r + 1], its pairs: the slot of the other row, and 2 index, plus 1
  // where r is the right row.
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
  const auto add = [&](int64_t slot, int64_t other, int64_t side) {
    plan.other[next[slot]] = other;
    plan.side[next[slot]++] = side;
  };
  for (size_t k = 0; k < pairs; ++k) {
    add(plan.left[k], plan.right[k], 2 * plan.index[k]);
    add(plan.right[k], plan.left[k], 2 * plan.index[k] + 1);
  }
  return plan;
}

}  // namespace compact
