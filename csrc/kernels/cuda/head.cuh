// Final logits z = softcap(scale * raw + bias) from raw ones, and the two functions that every
// kernel of the head needs: the online log-sum-exp and the slope of the softcap.
#pragma once

#include "kernels/cuda/simt.cuh"

namespace compact::cuda {

template <typename A>
struct Head {
  const A* bias;  // of the first column that the kernel sees; null for none
  A scale;
  A softcap;  // 0 for none

  // z of `count` consecutive raw logits from column `column` on.
  template <int kCount>
  SIMT_DEVICE void finish(A (&z)[kCount], int64_t column) const {
    if (scale != A(1)) {
      for (int i = 0; i < kCount; ++i) z[i] *= scale;
    }
    if (bias != nullptr) {
      for (int i = 0; i < kCount; ++i) z[i] += bias[column + i];
    }
    if (softcap != A(0)) {
      for (int i = 0; i < kCount; ++i) z[i] = softcap * simt::tanh(z[i] / softcap);
    }
  }
  SIMT_DEVICE A finish_one(A raw, int64_t column) const {
    A z[1] = {raw};
    finish(z, column);
    return z[0];
  }
  // Multiplies g by d z / d (scale * raw + bias) = 1 - tanh^2, computed from z.
  template <int kCount>
  SIMT_DEVICE void through_softcap(const A (&z)[kCount], A (&g)[kCount]) const {
    if (softcap == A(0)) return;
    for (int i = 0; i < kCount; ++i) {
      const A t = z[i] / softcap;
      g[i] *= A(1) - t * t;
    }
  }
};

// exp(x) for a difference of logits, by 2^x, which is one instruction.
template <typename A>
SIMT_DEVICE A exp_of(A x) {
  return simt::exp2(x * A(simt::kLog2e));
}

// Stores x rounded to bfloat16, as one access of 16 bytes if address and count allow it.
template <typename A, int kCount>
SIMT_DEVICE void store_bfloat16(simt::bfloat16* at, const A (&x)[kCount]) {
  if constexpr (kCount == simt::Pack<simt::bfloat16>::kSize) {
    if (reinterpret_cast<uintptr_t>(at) % 16 == 0) {
      simt::store_pack(at, simt::narrow_pack<simt::bfloat16>(x));
      return;
    }
  }
  for (int i = 0; i < kCount; ++i) at[i] = simt::narrow<simt::bfloat16>(x[i]);
}

// The state of an online log-sum-exp: the largest logit so far, and relative to it the sums of e =
// exp(z - ref) and of e (z - ref), which give log-sum-exp and entropy, and if asked of e^2. Starts
// empty.
template <typename A, bool kSquares = false>
struct Online {
  A largest = -simt::infinity<A>();
  A sum = 0;
  A moment = 0;
  A squares = 0;  // 0 without kSquares

  // The reference is the largest logit, or 0 if that is infinite: -inf means an excluded class.
  SIMT_DEVICE A reference() const {
    return largest > -simt::infinity<A>() && largest < simt::infinity<A>() ? largest : A(0);
  }
  SIMT_DEVICE A log_sum_exp() const { return reference() + simt::log(sum); }
  // H = log S - (sum of e d) / S with d = z - ref.
  SIMT_DEVICE A entropy() const { return simt::log(sum) - moment / sum; }

  // Changes the reference by -shift. Below -1e4 the old terms are 0; the shift is bounded, because
  // an infinite one would turn them into NaN.
  SIMT_DEVICE void rescale(A shift) {
    if (sum == A(0)) return;
    shift = simt::max(shift, A(-1e4));
    const A factor = exp_of(shift);
    moment = factor * (moment + shift * sum);
    sum *= factor;
    if constexpr (kSquares) squares *= factor * factor;
  }
  SIMT_DEVICE void raise(A candidate) {
    if (!(candidate > largest)) return;
    const A before = reference();
    largest = candidate;
    rescale(before - reference());
  }
  template <int kCount>
  SIMT_DEVICE void add(const A (&z)[kCount]) {
    A peak = z[0];
    for (int i = 1; i < kCount; ++i) peak = simt::max(peak, z[i]);
    raise(peak);
    const A ref = reference();
    for (int i = 0; i < kCount; ++i) {
      const A d = z[i] - ref;
      const A e = exp_of(d);
      sum += e;
      if constexpr (kSquares) squares += e * e;
      moment += e * simt::max(d, A(-1e4));  // e is 0 there, and 0 * -inf would be NaN
    }
  }
  SIMT_DEVICE void merge(Online other) {
    const A peak = simt::max(largest, other.largest);
    other.raise(peak);
    raise(peak);
    sum += other.sum;
    moment += other.moment;
    if constexpr (kSquares) squares += other.squares;
  }
};

template <typename A, bool kSquares>
SIMT_DEVICE Online<A, kSquares> warp_merge(Online<A, kSquares> mine) {
  for (int mask = simt::kWarp / 2; mask > 0; mask /= 2) {
    Online<A, kSquares> other;
    other.largest = simt::shuffle_xor(mine.largest, mask);
    other.sum = simt::shuffle_xor(mine.sum, mask);
    other.moment = simt::shuffle_xor(mine.moment, mask);
    if constexpr (kSquares) other.squares = simt::shuffle_xor(mine.squares, mask);
    mine.merge(other);
  }
  return mine;
}

// Merges the states of the block; every thread gets the same result. `shared` holds a value per
// warp and may be used again after the next barrier; `squares` may be null without kSquares.
template <typename A, bool kSquares>
SIMT_DEVICE Online<A, kSquares> block_merge(Online<A, kSquares> mine, A (&largest)[simt::kWarp],
                                            A (&sum)[simt::kWarp], A (&moment)[simt::kWarp],
                                            A* squares = nullptr) {
  mine = warp_merge(mine);
  if (simt::lane() == 0) {
    largest[simt::warp()] = mine.largest;
    sum[simt::warp()] = mine.sum;
    moment[simt::warp()] = mine.moment;
    if constexpr (kSquares) squares[simt::warp()] = mine.squares;
  }
  simt::barrier();
  Online<A, kSquares> all;
  if (simt::lane() < simt::warps()) {
    all.largest = largest[simt::lane()];
    all.sum = sum[simt::lane()];
    all.moment = moment[simt::lane()];
    if constexpr (kSquares) all.squares = squares[simt::lane()];
  }
  return warp_merge(all);
}

// The logits of a row without the target's: the largest, and how many are larger than the target's.
// The target is left out by its column.
template <typename A>
struct Rivals {
  int64_t target;
  A own;  // the target's logit; NaN if there is none, and then no logit is larger
  A largest = -simt::infinity<A>();
  int larger = 0;

