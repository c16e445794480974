// grad @ weight for a gradient that is nearly all zeros: small entries are rounded at random, most
// of them to 0, and zeros are skipped.
#include <cstring>

#include "ops/head.h"

namespace compact {
namespace {

constexpr const char* kOp = "filtered_matmul";
constexpr int64_t kRowsPerTask = 32;

template <class T>
Tensor run(const Tensor& grad, const Tensor& weight, double eps) {
  const Head<T> head(weight, std::nullopt, 0.0, 1.0);
  const int64_t rows = grad.size(0), width = head.width;
  const Tensor entries = in_compute_type<T>(grad);
  Tensor out = empty_of<T>(grad, {rows, width});
  run_tasks(ceil_div(rows, kRowsPerTask), [&](int64_t task) {
    const int64_t begin = task * kRowsPerTask, end = std::min(rows, begin + kRowsPerTask);
    auto buffer = scratch<T>(head.converts() ? kBlock * width : 0);
    std::memset(data<T>(out) + begin * width, 0, (end - begin) * width * sizeof(T));
    for (int64_t first = 0; first < head.vocabulary; first += kBlock) {
      const int64_t count = std::min(kBlock, head.vocabulary - first);
      const T* weights = head.block(first, count, buffer.get());
      for (int64_t r = begin; r < end; ++r) {
        add_sparse_product(data<T>(out) + r * width,
                           data<const T>(entries) + r * head.vocabulary + first, count, first,
                           static_cast<T>(eps), weights, width);
      }
    }
  });
  return out;
}

Tensor filtered_matmul(Tensor grad, Tensor weight, double eps) {
  check_dim(kOp, "grad", grad, 2);
  check_dim(kOp, "weight", weight, 2);
  check_size(kOp, "weight", weight, 0, grad.size(1));
  const auto call = computes_in_double(grad) ? &run<double> : &run<float>;
  return call(grad, weight, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compact, CPU, m) {
  m.impl("filtered_matmul", TORCH_BOX(&filtered_matmul));
}

}  // namespace compact
