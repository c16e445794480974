// The mode "fused-weights" for one chunk of rows. The row kernel stores the chunk's unit gradients
// in `blocks`. When the token weights are known, the second half is one product with the weighted
// hidden states. The blocks need no further factor, so `shift` has width 0.
#include "kernels/cuda/head_gradient.cuh"
#include "ops/head.cuh"

namespace compact::cuda {
namespace {

constexpr const char* kOp = "linear_token_stats_fused";
constexpr const char* kBackward = "linear_token_stats_fused_backward";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor>
linear_token_stats_fused(Tensor blocks, Tensor hidden, Tensor weight, Tensor target,
                         OptionalTensor gold_ids, OptionalTensor gold_offsets,
                         OptionalTensor gold_problem, OptionalTensor bias, OptionalTensor score_ids,
                         double softcap, double logit_scale, int64_t ignore_index,
                         double filter_eps, bool need_hidden, bool need_rank, bool need_sum_p2,
                         bool need_margin) {
  const DeviceGuard guard(hidden);
  const HeadTensors head(kOp, hidden, weight, bias, softcap, logit_scale);
  const ScalarType compute = compute_type(hidden);
  const int64_t count = hidden.size(0);
  check_blocks(kOp, blocks, count, head.vocabulary(), hidden);
  const Tensor targets = index_vector(kOp, "target", target, count);
  const GoldTensors gold(kOp, gold_ids, gold_offsets, gold_problem, count);
  RowOptions options;
  options.asked = Asked(kOp, need_rank, need_sum_p2, need_margin, score_ids, count);
  const StatsTensors out(hidden, count, static_cast<bool>(gold), options.asked);
  const Tensor unit = new_empty(hidden, {need_hidden ? count : 0, head.width()}, compute);
  const Tensor shift = new_empty(hidden, {count, 0}, compute);
  if (count > 0) {
    const Tensor logits = slice(blocks, 0, count);
    multiply_to(logits, head.hidden, torch::stable::transpose(head.weight, 0, 1));
    row_stats_of_block(kOp, logits, 0, targets, gold, head.bias, softcap, logit_scale, ignore_index,
                       options, out);
    if (need_hidden) {
      const Tensor gradient = contiguous_as(logits, hidden.scalar_type());
      if (filter_eps > 0.0) {
        multiply_filtered(kOp, unit, gradient, head.weight, filter_eps * std::abs(logit_scale),
                          std::nullopt);
      } else {
        multiply_to(unit, gradient, head.weight);
      }
    }
  }
  return {out.nll,  out.lse,    out.entropy, out.correct,    out.gold_logit, out.gold_logp,
          out.rank, out.sum_p2, out.margin,  out.score_logp, unit,           shift};
}

// to += x.
void add_to(const Tensor& to, const Tensor& x) {
  for_dtype(kBackward, "hidden", x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const AddTo<T> args{data<T>(x), x.size(0) * x.size(1), data<simt::accumulate_t<T>>(to)};
    launch(kBackward, x, &add_to_kernel<T>, ceil_div(args.count, kGradientThreads),
           kGradientThreads, args);
  });
}

// Fills `factor` and clears the rows of `units` for the tokens without a gradient.
void clear_rows(const Tensor& units, const Tensor& grad, const Tensor& target, const Tensor& factor,
                int64_t ignore_index) {
  for_dtype(kBackward, "blocks", units, [&](auto tag) {
    using A = simt::accumulate_t<typename decltype(tag)::type>;
    const ClearRows<A> args{data<A>(units),  data<A>(grad), data<int64_t>(target),
                            data<A>(factor), units.size(1), ignore_index};
    launch(kBackward, units, &clear_rows_kernel<A>, units.size(0),
           threads_for(args.cols, 4, kGradientThreads), args);
  });
}

void linear_token_stats_fused_backward(Tensor d_weight, Tensor d_bias, Tensor blocks, Tensor grad,
                                       Tensor hidden, Tensor target, Tensor nll, Tensor lse,
                                       Tensor shift, double softcap, double logit_scale,
                                       int64_t ignore_index) {
  (void)nll, (void)lse, (void)shift, (void)softcap;  // the blocks are final
  const DeviceGuard guard(hidden);
  const ScalarType compute = compute_type(hidden);
  const int64_t count = hidden.size(0), vocabulary = blocks.size(1);
  check_size(kBackward, "grad", grad, 0, count);
  check_dtype(kBackward, "blocks", blocks, {compute});
  require(d_bias.size(0) == 0 || logit_scale != 0.0, kBackward,
          ": logit_scale must not be 0 where the bias needs a gradient");
  if (count == 0) return;
  const Tensor units = slice(blocks, 0, count), upstream = new_empty(hidden, {count}, compute);
  clear_rows(units, contiguous_as(grad, compute), index_vector(kBackward, "target", target, count),
             upstream, ignore_index);
  if (d_weight.size(0) > 0) {
    check_contiguous(kBackward, "d_weight", d_weight);
    check_dtype(kBackward, "d_weight", d_weight, {compute});
    const Tensor weighed =
        call_torch<2>("aten::mul", "Tensor",
                      {torch::stable::detail::from(detached(hidden)),
                       torch::stable::detail::from(torch::stable::unsqueeze(upstream, 1))});
    const Tensor gradient = contiguous_as(units, hidden.scalar_type());
    const Tensor product = new_empty(hidden, {vocabulary, hidden.size(1)}, hidden.scalar_type());
    multiply(product, torch::stable::transpose(gradient, 0, 1),
             contiguous_as(weighed, hidden.scalar_type()));
    add_to(d_weight, product);
  }
  if (d_bias.size(0) > 0) {
    check_dtype(kBackward, "d_bias", d_bias, {compute});
    sum_columns(kBackward, d_bias, units, 1.0 / logit_scale, upstream);
  }
}

}  // namespace

COMPACT_DEVICE_LIBRARY(m) {
  m.impl("linear_token_stats_fused", TORCH_BOX(&linear_token_stats_fused));
  m.impl("linear_token_stats_fused_backward", TORCH_BOX(&linear_token_stats_fused_backward));
}

}  // namespace compact::cuda