  template <int kCount>
  SIMT_DEVICE void add(int64_t column, const A (&z)[kCount]) {
    const bool here = target >= column && target < column + kCount;
    for (int i = 0; i < kCount; ++i) {
      if (here && column + i == target) continue;
      largest = simt::max(largest, z[i]);
      larger += z[i] > own;
    }
  }
};

// Merges the states of the block; every thread gets the same result. The shared arrays may be used
// again after the next barrier.
template <typename A>
SIMT_DEVICE Rivals<A> block_merge(Rivals<A> mine, A (&largest)[simt::kWarp],
                                  int (&larger)[simt::kWarp]) {
  mine.largest = simt::warp_max(mine.largest);
  mine.larger = simt::warp_sum(mine.larger);
  if (simt::lane() == 0) {
    largest[simt::warp()] = mine.largest;
    larger[simt::warp()] = mine.larger;
  }
  simt::barrier();
  const bool used = simt::lane() < simt::warps();
  mine.largest = simt::warp_max(used ? largest[simt::lane()] : -simt::infinity<A>());
  mine.larger = simt::warp_sum(used ? larger[simt::lane()] : 0);
  return mine;
}

// The sum over the block, the same in every thread and in every run. `shared` may be used again
// after the next barrier.
template <typename A>
SIMT_DEVICE A block_sum(A mine, A (&shared)[simt::kWarp]) {
  mine = simt::warp_sum(mine);
  if (simt::lane() == 0) shared[simt::warp()] = mine;
  simt::barrier();
  return simt::warp_sum(simt::lane() < simt::warps() ? shared[simt::lane()] : A(0));
}

// Replaces a row in place, by all threads of the block. change(column, z) gets the values from
// `column` on in an array of one element or one pack, and overwrites them by the new values.
template <typename T, typename Change>
SIMT_DEVICE void rewrite_row(T* row, int64_t cols, const Change& change) {
  using A = simt::accumulate_t<T>;
  constexpr int kPack = simt::Pack<T>::kSize;
  const simt::Split<T> split(row, cols);
  for (int64_t i = simt::thread(); i < split.packs; i += simt::threads()) {
    const int64_t column = split.head + i * kPack;
    A z[kPack];
    simt::widen(simt::load_pack(row + column), z);
    change(column, z);
    simt::store_pack(row + column, simt::narrow_pack<T>(z));
  }
  const int64_t single = split.single(simt::thread());
  if (single >= 0) {
    A z[1] = {simt::to_float(row[single])};
    change(single, z);
    row[single] = simt::narrow<T>(z[0]);
  }
}

// The gradient of one row: upstream * (exp(z - ref) * over_sum - [v = target]) * softcap'(z).
// A row without one (`none`: ignored, or upstream is 0) gets zeros, also if a logit is not finite.
template <typename A>
struct RowGradient {
  Head<A> head;
  int64_t target;
  bool none;
  A ref, over_sum, upstream;

  // z: on entry raw logits from `column` on, on return the gradient.
  template <int kCount>
  SIMT_DEVICE void operator()(int64_t column, A (&z)[kCount]) const {
    A part[kCount];
    (*this)(column, z, part);
  }
  // The same; also returns `part`, the softmax part of d nll / d x, which is 0 at the target.
  template <int kCount>
  SIMT_DEVICE void operator()(int64_t column, A (&z)[kCount], A (&part)[kCount]) const {
    head.finish(z, column);
    for (int i = 0; i < kCount; ++i) part[i] = exp_of(z[i] - ref) * over_sum;
    A own[1] = {0};  // the new value of the target's part
    if (target >= column && target < column + kCount) {
      for (int i = 0; i < kCount; ++i) {
        if (column + i == target) {
          const A at_target[1] = {z[i]};
          own[0] = part[i] - A(1);
          head.through_softcap(at_target, own);
          part[i] = A(0);
        }
      }
    }
    head.through_softcap(z, part);
    for (int i = 0; i < kCount; ++i) z[i] = upstream * (column + i == target ? own[0] : part[i]);
    if (none) {
      for (int i = 0; i < kCount; ++i) z[i] = part[i] = A(0);
    }
  }
};

}  // namespace compact::cuda
