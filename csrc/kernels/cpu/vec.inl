// Vectors of kVectorBytes, built with GCC's vector extension, and the functions that kernels need.
// Everything here is inlined into the kernels of one namespace.
#define COMPACT_INLINE inline __attribute__((always_inline))

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
COMPACT_INLINE Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(from);
}

template <class T>
COMPACT_INLINE void store(T* to, Vec<T> value) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(to) = value;
}

// The first `count` lanes from memory, `fill` in the others.
template <class T>
COMPACT_INLINE Vec<T> load_head(const T* from, int64_t count, T fill) {
  T lanes[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = i < count ? from[i] : fill;
  return load(lanes);
}

template <class T>
COMPACT_INLINE void store_head(T* to, int64_t count, Vec<T> value) {
  T lanes[kLanes<T>];
  store(lanes, value);
  for (int i = 0; i < count; ++i) to[i] = lanes[i];
}

template <class T>
COMPACT_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}

// A NaN in `a` is lost; callers handle NaN elsewhere.
template <class T>
COMPACT_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class T>
COMPACT_INLINE T sum_lanes(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

template <class T>
COMPACT_INLINE T max_lanes(Vec<T> v) {
  T best = v[0];
  for (int i = 1; i < kLanes<T>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// Below this, exp() is 0: the last float whose exponential is a normal number.
template <class T>
constexpr T kExpLow = sizeof(T) == 4 ? T(-87.3) : T(-708.3);

// exp for u <= 88 (a NaN stays a NaN), within 1 ulp. u = n ln2 + r, |r| <= ln2 / 2, Taylor to r^7:
// the next term is 5e-9 relative. float64 uses std::exp: it is for exactness, not for speed.
COMPACT_INLINE Vec<float> exp(Vec<float> u) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves n in the low bits
  const Vec<float> shifted = u * 1.44269504088896341f + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> r = (u - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Vec<int32_t> power = (reinterpret_cast<Vec<int32_t>>(shifted) + 127) << 23;
  const Vec<float> value = p * reinterpret_cast<Vec<float>>(power);
  return u < kExpLow<float> ? Vec<float>{} : value;
}

COMPACT_INLINE Vec<double> exp(Vec<double> u) {
  Vec<double> value{};
  for (int i = 0; i < kLanes<double>; ++i) value[i] = std::exp(u[i]);
  return u < kExpLow<double> ? Vec<double>{} : value;
}

// tanh: an odd Taylor series up to |y| = 0.3 (next term 2e-9 relative), 1 - 2 / (exp(2y) + 1)
// above.
COMPACT_INLINE Vec<float> tanh(Vec<float> y) {
  const Vec<float> s = y * y;
  Vec<float> p = s * (-1382.0f / 155925) + 62.0f / 2835;
  p = p * s + (-17.0f / 315);
  p = p * s + 2.0f / 15;
  p = p * s + (-1.0f / 3);
  const Vec<float> small = y + y * s * p;
  const Vec<float> bounded = y > 10.0f ? splat(10.0f) : (y < -10.0f ? splat(-10.0f) : y);
  const Vec<float> large = 1.0f - 2.0f / (exp(bounded * 2.0f) + 1.0f);
  return s < 0.09f ? small : large;
}

COMPACT_INLINE Vec<double> tanh(Vec<double> y) {
  Vec<double> value{};
  for (int i = 0; i < kLanes<double>; ++i) value[i] = std::tanh(y[i]);
  return value;
}

template <class T>
COMPACT_INLINE T exp_one(T u) {
  return exp(splat(u))[0];
}
