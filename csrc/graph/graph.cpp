#include "graph/graph.h"

#include <algorithm>
#include <cmath>
#include <compare>
#include <cstdint>
#include <map>
#include <numeric>
#include <tuple>
#include <utility>

namespace compact::graph {
namespace {

// Disjoint sets with path halving; the root is the least member.
class Sets {
 public:
  explicit Sets(int64_t size) : parent_(size) { std::iota(parent_.begin(), parent_.end(), 0); }

  int64_t find(int64_t x) {
    while (parent_[x] != x) x = parent_[x] = parent_[parent_[x]];
    return x;
  }

  void join(int64_t a, int64_t b) {
    a = find(a);
    b = find(b);
    parent_[std::max(a, b)] = std::min(a, b);
  }

 private:
  std::vector<int64_t> parent_;
};

// Whether rationale a comes before b: by the content of their steps, then by their states. Ties in
// a matching are broken by this order, so the order of the input does not matter.
bool says_less(const Steps& s, int64_t a, int64_t b) {
  const auto content = s.content.begin();
  const int64_t a0 = s.step_offsets[a], a1 = s.step_offsets[a + 1];
  const int64_t b0 = s.step_offsets[b], b1 = s.step_offsets[b + 1];
  const auto order = std::lexicographical_compare_three_way(content + a0, content + a1,
                                                            content + b0, content + b1);
  if (order != 0) return order < 0;
  return std::lexicographical_compare(s.state + a0 * s.width, s.state + a1 * s.width,
                                      s.state + b0 * s.width, s.state + b1 * s.width);
}

// Similarities are rounded to whole multiples of 1 / kSimilarityUnits, so that rounding errors of
// hidden states do not matter: two copies of a step have similarity 1 exactly, and sums are exact
// in any order.
constexpr double kSimilarityUnits = 4096.0;

int64_t in_units(double similarity) { return std::llround(similarity * kSimilarityUnits); }

// Appends the matches of two rationales. Candidates are mutual best matches of at least
// `threshold`. Of these, the order-preserving chain with the greatest total similarity is kept.
void match(const Steps& s, int64_t a, int64_t b, double threshold, std::vector<int64_t>& matches) {
  if (says_less(s, b, a)) std::swap(a, b);
  const int64_t first_a = s.step_offsets[a], n = s.step_offsets[a + 1] - first_a;
  const int64_t first_b = s.step_offsets[b], m = s.step_offsets[b + 1] - first_b;
  if (n == 0 || m == 0) return;
  const int64_t least = in_units(threshold);
  std::vector<int64_t> sim(n * m), best_a(n, INT64_MIN), best_b(m, INT64_MIN);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      const int64_t value = in_units(similarity(s, first_a + i, first_b + j));
      sim[i * m + j] = value;
      best_a[i] = std::max(best_a[i], value);
      best_b[j] = std::max(best_b[j], value);
    }
  }
  const auto allowed = [&](int64_t i, int64_t j) {
    const int64_t value = sim[i * m + j];
    return value >= least && value == best_a[i] && value == best_b[j];
  };
  // total[i, j]: total similarity of the best chain within the first i and j steps.
  std::vector<int64_t> total((n + 1) * (m + 1), 0);
  const auto at = [&](int64_t i, int64_t j) -> int64_t& { return total[i * (m + 1) + j]; };
  for (int64_t i = 1; i <= n; ++i) {
    for (int64_t j = 1; j <= m; ++j) {
      at(i, j) = std::max(at(i - 1, j), at(i, j - 1));
      if (allowed(i - 1, j - 1)) {
        at(i, j) = std::max(at(i, j), at(i - 1, j - 1) + sim[(i - 1) * m + j - 1]);
      }
    }
  }
  for (int64_t i = n, j = m; i > 0 && j > 0;) {
    if (at(i, j) == at(i - 1, j)) {
      --i;
    } else if (at(i, j) == at(i, j - 1)) {
      --j;
    } else {
      --i;
      --j;
      matches.push_back(first_a + i);
      matches.push_back(first_b + j);
    }
  }
}

// A place in a rationale, 0..1, is stored in these units as a whole number, so sums are exact.
constexpr double kPlaceUnits = 1 << 20;

// An edge between classes, with the values that determine which edges of a cycle are kept.
struct Edge {
  int64_t from, to, count;
  double place_from, place_to;  // mean place in the rationale, 0..kPlaceUnits

  auto rank() const { return std::tuple(-count, place_from - place_to, place_from, place_to); }
};

bool reaches(const std::vector<std::vector<int64_t>>& next, int64_t from, int64_t to) {
  std::vector<int64_t> open{from};
  std::vector<bool> seen(next.size(), false);
  while (!open.empty()) {
    const int64_t node = open.back();
    open.pop_back();
    if (node == to) return true;
    if (seen[node]) continue;
    seen[node] = true;
    open.insert(open.end(), next[node].begin(), next[node].end());
  }
  return false;
}

