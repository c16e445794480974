// Kullback-Leibler divergence of pairs of rows of logits, in both directions: one thread block per
// pair. Its gradient: one thread block per row, which adds up over the row's pairs.
//
// With log p = z_p - lse_p, log q = z_q - lse_q and delta = log p - log q,
//   KL(p || q) = sum p delta,   KL(q || p) = -sum q delta,
//   d (KL(p || q) + KL(q || p)) / d z_p = p (delta - KL(p || q)) + p - q,
// and the same for z_q with p and q exchanged. A class that a row excludes (z = -inf) has p = 0 and
// adds nothing. delta is computed from normalised terms, in a second pass: KL is of the order of
// delta^2, so the difference of two sums would be only rounding error.
#pragma once

#include "kernels/cuda/head.cuh"

namespace compact::cuda {

inline constexpr int kPairThreads = 512;

// Pairs of rows of a block of logits.
template <typename T>
struct Pairs {
  using A = simt::accumulate_t<T>;

  const T* logits;  // raw, [rows of the block, cols]
  int64_t cols;
  int64_t first_slot;  // of the block's rows in the plan (ops/pairs.h)
  Head<A> head;
  // [all pairs of the call]: results of the first kernel, arguments of the second.
  A *kl_left, *kl_right, *lse_left, *lse_right;
  // Of the first kernel, for each pair of the block: the slots of its rows, and its index.
  const int64_t *left, *right, *index;
  // Of the second kernel, as in PairPlan.
  const int64_t *ends, *other, *side;
  const A* upstream;  // [all pairs]
  A out_scale;
  T* out;  // [rows of the block, cols], the gradient

  SIMT_DEVICE const T* row(int64_t slot) const { return logits + (slot - first_slot) * cols; }
};

// x y, or 0 if x is 0, for any y.
template <typename A>
SIMT_DEVICE A weighted(A x, A y) {
  return x > A(0) ? x * y : x;
}

template <typename T>
SIMT_KERNEL(kPairThreads)
pair_stats_kernel(Pairs<T> args) {
  using A = simt::accumulate_t<T>;
  SIMT_SHARED(A, largest_p, simt::kWarp);
  SIMT_SHARED(A, sum_p, simt::kWarp);
  SIMT_SHARED(A, moment_p, simt::kWarp);
  SIMT_SHARED(A, largest_q, simt::kWarp);
  SIMT_SHARED(A, sum_q, simt::kWarp);
  SIMT_SHARED(A, moment_q, simt::kWarp);
  SIMT_SHARED(A, shared_left, simt::kWarp);
  SIMT_SHARED(A, shared_right, simt::kWarp);

  const T* left = args.row(args.left[simt::block()]);
  const T* right = args.row(args.right[simt::block()]);
  Online<A> p, q;
  for (int64_t v = simt::thread(); v < args.cols; v += simt::threads()) {
    const A zp[1] = {args.head.finish_one(simt::to_float(left[v]), v)};
    const A zq[1] = {args.head.finish_one(simt::to_float(right[v]), v)};
    p.add(zp);
    q.add(zq);
  }
  p = block_merge(p, largest_p, sum_p, moment_p);
  q = block_merge(q, largest_q, sum_q, moment_q);

  const A log_sum_p = simt::log(p.sum), log_sum_q = simt::log(q.sum);
  A kl_left = 0, kl_right = 0;
  for (int64_t v = simt::thread(); v < args.cols; v += simt::threads()) {
    const A zp = args.head.finish_one(simt::to_float(left[v]), v);
    const A zq = args.head.finish_one(simt::to_float(right[v]), v);
    const A log_p = (zp - p.reference()) - log_sum_p, log_q = (zq - q.reference()) - log_sum_q;
    const A delta = log_p - log_q;
    kl_left += weighted(exp_of(log_p), delta);
    kl_right += weighted(exp_of(log_q), -delta);
  }
  kl_left = block_sum(kl_left, shared_left);
  kl_right = block_sum(kl_right, shared_right);
  if (simt::thread() == 0) {
    const int64_t pair = args.index[simt::block()];
    args.kl_left[pair] = kl_left;
    args.kl_right[pair] = kl_right;
    args.lse_left[pair] = p.log_sum_exp();
    args.lse_right[pair] = q.log_sum_exp();
  }
}

template <typename T>
SIMT_KERNEL(kPairThreads)
pair_gradient_kernel(Pairs<T> args) {
  using A = simt::accumulate_t<T>;
  const int64_t r = args.first_slot + simt::block();
  const int64_t begin = args.ends[r], end = args.ends[r + 1];
  const T* mine = args.row(r);
  T* out = args.out + simt::block() * args.cols;
  const auto is_right = [&](int64_t e) { return (args.side[e] & 1) != 0; };
  // Every slot is in a pair, and all of its pairs know its log-sum-exp.
  const A own_lse = (is_right(begin) ? args.lse_right : args.lse_left)[args.side[begin] >> 1];
  for (int64_t v = simt::thread(); v < args.cols; v += simt::threads()) {
    const A z[1] = {args.head.finish_one(simt::to_float(mine[v]), v)};
    const A log_p = z[0] - own_lse, p = exp_of(log_p);
    A gradient[1] = {A(0)};
    for (int64_t e = begin; e < end; ++e) {
      const int64_t pair = args.side[e] >> 1;
      const bool right = is_right(e);
      const A upstream = args.upstream[pair];
      if (upstream == A(0)) continue;  // leaves the pair out, even if its divergence is not finite
      const A kl = right ? args.kl_right[pair] : args.kl_left[pair];
      const A other_lse = right ? args.lse_left[pair] : args.lse_right[pair];
      const A other = args.head.finish_one(simt::to_float(args.row(args.other[e])[v]), v);
      const A log_q = other - other_lse;
      gradient[0] += upstream * (weighted(p, log_p - log_q - kl) + (p - exp_of(log_q)));
    }
    args.head.through_softcap(z, gradient);
    out[v] = simt::narrow<T>(args.out_scale * gradient[0]);
  }
}

}  // namespace compact::cuda
