// KL(p || q) and KL(q || p) of pairs of rows, block by block over the vocabulary.
//
// With u = z - reference, KL(p || q) = sum p (u_p - u_q) - (log S_p - log S_q), S = sum exp(u).
// Relative to the references, the differences are small if p and q are close, so no digits cancel.
// A row's logits and exponentials are computed once for all of its pairs.
#include <cmath>
#include <cstring>
#include <tuple>

#include "kernels/cpu/pairwise_symmetric_kl.h"
#include "ops/head.h"
#include "ops/pairs.h"

namespace compact {
namespace {

constexpr const char* kOp = "pairwise_symmetric_kl";

// The sums of one pair over a slice: of exp(u_p) (u_p - u_q) and exp(u_q) (u_p - u_q).
struct PairState {
  double left = 0.0, right = 0.0;
};

// A row without a finite logit so far has the reference -inf, which counts as 0 in differences.
template <class T>
double finite(T reference) {
  return reference == -std::numeric_limits<T>::infinity() ? 0.0 : static_cast<double>(reference);
}

// The sums of one slice of the vocabulary for the rows and pairs of a tile.
template <class T>
struct Slice {
  std::vector<RowState<T>> rows;
  std::vector<PairState> pairs;
};

// Converts the sums of a pair from the references in `from` to those in `to`. The sums of the rows
// are relative to `from`.
template <class T>
void move_pair(PairState* state, const RowState<T>& from_p, const RowState<T>& from_q,
               const RowState<T>& to_p, const RowState<T>& to_q) {
  const double moved_p = finite(from_p.reference) - finite(to_p.reference);
  const double moved_q = finite(from_q.reference) - finite(to_q.reference);
  if (moved_p == 0.0 && moved_q == 0.0) return;
  const double moved = moved_p - moved_q;
  const auto shift = [moved](double weighted, double sum, double factor) {
    return factor > 0.0 && sum != 0.0 ? factor * (weighted + moved * sum) : 0.0 * weighted;
  };
  state->left = shift(state->left, from_p.sum, std::exp(moved_p));
  state->right = shift(state->right, from_q.sum, std::exp(moved_q));
}

template <class T>
void walk(const Head<T>& head, const PairTile& tile, const Tensor& hidden, int64_t begin,
          int64_t end, Slice<T>* slice) {
  const auto rows = static_cast<int64_t>(tile.rows.size());
  slice->rows.assign(rows, {});
  slice->pairs.assign(tile.pairs.size(), {});
  auto logits = scratch<T>(rows * kBlock), weights_e = scratch<T>(rows * kBlock);
  auto buffer = scratch<T>(head.converts() ? kBlock * head.width : 0);
  // e must be the plain exponential, without the derivative of the softcap.
  const LogitShape<T> plain{T(1), T(0), nullptr};
  std::vector<RowState<T>> before;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    const T* weights = head.block(first, count, buffer.get());
    multiply(matrix(logits.get(), rows, count), hidden, transposed(weights, count, head.width));
    before = slice->rows;
    for (int64_t i = 0; i < rows; ++i) {
      T* z = logits.get() + i * count;
      T* e = weights_e.get() + i * count;
      const T peak = finish_logits(z, count, first, head.shape);
      std::memcpy(e, z, count * sizeof(T));
      exp_piece(e, count, peak, plain, &slice->rows[i]);
    }
    for (size_t k = 0; k < tile.pairs.size(); ++k) {
      const int64_t p = tile.pairs[k].left, q = tile.pairs[k].right;
      const RowState<T>&now_p = slice->rows[p], &now_q = slice->rows[q];
      move_pair(&slice->pairs[k], before[p], before[q], now_p, now_q);
      const T offset = static_cast<T>(finite(now_p.reference) - finite(now_q.reference));
      pair_sums(logits.get() + p * count, logits.get() + q * count, weights_e.get() + p * count,
                weights_e.get() + q * count, count, offset, &slice->pairs[k].left,
                &slice->pairs[k].right);
    }
  }
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> run(const Tensor& hidden, const Tensor& weight,
                                               const Tensor& left, const Tensor& right,
                                               const OptionalTensor& bias, double softcap,
                                               double logit_scale) {
  const int64_t count = left.size(0);
  const Head<T> head(weight, bias, softcap, logit_scale);
  Tensor kl_left = empty_of<T>(hidden, {count}), kl_right = empty_of<T>(hidden, {count}),
         lse_left = empty_of<T>(hidden, {count}), lse_right = empty_of<T>(hidden, {count});
  for (const PairTile& tile : tile_pairs(data<const int64_t>(left), data<const int64_t>(right),
                                         count, hidden.size(0), tile_rows<T>())) {
    const auto rows = static_cast<int64_t>(tile.rows.size());
    const Tensor read = gather_rows<T>(hidden, tile.rows);
    const Grid grid(rows, head.vocabulary, rows, kTasks);
    std::vector<Slice<T>> slices(grid.slices);
    run_tasks(grid.slices, [&](int64_t s) {
      walk(head, tile, read, grid.slice_begin(s), grid.slice_end(s), &slices[s]);
    });
    // Convert all slices to the largest reference of each row.
    std::vector<RowState<T>> total = slices[0].rows;
    for (int64_t i = 0; i < rows; ++i) {
      total[i].sum = 0.0;
      for (const Slice<T>& slice : slices) {
        total[i].reference = std::max(total[i].reference, slice.rows[i].reference);
      }
      for (const Slice<T>& slice : slices) {
        const double moved = finite(slice.rows[i].reference) - finite(total[i].reference);
        total[i].sum += slice.rows[i].sum * std::exp(moved);
      }
    }
    for (size_t k = 0; k < tile.pairs.size(); ++k) {
      const Pair& pair = tile.pairs[k];
      const RowState<T>&p = total[pair.left], &q = total[pair.right];
      PairState sums;
      for (Slice<T>& slice : slices) {
        move_pair(&slice.pairs[k], slice.rows[pair.left], slice.rows[pair.right], p, q);
        sums.left += slice.pairs[k].left;
        sums.right += slice.pairs[k].right;
      }
      const double apart = std::log(p.sum) - std::log(q.sum);
      data<T>(kl_left)[pair.index] = static_cast<T>(sums.left / p.sum - apart);
      data<T>(kl_right)[pair.index] = static_cast<T>(apart - sums.right / q.sum);
      data<T>(lse_left)[pair.index] = static_cast<T>(p.reference + std::log(p.sum));
      data<T>(lse_right)[pair.index] = static_cast<T>(q.reference + std::log(q.sum));
    }
  }
  return {kl_left, kl_right, lse_left, lse_right};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pairwise_symmetric_kl(Tensor hidden, Tensor weight,
                                                                 Tensor left, Tensor right,
                                                                 OptionalTensor bias,
                                                                 double softcap,
                                                                 double logit_scale) {
  check_head(kOp, hidden, weight, bias);
  left = checked_index(kOp, "left", left, left.size(0), hidden.size(0));
  right = checked_index(kOp, "right", right, left.size(0), hidden.size(0));
  const auto call = computes_in_double(hidden) ? &run<double> : &run<float>;
  return call(hidden, weight, left, right, bias, softcap, logit_scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compact, CPU, m) {
  m.impl("pairwise_symmetric_kl", TORCH_BOX(&pairwise_symmetric_kl));
}

}  // namespace compact