// Appends edges to `kept`, in the order of their rank, unless they close a cycle: first the more
// common ones, then those that go further forward in the rationales. Edges of one rank are added
// together, so that no arbitrary order matters: those of them that are in a cycle are all dropped.
void cut_cycles(std::vector<Edge> edges, int64_t classes, std::vector<Edge>& kept) {
  std::sort(edges.begin(), edges.end(),
            [](const Edge& x, const Edge& y) { return x.rank() < y.rank(); });
  std::vector<std::vector<int64_t>> next(classes);
  for (auto first = edges.begin(); first != edges.end();) {
    auto end = first;
    while (end != edges.end() && end->rank() == first->rank()) ++end;
    std::for_each(first, end, [&](const Edge& edge) { next[edge.from].push_back(edge.to); });
    const auto in_cycle = std::stable_partition(
        first, end, [&](const Edge& edge) { return !reaches(next, edge.to, edge.from); });
    std::for_each(in_cycle, end, [&](const Edge& edge) { std::erase(next[edge.from], edge.to); });
    kept.insert(kept.end(), first, in_cycle);
    first = end;
  }
}

// Appends the classes and edges of problem p; `sets` holds the classes of its steps.
void add_problem(const Steps& s, int64_t p, Sets& sets, Graphs& graphs) {
  const int64_t first_class = graphs.class_offsets.back();
  const int64_t first = s.problem_offsets[p], end = s.problem_offsets[p + 1];
  const int64_t first_step = s.step_offsets[first], end_step = s.step_offsets[end];
  std::vector<int64_t> name(end_step - first_step, -1);
  int64_t classes = 0;
  for (int64_t step = first_step; step < end_step; ++step) {
    int64_t& id = name[sets.find(step) - first_step];
    if (id < 0) id = classes++;
    graphs.step_class[step] = first_class + id;
  }
  graphs.class_offsets.push_back(first_class + classes);
  graphs.class_members.resize(first_class + classes, 0);
  std::vector<int64_t> place(classes, 0), steps_in(classes, 0), last_seen(classes, -1);
  std::map<std::pair<int64_t, int64_t>, std::pair<int64_t, int64_t>> follows;  // count, last seen
  for (int64_t r = first; r < end; ++r) {
    const int64_t begin = s.step_offsets[r], count = s.step_offsets[r + 1] - begin;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t id = graphs.step_class[begin + i] - first_class;
      const double part = count > 1 ? static_cast<double>(i) / static_cast<double>(count - 1) : 1.0;
      place[id] += std::llround(part * kPlaceUnits);
      ++steps_in[id];
      if (last_seen[id] != r) {
        last_seen[id] = r;
        ++graphs.class_members[first_class + id];
      }
      if (i == 0) continue;
      const int64_t before = graphs.step_class[begin + i - 1] - first_class;
      if (before == id) continue;
      auto& [seen, in] = follows.try_emplace({before, id}, 0, -1).first->second;
      if (in != r) ++seen;
      in = r;
    }
  }
  const auto mean_place = [&](int64_t id) {
    return static_cast<double>(place[id]) / static_cast<double>(steps_in[id]);
  };
  std::vector<Edge> edges, kept;
  for (const auto& [pair, seen] : follows) {
    const auto [from, to] = pair;
    edges.push_back({from, to, seen.first, mean_place(from), mean_place(to)});
  }
  cut_cycles(std::move(edges), classes, kept);
  for (const Edge& edge : kept) {
    graphs.edges.push_back(first_class + edge.from);
    graphs.edges.push_back(first_class + edge.to);
    graphs.edge_count.push_back(edge.count);
  }
  graphs.edge_offsets.push_back(static_cast<int64_t>(graphs.edge_count.size()));
}

}  // namespace

double similarity(const Steps& steps, int64_t a, int64_t b) {
  const int64_t *x = steps.items.data() + steps.item_offsets[a],
                *x_end = steps.items.data() + steps.item_offsets[a + 1];
  const int64_t *y = steps.items.data() + steps.item_offsets[b],
                *y_end = steps.items.data() + steps.item_offsets[b + 1];
  if ((x == x_end) != (y == y_end)) return 0.0;
  if (x == x_end) {
    if (steps.width == 0) return steps.content[a] == steps.content[b] ? 1.0 : 0.0;
    const float *u = steps.state + a * steps.width, *v = steps.state + b * steps.width;
    return std::inner_product(u, u + steps.width, v, 0.0f);
  }
  int64_t shared = 0, distinct = 0;
  while (x != x_end || y != y_end) {
    const bool left = y == y_end || (x != x_end && *x <= *y);
    const bool right = x == x_end || (y != y_end && *y <= *x);
    const int64_t item = left ? *x : *y;
    if (left && right && (item & 1)) return 1.0;
    distinct += (item & 1) == 0;
    shared += left && right && (item & 1) == 0;
    x += left;
    y += right;
  }
  return distinct ? static_cast<double>(shared) / static_cast<double>(distinct) : 0.0;
}

Graphs assemble(const Steps& steps, double threshold) {
  Graphs graphs;
  const auto problems = static_cast<int64_t>(steps.problem_offsets.size()) - 1;
  const int64_t total = steps.step_offsets.back();
  graphs.step_class.resize(total);
  graphs.class_offsets.push_back(0);
  graphs.edge_offsets.push_back(0);
  Sets sets(total);
  for (int64_t p = 0; p < problems; ++p) {
    const int64_t first = steps.problem_offsets[p], end = steps.problem_offsets[p + 1];
    const std::size_t before = graphs.matches.size();
    for (int64_t a = first; a < end; ++a) {
      for (int64_t b = a + 1; b < end; ++b) match(steps, a, b, threshold, graphs.matches);
    }
    for (std::size_t e = before; e < graphs.matches.size(); e += 2) {
      sets.join(graphs.matches[e], graphs.matches[e + 1]);
    }
    add_problem(steps, p, sets, graphs);
  }
  return graphs;
}

}  // namespace compact::graph
