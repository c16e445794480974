// The kernels' index arithmetic at full size: 262,144 columns, 10,000 rows, grids over 65,535
// blocks, element numbers past 2^31. Memory is reserved, not used: of a launch only a few blocks
// are played, the first, the last and the first past 2^31, and only what they touch becomes real.
#pragma once

#include <sys/mman.h>

#include "simt_check.h"

namespace {

// `count` zeros of which only the touched pages exist.
template <typename T>
class Sparse {
 public:
  explicit Sparse(int64_t count) : bytes_(count * sizeof(T)) {
    void* at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) fail("address space", count, 0, 1);
    data_ = static_cast<T*>(at);
  }
  ~Sparse() { munmap(data_, bytes_); }
  Sparse(const Sparse&) = delete;
  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  size_t bytes_;
  T* data_;
};

// Plays `chosen` blocks of a launch.
template <typename Body>
void play(int64_t blocks, int threads, std::vector<int64_t> chosen, size_t dynamic_bytes,
          const Body& body) {
  simt::host::config().only = std::move(chosen);
  simt::host::run(blocks, threads, dynamic_bytes, body);
  simt::host::config().only.clear();
}

// Logits between -5 and 5 that differ from row to row; returns them as stored.
template <typename T>
std::vector<double> fill(T* row, int64_t cols, int64_t number) {
  std::vector<double> z(cols);
  for (int64_t v = 0; v < cols; ++v) {
    row[v] = make<T>(static_cast<double>((v * 7919 + number * 31) % 1021) / 102 - 5);
    z[v] = simt::to_float(row[v]);
  }
  return z;
}

double log_sum(const std::vector<double>& z) {
  double sum = 0;
  for (double v : z) sum += std::exp(v);
  return std::log(sum);
}

constexpr int64_t kRows = 10000, kVocabulary = 262144;
const std::vector<int64_t> kChosen{0, 8191, 8192, kRows - 1};  // 8192 * 262144 is 2^31

void full_size_row_stats(uint64_t) {
  for (int64_t cols : {kVocabulary, kVocabulary - 1}) {
    Sparse<bfloat16> logits(kRows * cols), stash(kRows * cols);
    std::vector<int64_t> target(kRows);
    std::vector<float> nll(kRows), lse(kRows), entropy(kRows);
    std::vector<int32_t> rank(kRows);
    std::unique_ptr<bool[]> correct(new bool[kRows]);
    std::vector<std::vector<double>> z;
    for (int64_t r = 0; r < kRows; ++r) target[r] = r * 7919 % cols;
    for (int64_t r : kChosen) z.push_back(fill(logits.get() + r * cols, cols, r));
    RowStats<bfloat16> args{};
    args.logits = logits.get();
    args.cols = cols;
    args.target = target.data();
    args.head = {nullptr, 1.f, 0.f};
    args.out_scale = 1;
    args.ignore_index = -100;
    args.nll = nll.data();
    args.lse = lse.data();
    args.entropy = entropy.data();
    args.correct = correct.get();
    args.rank = rank.data();
    args.stash = stash.get();
    args.overwrite = true;
    args.staged = 1000;
    play(kRows, threads_mode ? 64 : 1024, kChosen, 16000,
         [&] { row_stats_kernel<bfloat16, true>(args); });
    for (size_t i = 0; i < kChosen.size(); ++i) {
      const int64_t r = kChosen[i], t = target[r];
      const double l = log_sum(z[i]);
      near("lse", r, lse[r], l, kStat<float>, 1);
      near("nll", r, nll[r], l - z[i][t], kStat<float>, l);
      const auto larger =
          std::count_if(z[i].begin(), z[i].end(), [&](double v) { return v > z[i][t]; });
      if (rank[r] != 1 + larger) fail("rank", r, rank[r], 1 + larger);
      for (int64_t v = 0; v < cols; ++v) {
        const double p = std::exp(z[i][v] - l);
        near("gradient", v, simt::to_float(logits[r * cols + v]), p - (v == t), kUlp<bfloat16>,
             1e-7);
        near("stash", v, simt::to_float(stash[r * cols + v]), v == t ? 0 : p, kUlp<bfloat16>, 1e-7);
      }
    }
    for (int64_t v = 0; v < cols; ++v)
      near("a row that was not played", v, simt::to_float(logits[8190 * cols + v]), 0, 0, 0);
  }
}

