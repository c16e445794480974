// Symmetric Kullback-Leibler divergence of pairs of hidden rows and its gradients. The divergence
// and the gradients of hidden rows are computed by blocks of pairs, the gradients of the head by
// blocks of the vocabulary.
#include "kernels/cuda/pairwise_symmetric_kl.cuh"
#include "ops/head.cuh"

namespace compact::cuda {
namespace {

constexpr const char* kOp = "pairwise_symmetric_kl";
constexpr const char* kBackward = "pairwise_symmetric_kl_backward";

// [pairs] each, in the compute type; upstream only in the backward.
struct PairTensors {
  Tensor kl_left, kl_right, lse_left, lse_right;
  OptionalTensor upstream;
};

// Runs one of the two kernels on a block of logits: the left rows of `pairs` pairs, then their
// right rows, for the vocabulary entries from `first` on.
template <template <typename> class Kernel>
void run_pairs(const char* op, const HeadTensors& head, const Tensor& logits, int64_t begin,
               int64_t first, const PairTensors& tensors, double out_scale) {
  for_dtype(op, "hidden", logits, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = simt::accumulate_t<T>;
    const int64_t pairs = logits.size(0) / 2;
    Pairs<T> args{};
    args.cols = logits.size(1);
    args.left = data<T>(logits);
    args.right = args.left + pairs * args.cols;
    args.head = head.on_device<A>(first);
    args.kl_left = data<A>(tensors.kl_left) + begin;
    args.kl_right = data<A>(tensors.kl_right) + begin;
    args.lse_left = data<A>(tensors.lse_left) + begin;
    args.lse_right = data<A>(tensors.lse_right) + begin;
    if (tensors.upstream) args.upstream = data<A>(tensors.upstream) + begin;
    args.out_scale = static_cast<A>(out_scale);
    launch(op, logits, Kernel<T>::kernel, pairs, threads_for(args.cols, 4, kPairThreads), args);
  });
}
template <typename T>
struct StatsKernel {
  static constexpr auto kernel = &pair_stats_kernel<T>;
};
template <typename T>
struct GradientKernel {
  static constexpr auto kernel = &pair_gradient_kernel<T>;
};

// The hidden rows of pairs begin .. begin + count: left ones, then right ones [2 count, H].
Tensor read_pairs(const HeadTensors& head, const Tensor& left, const Tensor& right, int64_t begin,
                  int64_t count) {
  Tensor both = torch::stable::new_empty(head.hidden, {2 * count, head.width()});
  Tensor first = slice(both, 0, count), second = slice(both, count, count);
  torch::stable::copy_(first, take_rows(head.hidden, left, begin, count));
  torch::stable::copy_(second, take_rows(head.hidden, right, begin, count));
  return both;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pairwise_symmetric_kl(Tensor hidden, Tensor weight,
                                                                 Tensor left, Tensor right,
                                                                 OptionalTensor bias,
                                                                 double softcap,
                                                                 double logit_scale) {
  const DeviceGuard guard(hidden);
  const HeadTensors head(kOp, hidden, weight, bias, softcap, logit_scale);
  const int64_t count = left.size(0);
  left = index_vector(kOp, "left", left, count);
  right = index_vector(kOp, "right", right, count);
  const auto result = [&] { return new_empty(hidden, {count}, compute_type(hidden)); };
  const PairTensors out{result(), result(), result(), result(), std::nullopt};
  const Tensor to_logits = torch::stable::transpose(head.weight, 0, 1);
  const int64_t vocabulary = head.vocabulary();
  const int64_t step = rows_of_block(count, 2 * vocabulary, vocabulary, head.hidden);
  for (int64_t begin = 0; begin < count; begin += step) {
    const int64_t pairs = std::min(step, count - begin);
    const Tensor logits = torch::stable::new_empty(head.hidden, {2 * pairs, vocabulary});
    multiply(logits, read_pairs(head, left, right, begin, pairs), to_logits);
    run_pairs<StatsKernel>(kOp, head, logits, begin, 0, out, 1.0);
  }
  return {out.kl_left, out.kl_right, out.lse_left, out.lse_right};
}

std::tuple<Tensor, Tensor, Tensor> pairwise_symmetric_kl_backward(
    Tensor grad, Tensor hidden, Tensor weight, Tensor left, Tensor right, OptionalTensor bias,
    Tensor kl_left, Tensor kl_right, Tensor lse_left, Tensor lse_right, double softcap,
    double logit_scale, bool need_hidden, bool need_weight, bool need_bias) {
  const DeviceGuard guard(hidden);
  const HeadTensors head(kBackward, hidden, weight, bias, softcap, logit_scale);
  STD_TORCH_CHECK(!need_bias || logit_scale != 0.0, kBackward,
                  ": logit_scale must not be 0 where the bias needs a gradient");
  const ScalarType compute = compute_type(hidden);
  const int64_t count = left.size(0), vocabulary = head.vocabulary();
  check_size(kBackward, "grad", grad, 0, count);
  left = index_vector(kBackward, "left", left, count);
  right = index_vector(kBackward, "right", right, count);
  const PairTensors known{contiguous_as(kl_left, compute), contiguous_as(kl_right, compute),
                          contiguous_as(lse_left, compute), contiguous_as(lse_right, compute),
                          contiguous_as(grad, compute)};

  Tensor d_hidden = new_empty(hidden, {0, head.width()}, compute);
  if (need_hidden) {
    // Gradients of all left rows, then of all right rows; then rows that pairs share are added up.
    Tensor of_pairs = new_empty(hidden, {2 * count, head.width()}, compute);
    const Tensor to_logits = torch::stable::transpose(head.weight, 0, 1);
    const int64_t step = rows_of_block(count, 2 * vocabulary, head.width(), head.hidden);
    for (int64_t begin = 0; begin < count; begin += step) {
      const int64_t pairs = std::min(step, count - begin);
      const Tensor logits = torch::stable::new_empty(head.hidden, {2 * pairs, vocabulary});
      multiply(logits, read_pairs(head, left, right, begin, pairs), to_logits);
      run_pairs<GradientKernel>(kBackward, head, logits, begin, 0, known, logit_scale);
      multiply_to(slice(of_pairs, begin, pairs), slice(logits, 0, pairs), head.weight);
      multiply_to(slice(of_pairs, count + begin, pairs), slice(logits, pairs, pairs), head.weight);
    }
    Tensor both = new_empty(left, {2 * count}, ScalarType::Long);
    Tensor first = slice(both, 0, count), second = slice(both, count, count);
    torch::stable::copy_(first, left);
    torch::stable::copy_(second, right);
    d_hidden =
        accumulate_rows(kBackward, of_pairs, both, std::nullopt, std::nullopt, hidden.size(0));
  }

  const Tensor d_weight = new_empty(hidden, {need_weight ? vocabulary : 0, head.width()}, compute);
  const Tensor d_bias = new_empty(hidden, {need_bias ? vocabulary : 0}, compute);
  if (need_weight || need_bias) {
    const Tensor read = read_pairs(head, left, right, 0, count);
    const int64_t step = rows_of_block(vocabulary, 2 * count, head.width(), head.hidden);
    for (int64_t begin = 0; begin < vocabulary; begin += step) {
      const int64_t size = std::min(step, vocabulary - begin);
      const Tensor logits = torch::stable::new_empty(head.hidden, {2 * count, size});
      multiply(logits, read, torch::stable::transpose(slice(head.weight, begin, size), 0, 1));
      run_pairs<GradientKernel>(kBackward, head, logits, 0, begin, known, logit_scale);
      if (need_weight)
        multiply_to(slice(d_weight, begin, size), torch::stable::transpose(logits, 0, 1), read);
      if (need_bias) sum_columns(kBackward, slice(d_bias, begin, size), logits, 1.0 / logit_scale);
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
