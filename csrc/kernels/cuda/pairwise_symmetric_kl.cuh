// Kullback-Leibler divergence of pairs of rows of logits, in both directions, and its gradient. One
// thread block per pair.
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

template <typename T>
struct Pairs {
  using A = simt::accumulate_t<T>;

  T* left;  // [pairs, cols] raw logits; the gradient after pair_gradient_kernel
  T* right;
  int64_t cols;
  Head<A> head;
  // [pairs]: results of the first kernel, arguments of the second.
  A *kl_left, *kl_right, *lse_left, *lse_right;
  const A* upstream;  // [pairs], of the second
  A out_scale;
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

  const int64_t pair = simt::block();
  const T* left = args.left + pair * args.cols;
  const T* right = args.right + pair * args.cols;
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
  const int64_t pair = simt::block();
  T* left = args.left + pair * args.cols;
  T* right = args.right + pair * args.cols;
  const A kl_left = args.kl_left[pair], kl_right = args.kl_right[pair];
  const A lse_left = args.lse_left[pair], lse_right = args.lse_right[pair];
  const A upstream = args.upstream[pair] * args.out_scale;
  for (int64_t v = simt::thread(); v < args.cols; v += simt::threads()) {
    const A zp[1] = {args.head.finish_one(simt::to_float(left[v]), v)};
    const A zq[1] = {args.head.finish_one(simt::to_float(right[v]), v)};
    const A log_p = zp[0] - lse_left, log_q = zq[0] - lse_right;
    const A p = exp_of(log_p), q = exp_of(log_q), delta = log_p - log_q;
    A gp[1] = {weighted(p, delta - kl_left) + (p - q)};
    A gq[1] = {weighted(q, -delta - kl_right) + (q - p)};
    args.head.through_softcap(zp, gp);
    args.head.through_softcap(zq, gq);
    left[v] = simt::narrow<T>(upstream * gp[0]);
    right[v] = simt::narrow<T>(upstream * gq[0]);
  }
}

}  // namespace compact::cuda
