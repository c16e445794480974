// The LM head's arguments for the CUDA operators, and the kernel launches that several operators
// use. Each launch is defined in the file of the operator of that name.
#pragma once

#include "kernels/cuda/head.cuh"
#include "ops/launch.cuh"

namespace compact::cuda {

// Gold answers of the rows, or none.
struct GoldTensors {
  OptionalTensor ids, offsets, problem;
  GoldTensors(const char* op, const OptionalTensor& ids_, const OptionalTensor& offsets_,
              const OptionalTensor& problem_, int64_t rows) {
    if (!ids_) return;
    require(offsets_ && problem_, op, ": gold needs ids, offsets and problem");
    ids = index_vector(op, "gold.ids", *ids_, ids_->size(0));
    offsets = index_vector(op, "gold.offsets", *offsets_, offsets_->size(0));
    problem = index_vector(op, "gold.problem", *problem_, rows);
  }
  explicit operator bool() const { return ids.has_value(); }
};

// hidden [N, H] and weight [V, H] in one dtype, bias [V] in the compute type.
struct HeadTensors {
  Tensor hidden, weight;
  OptionalTensor bias;
  double scale, softcap;

  HeadTensors(const char* op, const Tensor& hidden_, const Tensor& weight_,
              const OptionalTensor& bias_, double softcap_, double scale_)
      : hidden(hidden_), weight(weight_), scale(scale_), softcap(softcap_) {
    check_dim(op, "hidden", hidden_, 2);
    check_dim(op, "weight", weight_, 2);
    check_size(op, "weight", weight_, 1, hidden_.size(1));
    require(weight_.size(0) > 0, op, ": weight must have at least one row");
    if (bias_) check_size(op, "bias", *bias_, 0, weight_.size(0));
    hidden = contiguous_as(hidden_, hidden_.scalar_type());
    weight = contiguous_as(weight_, hidden_.scalar_type());
    bias = contiguous_as(bias_, compute_type(hidden_));
  }
  int64_t vocabulary() const { return weight.size(0); }
  int64_t width() const { return weight.size(1); }

  // The logit shape for a kernel that gets the columns from `first` on.
  template <typename A>
  Head<A> on_device(int64_t first = 0) const {
    return {bias ? data<A>(*bias) + first : nullptr, static_cast<A>(scale),
            static_cast<A>(softcap)};
  }
};

// The statistics that a call may ask for.
struct Asked {
  bool rank = false, sum_p2 = false, margin = false;
  OptionalTensor score_ids;  // [rows, C], contiguous

  Asked() = default;
  Asked(const char* op, bool rank_, bool sum_p2_, bool margin_, const OptionalTensor& score_ids_,
        int64_t rows)
      : rank(rank_), sum_p2(sum_p2_), margin(margin_) {
    if (!score_ids_) return;
    check_dim(op, "score_ids", *score_ids_, 2);
    check_size(op, "score_ids", *score_ids_, 0, rows);
    check_dtype(op, "score_ids", *score_ids_, {ScalarType::Long});
    require(score_ids_->size(1) <= kMostScores, op, ": score_ids must have at most ", kMostScores,
            " columns, got ", score_ids_->size(1));
    score_ids = torch::stable::contiguous(*score_ids_);
  }
  bool any() const { return rank || sum_p2 || margin || score_ids; }
  int64_t scores() const { return score_ids ? score_ids->size(1) : 0; }
};

// Statistics of `rows` rows, as the operators return them.
struct StatsTensors {
  Tensor nll, lse, entropy, correct, gold_logit, gold_logp, rank, sum_p2, margin, score_logp;
  StatsTensors(const Tensor& like, int64_t rows, bool gold, const Asked& asked)
      : nll(new_empty(like, {rows}, compute_type(like))),
        lse(new_empty(like, {rows}, compute_type(like))),
        entropy(new_empty(like, {rows}, compute_type(like))),
        correct(new_empty(like, {rows}, ScalarType::Bool)),
        gold_logit(new_empty(like, {gold ? rows : 0}, compute_type(like))),
        gold_logp(new_empty(like, {gold ? rows : 0}, compute_type(like))),
        rank(new_empty(like, {asked.rank ? rows : 0}, ScalarType::Int)),
        sum_p2(new_empty(like, {asked.sum_p2 ? rows : 0}, compute_type(like))),
        margin(new_empty(like, {asked.margin ? rows : 0}, compute_type(like))),
        score_logp(
            new_empty(like, {asked.score_ids ? rows : 0, asked.scores()}, compute_type(like))) {}
};

// What the row kernel does with a block of logits besides its statistics.
struct RowOptions {
  bool overwrite = true;
  OptionalTensor weight;  // [rows of the block], in the compute type
  OptionalTensor stash;   // [all rows, vocabulary], bfloat16
  Asked asked{};          // score_ids are those of all rows
};

// Runs the row kernel on `logits` [rows, V], which are the rows from `begin` on. `target` and the
// gold table are for all rows. Of `head` it uses only bias, scale and softcap.
void row_stats_of_block(const char* op, const Tensor& logits, int64_t begin, const Tensor& target,
                        const GoldTensors& gold, const OptionalTensor& bias, double softcap,
                        double scale, int64_t ignore_index, const RowOptions& options,
                        const StatsTensors& out);

// out [V] = factor * sum of the rows of matrix [M, V]. With weights [M] (in the compute type),
// out += factor * sum of weight[m] * matrix[m].
void sum_columns(const char* op, const Tensor& out, const Tensor& matrix, double factor,
                 const OptionalTensor& add_weighted = std::nullopt);

// out [R, H] = grad [R, V] @ weight [V, H] without the entries |grad[r, v]| < eps |row_scale[r]|
// (row_scale in the compute type; without it 1). out is in the compute type.
void multiply_filtered(const char* op, const Tensor& out, const Tensor& grad, const Tensor& weight,
                       double eps, const OptionalTensor& row_scale);

// [num_rows, H] in the compute type: out[rows[m]] += weight[group[m]] * unit[m] (without weight: 1;
// without group: weight[m]).
Tensor accumulate_rows(const char* op, const Tensor& unit, const Tensor& rows,
                       const OptionalTensor& weight, const OptionalTensor& group, int64_t num_rows);

}  // namespace compact::cuda