void full_size_gradients(uint64_t) {
  const int64_t first = 7, cols = kVocabulary - first;
  for (bool from_stash : {false, true}) {
    Sparse<bfloat16> block(kRows * cols), stash(kRows * kVocabulary);
    std::vector<int64_t> target(kRows);
    std::vector<float> up(kRows), nll(kRows), lse(kRows);
    std::vector<std::vector<double>> z;
    for (int64_t r : kChosen) {
      z.push_back(fill(block.get() + r * cols, cols, r));
      const double l = log_sum(z.back());
      target[r] = first + r * 7919 % cols;
      up[r] = 1.f + static_cast<float>(r % 5);
      lse[r] = static_cast<float>(l);
      nll[r] = static_cast<float>(l - z.back()[target[r] - first]);
      for (int64_t v = 0; v < cols; ++v)
        stash[r * kVocabulary + first + v] = make<bfloat16>(std::exp(z.back()[v] - l));
    }
    const HeadGradient<bfloat16> args{block.get(),         cols,      first,      kVocabulary,
                                      target.data(),       up.data(), nll.data(), lse.data(),
                                      {nullptr, 1.f, 0.f}, 1.f,       -100,       stash.get()};
    play(kRows, threads_mode ? 64 : 256, kChosen, 0,
         [&] { from_stash ? stash_gradient_kernel(args) : head_gradient_kernel(args); });
    for (size_t i = 0; i < kChosen.size(); ++i) {
      const int64_t r = kChosen[i];
      for (int64_t v = 0; v < cols; ++v)
        near("gradient", v, simt::to_float(block[r * cols + v]),
             up[r] * (std::exp(z[i][v] - lse[r]) - (v + first == target[r])), 2 * kUlp<bfloat16>,
             1e-7);
    }
  }
  Sparse<float> matrix(kRows * kVocabulary);
  std::vector<float> out(kVocabulary);
  const std::vector<std::pair<int64_t, int64_t>> places{
      {0, 0}, {8192, 63}, {kRows - 1, kVocabulary - 1}, {8191, kVocabulary - 64}};
  for (auto [r, c] : places) matrix[r * kVocabulary + c] = static_cast<float>(1 + r + c);
  const ColumnSum<float> sum{matrix.get(), nullptr, kRows, kVocabulary, 2.f, out.data()};
  play(kVocabulary / 64, 64, {0, kVocabulary / 64 - 1}, 0, [&] { column_sum_kernel(sum); });
  for (auto [r, c] : places)
    near("column_sum", c, out[c], 2.0 * static_cast<float>(1 + r + c), 1e-6, 1);
}

void full_size_pairs(uint64_t) {
  const int64_t cols = kVocabulary;
  Sparse<bfloat16> logits(2 * kRows * cols);
  bfloat16 *left = logits.get(), *right = left + kRows * cols;
  std::vector<float> kl_left(kRows), kl_right(kRows), lse_left(kRows), lse_right(kRows),
      up(kRows, 2.f);
  std::vector<std::vector<double>> z;
  for (int64_t p : kChosen) {
    z.push_back(fill(left + p * cols, cols, p));
    z.push_back(fill(right + p * cols, cols, p + 77));
  }
  Sparse<bfloat16> gradient(2 * kRows * cols);
  std::vector<int64_t> places(2 * kRows), ends(2 * kRows + 1), other(2 * kRows), side(2 * kRows);
  std::iota(places.begin(), places.end(), 0);
  std::iota(ends.begin(), ends.end(), 0);
  for (int64_t r = 0; r < 2 * kRows; ++r) {
    other[r] = (r + kRows) % (2 * kRows);
    side[r] = 2 * (r % kRows) + r / kRows;
  }
  Pairs<bfloat16> args{};
  args.logits = logits.get();
  args.cols = cols;
  args.head = {nullptr, 1.f, 0.f};
  args.kl_left = kl_left.data(), args.kl_right = kl_right.data();
  args.lse_left = lse_left.data(), args.lse_right = lse_right.data();
  args.left = places.data(), args.right = places.data() + kRows, args.index = places.data();
  args.ends = ends.data(), args.other = other.data(), args.side = side.data();
  args.upstream = up.data();
  args.out_scale = 1.f;
  args.out = gradient.get();
  const int threads = threads_mode ? 64 : 512;
  play(kRows, threads, kChosen, 0, [&] { pair_stats_kernel(args); });
  std::vector<int64_t> chosen = kChosen;
  for (int64_t r : kChosen) chosen.push_back(kRows + r);
  play(2 * kRows, threads, chosen, 0, [&] { pair_gradient_kernel(args); });
  for (size_t i = 0; i < kChosen.size(); ++i) {
    const int64_t n = kChosen[i];
    const double a = log_sum(z[2 * i]), b = log_sum(z[2 * i + 1]);
    double ka = 0, kb = 0;
    const auto at = [&](int64_t v) {
      const double p = z[2 * i][v] - a, q = z[2 * i + 1][v] - b;
      return std::array<double, 3>{std::exp(p), std::exp(q), p - q};
    };
    for (int64_t v = 0; v < cols; ++v) {
      const auto [p, q, d] = at(v);
      ka += p * d;
      kb -= q * d;
    }
    near("kl_left", n, kl_left[n], ka, 1e-4, 1e-2);
    near("kl_right", n, kl_right[n], kb, 1e-4, 1e-2);
    for (int64_t v = 0; v < cols; ++v) {
      const auto [p, q, d] = at(v);
      near("left gradient", v, simt::to_float(gradient[n * cols + v]), 2 * (p * (d - ka) + p - q),
           kUlp<bfloat16>, 1e-5);
      near("right gradient", v, simt::to_float(gradient[(kRows + n) * cols + v]),
           2 * (q * (-d - kb) + q - p), kUlp<bfloat16>, 1e-5);
    }
  }
}

