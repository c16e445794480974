// The CUDA kernels against float64 in the host harness: simt_kernels [fibers|threads] [seed]
// [case]. Prints each case before it runs, so that the last line names the case that failed.
#include <algorithm>
#include <cstdlib>
#include <random>

#include "../rounding.h"
#include "simt_full_size.h"

namespace {

struct HeadCase {
  bool bias = false;
  double scale = 1, softcap = 0;
  double z(double raw, double b) const {
    const double x = scale * raw + (bias ? b : 0);
    return softcap == 0 ? x : softcap * std::tanh(x / softcap);
  }
  double slope(double z) const { return softcap == 0 ? 1 : 1 - (z / softcap) * (z / softcap); }
};

double lse_of(const std::vector<double>& z) {
  double m = -kInf, s = 0;
  for (double v : z) m = std::max(m, v);
  if (m == -kInf) return m;
  for (double v : z) s += std::exp(v - m);
  return m + std::log(s);
}

enum Values { kOrdinary, kHuge, kSomeExcluded, kAllExcluded, kAllIgnored, kPeaked, kTied, kOneNaN };

template <typename T>
void row_case(int64_t rows, int64_t cols, int64_t shift, int threads, int64_t staged, Values values,
              HeadCase head, bool overwrite, bool with_stash, bool more, uint64_t seed) {
  using A = accumulate_t<T>;
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(0, 3);
  const int64_t ignore = cols % 3 == 0 ? 0 : -100;  // 0 is a column too
  Buffer<T> logits(rows * cols, shift);
  Buffer<bfloat16> stash(rows * cols, 3);
  std::vector<double> raw(rows * cols);
  std::vector<A> bias(cols), weight(rows);
  std::vector<int64_t> target(rows), gold_ids{0, cols - 1, cols / 2, cols / 3},
      gold_offsets{0, 1, 4}, gold_problem(rows);
  for (auto& b : bias) b = static_cast<A>(normal(random));
  for (int64_t r = 0; r < rows; ++r) {
    target[r] =
        values == kAllIgnored || r % 5 == 4 ? ignore : static_cast<int64_t>(random() % cols);
    gold_problem[r] = r % 2;
    weight[r] = static_cast<A>(r % 7 == 3 ? 0 : 0.25 + (r % 7));
    for (int64_t v = 0; v < cols; ++v) {
      double x = normal(random) * (values == kHuge ? 1e3 : 1);
      if (values == kSomeExcluded && v != target[r] && random() % 3 == 0) x = -kInf;
      if (values == kAllExcluded) x = -kInf;
      if (values == kPeaked && v == target[r]) x = 40;
      if (values == kTied) x = std::round(x);
      if (values == kOneNaN && v == (target[r] + 1) % cols) x = std::nan("");
      logits[r * cols + v] = make<T>(x);
      raw[r * cols + v] = simt::to_float(logits[r * cols + v]);
    }
  }
  const int scores = 5;
  std::vector<int64_t> score_ids(rows * scores);
  for (auto& id : score_ids) id = random() % 3 == 0 ? -1 : static_cast<int64_t>(random() % cols);
  std::vector<A> nll(rows), lse(rows), entropy(rows), gold_logit(rows), gold_logp(rows),
      sum_p2(rows), margin(rows), score_logp(rows * scores);
  std::vector<int32_t> rank(rows);
  std::unique_ptr<bool[]> correct(new bool[rows]);
  RowStats<T> args{};
  args.logits = logits.get();
  args.cols = cols;
  args.target = target.data();
  args.weight = weight.data();
  args.head = {head.bias ? bias.data() : nullptr, static_cast<A>(head.scale),
               static_cast<A>(head.softcap)};
  args.out_scale = static_cast<A>(head.scale);
  args.ignore_index = ignore;
  args.gold_ids = gold_ids.data();
  args.gold_offsets = gold_offsets.data();
  args.gold_problem = gold_problem.data();
  args.gold_count = 4;
  args.gold_problems = 2;
  args.nll = nll.data();
  args.lse = lse.data();
  args.entropy = entropy.data();
  args.correct = correct.get();
  args.gold_logit = gold_logit.data();
  args.gold_logp = gold_logp.data();
  if (with_stash) args.stash = stash.get();
  args.overwrite = overwrite;
  args.staged = staged;
  args.rank = rank.data();
  args.sum_p2 = sum_p2.data();
  args.margin = margin.data();
  args.score_ids = score_ids.data();
  args.score_logp = score_logp.data();
  args.scores = scores;
  simt::host::run(rows, threads, staged * 16, [&] {
    if (more) {
      row_stats_kernel<T, true>(args);
    } else {
      row_stats_kernel<T, false>(args);
    }
  });
  logits.check("logits' surroundings");
  stash.check("stash's surroundings");
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<double> z(cols);
    for (int64_t v = 0; v < cols; ++v) z[v] = head.z(raw[r * cols + v], bias[v]);
    const double l = lse_of(z), big = std::max(1.0, std::abs(l));
    double h = 0, top = -kInf, golden = 0;
    for (double v : z) {
      top = std::max(top, v);
      const double p = std::exp(v - l);
      if (p > 0 || p != p) h -= p * (v - l);
    }
    const bool live = target[r] != ignore;
    const double zt = live ? z[target[r]] : 0;
    const auto& o = gold_offsets;
    for (int64_t i = o[gold_problem[r]]; i < o[gold_problem[r] + 1]; ++i) golden += z[gold_ids[i]];
    golden /= static_cast<double>(o[gold_problem[r] + 1] - o[gold_problem[r]]);
    near("lse", r, lse[r], l, kStat<T>, 1);
    near("nll", r, nll[r], live ? l - zt : 0, kStat<T>, big);
    near("entropy", r, entropy[r], h, kStat<T> * 8, std::max(1.0, std::log(cols)));
    near("gold_logit", r, gold_logit[r], golden, kStat<T>, big);
    near("gold_logp", r, gold_logp[r], golden - l, kStat<T>, big);
    const bool known = live && l == l;  // a NaN logit makes the sum NaN
    if (correct[r] != (known && zt >= top)) fail("correct", r, correct[r], known && zt >= top);
    if (more) {
      double squares = 0, other = -kInf;
      int64_t least = 1, most = 1;  // of the rank, for logits that float rounds
      for (int64_t v = 0; v < cols; ++v) {
        squares += std::exp(2 * (z[v] - l));
        if (!live || v == target[r]) continue;
        other = std::max(other, z[v]);
        const double slack = head.scale == 1 && !head.bias ? 0 : kStat<T> * big;
        least += z[v] > zt + slack;
        most += slack > 0 ? z[v] > zt - slack : z[v] > zt;
      }
      if (rank[r] < (known ? least : 0) || rank[r] > (known ? most : 0))
        fail("rank", r, rank[r], known ? static_cast<double>(least) : 0);
      near("sum_p2", r, sum_p2[r], squares, kStat<T> * 8, 1);
      near("margin", r, margin[r], known ? zt - other : live ? l : 0, kStat<T>, big);
      for (int64_t i = r * scores; i < (r + 1) * scores; ++i) {
        const double logp = score_ids[i] < 0 ? -kInf : z[score_ids[i]] - l;
        near("score_logp", i, score_logp[i], logp, kStat<T>, big);
      }
    }
    for (int64_t v = 0; v < cols; ++v) {
      const double now = simt::to_float(logits[r * cols + v]);
      if (!overwrite) {
        near("untouched logit", v, now, raw[r * cols + v], 0, 0);
        continue;
      }
      const double p = std::exp(z[v] - l), slope = head.slope(z[v]);
      const bool some = live && weight[r] != 0;  // else 0, also where p is NaN
      const double g = some ? weight[r] * (p - (v == target[r])) * slope * head.scale : 0;
      near("gradient", r * cols + v, now, g, kUlp<T>, 1e-2 * weight[r] + 1e-4 * (values == kHuge));
      if (with_stash)
        near("stash", r * cols + v, simt::to_float(stash[r * cols + v]),
             some && v != target[r] ? p * slope : 0, kUlp<bfloat16>, 1e-3);
    }
  }
}

