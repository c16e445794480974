// Bodies of csrc/kernels/cpu/pairwise_symmetric_kl.h for any instruction set.

template <class T>
void pair_sums(const T* zp, const T* zq, const T* ep, const T* eq, int64_t n, T offset,
               double* left, double* right) {
  constexpr int kStep = kLanes<T>;
  Vec<T> by_p{}, by_q{};
  for (int64_t i = 0; i < n; i += kStep) {
    Vec<T> a, b, wa, wb;
    if (i + kStep <= n) {
      a = load(zp + i), b = load(zq + i), wa = load(ep + i), wb = load(eq + i);
    } else {
      a = load_head(zp + i, n - i, T(0)), b = load_head(zq + i, n - i, T(0));
      wa = load_head(ep + i, n - i, T(0)), wb = load_head(eq + i, n - i, T(0));
    }
    const Vec<T> d = a - b - offset;
    by_p += wa == T(0) ? Vec<T>{} : wa * d;
    by_q += wb == T(0) ? Vec<T>{} : wb * d;
  }
  *left += sum_lanes<T>(by_p);
  *right += sum_lanes<T>(by_q);
}

template <class T>
void pair_gradients(const T* zp, const T* zq, const T* p, const T* q, int64_t n, T offset, T kl_pq,
                    T kl_qp, T factor, T* gp, T* gq) {
  constexpr int kStep = kLanes<T>;
  for (int64_t i = 0; i < n; i += kStep) {
    const bool whole = i + kStep <= n;
    const int64_t rest = n - i;
    const Vec<T> wa = whole ? load(p + i) : load_head(p + i, rest, T(0));
    const Vec<T> wb = whole ? load(q + i) : load_head(q + i, rest, T(0));
    const Vec<T> a = whole ? load(zp + i) : load_head(zp + i, rest, T(0));
    const Vec<T> b = whole ? load(zq + i) : load_head(zq + i, rest, T(0));
    const Vec<T> t = a - b - offset;
    const Vec<T> from_p = wa == T(0) ? Vec<T>{} : wa * (t - kl_pq);
    const Vec<T> from_q = wb == T(0) ? Vec<T>{} : wb * (t + kl_qp);
    const Vec<T> to_p = factor * (from_p + wa - wb);
    const Vec<T> to_q = factor * (wb - wa - from_q);
    if (whole) {
      store(gp + i, load(gp + i) + to_p);
      store(gq + i, load(gq + i) + to_q);
    } else {
      store_head(gp + i, rest, load_head(gp + i, rest, T(0)) + to_p);
      store_head(gq + i, rest, load_head(gq + i, rest, T(0)) + to_q);
    }
  }
}

template void pair_sums(const float*, const float*, const float*, const float*, int64_t, float,
                        double*, double*);
template void pair_sums(const double*, const double*, const double*, const double*, int64_t, double,
                        double*, double*);
template void pair_gradients(const float*, const float*, const float*, const float*, int64_t, float,
                             float, float, float, float*, float*);
template void pair_gradients(const double*, const double*, const double*, const double*, int64_t,
                             double, double, double, double, double*, double*);
