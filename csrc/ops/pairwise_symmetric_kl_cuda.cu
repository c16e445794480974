// Symmetric Kullback-Leibler divergence of pairs of hidden rows and its gradients. The indices of
// the pairs are CPU tensors, so that rows can be grouped: a row's logits are computed once for all
// of its pairs in a tile. The divergence and the gradients of hidden rows are computed by tiles of
// rows, the gradients of the head by blocks of the vocabulary.
#include <utility>

#include "kernels/cuda/pairwise_symmetric_kl.cuh"
#include "ops/head.cuh"
#include "ops/pairs.h"

namespace compact::cuda {
namespace {

constexpr const char* kOp = "pairwise_symmetric_kl";
constexpr const char* kBackward = "pairwise_symmetric_kl_backward";

// [pairs] each, in the compute type; upstream only in the backward.
struct PairTensors {
  Tensor kl_left, kl_right, lse_left, lse_right;
  OptionalTensor upstream;
};

// A plan of pairs, and its tables on the device.
struct DevicePlan {
  PairPlan host;
  Tensor rows, left, right, index, ends, other, side;

  // A tile has memory for `blocks` matrices [its rows, V] in the head's dtype, which are multiplied
  // with matrices of `columns` columns.
  DevicePlan(const char* op, const HeadTensors& head, const Tensor& left_, const Tensor& right_,
             int64_t blocks, int64_t columns) {
    const Tensor& hidden = head.hidden;
    const int64_t count = left_.size(0);
    require(left_.device().is_cpu() && right_.device().is_cpu(), op,
            ": left and right must be on the CPU");
    const Tensor ls = checked_index(op, "left", left_, count, hidden.size(0));
    const Tensor rs = checked_index(op, "right", right_, count, hidden.size(0));
    const auto *from = data<const int64_t>(ls), *to = data<const int64_t>(rs);
    const int64_t most = rows_of_block(rows_in_pairs(from, to, count, hidden.size(0)),
                                       blocks * head.vocabulary(), columns, hidden);
    host = plan_pairs(from, to, count, hidden.size(0), most);
    std::vector<int64_t> all;
    for (const auto* table :
         {&host.rows, &host.left, &host.right, &host.index, &host.ends, &host.other, &host.side}) {
      all.insert(all.end(), table->begin(), table->end());
    }
    const Tensor there = sent(all, hidden);
    int64_t first = 0;
    const auto part = [&](const std::vector<int64_t>& table) {
      const auto size = static_cast<int64_t>(table.size());
      return slice(there, std::exchange(first, first + size), size);
    };
    rows = part(host.rows), left = part(host.left), right = part(host.right);
    index = part(host.index), ends = part(host.ends), other = part(host.other);
    side = part(host.side);
  }