template <typename T>
void rows_of(uint64_t seed) {
  const HeadCase plain, full{true, 0.7, 5.0};
  // Three rows are enough for races: two blocks side by side, and one after another.
  const int64_t rows = threads_mode ? 3 : 7;
  for (int64_t cols : {1, 2, 7, 33, 129, 1000, 4099})
    for (int64_t shift : {0, 1, 3})
      for (bool more : {false, true})
        row_case<T>(rows, cols, shift, 64, (cols / 8) / 2, kOrdinary, shift == 1 ? full : plain,
                    true, true, more, seed + cols);
  for (bool more : {false, true}) {
    row_case<T>(3, 1000, 1, 256, 1 << 20 >> 14, kOrdinary, full, true, false, more, seed);
    for (Values values : {kHuge, kSomeExcluded, kAllExcluded, kAllIgnored, kPeaked, kTied, kOneNaN})
      row_case<T>(rows, 333, 1, 96, 8, values, plain, true, false, more, seed);
    row_case<T>(rows, 515, 1, 32, 0, kSomeExcluded, full, false, false, more, seed);
  }
}

void row_stats_float(uint64_t s) { rows_of<float>(s); }
void row_stats_double(uint64_t s) { rows_of<double>(s); }
void row_stats_half(uint64_t s) {
  const HeadCase plain;
  for (int64_t cols : {1, 33, 4099})
    row_case<half>(5, cols, 1, 64, 4, kOrdinary, plain, true, true, true, s);
}
void row_stats_bfloat16(uint64_t s) { rows_of<bfloat16>(s); }
void row_stats_large(uint64_t s) {
  const HeadCase plain;
  row_case<bfloat16>(2, 262143, 1, threads_mode ? 64 : 1024, 777, kOrdinary, plain, true, false,
                     true, s);
  row_case<bfloat16>(2, 151936, 0, threads_mode ? 64 : 1024, 2048, kPeaked, plain, true, false,
                     false, s);
}
void row_stats_grid(uint64_t s) {
  const HeadCase plain;
  row_case<float>(threads_mode ? 70 : 10000, 5, 1, 32, 0, kOrdinary, plain, true, false, true, s);
  row_case<float>(threads_mode ? 70 : 70001, 3, 1, 32, 0, kOrdinary, plain, true, false, false, s);
}

