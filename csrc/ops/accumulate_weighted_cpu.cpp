#include "kernels/cpu/accumulate_weighted.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <numeric>
#include <vector>

#include "ops/check.h"

namespace compact {
namespace {

Tensor accumulate_weighted(Tensor unit, Tensor rows, Tensor weight, std::optional<Tensor> group,
                           int64_t num_rows) {
  const char* op = "accumulate_weighted";
  check_dim(op, "unit", unit, 2);
  check_dtype(op, "unit", unit, {ScalarType::Float});
  check_contiguous(op, "unit", unit);
  const int64_t count = unit.size(0), width = unit.size(1);
  check_size(op, "rows", rows, 0, count);
  if (group) check_size(op, "group", *group, 0, count);
  Tensor out = torch::stable::new_empty(unit, {num_rows, width});

  // Items sorted by row, stable: each output row is summed by one thread in the order of the input.
  const auto* row_of = static_cast<const int64_t*>(rows.data_ptr());
  std::vector<int64_t> start(num_rows + 1, 0), items(count);
  for (int64_t m = 0; m < count; ++m) {
    STD_TORCH_CHECK(row_of[m] >= 0 && row_of[m] < num_rows, op, ": rows[", m, "] must be in [0, ",
                    num_rows, "), got ", row_of[m]);
    ++start[row_of[m] + 1];
  }
  std::partial_sum(start.begin(), start.end(), start.begin());
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t m = 0; m < count; ++m) items[next[row_of[m]]++] = m;

  const auto* unit_data = static_cast<const float*>(unit.data_ptr());
  const auto* weight_data = static_cast<const float*>(weight.data_ptr());
  const auto* group_data = group ? static_cast<const int64_t*>(group->data_ptr()) : nullptr;
  auto* out_data = static_cast<float*>(out.data_ptr());
  torch::stable::parallel_for(0, num_rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      cpu::accumulate_row(unit_data, items.data() + start[n], start[n + 1] - start[n], weight_data,
                          group_data, width, out_data + n * width);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compact, CPU, m) {
  m.impl("accumulate_weighted", TORCH_BOX(&accumulate_weighted));
}

}  // namespace compact
