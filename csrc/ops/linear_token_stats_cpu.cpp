// Statistics of the LM head and the unit gradient of every token, in one pass over the vocabulary.
//
// A task processes a tile of rows and a slice of the vocabulary, block by block, as flash attention
// processes keys. For each block it computes the logits, the statistics, e = exp(z - reference) in
// place, and the second product dH += e @ W_block while block and weights are in cache. At the end
// the sums of the slices are merged: unit = logit_scale * (dH / sum - slope_target * W[target]).
// linear_token_stats_fused does the same and stores the blocks of e in the caller's memory.
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "ops/gold.h"
#include "ops/head.h"
#include "ops/rivals.h"

namespace compact {
namespace {

constexpr const char* kOp = "linear_token_stats";
constexpr const char* kFusedOp = "linear_token_stats_fused";
static_assert(kBlock == kStashBlock, "a block of the walk has one reference a row");

enum Keep : int64_t { kNothing = 0, kUnit = 1, kStash = 2 };  // flags

// The statistics that a call may ask for.
struct Asked {
  bool rank, sum_p2, margin;
  OptionalTensor score_ids;  // [M, C] contiguous, entries in [-1, V)

  int64_t scores() const { return score_ids ? score_ids->size(1) : 0; }
};

Asked checked(const char* op, bool rank, bool sum_p2, bool margin, const OptionalTensor& score_ids,
              int64_t rows, int64_t vocabulary) {
  Asked asked{rank, sum_p2, margin, std::nullopt};
  if (!score_ids) return asked;
  check_dim(op, "score_ids", *score_ids, 2);
  check_size(op, "score_ids", *score_ids, 0, rows);
  check_dtype(op, "score_ids", *score_ids, {ScalarType::Long});
  const int64_t columns = score_ids->size(1);
  require(columns <= kMostScores, op, ": score_ids must have at most ", kMostScores,
          " columns, got ", columns);
  asked.score_ids = torch::stable::contiguous(*score_ids);
  const auto* ids = data<const int64_t>(*asked.score_ids);
  for (int64_t i = 0; i < rows * columns; ++i) {
    require(ids[i] >= -1 && ids[i] < vocabulary, op, ": score_ids[", i / columns, ", ", i % columns,
            "] must be in [-1, ", vocabulary, "), got ", ids[i]);
  }
  return asked;
}

template <class T>
struct Sweep {
  const Head<T>& head;
  const Grid grid;
  const GoldTable& gold;
  const Tensor hidden;    // [M, H] gathered, in the compute type
  const int64_t* target;  // [M]
  const int64_t ignore_index;
  const double filter_eps;
  Rivals<T> rivals;
  const int64_t* score_ids;  // [M, scores]
  const int64_t scores;

  std::vector<RowState<T>> states{};  // [slices, M]
  std::vector<double> gold_sums{};    // [slices, M]
  std::vector<T> target_logit{};      // [M]
  std::vector<T> seed{};              // [M] target logit up to rounding, known before the sweep
  std::vector<T> score_logits{};      // [M, scores]
  std::vector<int64_t> ranks{};       // [M], only if asked for
  Scratch<T> partial{};               // [slices - 1, M, H]
  T* unit = nullptr;                  // [M, H] if it is kept; also the partial sum of slice 0
  uint16_t* stash = nullptr;          // [M, V]
  float* shift = nullptr;             // [M, V / kStashBlock]
  T* blocks = nullptr;                // [M * V], the blocks of e as fused_block() lays them out
  T* block_shift = nullptr;           // [M, V / kStashBlock]

  T* partial_rows(int64_t slice) {
    return slice == 0 ? unit : partial.get() + (slice - 1) * grid.rows * head.width;
  }

  void run() {
    const int64_t rows = grid.rows;
    states.resize(grid.slices * rows);
    target_logit.assign(rows, T(0));
    if (gold) gold_sums.assign(grid.slices * rows, 0.0);
    if (unit != nullptr) partial = scratch<T>((grid.slices - 1) * rows * head.width);
    score_logits.assign(rows * scores, T(0));
    if (rivals.ranks || (unit != nullptr && filter_eps > 0.0)) find_seeds();
    run_tasks(grid.tiles * grid.slices, [&](int64_t task) {
      walk(grid.tile_begin(task / grid.slices), grid.tile_end(task / grid.slices),
           task % grid.slices);
    });
    if (rivals.ranks) find_ranks();
  }