void head_gradient(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  for (bool from_stash : {false, true})
    for (int64_t vocabulary : {3, 50, 601}) {
      const int64_t rows = 6, first = vocabulary / 3, cols = vocabulary - first;
      const HeadCase head{true, 1.3, 4.0};
      Buffer<float> block(rows * cols, 1);
      std::vector<bfloat16> stash(rows * vocabulary);
      std::vector<float> bias(vocabulary), up(rows), nll(rows), lse(rows);
      std::vector<int64_t> target(rows);
      std::vector<double> want(rows * cols);
      for (auto& b : bias) b = static_cast<float>(normal(random));
      for (int64_t r = 0; r < rows; ++r) {
        std::vector<double> z(vocabulary);
        std::vector<float> raw(vocabulary);
        for (int64_t v = 0; v < vocabulary; ++v) {
          raw[v] = static_cast<float>(normal(random));
          z[v] = head.z(raw[v], bias[v]);
        }
        const double l = lse_of(z);
        target[r] = r == 2 ? -100 : r == 0 ? first : static_cast<int64_t>(random() % vocabulary);
        up[r] = r == 3 ? 0.f : static_cast<float>(1 + r);
        lse[r] = static_cast<float>(l);
        nll[r] = r == 2 ? 0 : static_cast<float>(l - z[target[r]]);
        for (int64_t v = 0; v < vocabulary; ++v) {
          const double part = std::exp(z[v] - l) * head.slope(z[v]);
          stash[r * vocabulary + v] = make<bfloat16>(v == target[r] ? 0 : part);
          if (v < first) continue;
          block[r * cols + v - first] = raw[v];
          want[r * cols + v - first] =
              r == 2 ? 0 : up[r] * head.scale * (part - (v == target[r] ? head.slope(z[v]) : 0));
          // With upstream 0 the logits do not matter.
          if (r == 3) {
            block[r * cols + v - first] = std::nanf("");
            stash[r * vocabulary + v] = make<bfloat16>(std::nan(""));
            lse[r] = nll[r] = std::nanf("");
          }
        }
      }
      HeadGradient<float> args{block.get(), cols,          first,
                               vocabulary,  target.data(), up.data(),
                               nll.data(),  lse.data(),    {bias.data() + first, 1.3f, 4.0f},
                               1.3f,        -100,          stash.data()};
      simt::host::run(rows, 64, 0, [&] {
        from_stash ? stash_gradient_kernel(args) : head_gradient_kernel(args);
      });
      block.check("surroundings");
      for (int64_t i = 0; i < rows * cols; ++i)
        near("gradient", i, block[i], want[i], from_stash ? 8e-3 : 1e-5, 1e-2);
    }
  const int64_t rows = 37, cols = 100;
  std::vector<float> matrix(rows * cols), out(cols + 1, -5.f);
  for (auto& x : matrix) x = static_cast<float>(normal(random));
  std::vector<float> up(rows), sums(matrix.begin(), matrix.end());
  for (int64_t r = 0; r < rows; ++r) up[r] = static_cast<float>(r % 3) - 1;
  ColumnSum<float> sum{matrix.data(), nullptr, rows, cols, 2.f, out.data()};
  simt::host::run(4, 32, 0, [&] { column_sum_kernel(sum); });
  sum.weight = up.data();
  simt::host::run(4, 32, 0, [&] { column_sum_kernel(sum); });
  for (int64_t c = 0; c < cols; ++c) {
    double want = 0;
    for (int64_t r = 0; r < rows; ++r) want += 2.0 * (1 + up[r]) * matrix[r * cols + c];
    near("column_sum", c, out[c], want, 1e-5, 1);
  }
  if (out[cols] != -5.f) fail("past the last column", cols, out[cols], -5);
  Buffer<float> cleared(rows * cols, 1);
  std::vector<int64_t> target(rows, 5);
  std::vector<float> given(up), factor(rows);
  for (int64_t r = 0; r < rows; ++r) {
    if (r % 5 == 0) target[r] = -100, given[r] = std::nanf("");
    for (int64_t c = 0; c < cols; ++c)
      cleared[r * cols + c] = given[r] > 0 || given[r] < 0 ? matrix[r * cols + c] : std::nanf("");
  }
  const ClearRows<float> clear{cleared.get(), given.data(), target.data(),
                               factor.data(), cols,         -100};
  simt::host::run(rows, 32, 0, [&] { clear_rows_kernel(clear); });
  cleared.check("surroundings");
  for (int64_t r = 0; r < rows; ++r) {
    const bool some = r % 5 != 0 && up[r] != 0;
    near("factor", r, factor[r], some ? up[r] : 0, 0, 0);
    for (int64_t c = 0; c < cols; ++c)
      near("cleared", r * cols + c, cleared[r * cols + c], some ? matrix[r * cols + c] : 0, 0, 0);
  }
  const AddTo<float> add{matrix.data(), 99, sums.data()};
  simt::host::run(4, 32, 0, [&] { add_to_kernel(add); });
  for (int64_t i = 0; i < 128; ++i)
    near("sum", i, sums[i], (i < 99 ? 2.0 : 1.0) * matrix[i], 1e-6, 0);
}

