// Kernels of the symmetric KL divergence for one pair of rows and one block of the vocabulary. No
// torch.
#pragma once

#include <cstdint>

namespace compact::cpu {

// Adds sum of ep * d and sum of eq * d to *left and *right, with d = zp - zq - offset, over n
// entries. Entries with ep or eq = 0 add nothing to that sum, with any d.
template <class T>
void pair_sums(const T* zp, const T* zq, const T* ep, const T* eq, int64_t n, T offset,
               double* left, double* right);

// Adds the gradients of factor * (KL(p || q) + KL(q || p)) with respect to zp and zq:
// gp += factor * (p (t - kl_pq) + p - q), gq += factor * (q (-t - kl_qp) + q - p), t = log p - log
// q = zp - zq - offset, offset = lse_p - lse_q.
template <class T>
void pair_gradients(const T* zp, const T* zq, const T* p, const T* q, int64_t n, T offset, T kl_pq,
                    T kl_qp, T factor, T* gp, T* gq);

}  // namespace compact::cpu
