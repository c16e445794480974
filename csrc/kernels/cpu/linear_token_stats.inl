// Bodies of csrc/kernels/cpu/linear_token_stats.h for any instruction set.

template <class T>
COMPACT_INLINE Vec<T> finish_vector(Vec<T> raw, Vec<T> bias, const LogitShape<T>& shape) {
  const Vec<T> x = raw * shape.scale + bias;
  return shape.softcap == T(0) ? x : tanh(x / shape.softcap) * shape.softcap;
}

template <class T>
T finish_logits(T* row, int64_t n, int64_t first, const LogitShape<T>& shape) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  constexpr int kStep = kLanes<T>;
  const bool plain = shape.plain();
  const T* bias = shape.bias == nullptr ? nullptr : shape.bias + first;
  Vec<T> peak = splat(kLowest);
  int64_t i = 0;
  if (plain) {
    Vec<T> other = peak;
    for (; i + 2 * kStep <= n; i += 2 * kStep) {
      peak = larger<T>(load(row + i), peak);
      other = larger<T>(load(row + i + kStep), other);
    }
    peak = larger<T>(peak, other);
  }
  for (; i + kStep <= n; i += kStep) {
    Vec<T> z = load(row + i);
    if (!plain) {
      z = finish_vector(z, bias == nullptr ? Vec<T>{} : load(bias + i), shape);
      store(row + i, z);
    }
    peak = larger<T>(z, peak);
  }
  T best = max_lanes<T>(peak);
  if (i < n) {
    Vec<T> z = load_head(row + i, n - i, T(0));
    if (!plain) {
      z = finish_vector(z, bias == nullptr ? Vec<T>{} : load_head(bias + i, n - i, T(0)), shape);
      store_head(row + i, n - i, z);
    }
    for (int64_t k = 0; k < n - i; ++k) best = z[k] > best ? z[k] : best;
  }
  return best;
}

// The sums of RowState for every lane.
template <class T>
struct LaneSums {
  Vec<T> sum{}, weighted{}, squares{};
};

template <class T, bool kCapped>
COMPACT_INLINE Vec<T> exp_vector(Vec<T> z, T reference, T inverse_cap, LaneSums<T>* lanes) {
  const Vec<T> u = z - reference;
  const Vec<T> e = exp(u);
  // If e is 0, u may be -inf. Bound u, so that their product is 0 and not NaN.
  const Vec<T> bounded = u < kExpLow<T> ? splat(kExpLow<T>) : u;
  lanes->sum += e;
  lanes->weighted += e * bounded;
  lanes->squares += e * e;
  if (!kCapped) return e;
  const Vec<T> ratio = z * inverse_cap;
  return e * (T(1) - ratio * ratio);
}

template <class T, bool kCapped>
COMPACT_INLINE void exp_row(T* row, int64_t n, T reference, T softcap, RowState<T>* state) {
  constexpr int kStep = kLanes<T>;
  const T inverse_cap = kCapped ? T(1) / softcap : T(0);
  LaneSums<T> lanes;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    store(row + i, exp_vector<T, kCapped>(load(row + i), reference, inverse_cap, &lanes));
  }
  if (i < n) {
    const Vec<T> z = load_head(row + i, n - i, -std::numeric_limits<T>::infinity());
    store_head(row + i, n - i, exp_vector<T, kCapped>(z, reference, inverse_cap, &lanes));
  }
  state->sum += sum_lanes<T>(lanes.sum);
  state->weighted += sum_lanes<T>(lanes.weighted);
  state->squares += sum_lanes<T>(lanes.squares);
}

template <class T>
T exp_piece(T* row, int64_t n, T peak, const LogitShape<T>& shape, RowState<T>* state) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  T factor = 1;
  if (peak > state->peak) state->peak = peak;
  if (peak > state->reference + T(kReferenceSlack)) {
    if (state->reference != kLowest) {
      const double moved = static_cast<double>(state->reference) - static_cast<double>(peak);
      const double shrink = std::exp(moved);
      // Sum of exp(u + moved) * (u + moved). An empty sum stays 0 if moved is -inf.
      if (shrink > 0.0)
        state->weighted = shrink * (state->weighted + moved * state->sum);
      else
        state->weighted *= 0.0;
      state->sum *= shrink;
      state->squares *= shrink * shrink;
      factor = static_cast<T>(shrink);
    }
    state->reference = peak;
  }
  // All logits so far are -inf: any finite reference gives e = 0.
  const T reference = state->reference == kLowest ? T(0) : state->reference;
  if (shape.softcap == T(0)) {
    exp_row<T, false>(row, n, reference, shape.softcap, state);
  } else {
    exp_row<T, true>(row, n, reference, shape.softcap, state);
  }
  return factor;
}

template <class T>
void count_larger(const T* row, int64_t n, T low, T high, int64_t* above, int64_t* reaching) {
  constexpr int kStep = kLanes<T>;
  using Lanes = decltype(Vec<T>{} > Vec<T>{});  // -1 in every lane where it holds
  Lanes over{}, reached{};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    const Vec<T> z = load(row + i);
    over -= z > high;
    reached -= z >= low;
  }
  *above = *reaching = 0;
  for (int k = 0; k < kStep; ++k) *above += over[k], *reaching += reached[k];
  for (; i < n; ++i) *above += row[i] > high, *reaching += row[i] >= low;
}

template <class T>
COMPACT_INLINE Vec<T> gradient_vector(Vec<T> z, T lse, T factor, T inverse_cap) {
  const Vec<T> ratio = z * inverse_cap;
  return exp(z - lse) * factor * (T(1) - ratio * ratio);
}

