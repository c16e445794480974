// grad @ weight, where the entries of grad below eps are rounded at random to 0 or eps, without
// bias. If the gradient of a softmax is nearly all zeros, only few rows of weight are needed, which
// is much less work than the dense product.
//
// A block computes a range of the columns of one output row. It processes the row of grad tile by
// tile: every thread reads one pack, the nonzero entries are listed in shared memory in a fixed
// order, and all threads add weight[v] of the listed v to their columns. A tile without nonzero
// entries costs one barrier.
#pragma once

#include "kernels/cuda/simt.cuh"

namespace compact::cuda {

inline constexpr int kFilterThreads = 256;

template <typename T>
struct FilteredMatmul {
  using A = simt::accumulate_t<T>;

  const T* grad;    // [rows, inner]
  const T* weight;  // [inner, width]
  int64_t inner, width;
  int64_t stretches;  // blocks a row
  A eps;
  const A* row_scale;               // [rows], the threshold of a row is eps |row_scale|; null for 1
  bool packed_grad, packed_weight;  // rows start at multiples of 16 bytes
  A* out;                           // [rows, width]
};

// A number in [0, 1): a hash of the entry's float32 bits and its column, so the same entry in the
// same column gives the same number. Constants of lowbias32 by C. Wellons.
SIMT_DEVICE float hashed(float value, int64_t column) {
  uint32_t h = simt::bits_of(value) ^ (static_cast<uint32_t>(column) * 0x9e3779b1u);
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  h ^= h >> 16;
  return static_cast<float>(h >> 8) * 0x1p-24f;
}

// Stochastic rounding: an entry below eps becomes eps with the probability that keeps the mean,
// else 0. A NaN stays NaN.
template <typename A>
SIMT_DEVICE A rounded_at_random(A value, A eps, int64_t column) {
  const A size = simt::abs(value);
  if (!(size < eps)) return value;
  if (!(size > hashed(static_cast<float>(value), column) * eps)) return 0;
  return value < 0 ? -eps : eps;
}

template <typename T>
SIMT_KERNEL(kFilterThreads)
filtered_matmul_kernel(FilteredMatmul<T> args) {
  using A = simt::accumulate_t<T>;
  constexpr int kPack = simt::Pack<T>::kSize;
  constexpr int kTile = kFilterThreads * kPack;
  SIMT_SHARED(int, kept_index, kTile);
  SIMT_SHARED(A, kept_value, kTile);
  SIMT_SHARED(int, kept_of_warp, 2 * simt::kWarp);  // of two tiles in turn

  const int64_t row = simt::block() / args.stretches;
  const int64_t stretch = simt::block() % args.stretches;
  const T* grad = args.grad + row * args.inner;
  const int64_t column = (stretch * simt::threads() + simt::thread()) * kPack;
  const int64_t owned = args.width - column;  // columns from `column` on; may be negative
  const A eps = args.row_scale == nullptr ? args.eps : args.eps * simt::abs(args.row_scale[row]);
  A sum[kPack] = {};

  const int64_t tile = static_cast<int64_t>(simt::threads()) * kPack;
  int turn = 0;
  for (int64_t base = 0; base < args.inner; base += tile, turn ^= 1) {
    const int64_t at = base + simt::thread() * kPack;
    A g[kPack] = {};
    if (args.packed_grad && at + kPack <= args.inner) {
      simt::widen(simt::load_pack(grad + at), g);
    } else {
      for (int j = 0; j < kPack; ++j)
        if (at + j < args.inner) g[j] = simt::to_float(grad[at + j]);
    }
    // The nonzero entries of a warp are ordered by j, then by lane.
    uint32_t stays[kPack];
    int of_warp = 0;
    for (int j = 0; j < kPack; ++j) {
      g[j] = rounded_at_random(g[j], eps, at + j);
      stays[j] = simt::ballot(g[j] != 0);  // entries past the end are 0
      of_warp += simt::count_bits(stays[j]);
    }
    if (simt::lane() == 0) kept_of_warp[turn * simt::kWarp + simt::warp()] = of_warp;
    simt::barrier();
    int position = 0, kept = 0;
    for (int w = 0; w < simt::warps(); ++w) {
      if (w == simt::warp()) position = kept;
      kept += kept_of_warp[turn * simt::kWarp + w];
    }
    if (kept == 0) continue;
    for (int j = 0; j < kPack; ++j) {
      const uint32_t before = stays[j] & ((1u << simt::lane()) - 1u);
      if (stays[j] >> simt::lane() & 1u) {
        kept_index[position + simt::count_bits(before)] = static_cast<int>(at + j - base);
        kept_value[position + simt::count_bits(before)] = g[j];
      }
      position += simt::count_bits(stays[j]);
    }
    simt::barrier();
    for (int k = 0; k < kept && owned > 0; ++k) {
      const T* from = args.weight + (base + kept_index[k]) * args.width + column;
      const A value = kept_value[k];
      if (args.packed_weight) {
        A x[kPack];
        simt::widen(simt::load_pack(from), x);
        for (int j = 0; j < kPack; ++j) sum[j] += value * x[j];
      } else {
        for (int j = 0; j < kPack; ++j)
          if (j < owned) sum[j] += value * simt::to_float(from[j]);
      }
    }
    // The next tile writes the list after its first barrier.
  }
  A* out = args.out + row * args.width + column;
  for (int j = 0; j < kPack; ++j)
    if (j < owned) out[j] = sum[j];
}

}  // namespace compact::cuda
