// out[rows[m]] += weight[group[m]] * unit[m] without atomics. An item of weight 0 adds nothing,
// also if its unit is not finite. The items are sorted by row. The block of the first item of a row
// sums the row's items in their order; the blocks of the other items do nothing. So no two blocks
// write the same row, and the sum is the same in every run.
#pragma once

#include "kernels/cuda/simt.cuh"

namespace compact::cuda {

inline constexpr int kAccumulateThreads = 256;

template <typename T>
struct AccumulateWeighted {
  using A = simt::accumulate_t<T>;

  const T* unit;               // [items, width]
  const int64_t* sorted_rows;  // [items], ascending
  const int64_t* order;        // [items], order[i] is the item that sorted_rows[i] belongs to
  const A* weight;             // [groups], null for 1
  const int64_t* group;        // [items], null where weight is per item
  int64_t items, groups, width, num_rows;
  bool packed;  // rows of unit start at multiples of 16 bytes, and so do those of out
  A* out;       // [num_rows, width], already zero: rows without items are not written
};

// Sums one column, or one pack of columns, over the items from `first` on that belong to `row`.
template <int kCount, typename T>
SIMT_DEVICE void sum_items(const AccumulateWeighted<T>& args, int64_t first, int64_t row,
                           int64_t column) {
  using A = simt::accumulate_t<T>;
  A sum[kCount] = {};
  for (int64_t i = first; i < args.items && args.sorted_rows[i] == row; ++i) {
    const int64_t item = args.order[i];
    A weight = 1;
    if (args.weight != nullptr) {
      const int64_t group = args.group == nullptr ? item : args.group[item];
      weight = group >= 0 && group < args.groups ? args.weight[group] : simt::nan<A>();
    }
    if (weight == A(0)) continue;
    const T* from = args.unit + item * args.width + column;
    A x[kCount];
    if constexpr (kCount == 1) {
      x[0] = simt::to_float(*from);
    } else {
      simt::widen(simt::load_pack(from), x);
    }
    for (int j = 0; j < kCount; ++j) sum[j] += weight * x[j];
  }
  A* to = args.out + row * args.width + column;
  for (int j = 0; j < kCount; ++j) to[j] = sum[j];
}

template <typename T>
SIMT_KERNEL(kAccumulateThreads)
accumulate_weighted_kernel(AccumulateWeighted<T> args) {
  const int64_t first = simt::block();
  const int64_t row = args.sorted_rows[first];
  if (row < 0 || row >= args.num_rows) return;
  if (first > 0 && args.sorted_rows[first - 1] == row) return;
  constexpr int kPack = simt::Pack<T>::kSize;
  if (args.packed) {
    for (int64_t c = simt::thread() * kPack; c < args.width; c += simt::threads() * kPack)
      sum_items<kPack>(args, first, row, c);
  } else {
    for (int64_t c = simt::thread(); c < args.width; c += simt::threads())
      sum_items<1>(args, first, row, c);
  }
}

}  // namespace compact::cuda