template <class T>
void gradient_piece(T* row, int64_t n, T lse, T factor, const LogitShape<T>& shape) {
  constexpr int kStep = kLanes<T>;
  const T inverse_cap = shape.softcap == T(0) ? T(0) : T(1) / shape.softcap;
  int64_t i = 0;
  if (shape.softcap == T(0)) {
    for (; i + kStep <= n; i += kStep) store(row + i, exp(load(row + i) - lse) * factor);
    for (; i < n; ++i) row[i] = exp_one<T>(row[i] - lse) * factor;
    return;
  }
  for (; i + kStep <= n; i += kStep) {
    store(row + i, gradient_vector(load(row + i), lse, factor, inverse_cap));
  }
  if (i < n) {
    store_head(row + i, n - i,
               gradient_vector(load_head(row + i, n - i, T(0)), lse, factor, inverse_cap));
  }
}

template <class T>
void scale_row(T* row, int64_t n, T factor) {
  for (int64_t i = 0; i < n; ++i) row[i] *= factor;
}

template <class T>
void add_scaled_row(T* out, const T* row, int64_t n, T factor) {
  for (int64_t i = 0; i < n; ++i) out[i] += factor * row[i];
}

// Vectors of 32-bit items with as many lanes as Vec<T>.
template <class T>
struct Of32Bits {
  typedef float Floats __attribute__((vector_size(4 * kLanes<T>)));
  typedef uint32_t Bits __attribute__((vector_size(4 * kLanes<T>)));
  typedef int32_t Ints __attribute__((vector_size(4 * kLanes<T>)));
};

// A number in [0, 1) for each lane: a hash of the entry's float32 bits and its column, so the same
// entry in the same column gives the same number. Constants of lowbias32 by C. Wellons.
template <class T>
COMPACT_INLINE Vec<T> hashed(Vec<T> value, int64_t column) {
  using Bits = typename Of32Bits<T>::Bits;
  Bits h{};
  for (int k = 0; k < kLanes<T>; ++k) h[k] = static_cast<uint32_t>(column + k);
  h = reinterpret_cast<Bits>(__builtin_convertvector(value, typename Of32Bits<T>::Floats)) ^
      (h * 0x9e3779b1u);
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  h ^= h >> 16;
  const auto number = reinterpret_cast<typename Of32Bits<T>::Ints>(h >> 8);
  return __builtin_convertvector(number, Vec<T>) * T(0x1p-24);
}

// Stochastic rounding: an entry below the threshold becomes the threshold with the probability that
// keeps the mean, else 0. A NaN stays NaN.
template <class T>
COMPACT_INLINE Vec<T> rounded_at_random(Vec<T> value, T threshold, int64_t column) {
  const Vec<T> size = value < T(0) ? -value : value;
  const Vec<T> up = value < T(0) ? splat(-threshold) : splat(threshold);
  const Vec<T> small = size > hashed<T>(value, column) * threshold ? up : Vec<T>{};
  return size < threshold ? small : value;
}

template <class T>
int64_t add_sparse_product(T* out, const T* row, int64_t n, int64_t first, T threshold,
                           const T* matrix, int64_t width) {
  constexpr int kStep = kLanes<T>;
  int64_t used = 0;
  for (int64_t v = 0; v < n; v += kStep) {
    const Vec<T> value = v + kStep <= n ? load(row + v) : load_head(row + v, n - v, T(0));
    const Vec<T> factor = rounded_at_random<T>(value, threshold, first + v);
    // Nearly all vectors are zero.
    bool nothing = true;
    for (int k = 0; k < kStep; ++k) nothing = nothing & (factor[k] == T(0));
    if (nothing) continue;
    for (int k = 0; k < kStep; ++k) {
      if (factor[k] == T(0)) continue;
      const T* source = matrix + (v + k) * width;
      for (int64_t h = 0; h < width; ++h) out[h] += factor[k] * source[h];
      ++used;
    }
  }
  return used;
}

template <class T>
void to_bfloat16(const T* row, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = static_cast<float>(row[i]);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out[i] = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
  }
}

template <class T>
void from_bfloat16(const uint16_t* row, int64_t n, T factor, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(row[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    out[i] = static_cast<T>(value) * factor;
  }
}

template float finish_logits(float*, int64_t, int64_t, const LogitShape<float>&);
template double finish_logits(double*, int64_t, int64_t, const LogitShape<double>&);
template float exp_piece(float*, int64_t, float, const LogitShape<float>&, RowState<float>*);
template double exp_piece(double*, int64_t, double, const LogitShape<double>&, RowState<double>*);
template void count_larger(const float*, int64_t, float, float, int64_t*, int64_t*);
template void count_larger(const double*, int64_t, double, double, int64_t*, int64_t*);
template void gradient_piece(float*, int64_t, float, float, const LogitShape<float>&);
template void gradient_piece(double*, int64_t, double, double, const LogitShape<double>&);
template void scale_row(float*, int64_t, float);
template void scale_row(double*, int64_t, double);
template void add_scaled_row(float*, const float*, int64_t, float);
template void add_scaled_row(double*, const double*, int64_t, double);
template int64_t add_sparse_product(float*, const float*, int64_t, int64_t, float, const float*,
                                    int64_t);
template int64_t add_sparse_product(double*, const double*, int64_t, int64_t, double, const double*,
                                    int64_t);
template void to_bfloat16(const float*, int64_t, uint16_t*);
template void to_bfloat16(const double*, int64_t, uint16_t*);
template void from_bfloat16(const uint16_t*, int64_t, float, float*);
template void from_bfloat16(const uint16_t*, int64_t, double, double*);
