// Gradients of the symmetric KL of pairs of rows. The logits are computed again, block by block.
// The gradients of all pairs of a row are added up in the block, so one product is enough.
#include <cmath>
#include <cstring>
#include <tuple>

#include "kernels/cpu/pairwise_symmetric_kl.h"
#include "ops/head.h"
#include "ops/pairs.h"

namespace compact {
namespace {

constexpr const char* kOp = "pairwise_symmetric_kl_backward";

template <class T>
struct Backward {
  const Head<T>& head;
  const T *grad, *kl_left, *kl_right, *lse_left, *lse_right;  // [P]
  const double logit_scale;
  T *d_hidden, *d_weight, *d_bias;  // [N, H], [V, H], [V]; nullptr where not needed

  // Writes the slice's part of d_hidden / logit_scale to `sums` [rows, H]. Every block of d_weight
  // and d_bias belongs to one slice.
  void walk(const PairTile& tile, const Tensor& hidden, int64_t begin, int64_t end, T* sums) const {
    const auto rows = static_cast<int64_t>(tile.rows.size());
    const int64_t width = head.width;
    auto logits = scratch<T>(rows * kBlock), probability = scratch<T>(rows * kBlock),
         gradient = scratch<T>(rows * kBlock);
    auto buffer = scratch<T>(head.converts() ? kBlock * width : 0);
    const LogitShape<T> plain{T(1), T(0), nullptr};
    std::vector<T> lse(rows);
    for (const Pair& pair : tile.pairs) {
      lse[pair.left] = lse_left[pair.index];
      lse[pair.right] = lse_right[pair.index];
    }
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t count = std::min(kBlock, end - first);
      const T* weights = head.block(first, count, buffer.get());
      multiply(matrix(logits.get(), rows, count), hidden, transposed(weights, count, width));
      for (int64_t i = 0; i < rows; ++i) {
        T* z = logits.get() + i * count;
        finish_logits(z, count, first, head.shape);
        std::memcpy(probability.get() + i * count, z, count * sizeof(T));
        gradient_piece(probability.get() + i * count, count, lse[i], T(1), plain);
      }
      std::memset(gradient.get(), 0, rows * count * sizeof(T));
      for (const Pair& pair : tile.pairs) {
        if (pair.left == pair.right || grad[pair.index] == T(0)) continue;
        const int64_t p = pair.left * count, q = pair.right * count;
        pair_gradients(logits.get() + p, logits.get() + q, probability.get() + p,
                       probability.get() + q, count, lse[pair.left] - lse[pair.right],
                       kl_left[pair.index], kl_right[pair.index], grad[pair.index],
                       gradient.get() + p, gradient.get() + q);
      }
      if (head.shape.softcap != T(0)) {
        for (int64_t i = 0; i < rows * count; ++i) {
          gradient[i] *= softcap_slope(logits[i], head.shape);
        }
      }
      if (sums) {
        multiply_add(matrix(sums, rows, width), matrix(gradient.get(), rows, count),
                     matrix(weights, count, width), first > begin);
      }
      if (d_weight) {
        multiply_add(matrix(d_weight + first * width, count, width),
                     transposed(gradient.get(), rows, count), hidden, true, logit_scale);
      }
      for (int64_t i = 0; d_bias && i < rows; ++i) {
        add_scaled_row(d_bias + first, gradient.get() + i * count, count, T(1));
      }
    }
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& grad, const Tensor& hidden,
                                       const Tensor& weight, const Tensor& left,
                                       const Tensor& right, const OptionalTensor& bias,
                                       const Tensor& kl_left, const Tensor& kl_right,
                                       const Tensor& lse_left, const Tensor& lse_right,
                                       double softcap, double logit_scale, bool need_hidden,
                                       bool need_weight, bool need_bias) {
  const int64_t num_rows = hidden.size(0), width = hidden.size(1), vocabulary = weight.size(0);
  const Head<T> head(weight, bias, softcap, logit_scale);
  Tensor d_hidden = empty_of<T>(hidden, {need_hidden ? num_rows : 0, width}),
         d_weight = empty_of<T>(hidden, {need_weight ? vocabulary : 0, width}),
         d_bias = empty_of<T>(hidden, {need_bias ? vocabulary : 0});
  torch::stable::zero_(d_hidden);
  torch::stable::zero_(d_weight);
  torch::stable::zero_(d_bias);
  const Tensor per_pair[] = {in_compute_type<T>(grad), in_compute_type<T>(kl_left),
                             in_compute_type<T>(kl_right), in_compute_type<T>(lse_left),
                             in_compute_type<T>(lse_right)};
  const Backward<T> backward{head,
                             data<const T>(per_pair[0]),
                             data<const T>(per_pair[1]),
                             data<const T>(per_pair[2]),
                             data<const T>(per_pair[3]),
                             data<const T>(per_pair[4]),
                             logit_scale,
                             need_hidden ? data<T>(d_hidden) : nullptr,
                             need_weight ? data<T>(d_weight) : nullptr,
                             need_bias ? data<T>(d_bias) : nullptr};
  for (const PairTile& tile : tile_pairs(data<const int64_t>(left), data<const int64_t>(right),
                                         left.size(0), num_rows, tile_rows<T>())) {
    const auto rows = static_cast<int64_t>(tile.rows.size());
    const Tensor read = gather_rows<T>(hidden, tile.rows);
    const Grid grid(rows, vocabulary, rows, kTasks);
    auto partial = scratch<T>(need_hidden ? grid.slices * rows * width : 0);
    run_tasks(grid.slices, [&](int64_t s) {
      backward.walk(tile, read, grid.slice_begin(s), grid.slice_end(s),
                    need_hidden ? partial.get() + s * rows * width : nullptr);
    });
    for (int64_t i = 0; need_hidden && i < rows; ++i) {
      for (int64_t s = 0; s < grid.slices; ++s) {
        add_scaled_row(data<T>(d_hidden) + tile.rows[i] * width,
                       partial.get() + (s * rows + i) * width, width, static_cast<T>(logit_scale));
      }
    }
  }
  return {d_hidden, d_weight, d_bias};
}

std::tuple<Tensor, Tensor, Tensor> pairwise_symmetric_kl_backward(
    Tensor grad, Tensor hidden, Tensor weight, Tensor left, Tensor right, OptionalTensor bias,
    Tensor kl_left, Tensor kl_right, Tensor lse_left, Tensor lse_right, double softcap,
    double logit_scale, bool need_hidden, bool need_weight, bool need_bias) {
  check_head(kOp, hidden, weight, bias);
  const int64_t count = left.size(0);
  left = checked_index(kOp, "left", left, count, hidden.size(0));
  right = checked_index(kOp, "right", right, count, hidden.size(0));
  check_sizes(kOp, count,
              {{"grad", &grad},
               {"kl_left", &kl_left},
               {"kl_right", &kl_right},
               {"lse_left", &lse_left},
               {"lse_right", &lse_right}});
  const auto call = computes_in_double(hidden) ? &run<double> : &run<float>;
  return call(grad, hidden, weight, left, right, bias, kl_left, kl_right, lse_left, lse_right,
              softcap, logit_scale, need_hidden, need_weight, need_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compact, CPU, m) {
  m.impl("pairwise_symmetric_kl_backward", TORCH_BOX(&pairwise_symmetric_kl_backward));
}

}  // namespace compact