  void walk(int64_t row_begin, int64_t row_end, int64_t slice) {
    const int64_t rows = row_end - row_begin, width = head.width;
    const int64_t begin = grid.slice_begin(slice), end = grid.slice_end(slice);
    auto own = scratch<T>(blocks == nullptr ? rows * kBlock : 0);
    auto buffer = scratch<T>(head.converts() ? kBlock * width : 0);
    const Tensor read = matrix(data<const T>(hidden) + row_begin * width, rows, width);
    T* sums = unit == nullptr ? nullptr : partial_rows(slice) + row_begin * width;
    const bool sparse = filter_eps > 0.0;
    if (sums != nullptr && sparse) std::memset(sums, 0, rows * width * sizeof(T));
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t count = std::min(kBlock, end - first);
      const T* weights = head.block(first, count, buffer.get());
      T* logits = blocks == nullptr ? own.get()
                                    : fused_block(blocks, head.vocabulary, row_begin, rows, first);
      multiply(matrix(logits, rows, count), read, transposed(weights, count, width));
      for (int64_t i = 0; i < rows; ++i) {
        read_row(logits + i * count, row_begin + i, slice, first, count,
                 sums == nullptr ? nullptr : sums + i * width);
        if (sums != nullptr && sparse) {
          add_sparse_product(sums + i * width, logits + i * count, count, first,
                             threshold(row_begin + i, slice), weights, width);
        }
      }
      if (sums != nullptr && !sparse) {
        multiply_add(matrix(sums, rows, width), matrix(logits, rows, count),
                     matrix(weights, count, width), first > begin);
      }
    }
  }

  // An entry e below this has a probability below filter_eps. The sum of the row's exponentials is
  // at least the sum so far, and at least the target's exponential.
  T threshold(int64_t m, int64_t slice) {
    const RowState<T>& state = states[slice * grid.rows + m];
    const double known = std::exp(static_cast<double>(seed[m]) - state.reference);
    return static_cast<T>(filter_eps * std::max(state.sum, known));
  }

  // The target's logit of every row, from one dot product each. The error of a sum of H terms
  // grows with the root of H, that of bias and softcap with the logit.
  void find_seeds() {
    seed.assign(grid.rows, -std::numeric_limits<T>::infinity());
    run_tasks(ceil_div(grid.rows, grid.tile_rows), [&](int64_t tile) {
      auto buffer = scratch<T>(head.width);
      for (int64_t m = grid.tile_begin(tile); m < grid.tile_end(tile); ++m) {
        if (target[m] == ignore_index) continue;
        const T* weights = head.block(target[m], 1, buffer.get());
        T dot = 0, size = 0;
        for (int64_t h = 0; h < head.width; ++h) {
          const T product = data<T>(hidden)[m * head.width + h] * weights[h];
          dot += product;
          size += std::abs(product);
        }
        seed[m] = finish_logits(&dot, 1, target[m], head.shape);
        if (!rivals.ranks) continue;
        const T bias = head.shape.bias == nullptr ? T(0) : std::abs(head.shape.bias[target[m]]);
        const T terms = 4 * std::sqrt(static_cast<T>(head.width)) * std::abs(head.shape.scale);
        rivals.expect(
            m, seed[m],
            std::numeric_limits<T>::epsilon() * (terms * size + 8 * (bias + std::abs(seed[m]))));
      }
    });
  }

  // The rank of every row; 0 where ignored. Rows whose rank the sweep does not tell are counted
  // again, from logits that are computed again.
  void find_ranks() {
    ranks.assign(grid.rows, 0);
    std::vector<int64_t> open;  // tiles
    std::vector<char> again(grid.rows, false);
    for (int64_t m = 0; m < grid.rows; ++m) {
      if (target[m] == ignore_index || std::isnan(target_logit[m])) continue;
      const std::optional<int64_t> rank = rivals.rank(m, target_logit[m]);
      ranks[m] = rank.value_or(1);
      again[m] = !rank;
      const int64_t tile = m / grid.tile_rows;
      if (!rank && (open.empty() || open.back() != tile)) open.push_back(tile);
    }
    if (open.empty()) return;
    std::vector<int64_t> larger(grid.slices * grid.rows, 0);
    run_tasks(static_cast<int64_t>(open.size()) * grid.slices, [&](int64_t task) {
      const int64_t slice = task % grid.slices;
      count_again(open[task / grid.slices], slice, again, larger.data() + slice * grid.rows);
    });
    for (size_t i = 0; i < larger.size(); ++i) ranks[i % grid.rows] += larger[i];
  }

