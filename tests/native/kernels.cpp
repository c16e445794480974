// The CPU kernels against plain float64 loops, without torch: run under each COMPACT_CPU_CAPABILITY
// and, in an emulator, on a CPU that has none of them. Prints the instruction set; returns the
// failures.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "../rounding.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/linear_token_stats.h"
#include "kernels/cpu/pairwise_symmetric_kl.h"
#include "ops/waves.h"

namespace {

using namespace compact::cpu;
using compact::kTileRows;
using compact::rows_in_waves;
using compact::waves;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
int failures = 0;

void expect_near(const char* what, int64_t n, double got, double want, double tolerance) {
  const bool near = std::abs(got - want) <= tolerance * (1.0 + std::abs(want));
  if (near || got == want) return;
  std::printf("%s (n = %lld): got %.9g, want %.9g\n", what, static_cast<long long>(n), got, want);
  ++failures;
}

// Numbers in [-1, 1), the same on every machine.
double draw() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return static_cast<double>(state >> 8) / (1 << 23) - 1.0;
}

template <class T>
std::vector<T> numbers(int64_t n, double scale) {
  std::vector<T> values(n);
  for (T& value : values) value = static_cast<T>(scale * draw());
  return values;
}

// A row in pieces of 7, 64 and the rest: sum, entropy, peak, and the gradient, against float64.
template <class T>
void check_row(int64_t n, double scale, T softcap, bool excluded, double tolerance) {
  std::vector<T> raw = numbers<T>(n, scale), bias = numbers<T>(n, 1.0);
  if (excluded) bias[n / 2] = -std::numeric_limits<T>::infinity();
  const LogitShape<T> shape{T(0.75), softcap, bias.data()};
  std::vector<double> z(n);
  double peak = -kInfinity, sum = 0.0, weighted = 0.0;
  for (int64_t v = 0; v < n; ++v) {
    const double x = 0.75 * raw[v] + bias[v];
    z[v] = softcap == T(0) ? x : softcap * std::tanh(x / softcap);
    peak = std::max(peak, z[v]);
  }
  for (double value : z) {
    sum += std::exp(value - peak);
    if (std::isfinite(value)) weighted += std::exp(value - peak) * (value - peak);
  }
  RowState<T> state;
  std::vector<T> row = raw;
  for (int64_t first = 0; first < n;) {
    const int64_t count = std::min<int64_t>(first == 0 ? 7 : 64, n - first);
    const T largest = finish_logits(row.data() + first, count, first, shape);
    exp_piece(row.data() + first, count, largest, shape, &state);
    first += count;
  }
  const double lse = peak + std::log(sum);
  expect_near("lse", n, state.reference + std::log(state.sum), lse, tolerance);
  expect_near("entropy", n, std::log(state.sum) - state.weighted / state.sum,
              std::log(sum) - weighted / sum, tolerance);
  expect_near("peak", n, state.peak, peak, tolerance);
  row = raw;
  finish_logits(row.data(), n, 0, shape);
  gradient_piece(row.data(), n, static_cast<T>(lse), T(2), shape);
  for (int64_t v = 0; v < n; ++v) {
    const double ratio = softcap == T(0) ? 0.0 : z[v] / softcap;
    expect_near("gradient", n, row[v], 2.0 * std::exp(z[v] - lse) * (1.0 - ratio * ratio),
                tolerance);
  }
}

void check_sparse_product(int64_t n, int64_t width) {
  const std::vector<float> matrix = numbers<float>(n * width, 1.0);
  std::vector<float> row = numbers<float>(n, 1.0), out(width, 0.0f);
  constexpr int64_t kFirst = 3000;
  constexpr float kThreshold = 0.5f;
  int64_t counted = 0;
  std::vector<double> want(width, 0.0);
  for (int64_t v = 0; v < n; ++v) {
    const double entry = rounded_by_reference(row[v], kThreshold, kFirst + v);
    if (entry == 0.0) continue;
    ++counted;
    for (int64_t h = 0; h < width; ++h) want[h] += entry * matrix[v * width + h];
  }
  const int64_t used =
      add_sparse_product(out.data(), row.data(), n, kFirst, kThreshold, matrix.data(), width);
  expect_near("entries used", n, static_cast<double>(used), static_cast<double>(counted), 0.0);
  for (int64_t h = 0; h < width; ++h) expect_near("sparse product", n, out[h], want[h], 1e-5);
}

void check_bfloat16(int64_t n) {
  const std::vector<float> row = numbers<float>(n, 100.0);
  std::vector<uint16_t> half(n);
  std::vector<float> back(n);
  to_bfloat16(row.data(), n, half.data());
  from_bfloat16(half.data(), n, 1.0f, back.data());
  for (int64_t i = 0; i < n; ++i) {
    expect_near("bfloat16", n, (back[i] - row[i]) / (1e-30 + std::abs(row[i])), 0.0, 1.0 / 256);
  }
}

