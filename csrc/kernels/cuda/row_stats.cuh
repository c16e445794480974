// The row kernel: statistics of rows of logits; each row is then overwritten by its gradient. One
// thread block per row.
//
// It passes over the row twice. The first pass computes, online and per thread, the largest logit,
// S = sum e and T = sum e d with d = z - ref, e = exp(d). Merged over the block they give
//   lse = ref + log S,  entropy = log S - T / S,  nll = log S - (z_t - ref),
// The logits of the target and of the gold answer are read before the row is overwritten, so all
// statistics need one read of the row. The kernel with kMore also computes what a call may ask for:
// the sum of p^2, which is (sum e^2) / S^2, rank and margin of the target, whose logit it reads
// before the pass, and log p of up to 16 ids. The second pass writes
//   g_v = w (e_v / S - [v = t]) softcap'(z_v) * out_scale.
// It goes backwards, because the end of the row is still in the caches. It does not read again the
// `staged` packs at the beginning of the row, which are in shared memory. In total this is about
// one read and one write of the logits in memory. A thread overwrites only logits that it has read
// itself.
#pragma once

#include "kernels/cuda/head.cuh"

namespace compact::cuda {

inline constexpr int kRowThreads = 1024;

template <typename T>
struct RowStats {
  using A = simt::accumulate_t<T>;

  T* logits;     // [rows, cols] raw logits; becomes the gradient where `overwrite`
  int64_t cols;  // below 2^31: within a row packs are counted in 32 bits, which saves registers
  const int64_t* target;  // [rows]
  const A* weight;        // [rows] upstream weights, null for 1
  Head<A> head;
  A out_scale;  // scale for d / d raw, 1 for d / d (scale * raw + bias)
  int64_t ignore_index;
  // The gold answer of row r: gold_ids[gold_offsets[p] : gold_offsets[p + 1]] with p =
  // gold_problem[r]; gold_ids null for none.
  const int64_t* gold_ids;
  const int64_t* gold_offsets;
  const int64_t* gold_problem;
  int64_t gold_count, gold_problems;

  A* nll;  // [rows], all of them
  A* lse;
  A* entropy;
  bool* correct;
  A* gold_logit;
  A* gold_logp;

  // Only with kMore, each null if it is not asked for.
  int32_t* rank;             // [rows]
  A* sum_p2;                 // [rows]
  A* margin;                 // [rows]
  const int64_t* score_ids;  // [rows, scores], scores <= 32; -1 for no id
  A* score_logp;             // [rows, scores]
  int scores;