  // For the rows of `again` in a tile: the number of other logits of a slice that are larger than
  // the target's. The buffer has the alignment of the sweep's, so the logits have the same bits.
  void count_again(int64_t tile, int64_t slice, const std::vector<char>& again, int64_t* larger) {
    const int64_t row_begin = grid.tile_begin(tile), rows = grid.tile_end(tile) - row_begin;
    const int64_t width = head.width, end = grid.slice_end(slice);
    constexpr int64_t kLineItems = static_cast<int64_t>(kLine) / static_cast<int64_t>(sizeof(T));
    auto own = scratch<T>(rows * kBlock + kLineItems);
    auto buffer = scratch<T>(head.converts() ? kBlock * width : 0);
    const Tensor read = matrix(data<const T>(hidden) + row_begin * width, rows, width);
    for (int64_t first = grid.slice_begin(slice); first < end; first += kBlock) {
      const int64_t count = std::min(kBlock, end - first);
      const T* before = blocks == nullptr
                            ? nullptr
                            : fused_block(blocks, head.vocabulary, row_begin, rows, first);
      T* logits = own.get() + reinterpret_cast<uintptr_t>(before) / sizeof(T) % kLineItems;
      multiply(matrix(logits, rows, count), read,
               transposed(head.block(first, count, buffer.get()), count, width));
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t m = row_begin + i, wanted = target[m] - first;
        if (!again[m]) continue;
        T* row = logits + i * count;
        finish_logits(row, count, first, head.shape);
        if (wanted >= 0 && wanted < count) row[wanted] = -std::numeric_limits<T>::infinity();
        int64_t above, reaching;
        count_larger(row, count, target_logit[m], target_logit[m], &above, &reaching);
        larger[m] += above;
      }
    }
  }

  // One row of a block: replaces the logits by e.
  void read_row(T* row, int64_t m, int64_t slice, int64_t first, int64_t count, T* sums) {
    RowState<T>& state = states[slice * grid.rows + m];
    const T peak = finish_logits(row, count, first, head.shape);
    const int64_t wanted = target[m] - first;
    const bool here = target[m] != ignore_index && wanted >= 0 && wanted < count;
    if (here) target_logit[m] = row[wanted];
    if (gold) gold_sums[slice * grid.rows + m] += gold.sum_in(m, row, first, count);
    if (rivals && target[m] != ignore_index)
      rivals.read(m, slice, row, count, here ? wanted : -1, peak);
    for (int64_t i = m * scores; i < (m + 1) * scores; ++i) {
      const int64_t asked = score_ids[i] - first;
      if (asked >= 0 && asked < count) score_logits[i] = row[asked];
    }
    const T factor = exp_piece(row, count, peak, head.shape, &state);
    if (sums != nullptr && factor != T(1)) scale_row(sums, head.width, factor);
    if (stash != nullptr) {
      to_bfloat16(row, count, stash + m * head.vocabulary + first);
      if (here) stash[m * head.vocabulary + target[m]] = 0;
    }
    const int64_t cell = m * ceil_div(head.vocabulary, kStashBlock) + first / kStashBlock;
    if (shift != nullptr) shift[cell] = static_cast<float>(state.reference);
    if (block_shift != nullptr) block_shift[cell] = state.reference;
  }
};

// a - b, or 0 if both are -inf (all logits of the row are -inf).
inline double distance(double a, double b) { return a == b ? 0.0 : a - b; }

// Merges the states of the slices of one row.
template <class T>
RowState<T> merge(const Sweep<T>& sweep, int64_t m) {
  RowState<T> total = sweep.states[m];
  for (int64_t s = 1; s < sweep.grid.slices; ++s) {
    const T reference = sweep.states[s * sweep.grid.rows + m].reference;
    if (reference > total.reference) total.reference = reference;
  }
  total.sum = total.weighted = total.squares = 0.0;
  for (int64_t s = 0; s < sweep.grid.slices; ++s) {
    const RowState<T>& part = sweep.states[s * sweep.grid.rows + m];
    if (part.peak > total.peak) total.peak = part.peak;
    const double moved = distance(part.reference, total.reference);
    const double factor = std::exp(moved);
    total.sum += factor * part.sum;
    total.squares += factor * factor * part.squares;
    if (factor > 0.0) total.weighted += factor * (part.weighted + moved * part.sum);
  }
  return total;
}

// The ten statistics; unit, stash and shift, or unit and shift.
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                           Tensor, Tensor, Tensor, Tensor>;
using FusedResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                Tensor, Tensor, Tensor, Tensor>;

