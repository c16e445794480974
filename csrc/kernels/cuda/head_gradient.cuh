// The head's gradient for the backward, where the log-sum-exp is known: replaces a block of raw
// logits, some rows and some columns of the vocabulary, by upstream * d nll / d x. One thread block
// per row.
#pragma once

#include "kernels/cuda/head.cuh"

namespace compact::cuda {

inline constexpr int kGradientThreads = 256;

template <typename T>
struct HeadGradient {
  using A = simt::accumulate_t<T>;

  T* logits;  // [rows, cols] raw logits in, gradient out
  int64_t cols;
  int64_t first, vocabulary;  // column 0 is entry `first` of a vocabulary of this size
  const int64_t* target;      // [rows]
  const A* upstream;          // [rows]
  const A* nll;               // [rows]
  const A* lse;               // [rows]
  Head<A> head;
  A out_scale;
  int64_t ignore_index;
  // From the stash instead: [rows, vocabulary], softmax part of d nll / d x, 0 at the target.
  const simt::bfloat16* stash;
};

// Whether a token has no gradient, whatever its logits are.
template <typename A>
SIMT_DEVICE bool without(int64_t target, int64_t ignore_index, A upstream) {
  return target == ignore_index || upstream == A(0);
}

template <typename T>
SIMT_DEVICE simt::accumulate_t<T> upstream_of(const HeadGradient<T>& args, int64_t r) {
  const int64_t target = args.target[r];
  if (target < 0 || target >= args.vocabulary) return simt::nan<simt::accumulate_t<T>>();
  return args.upstream[r] * args.out_scale;
}

template <typename T>
SIMT_KERNEL(kGradientThreads)
head_gradient_kernel(HeadGradient<T> args) {
  using A = simt::accumulate_t<T>;
  const int64_t r = simt::block();
  const RowGradient<A> gradient{args.head,
                                args.target[r] - args.first,
                                without(args.target[r], args.ignore_index, args.upstream[r]),
                                args.lse[r],
                                A(1),
                                upstream_of(args, r)};
  rewrite_row(args.logits + r * args.cols, args.cols, gradient);
}

// The same from the stash. Only the target's own term is computed again,
// (p_t - 1) softcap'(z_t) with p_t = exp(-nll) and z_t = lse - nll.
template <typename T>
SIMT_KERNEL(kGradientThreads)
stash_gradient_kernel(HeadGradient<T> args) {
  using A = simt::accumulate_t<T>;
  const int64_t r = simt::block();
  const int64_t target = args.target[r] - args.first;
  const bool none = without(args.target[r], args.ignore_index, args.upstream[r]);
  const A upstream = upstream_of(args, r);
  A z[1] = {args.lse[r] - args.nll[r]}, own[1] = {simt::expm1(-args.nll[r])};
  args.head.through_softcap(z, own);
  const simt::bfloat16* stash = args.stash + r * args.vocabulary + args.first;
  T* row = args.logits + r * args.cols;
  for (int64_t column = simt::thread(); column < args.cols; column += simt::threads()) {
    const A part = column == target ? own[0] : A(simt::to_float(stash[column]));
    row[column] = simt::narrow<T>(none ? A(0) : upstream * part);
  }
}

// For a product of `matrix` with rows times `upstream`: a token without a gradient gets a row of
// zeros and the factor 0, because 0 * inf and NaN * 0 would be NaN.
template <typename A>
struct ClearRows {
  A* matrix;              // [rows, cols]
  const A* upstream;      // [rows]
  const int64_t* target;  // [rows]
  A* factor;              // [rows], upstream or 0
  int64_t cols, ignore_index;
};

template <typename A>
SIMT_KERNEL(kGradientThreads)
clear_rows_kernel(ClearRows<A> args) {
  const int64_t r = simt::block();
  const bool none = without(args.target[r], args.ignore_index, args.upstream[r]);
  if (simt::thread() == 0) args.factor[r] = none ? A(0) : args.upstream[r];
  if (!none) return;
  A* row = args.matrix + r * args.cols;
  for (int64_t column = simt::thread(); column < args.cols; column += simt::threads())
    row[column] = A(0);
}

// The gradient of the bias: out[c] = factor * sum over the rows of matrix[r, c], in the order of
// the rows. With weights, out[c] += factor * sum of weight[r] * matrix[r, c].
template <typename T>
struct ColumnSum {
  using A = simt::accumulate_t<T>;

  const T* matrix;  // [rows, cols]
  const A* weight;  // [rows], null for none
  int64_t rows, cols;
  A factor;
  A* out;  // [cols]
};

template <typename T>
SIMT_KERNEL(kGradientThreads)
column_sum_kernel(ColumnSum<T> args) {
  using A = simt::accumulate_t<T>;
  const int64_t column = simt::block() * simt::threads() + simt::thread();
  if (column >= args.cols) return;
  A sum = 0;
  for (int64_t r = 0; r < args.rows; ++r) {
    const A x = simt::to_float(args.matrix[r * args.cols + column]);
    sum += args.weight == nullptr ? x : args.weight[r] * x;
  }
  const A before = args.weight == nullptr ? A(0) : args.out[column];
  args.out[column] = before + args.factor * sum;
}

// out[i] += x[i].
template <typename T>
struct AddTo {
  const T* x;  // [count]
  int64_t count;
  simt::accumulate_t<T>* out;  // [count]
};

template <typename T>
SIMT_KERNEL(kGradientThreads)
add_to_kernel(AddTo<T> args) {
  const int64_t i = simt::block() * simt::threads() + simt::thread();
  if (i < args.count) args.out[i] += simt::to_float(args.x[i]);
}

}  // namespace compact::cuda
