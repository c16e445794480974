// grad @ weight where small entries of grad are rounded at random, most of them to 0.
#include "kernels/cuda/filtered_matmul.cuh"
#include "ops/head.cuh"

namespace compact::cuda {

void multiply_filtered(const char* op, const Tensor& out, const Tensor& grad, const Tensor& weight,
                       double eps, const OptionalTensor& row_scale) {
  for_dtype(op, "grad", grad, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = simt::accumulate_t<T>;
    FilteredMatmul<T> args{};
    args.grad = data<T>(grad);
    args.weight = data<T>(weight);
    args.inner = grad.size(1);
    args.width = weight.size(1);
    const int64_t packs = ceil_div(args.width, simt::Pack<T>::kSize);
    const int64_t threads = threads_for(packs, 1, kFilterThreads);
    args.stretches = ceil_div(packs, threads);
    args.eps = static_cast<A>(eps);
    args.row_scale = data<A>(row_scale);
    args.packed_grad = rows_aligned(grad, args.inner);
    args.packed_weight = rows_aligned(weight, args.width);
    args.out = data<A>(out);
    launch(op, grad, &filtered_matmul_kernel<T>, grad.size(0) * args.stretches, threads, args);
  });
}

namespace {

Tensor filtered_matmul(Tensor grad, Tensor weight, double eps) {
  const char* op = "filtered_matmul";
  check_dim(op, "grad", grad, 2);
  check_dim(op, "weight", weight, 2);
  check_size(op, "weight", weight, 0, grad.size(1));
  const DeviceGuard guard(grad);
  const Tensor out = new_empty(grad, {grad.size(0), weight.size(1)}, compute_type(grad));
  multiply_filtered(op, out, contiguous_as(grad, grad.scalar_type()),
                    contiguous_as(weight, grad.scalar_type()), eps, std::nullopt);
  return out;
}

}  // namespace

COMPACT_DEVICE_LIBRARY(m) { m.impl("filtered_matmul", TORCH_BOX(&filtered_matmul)); }

}  // namespace compact::cuda
