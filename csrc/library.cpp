// The schema of every operator of the library, each with a short description. Implementations:
// csrc/ops/<op>_cpu.cpp and csrc/ops/<op>_cuda.cu. Public functions, fakes and autograd:
// compact_ops/<op>.py. Specification in plain torch: compact_ops/reference.py.
//
// The head in all operators: raw = hidden @ weight^T, x = logit_scale * raw + bias, z = softcap(x),
// softcap(x) = c tanh(x / c), and softcap = 0.0 means none. Index tensors are int64. Outputs that a
// call does not need have size 0. Statistics are float32 (float64 for float64 input).
#include <torch/csrc/stable/library.h>

// The host build of the CUDA kernels (CMake: COMPACT_SIMT) registers the same schemas a second
// time.
#ifndef COMPACT_NAMESPACE
#define COMPACT_NAMESPACE compact
#endif

STABLE_TORCH_LIBRARY(COMPACT_NAMESPACE, m) {
  // Statistics of M tokens; token m reads hidden[rows[m]] (rows = None: hidden[m]). rank, sum_p2
  // and margin are computed where needed, score_logp [M, C] for score_ids [M, C]. `keep` is what
  // the backward gets: 0 nothing, 1 unit = d nll / d hidden [M, H], 2 the stash, 3 both. The stash
  // is the softmax part of d nll / d x in bfloat16 [M, V], 0 at the target, to be multiplied by
  // exp(stash_shift[m, v / 256] - lse[m]). If stash_shift has width 0, the stash is final.
  m.def(
      "linear_token_stats(Tensor hidden, Tensor weight, Tensor target, Tensor? rows, "
      "Tensor? gold_ids, Tensor? gold_offsets, Tensor? gold_problem, Tensor? bias, "
      "Tensor? score_ids, float softcap, float logit_scale, int ignore_index, int keep, "
      "float filter_eps, bool need_rank, bool need_sum_p2, bool need_margin) "
      "-> (Tensor nll, Tensor lse, Tensor entropy, Tensor correct, Tensor gold_logit, "
      "Tensor gold_logp, Tensor rank, Tensor sum_p2, Tensor margin, Tensor score_logp, "
      "Tensor unit, Tensor stash, Tensor stash_shift)");

  // Gradients for the upstream gradient grad [M] of nll: from the stash (then need_hidden is
  // false), or with stash = None from logits that are computed again. d_hidden [M, H] has a row per
  // token (the caller adds up tokens that read the same row); d_weight [V, H], d_bias [V]. All are
  // in the compute type; a gradient that is not needed has size 0 in its first dimension.
  m.def(
      "linear_token_stats_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor target, "
      "Tensor? rows, Tensor? bias, Tensor nll, Tensor lse, Tensor? stash, Tensor? stash_shift, "
      "float softcap, float logit_scale, int ignore_index, float filter_eps, bool need_hidden, "
      "bool need_weight, bool need_bias) -> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)");

  // The mode "fused-weights": first half for one chunk of R rows, whose token weights are computed
  // after its statistics. It stores what d_weight needs in `blocks` [>= R, V], relative to `shift`.
  // `blocks` is in the compute type; the caller allocates it and uses it for all chunks. Its layout
  // depends on the device. unit [R, H] as above, 0 rows if need_hidden is false.
  m.def(
      "linear_token_stats_fused(Tensor(a!) blocks, Tensor hidden, Tensor weight, Tensor target, "
      "Tensor? gold_ids, Tensor? gold_offsets, Tensor? gold_problem, Tensor? bias, "
      "Tensor? score_ids, float softcap, float logit_scale, int ignore_index, float filter_eps, "
      "bool need_hidden, bool need_rank, bool need_sum_p2, bool need_margin) "
      "-> (Tensor nll, Tensor lse, Tensor entropy, Tensor correct, Tensor gold_logit, "
      "Tensor gold_logp, Tensor rank, Tensor sum_p2, Tensor margin, Tensor score_logp, "
      "Tensor unit, Tensor shift)");

  // Its second half: adds the gradients of sum(grad [R] * nll) to d_weight [V, H] and d_bias [V]
  // (0 rows: not needed). Overwrites `blocks`.
  m.def(
      "linear_token_stats_fused_backward(Tensor(a!) d_weight, Tensor(b!) d_bias, "
      "Tensor(c!) blocks, Tensor grad, Tensor hidden, Tensor target, Tensor nll, Tensor lse, "
      "Tensor shift, float softcap, float logit_scale, int ignore_index) -> ()");

  // out[rows[m]] += weight[group[m]] * unit[m] (group = None: weight[m]), deterministic: the
  // multi-teacher gradient accumulation.
  m.def(
      "accumulate_weighted(Tensor unit, Tensor rows, Tensor weight, Tensor? group, int num_rows) "
      "-> Tensor");

  // KL(p || q) and KL(q || p) of the softmaxes of hidden rows left[i] and right[i], without storing
  // their logits. The backward uses the two log-sum-exps [P]. left and right are on the CPU.
  m.def(
      "pairwise_symmetric_kl(Tensor hidden, Tensor weight, Tensor left, Tensor right, Tensor? "
      "bias, "
      "float softcap, float logit_scale) "
      "-> (Tensor kl_left, Tensor kl_right, Tensor lse_left, Tensor lse_right)");

  // Gradients of sum_i grad[i] * (kl_left[i] + kl_right[i]).
  m.def(
      "pairwise_symmetric_kl_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor left, "
      "Tensor right, Tensor? bias, Tensor kl_left, Tensor kl_right, Tensor lse_left, "
      "Tensor lse_right, float softcap, float logit_scale, bool need_hidden, bool need_weight, "
      "bool need_bias) -> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)");

  // Per problem: z-scores of S scores over its rationales, u = sum of beta z, softmax(u / tau),
  // mixed with uniform weights: (1 - floor) softmax + floor / K. zscores is [S, R].
  m.def(
      "problem_weights(Tensor scores, Tensor offsets, Tensor beta, Tensor prior_std, float tau, "
      "int ddof, float eps, float floor) -> (Tensor weight, Tensor zscores)");

  // Statistics of rows of raw logits; each row becomes weight[r] * d nll / d raw (weight = None:
  // 1).
  m.def(
      "row_stats_(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor? gold_ids, "
      "Tensor? gold_offsets, Tensor? gold_problem, Tensor? bias, float softcap, float logit_scale, "
      "int ignore_index) -> (Tensor nll, Tensor lse, Tensor entropy, Tensor correct, "
      "Tensor gold_logit, Tensor gold_logp)");

  // grad @ weight, the sparse gradient product: entries |grad| < eps are rounded at random to 0 or
  // +-eps, and zeros are skipped.
  m.def("filtered_matmul(Tensor grad, Tensor weight, float eps) -> Tensor");

  // Attention for the tree layout, CPU only: parts [N, 5] int64 are (row, begin, end, prefix begin,
  // prefix end). A token of a part sees the prefix and the part up to and including itself. query,
  // out [B, L, heads, D], key and value [B, L, key heads, D], lse [B, L, heads]. Tokens in no
  // part: 0.
  m.def(
      "tree_attention(Tensor query, Tensor key, Tensor value, Tensor parts, float scale) "
      "-> (Tensor out, Tensor lse)");

  // Its gradients, from the inputs and outputs of the forward.
  m.def(
      "tree_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor parts, "
      "Tensor out, Tensor lse, float scale) -> (Tensor d_query, Tensor d_key, Tensor d_value)");
}
