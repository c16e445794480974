// The row kernel on given logits: one pass for the statistics, one for the gradient, in place.
#include <cmath>
#include <cstring>
#include <tuple>

#include "ops/gold.h"
#include "ops/head.h"

namespace compact {
namespace {

constexpr const char* kOp = "row_stats_";
constexpr int64_t kRowsPerTask = 4;

// A row is read in pieces of half the first-level cache: 4,096 float32 for a cache of 32 KB.
template <class T>
int64_t piece_entries() {
  static const int64_t fitting =
      cache_bytes(_SC_LEVEL1_DCACHE_SIZE, 1 << 15) / 2 / static_cast<int64_t>(sizeof(T));
  return std::clamp<int64_t>(fitting / 64 * 64, 1024, 16384);
}

// Reads and writes pieces of rows of a logits tensor, converted to and from the compute type.
template <class T>
struct Rows {
  char* bytes;
  ScalarType type;
  int64_t vocabulary, element_size;

  char* at(int64_t row, int64_t first) const {
    return bytes + (row * vocabulary + first) * element_size;
  }
  void read(int64_t row, int64_t first, int64_t count, T* piece) const {
    if (type == kTypeOf<T>) {
      std::memcpy(piece, at(row, first), count * sizeof(T));
      return;
    }
    Tensor to = matrix(piece, 1, count);
    torch::stable::copy_(to, strided(at(row, first), type, 1, count, count, 1));
  }
  void write(int64_t row, int64_t first, int64_t count, const T* piece) const {
    if (type == kTypeOf<T>) {
      std::memcpy(at(row, first), piece, count * sizeof(T));
      return;
    }
    Tensor to = strided(at(row, first), type, 1, count, count, 1);
    torch::stable::copy_(to, matrix(piece, 1, count));
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const GoldTable& gold,
    const OptionalTensor& bias, double softcap, double logit_scale, int64_t ignore_index) {
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  Tensor nll = empty_of<T>(logits, {rows}), lse = empty_of<T>(logits, {rows}),
         entropy = empty_of<T>(logits, {rows}),
         correct = torch::stable::new_empty(logits, {rows}, ScalarType::Bool),
         gold_logit = empty_of<T>(logits, {gold ? rows : 0}),
         gold_logp = empty_of<T>(logits, {gold ? rows : 0});
  OptionalTensor biases, weights;
  if (bias) biases = in_compute_type<T>(*bias);
  if (weight) weights = in_compute_type<T>(*weight);
  const LogitShape<T> shape{static_cast<T>(logit_scale), static_cast<T>(softcap),
                            biases ? data<const T>(*biases) : nullptr};
  const Rows<T> table{static_cast<char*>(logits.data_ptr()), logits.scalar_type(), vocabulary,
                      static_cast<int64_t>(logits.element_size())};
  const int64_t piece_size = piece_entries<T>();
  run_tasks(ceil_div(rows, kRowsPerTask), [&](int64_t task) {
    auto piece = scratch<T>(piece_size);
    for (int64_t r = task * kRowsPerTask; r < std::min(rows, (task + 1) * kRowsPerTask); ++r) {
      const int64_t wanted = data<const int64_t>(target)[r];
      const bool live = wanted != ignore_index;
      RowState<T> state;
      T target_logit = 0;
      double gold_sum = 0.0;
      for (int64_t first = 0; first < vocabulary; first += piece_size) {
        const int64_t count = std::min(piece_size, vocabulary - first);
        table.read(r, first, count, piece.get());
        const T peak = finish_logits(piece.get(), count, first, shape);
        if (live && wanted >= first && wanted < first + count) target_logit = piece[wanted - first];
        if (gold) gold_sum += gold.sum_in(r, piece.get(), first, count);
        exp_piece(piece.get(), count, peak, shape, &state);
      }
      const double log_sum = state.reference + std::log(state.sum);
      data<T>(lse)[r] = static_cast<T>(log_sum);
      data<T>(entropy)[r] = static_cast<T>(std::log(state.sum) - state.weighted / state.sum);
      data<T>(nll)[r] = live ? static_cast<T>(log_sum - target_logit) : T(0);
      // If a logit is NaN, the peak does not show it, but the sum does.
      data<bool>(correct)[r] = live && target_logit >= state.peak && !std::isnan(state.sum);
      if (gold) {
        const double mean = gold_sum / static_cast<double>(gold.end(r) - gold.begin(r));
        data<T>(gold_logit)[r] = static_cast<T>(mean);
        data<T>(gold_logp)[r] = static_cast<T>(mean - log_sum);
      }
      const T factor =
          live ? static_cast<T>(logit_scale) * (weights ? data<const T>(*weights)[r] : T(1)) : T(0);
      if (factor == T(0)) {
        std::memset(table.at(r, 0), 0, vocabulary * table.element_size);
        continue;
      }
      for (int64_t first = 0; first < vocabulary; first += piece_size) {
        const int64_t count = std::min(piece_size, vocabulary - first);
        table.read(r, first, count, piece.get());
        finish_logits(piece.get(), count, first, shape);
        gradient_piece(piece.get(), count, static_cast<T>(log_sum), factor, shape);
        if (wanted >= first && wanted < first + count) {
          piece[wanted - first] -= factor * softcap_slope(target_logit, shape);
        }
        table.write(r, first, count, piece.get());
      }
    }
  });
  return {nll, lse, entropy, correct, gold_logit, gold_logp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> row_stats_(
    Tensor logits, Tensor target, OptionalTensor weight, OptionalTensor gold_ids,
    OptionalTensor gold_offsets, OptionalTensor gold_problem, OptionalTensor bias, double softcap,
    double logit_scale, int64_t ignore_index) {
  check_dim(kOp, "logits", logits, 2);
  check_contiguous(kOp, "logits", logits);
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  target = checked_index(kOp, "target", target, rows, vocabulary, ignore_index);
  if (weight) check_size(kOp, "weight", *weight, 0, rows);
  if (bias) check_size(kOp, "bias", *bias, 0, vocabulary);
  const GoldTable gold(kOp, gold_ids, gold_offsets, gold_problem, rows, vocabulary);
  const auto call = computes_in_double(logits) ? &run<double> : &run<float>;
  return call(logits, target, weight, gold, bias, softcap, logit_scale, ignore_index);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compact, CPU, m) { m.impl("row_stats_", TORCH_BOX(&row_stats_)); }

}  // namespace compact