void pairs(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(0, 2);
  // Row 0 is in three pairs, row 4 in one with itself, row 3 in none; rows 0 and 1 are equal. Tiles
  // of three rows hold {0, 1, 2} and {0, 5}, parts of one component, and 4.
  const std::vector<int64_t> lefts{0, 4, 2, 5}, rights{1, 4, 0, 0};
  const int64_t n = 4, rows = 6;
  const compact::PairPlan plan = compact::plan_pairs(lefts.data(), rights.data(), n, rows, 3);
  if (plan.rows != std::vector<int64_t>{0, 1, 2, 5, 0, 4}) fail("rows of tiles", 0, 0, 0);
  if (plan.tile_rows != std::vector<int64_t>{0, 3, 6}) fail("tiles", 0, 0, 0);
  for (int64_t cols : {1, 5, 130, 2051})
    for (bool excluded : {false, true}) {
      const HeadCase head{true, 0.9, excluded ? 0 : 6.0};
      std::vector<float> logits(rows * cols), bias(cols), up{1.f, -2.f, .5f, 0.7f};
      for (auto& b : bias) b = static_cast<float>(normal(random));
      for (int64_t i = 0; i < rows * cols; ++i) {
        logits[i] = static_cast<float>(normal(random));
        if (i / cols == 1) logits[i] = logits[i - cols];
        if (excluded && cols > 1 && i % cols % 4 == 1) logits[i] = -INFINITY;
      }
      std::vector<double> z(rows * cols), lse, kl_left(n), kl_right(n), want(rows * cols);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t v = 0; v < cols; ++v) z[r * cols + v] = head.z(logits[r * cols + v], bias[v]);
        lse.push_back(lse_of({z.begin() + r * cols, z.begin() + (r + 1) * cols}));
      }
      // KL(p || q) of rows a and b, and its part of the gradient of the logits of a.
      const auto one_way = [&](int64_t a, int64_t b, double upstream) {
        const auto log_p = [&](int64_t v) { return z[a * cols + v] - lse[a]; };
        const auto log_q = [&](int64_t v) { return z[b * cols + v] - lse[b]; };
        double kl = 0;
        for (int64_t v = 0; v < cols; ++v)
          if (z[a * cols + v] != -kInf) kl += std::exp(log_p(v)) * (log_p(v) - log_q(v));
        for (int64_t v = 0; v < cols; ++v) {
          if (z[a * cols + v] == -kInf) continue;
          const double x = std::exp(log_p(v)), y = std::exp(log_q(v));
          want[a * cols + v] += upstream * .9 * head.slope(z[a * cols + v]) *
                                (x * (log_p(v) - log_q(v) - kl) + x - y);
        }
        return kl;
      };
      for (int64_t k = 0; k < n; ++k) {
        kl_left[k] = one_way(lefts[k], rights[k], up[k]);
        kl_right[k] = one_way(rights[k], lefts[k], up[k]);
      }
      std::vector<float> found_left(n), found_right(n), lse_left(n), lse_right(n);
      Pairs<float> args{};
      args.cols = cols;
      args.head = {bias.data(), 0.9f, static_cast<float>(head.softcap)};
      args.kl_left = found_left.data(), args.kl_right = found_right.data();
      args.lse_left = lse_left.data(), args.lse_right = lse_right.data();
      args.ends = plan.ends.data(), args.other = plan.other.data(), args.side = plan.side.data();
      args.upstream = up.data();
      args.out_scale = 0.9f;
      std::vector<double> found(rows * cols);  // rows of several tiles are added up
      for (bool gradient : {false, true})
        for (size_t t = 0; t + 1 < plan.tile_rows.size(); ++t) {
          const int64_t first = plan.tile_rows[t], count = plan.tile_rows[t + 1] - first;
          std::vector<float> block(count * cols);
          for (int64_t i = 0; i < count * cols; ++i)
            block[i] = logits[plan.rows[first + i / cols] * cols + i % cols];
          Buffer<float> out(count * cols, 0);
          args.logits = block.data();
          args.first_slot = first;
          args.out = out.get();
          const int64_t begin = plan.tile_pairs[t];
          args.left = plan.left.data() + begin, args.right = plan.right.data() + begin;
          args.index = plan.index.data() + begin;
          if (!gradient) {
            simt::host::run(plan.tile_pairs[t + 1] - begin, 96, 0,
                            [&] { pair_stats_kernel(args); });
            continue;
          }
          simt::host::run(count, 96, 0, [&] { pair_gradient_kernel(args); });
          for (int64_t i = 0; i < count * cols; ++i)
            found[plan.rows[first + i / cols] * cols + i % cols] += out[i];
          out.check("past the gradient");
        }
      for (int64_t i = 0; i < rows * cols; ++i) near("gradient", i, found[i], want[i], 1e-4, 1e-2);
      for (int64_t k = 0; k < n; ++k) {
        near("kl_left", k, found_left[k], kl_left[k], 1e-4, 1e-2);
        near("kl_right", k, found_right[k], kl_right[k], 1e-4, 1e-2);
        near("lse_left", k, lse_left[k], lse[lefts[k]], 4e-6, 1);
        near("lse_right", k, lse_right[k], lse[rights[k]], 4e-6, 1);
      }
    }
}