  simt::bfloat16*
      stash;  // [rows, cols] softmax part of d nll / d x, 0 at the target; null for none
  bool overwrite;
  int64_t staged;  // packs kept in dynamic shared memory
};

// Mean of z - ref over the gold answer, in every lane of the warp. NaN for an index out of range.
template <typename T>
SIMT_DEVICE simt::accumulate_t<T> mean_gold(const RowStats<T>& args, const T* row, int64_t r) {
  using A = simt::accumulate_t<T>;
  const int64_t problem = args.gold_problem[r];
  if (problem < 0 || problem >= args.gold_problems) return simt::nan<A>();
  const int64_t begin = args.gold_offsets[problem], end = args.gold_offsets[problem + 1];
  if (begin < 0 || end > args.gold_count) return simt::nan<A>();
  A sum = 0;
  for (int64_t i = begin + simt::lane(); i < end; i += simt::kWarp) {
    const int64_t id = args.gold_ids[i];
    sum += id >= 0 && id < args.cols ? args.head.finish_one(simt::to_float(row[id]), id)
                                     : simt::nan<A>();
  }
  return simt::warp_sum(sum) / static_cast<A>(end - begin);
}

// What thread 0 writes of a row with kMore.
template <typename T, typename A>
SIMT_DEVICE void write_more(const RowStats<T>& args, int64_t r, bool ignored, A target_logit,
                            const Online<A, true>& all, const Rivals<A>& rivals) {
  const bool known = !ignored && all.sum == all.sum && target_logit == target_logit;
  if (args.rank != nullptr) args.rank[r] = known ? 1 + rivals.larger : 0;
  if (args.sum_p2 != nullptr) args.sum_p2[r] = all.squares / (all.sum * all.sum);
  if (args.margin == nullptr) return;
  args.margin[r] = ignored ? A(0) : known ? target_logit - rivals.largest : simt::nan<A>();
}

template <typename T, bool kMore>
SIMT_KERNEL(kRowThreads)
row_stats_kernel(RowStats<T> args) {
  using A = simt::accumulate_t<T>;
  constexpr int kPack = simt::Pack<T>::kSize;
  SIMT_SHARED(A, largest, simt::kWarp);
  SIMT_SHARED(A, sum, simt::kWarp);
  SIMT_SHARED(A, moment, simt::kWarp);
  SIMT_SHARED(A, squares, kMore ? simt::kWarp : 1);
  SIMT_SHARED(A, rival, kMore ? simt::kWarp : 1);
  SIMT_SHARED(int, larger, kMore ? simt::kWarp : 1);
  SIMT_DYNAMIC_SHARED(dynamic);
  auto* stage = reinterpret_cast<simt::Pack<T>*>(dynamic);

  const int64_t r = simt::block();
  T* row = args.logits + r * args.cols;
  const simt::Split<T> split(row, args.cols);
  T* body = row + split.head;
  const int step = simt::threads(), packs = static_cast<int>(split.packs);
  const int64_t single = split.single(simt::thread());

  // First pass.
  Online<A, kMore> mine;
  Rivals<A> rivals{-1, simt::nan<A>()};
  if constexpr (kMore) {
    rivals.target = args.target[r];
    if (rivals.target >= 0 && rivals.target < args.cols)
      rivals.own = args.head.finish_one(simt::to_float(row[rivals.target]), rivals.target);
  }
  if (single >= 0) {
    const A z[1] = {args.head.finish_one(simt::to_float(row[single]), single)};
    mine.add(z);
    if constexpr (kMore) rivals.add(single, z);
  }
  const auto take = [&](int i, const simt::Pack<T>& pack) {
    A z[kPack];
    simt::widen(pack, z);
    const int64_t column = split.head + int64_t{i} * kPack;
    args.head.finish(z, column);
    mine.add(z);
    if constexpr (kMore) rivals.add(column, z);
    if (i < args.staged) stage[i] = pack;
  };
  for (int i = simt::thread(); i < packs; i += 2 * step) {
    // Start two loads before the first is used.
    const bool second = i + step < packs;
    const simt::Pack<T> a = simt::load_pack(body + int64_t{i} * kPack);
    const simt::Pack<T> b = simt::load_pack(body + int64_t{second ? i + step : i} * kPack);
    take(i, a);
    if (second) take(i + step, b);
  }

  // Read the entries that are needed by index before any thread overwrites the row.
  const int64_t target = args.target[r];
  const bool ignored = target == args.ignore_index;
  const bool in_range = target >= 0 && target < args.cols;
  A target_logit = simt::nan<A>(), gold = 0, score = simt::nan<A>();
  int64_t score_id = -1;
  if (simt::warp() == 0) {
    if (in_range) target_logit = args.head.finish_one(simt::to_float(row[target]), target);
    if (args.gold_ids != nullptr) gold = mean_gold(args, row, r);
    if (kMore && simt::lane() < args.scores) {
      score_id = args.score_ids[r * args.scores + simt::lane()];
      if (score_id >= 0 && score_id < args.cols)
        score = args.head.finish_one(simt::to_float(row[score_id]), score_id);
    }
  }

  const Online<A, kMore> all = block_merge(mine, largest, sum, moment, squares);
  if constexpr (kMore) rivals = block_merge(rivals, rival, larger);
  const A ref = all.reference();
  if (simt::thread() == 0) {
    const A log_sum = simt::log(all.sum);
    args.nll[r] = ignored ? A(0) : log_sum - (target_logit - ref);
    args.lse[r] = all.log_sum_exp();
    args.entropy[r] = all.entropy();
    args.correct[r] = !ignored && target_logit >= all.largest && all.sum == all.sum;
    if (args.gold_ids != nullptr) {
      args.gold_logit[r] = gold;
      args.gold_logp[r] = (gold - ref) - log_sum;
    }
    if constexpr (kMore) write_more(args, r, ignored, target_logit, all, rivals);
  }
  if (kMore && simt::warp() == 0 && simt::lane() < args.scores) {
    args.score_logp[r * args.scores + simt::lane()] =
        score_id == -1 ? -simt::infinity<A>() : (score - ref) - simt::log(all.sum);
  }
  if (!args.overwrite) return;

  // Second pass. If the target is neither in range nor ignore_index, the row becomes NaN.
  A upstream = args.weight == nullptr ? A(1) : args.weight[r];
  if (!in_range) upstream = simt::nan<A>();
  const RowGradient<A> gradient{args.head, target,         ignored || upstream == A(0),
                                ref,       A(1) / all.sum, upstream * args.out_scale};
  simt::bfloat16* stash = args.stash == nullptr ? nullptr : args.stash + r * args.cols;
  const auto give = [&](int i, const simt::Pack<T>& pack) {
    A z[kPack], part[kPack];
    simt::widen(pack, z);
    const int64_t column = split.head + int64_t{i} * kPack;
    gradient(column, z, part);
    simt::store_pack(body + int64_t{i} * kPack, simt::narrow_pack<T>(z));
    if (stash != nullptr) store_bfloat16(stash + column, part);
  };
  const int rounds = (packs - simt::thread() + step - 1) / step;
  for (int k = rounds - 1; k >= 0; k -= 2) {
    const int i = simt::thread() + k * step;
    const int j = k > 0 ? i - step : i;
    const simt::Pack<T> a = i < args.staged ? stage[i] : simt::load_pack(body + int64_t{i} * kPack);
    const simt::Pack<T> b = j < args.staged ? stage[j] : simt::load_pack(body + int64_t{j} * kPack);
    give(i, a);
    if (k > 0) give(j, b);
  }
  if (single >= 0) {
    A z[1] = {simt::to_float(row[single])}, part[1];
    gradient(single, z, part);
    row[single] = simt::narrow<T>(z[0]);
    if (stash != nullptr) store_bfloat16(stash + single, part);
  }
}

}  // namespace compact::cuda
