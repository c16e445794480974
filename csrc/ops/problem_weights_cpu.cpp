// Teacher weights: z-scores within each problem, their weighted sum, a softmax. There are only a
// few numbers per problem, so these are plain float64 loops.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "ops/head.h"

namespace compact {
namespace {

constexpr const char* kOp = "problem_weights";

std::tuple<Tensor, Tensor> problem_weights(Tensor scores, Tensor offsets, Tensor beta,
                                           Tensor prior_std, double tau, int64_t ddof, double eps,
                                           double floor) {
  check_dim(kOp, "scores", scores, 2);
  check_dim(kOp, "offsets", offsets, 1);
  const int64_t kinds = scores.size(0), rationales = scores.size(1);
  const int64_t problems = offsets.size(0) - 1;
  check_size(kOp, "beta", beta, 0, kinds);
  check_size(kOp, "prior_std", prior_std, 0, kinds);
  const Tensor bounds = checked_index(kOp, "offsets", offsets, offsets.size(0), rationales + 1);
  const auto* at = data<const int64_t>(bounds);
  require(problems >= 0 && at[0] == 0 && at[problems] == rationales, kOp,
          ": offsets must run from 0 to R = ", rationales, ", got ", problems >= 0 ? at[0] : 0,
          " to ", problems >= 0 ? at[problems] : 0);
  const Tensor values = in_compute_type<double>(scores), betas = in_compute_type<double>(beta),
               priors = in_compute_type<double>(prior_std);
  Tensor out = torch::stable::new_empty(values, {rationales});
  Tensor standard = torch::stable::new_zeros(values, {kinds, rationales});
  auto* alpha = data<double>(out);
  std::vector<double> utility;
  for (int64_t p = 0; p < problems; ++p) {
    const int64_t begin = at[p], count = at[p + 1] - at[p];
    require(count > 0, kOp, ": offsets[", p + 1, "] must be larger than offsets[", p, "] = ", begin,
            ", got ", at[p + 1]);
    if (count == 1) {
      alpha[begin] = 1.0;
      continue;
    }
    utility.assign(count, 0.0);
    for (int64_t s = 0; s < kinds; ++s) {
      const double* score = data<const double>(values) + s * rationales + begin;
      double* z = data<double>(standard) + s * rationales + begin;
      double mean = 0.0, squares = 0.0;
      for (int64_t k = 0; k < count; ++k) mean += score[k];
      mean /= static_cast<double>(count);
      for (int64_t k = 0; k < count; ++k) squares += (score[k] - mean) * (score[k] - mean);
      const double variance = squares / static_cast<double>(std::max<int64_t>(count - ddof, 1));
      const double prior = data<const double>(priors)[s];
      const double scale =
          eps > 0.0 ? std::sqrt(variance) + eps : std::sqrt(variance + prior * prior);
      // If all scores are equal, z is 0; they may differ from their rounded mean. The comparisons
      // are written so that a NaN reaches the weights, where the caller can see it.
      const bool equal =
          std::all_of(score, score + count, [&](double other) { return other == score[0]; });
      if (equal || scale == 0.0) continue;
      const double weight = data<const double>(betas)[s];
      for (int64_t k = 0; k < count; ++k) {
        z[k] = (score[k] - mean) / scale;
        utility[k] += weight * z[k];
      }
    }
    const double best = *std::max_element(utility.begin(), utility.end());
    double sum = 0.0;
    for (int64_t k = 0; k < count; ++k) sum += std::exp((utility[k] - best) / tau);
    for (int64_t k = 0; k < count; ++k) {
      alpha[begin + k] = (1.0 - floor) * std::exp((utility[k] - best) / tau) / sum +
                         floor / static_cast<double>(count);
    }
  }
  const auto wanted = computes_in_double(scores) ? ScalarType::Double : ScalarType::Float;
  return {torch::stable::to(out, wanted), torch::stable::to(standard, wanted)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compact, CPU, m) {
  m.impl("problem_weights", TORCH_BOX(&problem_weights));
}

}  // namespace compact
