// Weights of the rationales of each problem from their scores.
#include <limits>

#include "kernels/cuda/problem_weights.cuh"
#include "ops/launch.cuh"

namespace compact::cuda {
namespace {

std::tuple<Tensor, Tensor> problem_weights(Tensor scores, Tensor offsets, Tensor beta,
                                           Tensor prior_std, double tau, int64_t ddof, double eps,
                                           double floor) {
  const char* op = "problem_weights";
  check_dim(op, "scores", scores, 2);
  check_size(op, "beta", beta, 0, scores.size(0));
  check_size(op, "prior_std", prior_std, 0, scores.size(0));
  const DeviceGuard guard(scores);
  const ScalarType compute = compute_type(scores);
  const Tensor read = contiguous_as(scores, compute), factors = contiguous_as(beta, compute),
               priors = contiguous_as(prior_std, compute),
               bounds = index_vector(op, "offsets", offsets, offsets.size(0));
  Tensor out = new_empty(scores, {scores.size(1)}, compute),
         zscores = new_empty(scores, {scores.size(0), scores.size(1)}, compute);
  // What no problem covers stays NaN, so that wrong offsets are seen.
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  torch::stable::fill_(out, kNaN);
  torch::stable::fill_(zscores, kNaN);
  for_dtype(op, "scores", read, [&](auto tag) {
    using A = simt::accumulate_t<typename decltype(tag)::type>;
    ProblemWeights<A> args{};
    args.scores = data<A>(read);
    args.offsets = data<int64_t>(bounds);
    args.beta = data<A>(factors);
    args.prior_std = data<A>(priors);
    args.num_scores = read.size(0);
    args.rationales = read.size(1);
    args.tau = static_cast<A>(tau);
    args.ddof = ddof;
    args.eps = static_cast<A>(eps);
    args.floor = static_cast<A>(floor);
    args.out = data<A>(out);
    args.zscores = data<A>(zscores);
    launch(op, scores, &problem_weights_kernel<A>, std::max<int64_t>(bounds.size(0) - 1, 0),
           simt::kWarp, args);
  });
  return {out, zscores};
}

}  // namespace

COMPACT_DEVICE_LIBRARY(m) { m.impl("problem_weights", TORCH_BOX(&problem_weights)); }

}  // namespace compact::cuda
