// out[rows[m]] += weight[group[m]] * unit[m]: one task sums each output row, in input order.
#include <cstring>
#include <numeric>
#include <vector>

#include "ops/head.h"

namespace compact {
namespace {

constexpr const char* kOp = "accumulate_weighted";
constexpr int64_t kRowsPerTask = 64;

template <class T>
Tensor run(const Tensor& unit, const int64_t* row_of, const Tensor& weight, const int64_t* group,
           int64_t num_rows) {
  const int64_t count = unit.size(0), width = unit.size(1);
  const Tensor units = in_compute_type<T>(unit), weights = in_compute_type<T>(weight);
  Tensor out = empty_of<T>(unit, {num_rows, width});

  // Tokens in a stable sort by the row that they read.
  std::vector<int64_t> start(num_rows + 1, 0), tokens(count);
  for (int64_t m = 0; m < count; ++m) ++start[row_of[m] + 1];
  std::partial_sum(start.begin(), start.end(), start.begin());
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t m = 0; m < count; ++m) tokens[next[row_of[m]]++] = m;

  run_tasks(ceil_div(num_rows, kRowsPerTask), [&](int64_t task) {
    const int64_t end = std::min(num_rows, (task + 1) * kRowsPerTask);
    for (int64_t n = task * kRowsPerTask; n < end; ++n) {
      T* sum = data<T>(out) + n * width;
      std::memset(sum, 0, width * sizeof(T));
      for (int64_t i = start[n]; i < start[n + 1]; ++i) {
        const int64_t m = tokens[i];
        const T weight = data<const T>(weights)[group ? group[m] : m];
        if (weight == 0) continue;  // also if the unit gradient is not finite
        add_scaled_row(sum, data<const T>(units) + m * width, width, weight);
      }
    }
  });
  return out;
}

Tensor accumulate_weighted(Tensor unit, Tensor rows, Tensor weight, OptionalTensor group,
                           int64_t num_rows) {
  check_dim(kOp, "unit", unit, 2);
  check_dim(kOp, "weight", weight, 1);
  const int64_t count = unit.size(0);
  const Tensor row_of = checked_index(kOp, "rows", rows, count, num_rows);
  if (group) {
    group = checked_index(kOp, "group", *group, count, weight.size(0));
  } else {
    check_size(kOp, "weight", weight, 0, count);
  }
  const auto call = computes_in_double(unit) ? &run<double> : &run<float>;
  return call(unit, data<const int64_t>(row_of), weight,
              group ? data<const int64_t>(*group) : nullptr, num_rows);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compact, CPU, m) {
  m.impl("accumulate_weighted", TORCH_BOX(&accumulate_weighted));
}

}  // namespace compact
