// Assembles the consensus graphs of a batch of problems from plain arrays.
//
// A node is a reasoning step. Two steps of different rationales match if each is the other's best
// match, if they are similar enough, and if the matches keep the order of the steps. The connected
// components are step classes. An edge between classes means "is followed by". Of the edges of a
// cycle, the rarer ones are removed. The result does not depend on the order of the rationales.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace compact::graph {

// The steps of P problems, R rationales, S steps. An offsets array has one entry more than there
// are owners.
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

// Similarity of two steps. If both have mathematics: 1 if they share an equation, else the Jaccard
// index of their numbers. If neither has: the cosine of their states, or with width 0, 1 for equal
// content and else 0. If only one has: 0.
double similarity(const Steps& steps, int64_t a, int64_t b);

Graphs assemble(const Steps& steps, double threshold);

}  // namespace compact::graph