void accumulate(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  for (int64_t width : {1, 7, 64, 129})
    for (bool grouped : {false, true}) {
      const int64_t items = 41, rows = 17, groups = 3;
      std::vector<int64_t> row(items), group(items), order(items), sorted(items);
      Buffer<float> unit(items * width, 0), out(rows * width, 0);
      std::vector<float> weight(items);
      std::vector<double> want(rows * width);
      for (auto& w : weight) w = static_cast<float>(normal(random));
      weight[1] = 0;  // its units are NaN
      for (int64_t i = 0; i < rows * width; ++i) out[i] = 0;
      for (int64_t m = 0; m < items; ++m) {
        row[m] = m == 3 ? rows : m == 4 ? -1 : static_cast<int64_t>(random() % (rows - 1));
        group[m] = static_cast<int64_t>(random() % groups);
        order[m] = m;
        const double factor = weight[grouped ? group[m] : m];
        for (int64_t h = 0; h < width; ++h) {
          float& each = unit[m * width + h];
          each = factor == 0 ? NAN : static_cast<float>(normal(random));
          if (factor != 0 && row[m] >= 0 && row[m] < rows)
            want[row[m] * width + h] += factor * each;
        }
      }
      std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return row[a] < row[b]; });
      for (int64_t i = 0; i < items; ++i) sorted[i] = row[order[i]];
      AccumulateWeighted<float> args{unit.get(),
                                     sorted.data(),
                                     order.data(),
                                     weight.data(),
                                     grouped ? group.data() : nullptr,
                                     items,
                                     grouped ? groups : items,
                                     width,
                                     rows,
                                     width % 4 == 0,
                                     out.get()};
      simt::host::run(items, 32, 0, [&] { accumulate_weighted_kernel(args); });
      out.check("surroundings");
      for (int64_t i = 0; i < rows * width; ++i) near("row", i, out[i], want[i], 1e-5, 1);
    }
}

