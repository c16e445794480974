// Weights of the K rationales of a problem from S scores each. One thread block of one warp per
// problem.
//   z_s = (score_s - mean) / sqrt(var + prior_std_s^2)   or, with eps > 0, / (std + eps)
//   alpha = softmax(sum_s beta_s z_s / tau),  out = (1 - floor) alpha + floor / K
// Scores that are all equal give z = 0; K = 1 gives 1. A problem whose offsets are out of range is
// not written.
#pragma once

#include "kernels/cuda/simt.cuh"

namespace compact::cuda {

template <typename A>
struct ProblemWeights {
  const A* scores;         // [num_scores, rationales]
  const int64_t* offsets;  // [problems + 1]
  const A* beta;           // [num_scores]
  const A* prior_std;      // [num_scores]
  int64_t num_scores, rationales;
  A tau;
  int64_t ddof;
  A eps, floor;
  A* out;      // [rationales]
  A* zscores;  // [num_scores, rationales]
};

template <typename A>
SIMT_KERNEL(simt::kWarp)
problem_weights_kernel(ProblemWeights<A> args) {
  const int64_t begin = args.offsets[simt::block()], end = args.offsets[simt::block() + 1];
  // Offsets that are out of range would write out of range.
  if (begin < 0 || end > args.rationales || end <= begin) return;
  const int64_t count = end - begin;
  if (count == 1) {
    if (simt::thread() == 0) args.out[begin] = A(1);
    for (int64_t s = simt::thread(); s < args.num_scores; s += simt::kWarp)
      args.zscores[s * args.rationales + begin] = A(0);
    return;
  }
  const A k = static_cast<A>(count);
  // Each lane uses the same rationales everywhere, so that `out` can hold u, then exp(u).
  for (int64_t i = begin + simt::thread(); i < end; i += simt::kWarp) args.out[i] = A(0);
  for (int64_t s = 0; s < args.num_scores; ++s) {
    const A* score = args.scores + s * args.rationales;
    A* z = args.zscores + s * args.rationales;
    A sum = 0;
    for (int64_t i = begin + simt::thread(); i < end; i += simt::kWarp) sum += score[i];
    const A mean = simt::warp_sum(sum) / k;
    A squares = 0;
    int different = 0;  // a NaN counts
    for (int64_t i = begin + simt::thread(); i < end; i += simt::kWarp) {
      const A d = score[i] - mean;
      squares += d * d;
      different += !(score[i] == score[begin]);
    }
    const int64_t freedom = count - args.ddof;
    const A var = simt::warp_sum(squares) / static_cast<A>(freedom > 1 ? freedom : 1);
    const A prior = args.prior_std[s];
    const A spread = args.eps > A(0) ? simt::sqrt(var) + args.eps : simt::sqrt(var + prior * prior);
    // Equal scores may differ from their rounded mean. A NaN spread stays NaN.
    const bool flat = simt::warp_sum(different) == 0 || spread <= A(0);
    for (int64_t i = begin + simt::thread(); i < end; i += simt::kWarp) {
      z[i] = flat ? A(0) : (score[i] - mean) / spread;
      args.out[i] += args.beta[s] * z[i];
    }
  }
  A largest = -simt::infinity<A>();
  for (int64_t i = begin + simt::thread(); i < end; i += simt::kWarp) {
    args.out[i] /= args.tau;
    largest = simt::max(largest, args.out[i]);
  }
  largest = simt::warp_max(largest);
  A sum = 0;
  for (int64_t i = begin + simt::thread(); i < end; i += simt::kWarp) {
    args.out[i] = simt::exp2((args.out[i] - largest) * A(simt::kLog2e));
    sum += args.out[i];
  }
  sum = simt::warp_sum(sum);
  for (int64_t i = begin + simt::thread(); i < end; i += simt::kWarp)
    args.out[i] = (A(1) - args.floor) * (args.out[i] / sum) + args.floor / k;
}

}  // namespace compact::cuda