template <class T>
Results run(const Tensor& hidden, const Tensor& weight, const Tensor& target,
            const OptionalTensor& rows, const GoldTable& gold, const OptionalTensor& bias,
            const Asked& asked, double softcap, double logit_scale, int64_t ignore_index,
            int64_t keep, double filter_eps, const OptionalTensor& blocks) {
  const int64_t count = target.size(0), width = hidden.size(1), vocabulary = weight.size(0);
  const Head<T> head(weight, bias, softcap, logit_scale);
  Tensor nll = empty_of<T>(hidden, {count}), lse = empty_of<T>(hidden, {count}),
         entropy = empty_of<T>(hidden, {count}),
         correct = torch::stable::new_empty(hidden, {count}, ScalarType::Bool),
         gold_logit = empty_of<T>(hidden, {gold ? count : 0}),
         gold_logp = empty_of<T>(hidden, {gold ? count : 0}),
         rank = torch::stable::new_empty(hidden, {asked.rank ? count : 0}, ScalarType::Int),
         sum_p2 = empty_of<T>(hidden, {asked.sum_p2 ? count : 0}),
         margin = empty_of<T>(hidden, {asked.margin ? count : 0}),
         score_logp = empty_of<T>(hidden, {asked.score_ids ? count : 0, asked.scores()}),
         unit = empty_of<T>(hidden, {keep & kUnit ? count : 0, width});
  const bool stashes = keep & kStash;
  const int64_t references = ceil_div(vocabulary, kStashBlock);
  Tensor stash = torch::stable::new_empty(hidden, {stashes ? count : 0, vocabulary},
                                          ScalarType::BFloat16),
         shift = blocks ? empty_of<T>(hidden, {count, references})
                        : torch::stable::new_empty(hidden, {stashes ? count : 0, references},
                                                   ScalarType::Float);

  const Grid grid(count, vocabulary, tile_rows<T>(), kTasks);
  Sweep<T> sweep{head,
                 grid,
                 gold,
                 rows ? gather_rows<T>(hidden, *rows) : in_compute_type<T>(hidden),
                 data<const int64_t>(target),
                 ignore_index,
                 filter_eps,
                 Rivals<T>(asked.rank, asked.margin, count, grid.slices),
                 asked.score_ids ? data<const int64_t>(*asked.score_ids) : nullptr,
                 asked.scores()};
  sweep.unit = keep & kUnit ? data<T>(unit) : nullptr;
  if (stashes) {
    sweep.stash = data<uint16_t>(stash);
    sweep.shift = data<float>(shift);
  }
  if (blocks) {
    sweep.blocks = data<T>(*blocks);
    sweep.block_shift = data<T>(shift);
  }
  sweep.run();

  const int64_t* targets = data<const int64_t>(target);
  run_tasks(sweep.grid.tiles, [&](int64_t tile) {
    auto target_row = scratch<T>(width);
    for (int64_t m = sweep.grid.tile_begin(tile); m < sweep.grid.tile_end(tile); ++m) {
      const RowState<T> total = merge(sweep, m);
      const bool live = targets[m] != ignore_index;
      const double log_sum = total.reference + std::log(total.sum);
      data<T>(lse)[m] = static_cast<T>(log_sum);
      data<T>(entropy)[m] = static_cast<T>(std::log(total.sum) - total.weighted / total.sum);
      data<T>(nll)[m] = live ? static_cast<T>(log_sum - sweep.target_logit[m]) : T(0);
      // If a logit is NaN, the peak does not show it, but the sum does.
      const bool number = !std::isnan(total.sum);
      data<bool>(correct)[m] = live && sweep.target_logit[m] >= total.peak && number;
      if (asked.rank) data<int32_t>(rank)[m] = number ? static_cast<int32_t>(sweep.ranks[m]) : 0;
      if (asked.sum_p2)
        data<T>(sum_p2)[m] = static_cast<T>(total.squares / (total.sum * total.sum));
      if (asked.margin) {
        const T apart = sweep.target_logit[m] - sweep.rivals.largest(m);
        data<T>(margin)[m] = !live ? T(0) : number ? apart : std::numeric_limits<T>::quiet_NaN();
      }
      for (int64_t i = m * asked.scores(); i < (m + 1) * asked.scores(); ++i) {
        data<T>(score_logp)[i] = sweep.score_ids[i] < 0
                                     ? -std::numeric_limits<T>::infinity()
                                     : static_cast<T>(sweep.score_logits[i] - log_sum);
      }
      if (gold) {
        double sum = 0.0;
        for (int64_t s = 0; s < sweep.grid.slices; ++s) sum += sweep.gold_sums[s * count + m];
        const double mean = sum / static_cast<double>(gold.end(m) - gold.begin(m));
        data<T>(gold_logit)[m] = static_cast<T>(mean);
        data<T>(gold_logp)[m] = static_cast<T>(mean - log_sum);
      }
      if (sweep.unit == nullptr) continue;
      T* out = sweep.unit + m * width;
      if (!live) {
        std::memset(out, 0, width * sizeof(T));
        continue;
      }
      for (int64_t s = 0; s < sweep.grid.slices; ++s) {
        const double moved = distance(sweep.states[s * count + m].reference, total.reference);
        const T factor = static_cast<T>(logit_scale * std::exp(moved) / total.sum);
        if (s == 0) {
          scale_row(out, width, factor);
        } else {
          add_scaled_row(out, sweep.partial_rows(s) + m * width, width, factor);
        }
      }
      const T slope = softcap_slope(sweep.target_logit[m], head.shape);
      add_scaled_row(out, head.block(targets[m], 1, target_row.get()), width,
                     static_cast<T>(-logit_scale * slope));
    }
  });
  return {nll,    lse,    entropy,    correct, gold_logit, gold_logp, rank,
          sum_p2, margin, score_logp, unit,    stash,      shift};
}