void full_size_accumulate(uint64_t) {
  const int64_t items = 1100000, width = 2048;
  for (bool packed : {true, false}) {
    Sparse<float> unit(items * width), out(items * width);
    std::vector<int64_t> rows(items), order(items);
    std::vector<float> weight(items);
    for (int64_t i = 0; i < items; ++i) {
      rows[i] = i;
      order[i] = items - 1 - i;
      weight[i] = static_cast<float>(1 + i % 3);
    }
    const std::vector<int64_t> chosen{0, 70000, int64_t{1} << 20, items - 1};
    const auto value = [](int64_t item, int64_t c) { return static_cast<float>(item % 97 + c); };
    for (int64_t r : chosen)
      for (int64_t c = 0; c < width; ++c) unit[order[r] * width + c] = value(order[r], c);
    const AccumulateWeighted<float> args{unit.get(), rows.data(), order.data(), weight.data(),
                                         nullptr,    items,       items,        width,
                                         items,      packed,      out.get()};
    play(items, 64, chosen, 0, [&] { accumulate_weighted_kernel(args); });
    for (int64_t r : chosen)
      for (int64_t c = 0; c < width; ++c)
        near("row", c, out[r * width + c], weight[order[r]] * value(order[r], c), 0, 0);
  }
}

void full_size_filtered(uint64_t) {
  // Every tile costs each thread a barrier, which real threads pay dearly.
  const int64_t inner = threads_mode ? 9000 : kVocabulary, width = 8200, threads = 128;
  const int64_t stretches = (width + threads * 4 - 1) / (threads * 4), blocks = kRows * stretches;
  Sparse<float> grad(kRows * inner), weight(inner * width), out(kRows * width);
  const std::vector<int64_t> kept{0, inner / 2, inner - 1};
  const auto value = [](int64_t v, int64_t c) { return static_cast<float>(v % 13 + c % 5); };
  for (int64_t v : kept)
    for (int64_t c = 0; c < width; ++c) weight[v * width + c] = value(v, c);
  // Rows of the first and the last block, and the first row past 2^31.
  const std::vector<int64_t> rows{0, 8192, kRows - 1};
  for (int64_t r : rows)
    for (int64_t v : kept) grad[r * inner + v] = static_cast<float>(1 + r % 7 + v % 3);
  const FilteredMatmul<float> args{grad.get(), weight.get(), inner, width, stretches,
                                   .5f,        nullptr,      true,  true,  out.get()};
  play(blocks, threads, {0, 8192 * stretches, blocks - 1}, 0,
       [&] { filtered_matmul_kernel(args); });
  const auto check = [&](int64_t r, int64_t c) {
    double want = 0;
    for (int64_t v : kept) want += (1.0 + r % 7 + v % 3) * value(v, c);
    near("product", c, out[r * width + c], want, 1e-6, 1);
  };
  for (int64_t c = 0; c < threads * 4; ++c) {
    check(0, c);
    check(8192, c);
  }
  for (int64_t c = (stretches - 1) * threads * 4; c < width; ++c) check(kRows - 1, c);
}

void full_size_problem(uint64_t) {
  const int64_t rationales = 1200000000, count = 3, k = 4, begin = rationales - k;
  Sparse<float> scores(count * rationales), out(rationales), zscores(count * rationales);
  const std::vector<int64_t> offsets{0, 3, begin, rationales};
  const std::vector<float> beta{1.f, 1.f, 1.f}, prior{0.f, 0.f, 0.f};
  // Only the third score tells the rationales apart: z = +-1 without ddof.
  for (int64_t i = 0; i < k; ++i) scores[2 * rationales + begin + i] = static_cast<float>(i % 2);
  const ProblemWeights<float> args{
      scores.get(), offsets.data(), beta.data(),  prior.data(), count, rationales, 1.f, 0, 0.f,
      0.f,          out.get(),      zscores.get()};
  play(3, 32, {0, 2}, 0, [&] { problem_weights_kernel(args); });
  for (int64_t i = 0; i < 3; ++i) near("weight", i, out[i], 1.0 / 3, 1e-6, 1);
  for (int64_t i = 0; i < k; ++i) {
    near("weight", begin + i, out[begin + i],
         (i % 2 ? 1 : std::exp(-2.0)) / (2 + 2 * std::exp(-2.0)), 1e-6, 1);
    near("z-score", i, zscores[2 * rationales + begin + i], i % 2 ? 1 : -1, 1e-6, 1);
  }
}

}  // namespace
