// The gradient of the head from the blocks of e that linear_token_stats_fused stored:
// dW += logit_scale * e^T @ (s * hidden), s = grad * exp(shift - lse). It scales the rows of hidden
// instead of those of e, so the blocks need no change. A task is a slice of the vocabulary, so only
// one task writes each row of dW.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "ops/head.h"

namespace compact {
namespace {

constexpr const char* kOp = "linear_token_stats_fused_backward";

template <class T>
struct FusedBackward {
  const Grid tiles;            // rows by tiles, as in the forward
  const LogitShape<T>& shape;  // only its softcap and scale are used
  T* blocks;                   // [R * V], see fused_block()
  const T *hidden, *grad, *nll, *lse;
  const T* shift;         // [R, V / kStashBlock]
  const int64_t* target;  // [R]
  const int64_t ignore_index, width;
  T *d_weight, *d_bias;  // nullptr where not needed

  void run() {
    const Grid slices(tiles.rows, tiles.vocabulary, std::max<int64_t>(tiles.rows, 1), kTasks);
    run_tasks(slices.slices, [&](int64_t slice) {
      for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
        walk(tiles.tile_begin(tile), tiles.tile_end(tile), slices.slice_begin(slice),
             slices.slice_end(slice));
      }
    });
  }

  // The factor grad of row m in s; 0 for an ignored token.
  T upstream(int64_t m) const { return target[m] == ignore_index ? T(0) : grad[m]; }

  void walk(int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
    const int64_t rows = row_end - row_begin;
    const int64_t references = ceil_div(tiles.vocabulary, kStashBlock);
    auto scaled = scratch<T>(rows * width);  // s * hidden
    std::vector<T> scale(rows, T(0));
    std::vector<T> known(rows, std::numeric_limits<T>::quiet_NaN());
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t count = std::min(kBlock, end - first);
      T* e = fused_block(blocks, tiles.vocabulary, row_begin, rows, first);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t m = row_begin + i;
        const T reference = shift[m * references + first / kStashBlock];
        if (known[i] != reference) {  // the reference of a row rarely changes
          known[i] = reference;
          scale[i] = upstream(m) == T(0) ? T(0) : upstream(m) * std::exp(reference - lse[m]);
          std::memset(scaled.get() + i * width, 0, width * sizeof(T));
          add_scaled_row(scaled.get() + i * width, hidden + m * width, width, scale[i]);
        }
        // A token with weight 0 adds nothing, with any logits. The target's entry is set below.
        if (upstream(m) == T(0)) std::memset(e + i * count, 0, count * sizeof(T));
        if (target[m] >= first && target[m] < first + count) e[i * count + target[m] - first] = 0;
        if (d_bias) add_scaled_row(d_bias + first, e + i * count, count, scale[i]);
      }
      if (d_weight) {
        multiply_add(matrix(d_weight + first * width, count, width), transposed(e, rows, count),
                     matrix(scaled.get(), rows, width), true, shape.scale);
      }
      for (int64_t m = row_begin; m < row_end; ++m) {
        if (target[m] >= first && target[m] < first + count) add_target(m);
      }
    }
  }

  // p - 1 at the target is computed from nll, which is exact also if p is close to 1.
  void add_target(int64_t m) {
    if (upstream(m) == T(0)) return;
    const T slope = softcap_slope(lse[m] - nll[m], shape);
    const T factor = upstream(m) * std::expm1(-nll[m]) * slope;
    if (d_bias) d_bias[target[m]] += factor;
    if (d_weight) {
      add_scaled_row(d_weight + target[m] * width, hidden + m * width, width, factor * shape.scale);
    }
  }
};

template <class T>
void run(const Tensor& d_weight, const Tensor& d_bias, const Tensor& blocks, const Tensor& grad,
         const Tensor& hidden, const Tensor& target, const Tensor& nll, const Tensor& lse,
         const Tensor& shift, double softcap, double logit_scale, int64_t ignore_index) {
  const Tensor upstream = in_compute_type<T>(grad), read = in_compute_type<T>(hidden);
  const LogitShape<T> shape{static_cast<T>(logit_scale), static_cast<T>(softcap), nullptr};
  FusedBackward<T> backward{Grid(target.size(0), blocks.size(1), tile_rows<T>(), kTasks),
                            shape,
                            data<T>(blocks),
                            data<const T>(read),
                            data<const T>(upstream),
                            data<const T>(nll),
                            data<const T>(lse),
                            data<const T>(shift),
                            data<const int64_t>(target),
                            ignore_index,
                            hidden.size(1),
                            d_weight.size(0) > 0 ? data<T>(d_weight) : nullptr,
                            d_bias.size(0) > 0 ? data<T>(d_bias) : nullptr};
  backward.run();
}

void linear_token_stats_fused_backward(Tensor d_weight, Tensor d_bias, Tensor blocks, Tensor grad,
                                       Tensor hidden, Tensor target, Tensor nll, Tensor lse,
                                       Tensor shift, double softcap, double logit_scale,
                                       int64_t ignore_index) {
  check_dim(kOp, "hidden", hidden, 2);
  const int64_t count = hidden.size(0), vocabulary = blocks.size(1);
  check_blocks(kOp, blocks, count, vocabulary, hidden);
  target = checked_index(kOp, "target", target, count, vocabulary, ignore_index);
  const ScalarType type = computes_in_double(hidden) ? ScalarType::Double : ScalarType::Float;
  check_size(kOp, "grad", grad, 0, count);
  const auto check_of_type = [&](const char* name, const Tensor& t) {
    check_dtype(kOp, name, t, {type});
    check_contiguous(kOp, name, t);
  };
  check_of_type("nll", nll);
  check_of_type("lse", lse);
  check_of_type("d_weight", d_weight);
  check_of_type("d_bias", d_bias);
  check_size(kOp, "nll", nll, 0, count);
  check_size(kOp, "lse", lse, 0, count);
  if (d_weight.size(0) > 0) check_size(kOp, "d_weight", d_weight, 0, vocabulary);
  if (d_bias.size(0) > 0) check_size(kOp, "d_bias", d_bias, 0, vocabulary);
  check_size(kOp, "d_weight", d_weight, 1, hidden.size(1));
  check_size(kOp, "shift", shift, 0, count);
  check_size(kOp, "shift", shift, 1, ceil_div(vocabulary, kStashBlock));
  check_of_type("shift", shift);
  const auto call = computes_in_double(hidden) ? &run<double> : &run<float>;
  call(d_weight, d_bias, blocks, grad, hidden, target, nll, lse, shift, softcap, logit_scale,
       ignore_index);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compact, CPU, m) {
  m.impl("linear_token_stats_fused_backward", TORCH_BOX(&linear_token_stats_fused_backward));
}

}  // namespace compact