void check_pair(int64_t n) {
  const std::vector<double> zp = numbers<double>(n, 3.0), zq = numbers<double>(n, 3.0);
  std::vector<double> ep(n), eq(n);
  double want_left = 0.0, want_right = 0.0, left = 0.0, right = 0.0;
  for (int64_t v = 0; v < n; ++v) {
    ep[v] = std::exp(zp[v]), eq[v] = std::exp(zq[v]);
    want_left += ep[v] * (zp[v] - zq[v] - 0.5), want_right += eq[v] * (zp[v] - zq[v] - 0.5);
  }
  pair_sums(zp.data(), zq.data(), ep.data(), eq.data(), n, 0.5, &left, &right);
  expect_near("pair left", n, left, want_left, 1e-12);
  expect_near("pair right", n, right, want_right, 1e-12);
}

// gp and gq of a pair, added to what stands there.
void check_pair_gradients(int64_t n) {
  const std::vector<double> zp = numbers<double>(n, 3.0), zq = numbers<double>(n, 3.0);
  std::vector<double> p(n), q(n), gp(n, 1.0), gq(n, 2.0);
  for (int64_t v = 0; v < n; ++v) p[v] = std::exp(zp[v]) / n, q[v] = std::exp(zq[v]) / n;
  pair_gradients(zp.data(), zq.data(), p.data(), q.data(), n, 0.5, 0.3, 0.2, 2.0, gp.data(),
                 gq.data());
  for (int64_t v = 0; v < n; ++v) {
    const double t = zp[v] - zq[v] - 0.5;
    expect_near("pair gradient left", n, gp[v], 1.0 + 2.0 * (p[v] * (t - 0.3) + p[v] - q[v]),
                1e-12);
    expect_near("pair gradient right", n, gq[v], 2.0 + 2.0 * (q[v] * (-t - 0.2) + q[v] - p[v]),
                1e-12);
  }
}

// What the fused weights are made of besides: scaled rows, and sums of them.
void check_scaled_rows(int64_t n) {
  const std::vector<float> row = numbers<float>(n, 3.0), start = numbers<float>(n, 3.0);
  std::vector<float> sum = start, scaled = row;
  add_scaled_row(sum.data(), row.data(), n, -0.7f);
  scale_row(scaled.data(), n, 1.3f);
  for (int64_t i = 0; i < n; ++i) {
    expect_near("added row", n, sum[i], double{start[i]} - 0.7 * row[i], 1e-6);
    expect_near("scaled row", n, scaled[i], 1.3 * row[i], 1e-6);
  }
}

// A block of rows fits into its memory on a GPU, and a block of another size takes no fewer waves.
void check_waves() {
  // An H200: 152k entries in bfloat16 in 640 MB, H = 2,048. 2,176 rows would fit.
  expect_near("rows of a block", 8192, rows_in_waves(8192, 2208, 2048, 132), 2048, 0);
  expect_near("waves", 8192, waves(8192, 2048, 2048, 132), 4, 0);
  expect_near("waves", 8192, waves(8192, 2176, 2048, 132), 7, 0);
  expect_near("rows that fit", 100, rows_in_waves(100, 2208, 2048, 132), 100, 0);
  expect_near("no rows", 0, rows_in_waves(0, 2208, 2048, 132), 1, 0);
  expect_near("little memory", 100, rows_in_waves(100, 7, 2048, 132), 7, 0);
  expect_near("no memory", 100, rows_in_waves(100, 0, 2048, 132), 1, 0);
  for (int64_t rows : {129, 1000, 5000, 40000}) {
    for (int64_t fit : {128, 300, 1700, 9000}) {
      for (int64_t columns : {64, 576, 2048, 8192}) {
        const int64_t step = rows_in_waves(rows, fit, columns, 132);
        expect_near("within memory", rows, rows <= fit || step <= fit, 1, 0);
        for (int64_t other = kTileRows; rows > fit && other <= fit; other += kTileRows) {
          if (2 * other < fit / kTileRows * kTileRows) continue;
          const bool fewest = waves(rows, step, columns, 132) <= waves(rows, other, columns, 132);
          expect_near("fewest waves", rows, fewest, 1, 0);
        }
      }
    }
  }
}

}  // namespace

int main() {
  std::printf("%s\n", isa_name());
  check_waves();
  for (int64_t n : {1, 3, 4, 15, 16, 17, 63, 255, 256, 1001}) {
    for (double scale : {1.0, 30.0}) {
      check_row<float>(n, scale, 0.0f, false, 2e-5);
      check_row<float>(n, scale, 5.0f, false, 2e-5);
      check_row<double>(n, scale, 5.0, false, 1e-12);
      if (n > 1) check_row<float>(n, scale, 0.0f, true, 2e-5);
    }
    check_sparse_product(n, 33);
    check_bfloat16(n);
    check_pair(n);
    check_pair_gradients(n);
    check_scaled_rows(n);
  }
  return failures == 0 ? 0 : 1;
}