void problem(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  const std::vector<int64_t> offsets{0, 1, 3, 7, 7, 77, 81};
  const int64_t total = 81, count = 3;
  std::vector<float> scores(count * total), beta{1.f, .5f, -1.f}, prior{.1f, 0.f, .3f};
  for (auto& s : scores) s = static_cast<float>(normal(random));
  for (int64_t s = 0; s < count; ++s)
    for (int64_t i = 77; i < 81; ++i) scores[s * total + i] = 2.f;
  for (double eps : {0.0, 1e-4})
    for (int64_t ddof : {0, 1}) {
      Buffer<float> out(total, 0), zscores(count * total, 0);
      ProblemWeights<float> args{scores.data(), offsets.data(), beta.data(),
                                 prior.data(),  count,          total,
                                 0.7f,          ddof,           static_cast<float>(eps),
                                 0.1f,          out.get(),      zscores.get()};
      simt::host::run(6, 32, 0, [&] { problem_weights_kernel(args); });
      out.check("surroundings");
      zscores.check("surroundings");
      for (size_t p = 0; p + 1 < offsets.size(); ++p) {
        const int64_t b = offsets[p], k = offsets[p + 1] - b;
        std::vector<double> u(k);
        for (int64_t s = 0; s < count; ++s) {
          double mean = 0, var = 0;
          for (int64_t i = 0; i < k; ++i) mean += scores[s * total + b + i] / k;
          for (int64_t i = 0; i < k; ++i) var += std::pow(scores[s * total + b + i] - mean, 2);
          var /= std::max<int64_t>(k - ddof, 1);
          const double d =
              eps > 0 ? std::sqrt(var) + eps : std::sqrt(var + 1.0 * prior[s] * prior[s]);
          for (int64_t i = 0; i < k; ++i) {
            const double z = d > 0 ? (scores[s * total + b + i] - mean) / d : 0;
            near("z-score", s * total + b + i, zscores[s * total + b + i], z, 2e-5, 1);
            u[i] += beta[s] * z / .7;
          }
        }
        const double l = k ? lse_of(u) : 0;
        for (int64_t i = 0; i < k; ++i)
          near("weight", b + i, out[b + i], k == 1 ? 1 : .9 * std::exp(u[i] - l) + .1 / k, 2e-5,
               1e-2);
      }
    }
}

