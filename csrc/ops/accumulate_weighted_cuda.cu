// Adds weighted unit gradients into hidden rows without atomics: the items are sorted by row.
#include "kernels/cuda/accumulate_weighted.cuh"
#include "ops/head.cuh"

namespace compact::cuda {
namespace {

// `rows` in ascending order, and the item of each entry; equal rows keep the order of the items.
std::tuple<Tensor, Tensor> stable_sort(const Tensor& rows) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(rows), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

}  // namespace

Tensor accumulate_rows(const char* op, const Tensor& unit, const Tensor& rows,
                       const OptionalTensor& weight, const OptionalTensor& group,
                       int64_t num_rows) {
  const Tensor out = torch::stable::new_zeros(unit, {num_rows, unit.size(1)}, compute_type(unit));
  const auto [sorted, order] = stable_sort(rows);
  for_dtype(op, "unit", unit, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = simt::accumulate_t<T>;
    AccumulateWeighted<T> args{};
    args.unit = data<T>(unit);
    args.sorted_rows = data<int64_t>(sorted);
    args.order = data<int64_t>(order);
    args.weight = data<A>(weight);
    args.group = data<int64_t>(group);
    args.items = unit.size(0);
    args.groups = weight ? weight->size(0) : 0;
    args.width = unit.size(1);
    args.num_rows = num_rows;
    args.packed = rows_aligned(unit, args.width) && rows_aligned(out, args.width);
    args.out = data<A>(out);
    const int64_t pieces = args.packed ? args.width / simt::Pack<T>::kSize : args.width;
    launch(op, unit, &accumulate_weighted_kernel<T>, args.items,
           threads_for(pieces, 1, kAccumulateThreads), args);
  });
  return out;
}

namespace {

Tensor accumulate_weighted(Tensor unit, Tensor rows, Tensor weight, OptionalTensor group,
                           int64_t num_rows) {
  const char* op = "accumulate_weighted";
  check_dim(op, "unit", unit, 2);
  const int64_t count = unit.size(0);
  if (!group) check_size(op, "weight", weight, 0, count);
  const DeviceGuard guard(unit);
  if (group) group = index_vector(op, "group", *group, count);
  return accumulate_rows(op, contiguous_as(unit, unit.scalar_type()),
                         index_vector(op, "rows", rows, count),
                         contiguous_as(weight, compute_type(unit)), group, num_rows);
}

}  // namespace

COMPACT_DEVICE_LIBRARY(m) { m.impl("accumulate_weighted", TORCH_BOX(&accumulate_weighted)); }

}  // namespace compact::cuda
