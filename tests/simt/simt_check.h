// What the checks of the kernels share: the kernels, comparison, and memory with guarded edges.
#pragma once

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/accumulate_weighted.cuh"
#include "kernels/cuda/filtered_matmul.cuh"
#include "kernels/cuda/head_gradient.cuh"
#include "kernels/cuda/pairwise_symmetric_kl.cuh"
#include "kernels/cuda/problem_weights.cuh"
#include "kernels/cuda/row_stats.cuh"
#include "ops/pairs.h"

using namespace compact::cuda;
using simt::accumulate_t;
using simt::bfloat16;
using simt::half;

namespace {

bool threads_mode = false;
const double kInf = std::numeric_limits<double>::infinity();

[[noreturn]] void fail(const char* what, int64_t index, double got, double want) {
  std::printf("FAILED %s[%lld]: got %.9g, want %.9g\n", what, static_cast<long long>(index), got,
              want);
  std::fflush(stdout);
  std::exit(1);
}

// Equal within `relative` of the larger of |want| and `floor`; NaN and infinities must agree.
void near(const char* what, int64_t index, double got, double want, double relative, double floor) {
  if (want != want ? got != got : got == want) return;
  if (!std::isfinite(want) || !(std::abs(got - want) <= relative * std::max(std::abs(want), floor)))
    fail(what, index, got, want);
}

// `count` elements that begin `shift` elements after a 16-byte boundary, between canaries.
template <typename T>
class Buffer {
 public:
  Buffer(int64_t count, int64_t shift) : count_(count), bytes_((count + shift) * sizeof(T) + 64) {
    raw_.reset(new (std::align_val_t(16)) unsigned char[bytes_]);
    std::memset(raw_.get(), 0x5a, bytes_);
    data_ = reinterpret_cast<T*>(raw_.get()) + shift;
  }
  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  void check(const char* what) const {
    const auto* end = reinterpret_cast<const unsigned char*>(data_ + count_);
    for (const unsigned char* c = raw_.get(); c < raw_.get() + bytes_; ++c) {
      const bool inside = c >= reinterpret_cast<const unsigned char*>(data_) && c < end;
      if (!inside && *c != 0x5a) fail(what, c - raw_.get(), *c, 0x5a);
    }
  }

 private:
  struct Free {
    void operator()(unsigned char* p) const { ::operator delete[](p, std::align_val_t(16)); }
  };
  int64_t count_;
  size_t bytes_;
  std::unique_ptr<unsigned char[], Free> raw_;
  T* data_;
};

template <typename T>
constexpr double kUlp = sizeof(T) == 8             ? 1e-11
                        : std::is_same_v<T, float> ? 3e-5
                        : std::is_same_v<T, half>  ? 1e-3
                                                   : 8e-3;
template <typename T>
constexpr double kStat = sizeof(T) == 8 ? 1e-12 : 4e-6;

template <typename T>
T make(double x) {
  return simt::narrow<T>(x);
}

}  // namespace
