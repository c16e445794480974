// Gradients of the LM head for an upstream gradient: from the stash, or from logits that are
// computed again.
//
// Rows are processed in chunks. Within a chunk a task is a slice of the vocabulary, so only one
// task writes each block of dW = G^T @ hidden. dH = G @ W is summed per slice, and then over the
// slices in order.
#include <cmath>
#include <cstring>
#include <tuple>

#include "ops/head.h"

namespace compact {
namespace {

constexpr const char* kOp = "linear_token_stats_backward";
constexpr int64_t kChunkRows = 1024;

template <class T>
struct Backward {
  const Head<T>& head;
  const Grid grid;        // tiles are the chunks of rows
  const Tensor hidden;    // [M, H] gathered, in the compute type
  const int64_t* target;  // [M]
  const T *grad, *nll, *lse;
  const int64_t ignore_index;
  const double logit_scale, filter_eps;
  const uint16_t* stash;            // [M, V] or nullptr
  const float* shift;               // [M, V / kStashBlock] or nullptr
  T *d_hidden, *d_weight, *d_bias;  // nullptr where not needed

  void run() {
    const int64_t width = head.width;
    const int64_t largest = std::min(grid.rows, grid.tile_rows);
    auto partial = scratch<T>(d_hidden ? grid.slices * largest * width : 0);
    for (int64_t chunk = 0; chunk < grid.tiles; ++chunk) {
      const int64_t begin = grid.tile_begin(chunk), rows = grid.tile_end(chunk) - begin;
      run_tasks(grid.slices, [&](int64_t slice) {
        walk(begin, rows, slice, d_hidden ? partial.get() + slice * largest * width : nullptr);
      });
      if (!d_hidden) continue;
      run_tasks(ceil_div(rows, 64), [&](int64_t tile) {
        for (int64_t i = tile * 64; i < std::min(rows, (tile + 1) * 64); ++i) {
          T* out = d_hidden + (begin + i) * width;
          std::memset(out, 0, width * sizeof(T));
          for (int64_t s = 0; s < grid.slices; ++s) {
            add_scaled_row(out, partial.get() + (s * largest + i) * width, width,
                           static_cast<T>(logit_scale));
          }
        }
      });
    }
  }

  void walk(int64_t row_begin, int64_t rows, int64_t slice, T* sums) {
    const int64_t width = head.width;
    const int64_t begin = grid.slice_begin(slice), end = grid.slice_end(slice);
    auto block = scratch<T>(rows * kBlock);
    auto buffer = scratch<T>(head.converts() ? kBlock * width : 0);
    const Tensor read = matrix(data<const T>(hidden) + row_begin * width, rows, width);
    const bool sparse = filter_eps > 0.0;
    if (sums && sparse) std::memset(sums, 0, rows * width * sizeof(T));
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t count = std::min(kBlock, end - first);
      const Tensor gradient = matrix(block.get(), rows, count);
      const T* weights = stash && !d_hidden ? nullptr : head.block(first, count, buffer.get());
      if (!stash) multiply(gradient, read, transposed(weights, count, width));
      for (int64_t i = 0; i < rows; ++i) {
        fill_row(block.get() + i * count, row_begin + i, first, count);
        if (sums && sparse) {
          add_sparse_product(sums + i * width, block.get() + i * count, count, first,
                             static_cast<T>(filter_eps * std::abs(upstream(row_begin + i))),
                             weights, width);
        }
      }
      if (sums && !sparse) {
        multiply_add(matrix(sums, rows, width), gradient, matrix(weights, count, width),
                     first > begin);
      }
      if (d_weight) {
        multiply_add(matrix(d_weight + first * width, count, width),
                     transposed(block.get(), rows, count), read, row_begin > 0, logit_scale);
      }
      if (d_bias) {
        if (row_begin == 0) std::memset(d_bias + first, 0, count * sizeof(T));
        for (int64_t i = 0; i < rows; ++i) {
          add_scaled_row(d_bias + first, block.get() + i * count, count, T(1));
        }
      }
    }
  }

  T upstream(int64_t m) const { return target[m] == ignore_index ? T(0) : grad[m]; }

