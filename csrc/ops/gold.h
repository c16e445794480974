// The ragged table of gold answers on the CPU. Each answer is sorted by token id, because the
// kernels go through the vocabulary in order.
#pragma once

#include <algorithm>
#include <vector>

#include "ops/head.h"

namespace compact {

// The answers of P problems, each sorted by token id. Empty if the call has no gold answers.
class GoldTable {
 public:
  GoldTable(const char* op, const OptionalTensor& ids, const OptionalTensor& offsets,
            const OptionalTensor& problem, int64_t rows, int64_t vocabulary) {
    if (!ids) return;
    require(offsets && problem, op, ": gold needs ids, offsets and problem");
    const int64_t problems = offsets->size(0) - 1;
    Tensor flat = checked_index(op, "gold.ids", *ids, ids->size(0), vocabulary);
    Tensor bounds = checked_index(op, "gold.offsets", *offsets, problems + 1, ids->size(0) + 1);
    problem_ = checked_index(op, "gold.problem", *problem, rows, problems);
    ids_.assign(data<const int64_t>(flat), data<const int64_t>(flat) + ids->size(0));
    offsets_.assign(data<const int64_t>(bounds), data<const int64_t>(bounds) + problems + 1);
    for (int64_t p = 0; p < problems; ++p) {
      require(offsets_[p] <= offsets_[p + 1], op, ": gold.offsets[", p + 1,
              "] must be at least gold.offsets[", p, "] = ", offsets_[p], ", got ",
              offsets_[p + 1]);
      std::sort(ids_.begin() + offsets_[p], ids_.begin() + offsets_[p + 1]);
    }
    for (int64_t m = 0; m < rows; ++m) {
      require(begin(m) < end(m), op, ": gold.problem[", m,
              "] must be a problem with an answer, got ", of(m), " with gold.offsets ", begin(m),
              " to ", end(m));
    }
  }

  explicit operator bool() const { return problem_.has_value(); }
  int64_t begin(int64_t row) const { return offsets_[of(row)]; }
  int64_t end(int64_t row) const { return offsets_[of(row) + 1]; }

  // Sum of z over the row's answer tokens in [first, first + count), where z [count] are the logits
  // of these vocabulary entries. A token that is in the answer twice counts twice.
  template <class T>
  double sum_in(int64_t row, const T* z, int64_t first, int64_t count) const {
    const int64_t last = end(row);
    double sum = 0.0;
    auto item = std::lower_bound(ids_.begin() + begin(row), ids_.begin() + last, first);
    for (; item != ids_.begin() + last && *item < first + count; ++item) sum += z[*item - first];
    return sum;
  }

 private:
  int64_t of(int64_t row) const { return data<const int64_t>(*problem_)[row]; }

  std::vector<int64_t> ids_, offsets_;
  OptionalTensor problem_;
};

}  // namespace compact
