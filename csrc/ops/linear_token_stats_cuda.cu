// Statistics of the LM head and the unit gradient of every token, one block of rows at a time: one
// product gives the logits, the row kernel runs on them while they are in cache, and a second
// product gives the gradient of the hidden states.
#include "kernels/cuda/head_gradient.cuh"
#include "ops/head.cuh"

namespace compact::cuda {

void sum_columns(const char* op, const Tensor& out, const Tensor& matrix, double factor,
                 const OptionalTensor& add_weighted) {
  for_dtype(op, "matrix", matrix, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = simt::accumulate_t<T>;
    const ColumnSum<T> args{data<T>(matrix), data<A>(add_weighted),  matrix.size(0),
                            matrix.size(1),  static_cast<A>(factor), data<A>(out)};
    launch(op, matrix, &column_sum_kernel<T>, ceil_div(args.cols, kGradientThreads),
           kGradientThreads, args);
  });
}

namespace {

constexpr const char* kOp = "linear_token_stats";
constexpr const char* kBackward = "linear_token_stats_backward";

enum Keep : int64_t { kNothing = 0, kUnit = 1, kStash = 2 };  // flags

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor, Tensor>
linear_token_stats(Tensor hidden, Tensor weight, Tensor target, OptionalTensor rows,
                   OptionalTensor gold_ids, OptionalTensor gold_offsets,
                   OptionalTensor gold_problem, OptionalTensor bias, OptionalTensor score_ids,
                   double softcap, double logit_scale, int64_t ignore_index, int64_t keep,
                   double filter_eps, bool need_rank, bool need_sum_p2, bool need_margin) {
  const DeviceGuard guard(hidden);
  const HeadTensors head(kOp, hidden, weight, bias, softcap, logit_scale);
  const int64_t count = rows ? rows->size(0) : hidden.size(0);
  const Tensor targets = index_vector(kOp, "target", target, count);
  if (rows) rows = index_vector(kOp, "rows", *rows, count);
  const GoldTensors gold(kOp, gold_ids, gold_offsets, gold_problem, count);

  const ScalarType compute = compute_type(hidden);
  const Asked asked(kOp, need_rank, need_sum_p2, need_margin, score_ids, count);
  const StatsTensors out(hidden, count, static_cast<bool>(gold), asked);
  Tensor unit = new_empty(hidden, {keep & kUnit ? count : 0, head.width()}, compute);
  Tensor stash =
      new_empty(hidden, {keep & kStash ? count : 0, head.vocabulary()}, ScalarType::BFloat16);
  // Width 0: the stash has final values.
  Tensor stash_shift = new_empty(hidden, {keep & kStash ? count : 0, 0}, ScalarType::Float);

  RowOptions options;
  options.overwrite = keep != kNothing;
  options.asked = asked;
  if (keep & kStash) options.stash = stash;
  const Tensor to_logits = torch::stable::transpose(head.weight, 0, 1);
  const int64_t columns = keep & kUnit ? head.width() : head.vocabulary();
  const int64_t step = rows_of_block(count, head.vocabulary(), columns, head.hidden);
  Tensor buffer = torch::stable::new_empty(head.hidden, {count == 0 ? 0 : step, head.vocabulary()});
  for (int64_t begin = 0; begin < count; begin += step) {
    const int64_t size = std::min(step, count - begin);
    const Tensor logits = slice(buffer, 0, size);
    multiply(logits, take_rows(head.hidden, rows, begin, size), to_logits);
    row_stats_of_block(kOp, logits, begin, targets, gold, head.bias, softcap, logit_scale,
                       ignore_index, options, out);
    if (!(keep & kUnit)) continue;
    const Tensor block_unit = slice(unit, begin, size);
    if (filter_eps > 0.0) {
      multiply_filtered(kOp, block_unit, logits, head.weight, filter_eps * std::abs(logit_scale),
                        std::nullopt);
    } else {
      multiply_to(block_unit, logits, head.weight);
    }
  }
  return {out.nll,       out.lse,  out.entropy, out.correct, out.gold_logit,
          out.gold_logp, out.rank, out.sum_p2,  out.margin,  out.score_logp,
          unit,          stash,    stash_shift};
}

// The inputs of the backward for each token.
struct TokenTensors {
  Tensor upstream, target, nll, lse;
  OptionalTensor rows;
  int64_t ignore_index;
};

// Fills buffer [size, cols] with the gradient with respect to the raw logits of the tokens from
// `begin` on and the vocabulary entries from `first` on: from the stash, or from the raw logits
// that the buffer holds.
void gradient_of_block(const HeadTensors& head, const TokenTensors& tokens, const Tensor& buffer,
                       int64_t begin, int64_t first, const OptionalTensor& stash) {
  for_dtype(kBackward, "hidden", buffer, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = simt::accumulate_t<T>;
    HeadGradient<T> args{};
    args.logits = data<T>(buffer);
    args.cols = buffer.size(1);
    args.first = first;
    args.vocabulary = head.vocabulary();
    args.target = data<int64_t>(tokens.target) + begin;
    args.upstream = data<A>(tokens.upstream) + begin;
    args.nll = data<A>(tokens.nll) + begin;
    args.lse = data<A>(tokens.lse) + begin;
    args.head = head.on_device<A>(first);
    args.out_scale = static_cast<A>(head.scale);
    args.ignore_index = tokens.ignore_index;
    if (stash) args.stash = data<simt::bfloat16>(*stash) + begin * head.vocabulary();
    const int64_t packs = ceil_div(args.cols, simt::Pack<T>::kSize);
    launch(kBackward, buffer, stash ? &stash_gradient_kernel<T> : &head_gradient_kernel<T>,
           buffer.size(0), threads_for(packs, 4, kGradientThreads), args);
  });
}