  int64_t num_rows() const { return static_cast<int64_t>(host.rows.size()); }
  int64_t tiles() const { return static_cast<int64_t>(host.tile_rows.size()) - 1; }
  // Rows before tile t, and those in it.
  int64_t first_row(int64_t t) const { return host.tile_rows[t]; }
  int64_t rows_of(int64_t t) const { return host.tile_rows[t + 1] - host.tile_rows[t]; }
  int64_t largest_tile() const {
    int64_t most = 0;
    for (int64_t t = 0; t < tiles(); ++t) most = std::max(most, rows_of(t));
    return most;
  }
  // The hidden states of rows first .. first + count [count, H].
  Tensor read(const HeadTensors& head, int64_t first, int64_t count) const {
    return take_rows(head.hidden, rows, first, count);
  }
};

// The arguments of both kernels for a block of logits: the rows of the plan from `row` on, and the
// vocabulary entries from `first` on.
template <typename T>
Pairs<T> arguments(const HeadTensors& head, const DevicePlan& plan, const Tensor& logits,
                   int64_t row, int64_t first, const PairTensors& tensors) {
  using A = simt::accumulate_t<T>;
  Pairs<T> args{};
  args.logits = data<const T>(logits);
  args.cols = logits.size(1);
  args.first_slot = row;
  args.head = head.on_device<A>(first);
  args.kl_left = data<A>(tensors.kl_left);
  args.kl_right = data<A>(tensors.kl_right);
  args.lse_left = data<A>(tensors.lse_left);
  args.lse_right = data<A>(tensors.lse_right);
  args.ends = data<const int64_t>(plan.ends);
  args.other = data<const int64_t>(plan.other);
  args.side = data<const int64_t>(plan.side);
  return args;
}

// The statistics of the pairs of tile t, from the logits of its rows.
void run_stats(const HeadTensors& head, const DevicePlan& plan, const Tensor& logits, int64_t t,
               const PairTensors& out) {
  for_dtype(kOp, "hidden", logits, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Pairs<T> args = arguments<T>(head, plan, logits, plan.first_row(t), 0, out);
    const int64_t begin = plan.host.tile_pairs[t], end = plan.host.tile_pairs[t + 1];
    args.left = data<const int64_t>(plan.left) + begin;
    args.right = data<const int64_t>(plan.right) + begin;
    args.index = data<const int64_t>(plan.index) + begin;
    launch(kOp, logits, &pair_stats_kernel<T>, end - begin, threads_for(args.cols, 4, kPairThreads),
           args);
  });
}

// out = the gradient of the logits of the rows from `row` on, for the vocabulary from `first` on.
void run_gradient(const HeadTensors& head, const DevicePlan& plan, const Tensor& out,
                  const Tensor& logits, int64_t row, int64_t first, const PairTensors& known) {
  for_dtype(kBackward, "hidden", logits, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = simt::accumulate_t<T>;
    Pairs<T> args = arguments<T>(head, plan, logits, row, first, known);
    args.upstream = data<const A>(*known.upstream);
    args.out_scale = static_cast<A>(head.scale);
    args.out = data<T>(out);
    launch(kBackward, logits, &pair_gradient_kernel<T>, logits.size(0),
           threads_for(args.cols, 4, kPairThreads), args);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pairwise_symmetric_kl(Tensor hidden, Tensor weight,
                                                                 Tensor left, Tensor right,
                                                                 OptionalTensor bias,
                                                                 double softcap,
                                                                 double logit_scale) {
  const DeviceGuard guard(hidden);
  const HeadTensors head(kOp, hidden, weight, bias, softcap, logit_scale);
  const int64_t count = left.size(0), vocabulary = head.vocabulary();
  const DevicePlan plan(kOp, head, left, right, 1, vocabulary);
  const auto result = [&] { return new_empty(hidden, {count}, compute_type(hidden)); };
  const PairTensors out{result(), result(), result(), result(), std::nullopt};
  const Tensor to_logits = torch::stable::transpose(head.weight, 0, 1);
  const Tensor block = torch::stable::new_empty(head.hidden, {plan.largest_tile(), vocabulary});
  for (int64_t t = 0; t < plan.tiles(); ++t) {
    const Tensor logits = slice(block, 0, plan.rows_of(t));
    multiply(logits, plan.read(head, plan.first_row(t), plan.rows_of(t)), to_logits);
    run_stats(head, plan, logits, t, out);
  }
  return {out.kl_left, out.kl_right, out.lse_left, out.lse_right};
}

std::tuple<Tensor, Tensor, Tensor> pairwise_symmetric_kl_backward(
    Tensor grad, Tensor hidden, Tensor weight, Tensor left, Tensor right, OptionalTensor bias,
    Tensor kl_left, Tensor kl_right, Tensor lse_left, Tensor lse_right, double softcap,
    double logit_scale, bool need_hidden, bool need_weight, bool need_bias) {
  const DeviceGuard guard(hidden);
  const HeadTensors head(kBackward, hidden, weight, bias, softcap, logit_scale);
  require(!need_bias || logit_scale != 0.0, kBackward,
          ": logit_scale must not be 0 where the bias needs a gradient");
  const ScalarType compute = compute_type(hidden);
  const int64_t count = left.size(0), vocabulary = head.vocabulary();
  check_sizes(kBackward, count,
              {{"grad", &grad},
               {"kl_left", &kl_left},
               {"kl_right", &kl_right},
               {"lse_left", &lse_left},
               {"lse_right", &lse_right}});
  // Logits and their gradient are there at the same time.
  const DevicePlan plan(kBackward, head, left, right, 2, head.width());
  const PairTensors known{contiguous_as(kl_left, compute), contiguous_as(kl_right, compute),
                          contiguous_as(lse_left, compute), contiguous_as(lse_right, compute),
                          contiguous_as(grad, compute)};

  Tensor d_hidden = new_empty(hidden, {0, head.width()}, compute);
  if (need_hidden) {
    const Tensor of_rows = new_empty(hidden, {plan.num_rows(), head.width()}, compute);
    const Tensor to_logits = torch::stable::transpose(head.weight, 0, 1);
    const Tensor block =
        torch::stable::new_empty(head.hidden, {2 * plan.largest_tile(), vocabulary});
    for (int64_t t = 0; t < plan.tiles(); ++t) {
      const int64_t first = plan.first_row(t), rows = plan.rows_of(t);
      const Tensor logits = slice(block, 0, rows), gradient = slice(block, rows, rows);
      multiply(logits, plan.read(head, first, rows), to_logits);
      run_gradient(head, plan, gradient, logits, first, 0, known);
      multiply_to(slice(of_rows, first, rows), gradient, head.weight);
    }
    d_hidden =
        accumulate_rows(kBackward, of_rows, plan.rows, std::nullopt, std::nullopt, hidden.size(0));
  }

  const Tensor d_weight = new_empty(hidden, {need_weight ? vocabulary : 0, head.width()}, compute);
  const Tensor d_bias = new_empty(hidden, {need_bias ? vocabulary : 0}, compute);
  if (need_weight || need_bias) {
    const int64_t rows = plan.num_rows();
    const Tensor read = plan.read(head, 0, rows);
    const int64_t step = rows_of_block(vocabulary, 2 * rows, head.width(), head.hidden);
    for (int64_t begin = 0; begin < vocabulary; begin += step) {
      const int64_t size = std::min(step, vocabulary - begin);
      const Tensor logits = torch::stable::new_empty(head.hidden, {rows, size});
      multiply(logits, read, torch::stable::transpose(slice(head.weight, begin, size), 0, 1));
      const Tensor gradient = torch::stable::new_empty(head.hidden, {rows, size});
      run_gradient(head, plan, gradient, logits, 0, begin, known);
      if (need_weight)
        multiply_to(slice(d_weight, begin, size), torch::stable::transpose(gradient, 0, 1), read);
      if (need_bias)
        sum_columns(kBackward, slice(d_bias, begin, size), gradient, 1.0 / logit_scale);
    }
  }
  return {d_hidden, d_weight, d_bias};
}

}  // namespace

COMPACT_DEVICE_LIBRARY(m) {
  m.impl("pairwise_symmetric_kl", TORCH_BOX(&pairwise_symmetric_kl));
  m.impl("pairwise_symmetric_kl_backward", TORCH_BOX(&pairwise_symmetric_kl_backward));
}

}  // namespace compact::cuda
