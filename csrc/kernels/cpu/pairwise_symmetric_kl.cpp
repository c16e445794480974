#include "kernels/cpu/pairwise_symmetric_kl.h"

#include "kernels/cpu/isa.h"

#define COMPACT_BODY "kernels/cpu/pairwise_symmetric_kl.inl"
#include "kernels/cpu/each_isa.h"

namespace compact::cpu {

template <class T>
void pair_sums(const T* zp, const T* zq, const T* ep, const T* eq, int64_t n, T offset,
               double* left, double* right) {
  static const auto chosen = pick(&base::pair_sums<T>, &avx2::pair_sums<T>, &avx512::pair_sums<T>);
  chosen(zp, zq, ep, eq, n, offset, left, right);
}

template <class T>
void pair_gradients(const T* zp, const T* zq, const T* p, const T* q, int64_t n, T offset, T kl_pq,
                    T kl_qp, T factor, T* gp, T* gq) {
  static const auto chosen =
      pick(&base::pair_gradients<T>, &avx2::pair_gradients<T>, &avx512::pair_gradients<T>);
  chosen(zp, zq, p, q, n, offset, kl_pq, kl_qp, factor, gp, gq);
}

#define COMPACT_INSTANTIATE(T)                                                                   \
  template void pair_sums(const T*, const T*, const T*, const T*, int64_t, T, double*, double*); \
  template void pair_gradients(const T*, const T*, const T*, const T*, int64_t, T, T, T, T, T*, T*);
COMPACT_INSTANTIATE(float)
COMPACT_INSTANTIATE(double)

}  // namespace compact::cpu