Results linear_token_stats(Tensor hidden, Tensor weight, Tensor target, OptionalTensor rows,
                           OptionalTensor gold_ids, OptionalTensor gold_offsets,
                           OptionalTensor gold_problem, OptionalTensor bias,
                           OptionalTensor score_ids, double softcap, double logit_scale,
                           int64_t ignore_index, int64_t keep, double filter_eps, bool need_rank,
                           bool need_sum_p2, bool need_margin) {
  check_head(kOp, hidden, weight, bias);
  const int64_t count = rows ? rows->size(0) : hidden.size(0);
  const Tensor targets = checked_index(kOp, "target", target, count, weight.size(0), ignore_index);
  if (rows) rows = checked_index(kOp, "rows", *rows, count, hidden.size(0));
  const GoldTable gold(kOp, gold_ids, gold_offsets, gold_problem, count, weight.size(0));
  const Asked asked =
      checked(kOp, need_rank, need_sum_p2, need_margin, score_ids, count, weight.size(0));
  const auto call = computes_in_double(hidden) ? &run<double> : &run<float>;
  return call(hidden, weight, targets, rows, gold, bias, asked, softcap, logit_scale, ignore_index,
              keep, filter_eps, std::nullopt);
}

FusedResults linear_token_stats_fused(Tensor blocks, Tensor hidden, Tensor weight, Tensor target,
                                      OptionalTensor gold_ids, OptionalTensor gold_offsets,
                                      OptionalTensor gold_problem, OptionalTensor bias,
                                      OptionalTensor score_ids, double softcap, double logit_scale,
                                      int64_t ignore_index, double filter_eps, bool need_hidden,
                                      bool need_rank, bool need_sum_p2, bool need_margin) {
  check_head(kFusedOp, hidden, weight, bias);
  const int64_t count = hidden.size(0), vocabulary = weight.size(0);
  const Tensor targets = checked_index(kFusedOp, "target", target, count, vocabulary, ignore_index);
  const GoldTable gold(kFusedOp, gold_ids, gold_offsets, gold_problem, count, vocabulary);
  const Asked asked =
      checked(kFusedOp, need_rank, need_sum_p2, need_margin, score_ids, count, vocabulary);
  check_blocks(kFusedOp, blocks, count, vocabulary, hidden);
  const auto call = computes_in_double(hidden) ? &run<double> : &run<float>;
  auto [nll, lse, entropy, correct, gold_logit, gold_logp, rank, sum_p2, margin, score_logp, unit,
        stash, shift] =
      call(hidden, weight, targets, std::nullopt, gold, bias, asked, softcap, logit_scale,
           ignore_index, need_hidden ? kUnit : kNothing, filter_eps, blocks);
  return {nll,  lse,    entropy, correct,    gold_logit, gold_logp,
          rank, sum_p2, margin,  score_logp, unit,       shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compact, CPU, m) {
  m.impl("linear_token_stats", TORCH_BOX(&linear_token_stats));
  m.impl("linear_token_stats_fused", TORCH_BOX(&linear_token_stats_fused));
}

}  // namespace compact
