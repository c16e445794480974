// Assembles the consensus graphs of a batch of problems from plain arrays.
//
// A node is a reasoning step. Steps of different rationales of a problem match when each is the
// other's best match, similar enough, and the order of steps is preserved; the connected components
// are step classes. Classes are joined by edges "is followed by", made acyclic by leaving out the
// rarer ones. What is found does not depend on the order in which rationales are given.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace compact::graph {

// The steps of P problems, R rationales, S steps. Offsets have one entry more than there are
// owners.
struct Steps {
  std::span<const int64_t> problem_offsets;  // [P + 1] rationales of each problem
  std::span<const int64_t> step_offsets;     // [R + 1] steps of each rationale
  std::span<const int64_t> item_offsets;     // [S + 1] items of each step
  std::span<const int64_t> items;  // sorted in each step; a number n is 2 n, an equation e 2 e + 1
  std::span<const int64_t> content;  // [S] rank of the step's text among all texts
  const float* state;                // [S, width] unit vectors: hidden states
  int64_t width;                     // may be 0: steps without mathematics then match by content
};

struct Graphs {
  std::vector<int64_t> matches;        // [E, 2] pairs of steps
  std::vector<int64_t> step_class;     // [S]
  std::vector<int64_t> class_offsets;  // [P + 1] classes of each problem
  std::vector<int64_t> class_members;  // [C] rationales that have a step in the class
  std::vector<int64_t> edge_offsets;   // [P + 1] edges of each problem
  std::vector<int64_t> edges;          // [D, 2] pairs of classes, numbered over the whole batch
  std::vector<int64_t> edge_count;     // [D] rationales in which the second follows the first
};

// Similarity in 0..1 of two steps. Where both hold mathematics: 1 if they share an equation, else
// the Jaccard index of their numbers. Where neither does: the cosine of their states. Otherwise 0.
double similarity(const Steps& steps, int64_t a, int64_t b);

Graphs assemble(const Steps& steps, double threshold);

}  // namespace compact::graph
