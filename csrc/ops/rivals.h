// The target's logit against the other logits of its row: its rank, and the largest of the others.
//
// The sweep reads the logits block by block, most of them before the target's. A dot product gives
// the target's logit before the sweep, but not to the last bit. So the sweep counts the logits that
// are surely larger and keeps the few that lie within the rounding error of the dot product. They
// are compared at the end, with the target's logit of the sweep. So the rank is exact.
#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "ops/head.h"

namespace compact {

template <class T>
class Rivals {
 public:
  const bool ranks, margins;

  Rivals(bool ranks_, bool margins_, int64_t rows, int64_t slices)
      : ranks(ranks_), margins(margins_), rows_(rows), slices_(slices) {
    if (*this) found_.resize(slices * rows);
    if (ranks) low_.assign(rows, T(0)), high_.assign(rows, T(0));
  }

  explicit operator bool() const { return ranks || margins; }

  // The target's logit of row m lies within `slack` of z, or nearly always.
  void expect(int64_t m, T z, T slack) {
    if (!std::isfinite(slack)) slack = 0;  // z is infinite, and so exact
    low_[m] = z - slack;
    high_[m] = z + slack;
  }

  // Reads logits z [count] of row m, the largest of which is `peak`. z[own] is the target's; own =
  // -1 where it is not among them.
  void read(int64_t m, int64_t slice, const T* z, int64_t count, int64_t own, T peak) {
    Found& found = found_[slice * rows_ + m];
    if (margins) {
      if (own >= 0) peak = largest_but(z, count, own);
      if (peak > found.largest) found.largest = peak;
    }
    if (!ranks) return;
    int64_t above, reaching;
    count_larger(z, count, low_[m], high_[m], &above, &reaching);
    found.larger += above;
    if (reaching - above == (own >= 0)) return;
    for (int64_t i = 0; i < count; ++i) {
      if (i == own || !(z[i] >= low_[m] && z[i] <= high_[m])) continue;
      if (found.count < kKept) found.kept[found.count] = z[i];
      ++found.count;
    }
  }

  // The rank of row m with the target's logit z of the sweep. Nothing if z is not where it was
  // expected (the product has a lower precision, say) or if more logits are near it than are kept.
  std::optional<int64_t> rank(int64_t m, T z) const {
    if (!(z >= low_[m] && z <= high_[m])) return std::nullopt;
    int64_t rank = 1;
    for (int64_t slice = 0; slice < slices_; ++slice) {
      const Found& found = found_[slice * rows_ + m];
      if (found.count > kKept) return std::nullopt;
      rank += found.larger;
      for (int64_t i = 0; i < found.count; ++i) rank += found.kept[i] > z;
    }
    return rank;
  }

  // The largest logit of row m without the target's; -inf if there is no other.
  T largest(int64_t m) const {
    T largest = kLowest;
    for (int64_t slice = 0; slice < slices_; ++slice) {
      largest = std::max(largest, found_[slice * rows_ + m].largest);
    }
    return largest;
  }

 private:
  static constexpr T kLowest = -std::numeric_limits<T>::infinity();
  static constexpr int64_t kKept = 16;  // usually there are none

  struct Found {
    T largest = kLowest;  // without the target's
    int64_t larger = 0;   // surely
    int64_t count = 0;    // of logits near the target's
    T kept[kKept];        // the first of them
  };

  static T largest_but(const T* z, int64_t count, int64_t own) {
    T largest = kLowest;
    for (int64_t i = 0; i < count; ++i) {
      if (i != own && z[i] > largest) largest = z[i];
    }
    return largest;
  }

  const int64_t rows_, slices_;
  std::vector<Found> found_;   // [slices, M]
  std::vector<T> low_, high_;  // [M]
};

}  // namespace compact