  // One row of a block: replaces logits (or, with a stash, any content) by upstream * d nll / d x.
  void fill_row(T* row, int64_t m, int64_t first, int64_t count) {
    const T factor = upstream(m);
    const int64_t wanted = target[m] - first;
    const bool here = wanted >= 0 && wanted < count;
    if (factor == T(0)) {
      std::memset(row, 0, count * sizeof(T));
    } else if (stash) {
      const int64_t blocks = ceil_div(head.vocabulary, kStashBlock);
      const T moved = shift ? std::exp(shift[m * blocks + first / kStashBlock] - lse[m]) : T(1);
      from_bfloat16(stash + m * head.vocabulary + first, count, factor * moved, row);
      // p - 1 at the target is computed from nll, which is exact also if p is close to 1.
      if (here)
        row[wanted] = factor * std::expm1(-nll[m]) * softcap_slope(lse[m] - nll[m], head.shape);
    } else {
      finish_logits(row, count, first, head.shape);
      const T slope = here ? softcap_slope(row[wanted], head.shape) : T(0);
      gradient_piece(row, count, lse[m], factor, head.shape);
      if (here) row[wanted] -= factor * slope;
    }
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> run(
    const Tensor& grad, const Tensor& hidden, const Tensor& weight, const Tensor& target,
    const OptionalTensor& rows, const OptionalTensor& bias, const Tensor& nll, const Tensor& lse,
    const OptionalTensor& stash, const OptionalTensor& shift, double softcap, double logit_scale,
    int64_t ignore_index, double filter_eps, bool need_hidden, bool need_weight, bool need_bias) {
  const int64_t count = target.size(0), width = hidden.size(1), vocabulary = weight.size(0);
  const Head<T> head(weight, bias, softcap, logit_scale);
  Tensor d_hidden = empty_of<T>(hidden, {need_hidden ? count : 0, width}),
         d_weight = empty_of<T>(hidden, {need_weight ? vocabulary : 0, width}),
         d_bias = empty_of<T>(hidden, {need_bias ? vocabulary : 0});
  if (count == 0) {
    torch::stable::zero_(d_weight);
    torch::stable::zero_(d_bias);
    return {d_hidden, d_weight, d_bias};
  }
  const Tensor upstream = in_compute_type<T>(grad), row_nll = in_compute_type<T>(nll),
               row_lse = in_compute_type<T>(lse);
  const bool shifted = shift && shift->numel() > 0;
  Backward<T> backward{head,
                       Grid(count, vocabulary, kChunkRows, kTasks * ceil_div(count, kChunkRows)),
                       rows ? gather_rows<T>(hidden, *rows) : in_compute_type<T>(hidden),
                       data<const int64_t>(target),
                       data<const T>(upstream),
                       data<const T>(row_nll),
                       data<const T>(row_lse),
                       ignore_index,
                       logit_scale,
                       filter_eps,
                       stash ? data<const uint16_t>(*stash) : nullptr,
                       shifted ? data<const float>(*shift) : nullptr,
                       need_hidden ? data<T>(d_hidden) : nullptr,
                       need_weight ? data<T>(d_weight) : nullptr,
                       need_bias ? data<T>(d_bias) : nullptr};
  backward.run();
  return {d_hidden, d_weight, d_bias};
}

std::tuple<Tensor, Tensor, Tensor> linear_token_stats_backward(
    Tensor grad, Tensor hidden, Tensor weight, Tensor target, OptionalTensor rows,
    OptionalTensor bias, Tensor nll, Tensor lse, OptionalTensor stash, OptionalTensor shift,
    double softcap, double logit_scale, int64_t ignore_index, double filter_eps, bool need_hidden,
    bool need_weight, bool need_bias) {
  check_head(kOp, hidden, weight, bias);
  const int64_t count = rows ? rows->size(0) : hidden.size(0);
  target = checked_index(kOp, "target", target, count, weight.size(0), ignore_index);
  if (rows) rows = checked_index(kOp, "rows", *rows, count, hidden.size(0));
  check_size(kOp, "grad", grad, 0, count);
  check_size(kOp, "nll", nll, 0, count);
  check_size(kOp, "lse", lse, 0, count);
  if (stash) {
    require(!need_hidden, kOp, ": with a stash d_hidden comes from the unit gradient");
    check_dtype(kOp, "stash", *stash, {ScalarType::BFloat16});
    check_size(kOp, "stash", *stash, 0, count);
    check_size(kOp, "stash", *stash, 1, weight.size(0));
    check_contiguous(kOp, "stash", *stash);
    if (shift) check_contiguous(kOp, "stash_shift", *shift);
  }
  const auto call = computes_in_double(hidden) ? &run<double> : &run<float>;
  return call(grad, hidden, weight, target, rows, bias, nll, lse, stash, shift, softcap,
              logit_scale, ignore_index, filter_eps, need_hidden, need_weight, need_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compact, CPU, m) {
  m.impl("linear_token_stats_backward", TORCH_BOX(&linear_token_stats_backward));
}

}  // namespace compact
