// Row kernels of the LM head; a row of logits is processed in pieces of the vocabulary. No torch.
//
// For a piece, the kernels compute the final logits z from the raw product, then the statistics,
// then overwrite it by e = exp(z - reference), times the softcap's derivative. The reference
// changes, and earlier sums are rescaled, only if a larger logit would make e exceed
// exp(kReferenceSlack). So the exp of a logit is computed once, and the gradient product can follow
// while the piece is in cache.
#pragma once

#include <cstdint>
#include <limits>

namespace compact::cpu {

// exp(16) = 9e6 times a vocabulary of 2^18 is far from overflow, and with this slack the reference
// rarely changes after the first piece.
constexpr double kReferenceSlack = 16.0;

// The sums of a row so far, relative to its reference: sum = sum of exp(z - reference), weighted =
// sum of exp(z - reference) * (z - reference), squares = sum of exp(z - reference)^2, peak =
// largest z.
template <class T>
struct RowState {
  double sum = 0.0;
  double weighted = 0.0;
  double squares = 0.0;
  T reference = -std::numeric_limits<T>::infinity();
  T peak = -std::numeric_limits<T>::infinity();
};

// x = scale * raw + bias[v], z = softcap * tanh(x / softcap); softcap 0 and bias nullptr mean none.
template <class T>
struct LogitShape {
  T scale;
  T softcap;
  const T* bias;  // [V] or nullptr
  bool plain() const { return scale == T(1) && softcap == T(0) && bias == nullptr; }
};

// raw [n] -> z [n] in place for vocabulary entries first, first + 1, ...; returns the largest z.
template <class T>
T finish_logits(T* row, int64_t n, int64_t first, const LogitShape<T>& shape);

// z [n] -> e in place; updates the state. The caller must multiply its own sums of earlier pieces
// by the returned factor (nearly always 1). `peak` is the return value of finish_logits.
template <class T>
T exp_piece(T* row, int64_t n, T peak, const LogitShape<T>& shape, RowState<T>* state);

// Counts the entries of z [n] above `high` and those that reach `low`. A NaN does neither.
template <class T>
void count_larger(const T* row, int64_t n, T low, T high, int64_t* above, int64_t* reaching);

// z [n] -> gradient with respect to x in place, without the target's -1:
// factor * exp(z - lse) * (1 - (z / softcap)^2).
template <class T>
void gradient_piece(T* row, int64_t n, T lse, T factor, const LogitShape<T>& shape);

// The derivative of softcap at z.
template <class T>
T softcap_slope(T z, const LogitShape<T>& shape) {
  if (shape.softcap == T(0)) return T(1);
  const T ratio = z / shape.softcap;
  return T(1) - ratio * ratio;
}

// out = factor * out, [n].
template <class T>
void scale_row(T* row, int64_t n, T factor);

// out += factor * row, [n].
template <class T>
void add_scaled_row(T* out, const T* row, int64_t n, T factor);

// out[h] += sum over v of q(row[v]) * matrix[v, h], where q rounds entries below the threshold at
// random to 0 or to the threshold, without bias. It is for a row that is nearly all zeros. `first`
// is the column of row[0]; the rounding depends on it. Returns the number of nonzero entries.
template <class T>
int64_t add_sparse_product(T* out, const T* row, int64_t n, int64_t first, T threshold,
                           const T* matrix, int64_t width);

// Conversion to bfloat16, rounded to nearest even, and back with a factor.
template <class T>
void to_bfloat16(const T* row, int64_t n, uint16_t* out);
template <class T>
void from_bfloat16(const uint16_t* row, int64_t n, T factor, T* out);

}  // namespace compact::cpu
