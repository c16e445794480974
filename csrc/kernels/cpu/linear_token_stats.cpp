#include "kernels/cpu/linear_token_stats.h"

#include "kernels/cpu/isa.h"

#define COMPACT_BODY "kernels/cpu/linear_token_stats.inl"
#include "kernels/cpu/each_isa.h"

namespace compact::cpu {

// Each function calls the build that fits the CPU.
#define COMPACT_DISPATCH(name) \
  static const auto chosen = pick(&base::name<T>, &avx2::name<T>, &avx512::name<T>)

template <class T>
T finish_logits(T* row, int64_t n, int64_t first, const LogitShape<T>& shape) {
  COMPACT_DISPATCH(finish_logits);
  return chosen(row, n, first, shape);
}

template <class T>
T exp_piece(T* row, int64_t n, T peak, const LogitShape<T>& shape, RowState<T>* state) {
  COMPACT_DISPATCH(exp_piece);
  return chosen(row, n, peak, shape, state);
}

template <class T>
void count_larger(const T* row, int64_t n, T low, T high, int64_t* above, int64_t* reaching) {
  COMPACT_DISPATCH(count_larger);
  chosen(row, n, low, high, above, reaching);
}

template <class T>
void gradient_piece(T* row, int64_t n, T lse, T factor, const LogitShape<T>& shape) {
  COMPACT_DISPATCH(gradient_piece);
  chosen(row, n, lse, factor, shape);
}

template <class T>
void scale_row(T* row, int64_t n, T factor) {
  COMPACT_DISPATCH(scale_row);
  chosen(row, n, factor);
}

template <class T>
void add_scaled_row(T* out, const T* row, int64_t n, T factor) {
  COMPACT_DISPATCH(add_scaled_row);
  chosen(out, row, n, factor);
}

template <class T>
int64_t add_sparse_product(T* out, const T* row, int64_t n, int64_t first, T threshold,
                           const T* matrix, int64_t width) {
  COMPACT_DISPATCH(add_sparse_product);
  return chosen(out, row, n, first, threshold, matrix, width);
}

template <class T>
void to_bfloat16(const T* row, int64_t n, uint16_t* out) {
  COMPACT_DISPATCH(to_bfloat16);
  chosen(row, n, out);
}

template <class T>
void from_bfloat16(const uint16_t* row, int64_t n, T factor, T* out) {
  COMPACT_DISPATCH(from_bfloat16);
  chosen(row, n, factor, out);
}

#define COMPACT_INSTANTIATE(T)                                                               \
  template T finish_logits(T*, int64_t, int64_t, const LogitShape<T>&);                      \
  template T exp_piece(T*, int64_t, T, const LogitShape<T>&, RowState<T>*);                  \
  template void count_larger(const T*, int64_t, T, T, int64_t*, int64_t*);                   \
  template void gradient_piece(T*, int64_t, T, T, const LogitShape<T>&);                     \
  template void scale_row(T*, int64_t, T);                                                   \
  template void add_scaled_row(T*, const T*, int64_t, T);                                    \
  template int64_t add_sparse_product(T*, const T*, int64_t, int64_t, T, const T*, int64_t); \
  template void to_bfloat16(const T*, int64_t, uint16_t*);                                   \
  template void from_bfloat16(const uint16_t*, int64_t, T, T*);
COMPACT_INSTANTIATE(float)
COMPACT_INSTANTIATE(double)

}  // namespace compact::cpu
