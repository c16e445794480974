// The row kernel on given logits, and its launch for linear_token_stats.
#include "kernels/cuda/row_stats.cuh"
#include "ops/head.cuh"

namespace compact::cuda {

void row_stats_of_block(const char* op, const Tensor& logits, int64_t begin, const Tensor& target,
                        const GoldTensors& gold, const OptionalTensor& bias, double softcap,
                        double scale, int64_t ignore_index, const RowOptions& options,
                        const StatsTensors& out) {
  const int64_t cols = logits.size(1);
  require(cols <= INT32_MAX, op, ": the vocabulary must be below 2^31, got ", cols);
  for_dtype(op, "logits", logits, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = simt::accumulate_t<T>;
    RowStats<T> args{};
    args.logits = data<T>(logits);
    args.cols = cols;
    args.target = data<int64_t>(target) + begin;
    args.weight = data<A>(options.weight);
    args.head = {data<A>(bias), static_cast<A>(scale), static_cast<A>(softcap)};
    args.out_scale = static_cast<A>(scale);
    args.ignore_index = ignore_index;
    if (gold) {
      args.gold_ids = data<int64_t>(gold.ids);
      args.gold_offsets = data<int64_t>(gold.offsets);
      args.gold_problem = data<int64_t>(gold.problem) + begin;
      args.gold_count = gold.ids->size(0);
      args.gold_problems = gold.offsets->size(0) - 1;
      args.gold_logit = data<A>(out.gold_logit) + begin;
      args.gold_logp = data<A>(out.gold_logp) + begin;
    }
    args.nll = data<A>(out.nll) + begin;
    args.lse = data<A>(out.lse) + begin;
    args.entropy = data<A>(out.entropy) + begin;
    args.correct = data<bool>(out.correct) + begin;
    const Asked& asked = options.asked;
    if (asked.rank) args.rank = data<int32_t>(out.rank) + begin;
    if (asked.sum_p2) args.sum_p2 = data<A>(out.sum_p2) + begin;
    if (asked.margin) args.margin = data<A>(out.margin) + begin;
    if (asked.score_ids) {
      args.scores = static_cast<int>(asked.scores());
      args.score_ids = data<int64_t>(asked.score_ids) + begin * asked.scores();
      args.score_logp = data<A>(out.score_logp) + begin * asked.scores();
    }
    if (options.stash) args.stash = data<simt::bfloat16>(options.stash) + begin * cols;
    args.overwrite = options.overwrite;
    const int64_t packs = ceil_div(cols, simt::Pack<T>::kSize);
    // Keep a row in shared memory only if it is long enough for all threads of the block. A short
    // row stays in the caches anyway.
    const int64_t threads = threads_for(packs, 4, kRowThreads);
    if (args.overwrite && packs >= 4 * simt::kWarp)
      args.staged = std::min(packs, shared_bytes(logits) / 16);
    launch(op, logits, asked.any() ? &row_stats_kernel<T, true> : &row_stats_kernel<T, false>,
           logits.size(0), threads, args, args.staged * 16);
  });
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> row_stats_(
    Tensor logits, Tensor target, OptionalTensor weight, OptionalTensor gold_ids,
    OptionalTensor gold_offsets, OptionalTensor gold_problem, OptionalTensor bias, double softcap,
    double logit_scale, int64_t ignore_index) {
  const char* op = "row_stats_";
  check_dim(op, "logits", logits, 2);
  check_contiguous(op, "logits", logits);
  const int64_t rows = logits.size(0);
  const DeviceGuard guard(logits);
  const Tensor targets = index_vector(op, "target", target, rows);
  if (weight) check_size(op, "weight", *weight, 0, rows);
  if (bias) check_size(op, "bias", *bias, 0, logits.size(1));
  const GoldTensors gold(op, gold_ids, gold_offsets, gold_problem, rows);
  const StatsTensors out(logits, rows, static_cast<bool>(gold), Asked{});
  RowOptions options;
  options.weight = contiguous_as(weight, compute_type(logits));
  row_stats_of_block(op, logits, 0, targets, gold, contiguous_as(bias, compute_type(logits)),
                     softcap, logit_scale, ignore_index, options, out);
  return {out.nll, out.lse, out.entropy, out.correct, out.gold_logit, out.gold_logp};
}

}  // namespace

COMPACT_DEVICE_LIBRARY(m) { m.impl("row_stats_", TORCH_BOX(&row_stats_)); }

}  // namespace compact::cuda