// [count, H]: the gradient of the hidden row of each token, computed by blocks of tokens.
Tensor token_gradients(const HeadTensors& head, const TokenTensors& tokens,
                       const OptionalTensor& stash, double filter_eps) {
  const int64_t count = tokens.target.size(0);
  Tensor out = new_empty(head.hidden, {count, head.width()}, compute_type(head.hidden));
  const Tensor to_logits = torch::stable::transpose(head.weight, 0, 1);
  const int64_t step = rows_of_block(count, head.vocabulary(), head.width(), head.hidden);
  Tensor buffer = torch::stable::new_empty(head.hidden, {count == 0 ? 0 : step, head.vocabulary()});
  for (int64_t begin = 0; begin < count; begin += step) {
    const int64_t size = std::min(step, count - begin);
    const Tensor logits = slice(buffer, 0, size);
    if (!stash) multiply(logits, take_rows(head.hidden, tokens.rows, begin, size), to_logits);
    gradient_of_block(head, tokens, logits, begin, 0, stash);
    if (filter_eps > 0.0) {
      multiply_filtered(kBackward, slice(out, begin, size), logits, head.weight,
                        filter_eps * std::abs(head.scale), slice(tokens.upstream, begin, size));
    } else {
      multiply_to(slice(out, begin, size), logits, head.weight);
    }
  }
  return out;
}

// Gradients of weight and bias, computed by blocks of the vocabulary. A block has all tokens, so
// the sum over tokens is one product and is rounded once.
void head_gradients(const HeadTensors& head, const TokenTensors& tokens,
                    const OptionalTensor& stash, const OptionalTensor& d_weight,
                    const OptionalTensor& d_bias) {
  const int64_t count = tokens.target.size(0), vocabulary = head.vocabulary();
  const Tensor read = take_rows(head.hidden, tokens.rows, 0, count);
  const int64_t step = rows_of_block(vocabulary, count, head.width(), head.hidden);
  for (int64_t first = 0; first < vocabulary; first += step) {
    const int64_t size = std::min(step, vocabulary - first);
    const Tensor logits = torch::stable::new_empty(head.hidden, {count, size});
    if (!stash)
      multiply(logits, read, torch::stable::transpose(slice(head.weight, first, size), 0, 1));
    gradient_of_block(head, tokens, logits, 0, first, stash);
    if (d_weight)
      multiply_to(slice(*d_weight, first, size), torch::stable::transpose(logits, 0, 1), read);
    if (d_bias) sum_columns(kBackward, slice(*d_bias, first, size), logits, 1.0 / head.scale);
  }
}

std::tuple<Tensor, Tensor, Tensor> linear_token_stats_backward(
    Tensor grad, Tensor hidden, Tensor weight, Tensor target, OptionalTensor rows,
    OptionalTensor bias, Tensor nll, Tensor lse, OptionalTensor stash, OptionalTensor stash_shift,
    double softcap, double logit_scale, int64_t ignore_index, double filter_eps, bool need_hidden,
    bool need_weight, bool need_bias) {
  (void)stash_shift;  // has width 0 here
  const DeviceGuard guard(hidden);
  const HeadTensors head(kBackward, hidden, weight, bias, softcap, logit_scale);
  require(!need_bias || logit_scale != 0.0, kBackward,
          ": logit_scale must not be 0 where the bias needs a gradient");
  const ScalarType compute = compute_type(hidden);
  const int64_t count = rows ? rows->size(0) : hidden.size(0);
  check_size(kBackward, "grad", grad, 0, count);
  if (rows) rows = index_vector(kBackward, "rows", *rows, count);
  if (stash) stash = contiguous_as(*stash, ScalarType::BFloat16);
  const TokenTensors tokens{contiguous_as(grad, compute),
                            index_vector(kBackward, "target", target, count),
                            contiguous_as(nll, compute),
                            contiguous_as(lse, compute),
                            rows,
                            ignore_index};
  const int64_t vocabulary = head.vocabulary();
  OptionalTensor d_weight, d_bias;
  if (need_weight) d_weight = new_empty(hidden, {vocabulary, head.width()}, compute);
  if (need_bias) d_bias = new_empty(hidden, {vocabulary}, compute);
  if (need_weight || need_bias) head_gradients(head, tokens, stash, d_weight, d_bias);
  return {need_hidden ? token_gradients(head, tokens, stash, filter_eps)
                      : new_empty(hidden, {0, head.width()}, compute),
          d_weight.value_or(new_empty(hidden, {0, head.width()}, compute)),
          d_bias.value_or(new_empty(hidden, {0}, compute))};
}

}  // namespace

COMPACT_DEVICE_LIBRARY(m) {
  m.impl("linear_token_stats", TORCH_BOX(&linear_token_stats));
  m.impl("linear_token_stats_backward", TORCH_BOX(&linear_token_stats_backward));
}

}  // namespace compact::cuda