void filtered(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  for (int64_t width : {1, 13, 64})
    for (int64_t inner : {1, 100, 1501}) {
      const int64_t rows = 4;
      const bool wide = width % 4 == 0, even = inner % 4 == 0;
      Buffer<float> grad(rows * inner, even ? 0 : 1), weight(inner * width, wide ? 0 : 1),
          out(rows * width, 1);
      std::vector<float> scale{1.f, -2.f, 1.f, 3.f};
      std::vector<double> want(rows * width);
      for (int64_t i = 0; i < inner * width; ++i) weight[i] = static_cast<float>(normal(random));
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t v = 0; v < inner; ++v) {
          double g = normal(random);
          if (r == 2) g *= 0.01;                     // little stays
          if (r == 3 && v >= 300 && v < 900) g = 0;  // tiles without entries
          if (v == inner - 1 && r == 0) g = 0.5;     // exactly the threshold stays
          grad[r * inner + v] = static_cast<float>(g);
          const double counted =
              rounded_by_reference(grad[r * inner + v], 0.5f * std::abs(scale[r]), v);
          for (int64_t h = 0; h < width; ++h)
            want[r * width + h] += counted * weight[v * width + h];
        }
      const int64_t threads = 32, stretches = (width + threads * 4 - 1) / (threads * 4);
      FilteredMatmul<float> args{grad.get(), weight.get(), inner, width, stretches,
                                 0.5f,       scale.data(), even,  wide,  out.get()};
      simt::host::run(rows * stretches, threads, 0, [&] { filtered_matmul_kernel(args); });
      args.stretches = 1;
      simt::host::run(rows, 64, 0, [&] { filtered_matmul_kernel(args); });
      out.check("surroundings");
      for (int64_t i = 0; i < rows * width; ++i) near("product", i, out[i], want[i], 1e-5, 20);
    }
}

struct Case {
  const char* name;
  void (*run)(uint64_t);
};
constexpr Case kCases[] = {
    {"row_stats_float", row_stats_float},
    {"row_stats_bfloat16", row_stats_bfloat16},
    {"row_stats_half", row_stats_half},
    {"row_stats_double", row_stats_double},
    {"head_gradient", head_gradient},
    {"pairs", pairs},
    {"accumulate", accumulate},
    {"problem", problem},
    {"filtered", filtered},
    {"row_stats_large", row_stats_large},
    {"full_size_row_stats", full_size_row_stats},
    {"full_size_gradients", full_size_gradients},
    {"full_size_pairs", full_size_pairs},
    {"full_size_accumulate", full_size_accumulate},
    {"full_size_filtered", full_size_filtered},
    {"full_size_problem", full_size_problem},
    {"row_stats_grid", row_stats_grid},
};

}  // namespace

int main(int argc, char** argv) {
  threads_mode = argc > 1 && std::string(argv[1]) == "threads";
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  simt::host::config() = {
      threads_mode ? simt::host::Mode::kThreads : simt::host::Mode::kFibers, seed, {}};
  int ran = 0;
  for (const Case& c : kCases) {
    if (argc > 3 && std::string(argv[3]) != c.name) continue;
    std::printf("%s\n", c.name);
    std::fflush(stdout);
    c.run(seed);
    ++ran;
  }
  const auto n = simt::host::counts();
  std::printf(
      "passed %d cases: %llu launches, %llu blocks, %llu barriers, %llu shuffles\n", ran,
      static_cast<unsigned long long>(n.launches), static_cast<unsigned long long>(n.blocks),
      static_cast<unsigned long long>(n.barriers), static_cast<unsigned long long>(n.shuffles));
  return ran == 0;
}
