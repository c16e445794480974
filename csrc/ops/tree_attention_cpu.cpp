// Attention for the tree layout: a token sees the prefix of its part, and the part causally.
//
// A task is one part and one key head, with all query heads that share it. Their queries are the
// rows of one matrix, which is multiplied by the part's keys [prefix; own], one block of query
// tokens at a time. The backward computes the probabilities again from the log-sum-exps. A task
// stores its gradients for the prefix separately; at the end these are added in the order of the
// parts. The products of a query with the keys are processed by the same kernels as a row of
// logits.
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "ops/head.h"

namespace compact {
namespace {

constexpr const char* kOp = "tree_attention";
constexpr int64_t kTokens = 64;  // query tokens per block

struct Part {
  int64_t row, begin, end, prefix_begin, prefix_end;
  int64_t prefix() const { return prefix_end - prefix_begin; }
  int64_t size() const { return end - begin; }
  int64_t keys() const { return prefix() + size(); }
};

std::vector<Part> checked_parts(const Tensor& parts, int64_t rows, int64_t length) {
  check_dim(kOp, "parts", parts, 2);
  check_size(kOp, "parts", parts, 1, 5);
  check_dtype(kOp, "parts", parts, {ScalarType::Long});
  const Tensor flat = torch::stable::contiguous(parts);
  const auto* entry = data<const int64_t>(flat);
  std::vector<Part> found;
  std::vector<bool> taken(rows * length, false);
  for (int64_t i = 0; i < parts.size(0); ++i, entry += 5) {
    const Part part{entry[0], entry[1], entry[2], entry[3], entry[4]};
    require(part.row >= 0 && part.row < rows, kOp, ": parts[", i, ", 0] must be a row in [0, ",
            rows, "), got ", part.row);
    require(0 <= part.begin && part.begin < part.end && part.end <= length, kOp, ": parts[", i,
            ", 1:3] must be a span of tokens in [0, ", length, "), got ", part.begin, " to ",
            part.end);
    require(
        0 <= part.prefix_begin && part.prefix_begin <= part.prefix_end &&
            part.prefix_end <= length &&
            (part.prefix() == 0 || part.prefix_end <= part.begin || part.prefix_begin >= part.end),
        kOp, ": parts[", i, ", 3:5] must be a span of tokens in [0, ", length,
        ") outside of the part, got ", part.prefix_begin, " to ", part.prefix_end);
    for (int64_t t = part.begin; t < part.end; ++t) {
      require(!taken[part.row * length + t], kOp, ": parts[", i,
              "] must not overlap another part, got token ", t, " twice");
      taken[part.row * length + t] = true;
    }
    found.push_back(part);
  }
  return found;
}

template <class T>
struct Attention {
  const int64_t length, heads, key_heads, depth;
  const T scale;
  const std::vector<Part>& parts;
  const T *query, *key, *value;  // [B, L, heads or key heads, D]

  int64_t shared() const { return heads / key_heads; }  // query heads per key head
  LogitShape<T> shape() const { return {scale, T(0), nullptr}; }

  // Runs task(part, index of the part, key head); the key heads of a part are consecutive.
  template <class Task>
  void each(const Task& task) const {
    run_tasks(static_cast<int64_t>(parts.size()) * key_heads,
              [&](int64_t i) { task(parts[i / key_heads], i / key_heads, i % key_heads); });
  }

  // The index in [B, L, heads, D] of the first query head of a token that shares a key head.
  int64_t group_at(const Part& part, int64_t token, int64_t head) const {
    return ((part.row * length + part.begin + token) * key_heads + head) * shared() * depth;
  }
  int64_t key_at(int64_t row, int64_t token, int64_t head) const {
    return ((row * length + token) * key_heads + head) * depth;
  }

  // Copies the queries of `count` tokens to rows [count * shared, D], token by token, and back.
  void take(const T* from, const Part& part, int64_t first, int64_t count, int64_t head,
            T* rows) const {
    const int64_t entries = shared() * depth;
    for (int64_t t = 0; t < count; ++t)
      std::memcpy(rows + t * entries, from + group_at(part, first + t, head), entries * sizeof(T));
  }
  void put(const T* rows, const Part& part, int64_t first, int64_t count, int64_t head,
           T* to) const {
    const int64_t entries = shared() * depth;
    for (int64_t t = 0; t < count; ++t)
      std::memcpy(to + group_at(part, first + t, head), rows + t * entries, entries * sizeof(T));
  }

  // The keys or values that a part sees, [prefix + own, D].
  Scratch<T> seen_by(const Part& part, int64_t head, const T* from) const {
    auto rows = scratch<T>(part.keys() * depth);
    T* to = rows.get();
    for (int64_t t = part.prefix_begin; t < part.prefix_end; ++t, to += depth)
      std::memcpy(to, from + key_at(part.row, t, head), depth * sizeof(T));
    for (int64_t t = part.begin; t < part.end; ++t, to += depth)
      std::memcpy(to, from + key_at(part.row, t, head), depth * sizeof(T));
    return rows;
  }

  // Calls block(first, count, rows of queries, keys that the last of them sees) for all blocks of
  // query tokens.
  template <class Block>
  void each_block(const Part& part, const Block& block) const {
    for (int64_t first = 0; first < part.size(); first += kTokens) {
      const int64_t count = std::min(kTokens, part.size() - first);
      block(first, count, count * shared(), part.prefix() + first + count);
    }
  }

  void forward(T* out, T* lse) const {
    each([&](const Part& part, int64_t, int64_t head) {
      const auto keys = seen_by(part, head, key), values = seen_by(part, head, value);
      const int64_t most = std::min(kTokens, part.size()) * shared();
      const auto queries = scratch<T>(most * depth), logits = scratch<T>(most * part.keys());
      each_block(part, [&](int64_t first, int64_t count, int64_t rows, int64_t seen) {
        take(query, part, first, count, head, queries.get());
        const Tensor q = matrix(queries.get(), rows, depth), p = matrix(logits.get(), rows, seen);
        multiply(p, q, transposed(keys.get(), seen, depth));
        std::vector<T> factor(rows);
        for (int64_t r = 0; r < rows; ++r) {
          T* row = logits.get() + r * seen;
          const int64_t token = r / shared(), visible = part.prefix() + first + token + 1;
          RowState<T> state;
          exp_piece(row, visible, finish_logits(row, visible, 0, shape()), shape(), &state);
          std::memset(row + visible, 0, (seen - visible) * sizeof(T));
          factor[r] = static_cast<T>(1.0 / state.sum);
          lse[group_at(part, first + token, head) / depth + r % shared()] =
              static_cast<T>(state.reference + std::log(state.sum));
        }
        multiply(q, p, matrix(values.get(), seen, depth));  // the queries are not needed again
        for (int64_t r = 0; r < rows; ++r) scale_row(queries.get() + r * depth, depth, factor[r]);
        put(queries.get(), part, first, count, head, out);
      });
    });
  }

  void backward(const T* grad, const T* out, const T* lse, T* d_query, T* d_key, T* d_value) const {
    std::vector<int64_t> start(parts.size() + 1, 0);  // of a part's prefix sums, in tokens
    for (size_t i = 0; i < parts.size(); ++i) start[i + 1] = start[i] + parts[i].prefix();
    const int64_t kept = start.back() * key_heads * depth;
    const auto prefix_sums = scratch<T>(2 * kept);  // of keys, then of values
    each([&](const Part& part, int64_t index, int64_t head) {
      const auto keys = seen_by(part, head, key), values = seen_by(part, head, value);
      const int64_t most = std::min(kTokens, part.size()) * shared();
      const auto rows_of_q = scratch<T>(most * depth), rows_of_g = scratch<T>(most * depth),
                 rows_of_o = scratch<T>(most * depth);
      const auto probability = scratch<T>(most * part.keys()),
                 slope = scratch<T>(most * part.keys());
      const auto sums = scratch<T>(2 * part.keys() * depth);
      std::fill_n(sums.get(), 2 * part.keys() * depth, T(0));
      T *key_sums = sums.get(), *value_sums = key_sums + part.keys() * depth;
      each_block(part, [&](int64_t first, int64_t count, int64_t rows, int64_t seen) {
        take(query, part, first, count, head, rows_of_q.get());
        take(grad, part, first, count, head, rows_of_g.get());
        take(out, part, first, count, head, rows_of_o.get());
        const Tensor q = matrix(rows_of_q.get(), rows, depth),
                     g = matrix(rows_of_g.get(), rows, depth),
                     p = matrix(probability.get(), rows, seen), s = matrix(slope.get(), rows, seen);
        multiply(p, q, transposed(keys.get(), seen, depth));
        multiply(s, g, transposed(values.get(), seen, depth));
        for (int64_t r = 0; r < rows; ++r) {
          T *p_row = probability.get() + r * seen, *s_row = slope.get() + r * seen;
          const int64_t token = r / shared(), visible = part.prefix() + first + token + 1;
          const int64_t at = group_at(part, first + token, head) / depth + r % shared();
          finish_logits(p_row, visible, 0, shape());
          gradient_piece(p_row, visible, lse[at], T(1), shape());
          T mean = 0;  // of the values' slopes under the probabilities
          for (int64_t d = 0; d < depth; ++d)
            mean += rows_of_g[r * depth + d] * rows_of_o[r * depth + d];
          for (int64_t j = 0; j < visible; ++j) s_row[j] = p_row[j] * (s_row[j] - mean) * scale;
          std::memset(p_row + visible, 0, (seen - visible) * sizeof(T));
          std::memset(s_row + visible, 0, (seen - visible) * sizeof(T));
        }
        multiply_add(matrix(value_sums, seen, depth), transposed(probability.get(), rows, seen), g,
                     true);
        multiply_add(matrix(key_sums, seen, depth), transposed(slope.get(), rows, seen), q, true);
        multiply(g, s, matrix(keys.get(), seen, depth));  // upstream is not needed again
        put(rows_of_g.get(), part, first, count, head, d_query);
      });
      const int64_t prefix = part.prefix() * depth;
      T* mine = prefix_sums.get() + (start[index] * key_heads + part.prefix() * head) * depth;
      std::memcpy(mine, key_sums, prefix * sizeof(T));
      std::memcpy(mine + kept, value_sums, prefix * sizeof(T));
      for (int64_t t = 0; t < part.size(); ++t) {
        const int64_t at = key_at(part.row, part.begin + t, head), from = prefix + t * depth;
        std::memcpy(d_key + at, key_sums + from, depth * sizeof(T));
        std::memcpy(d_value + at, value_sums + from, depth * sizeof(T));
      }
    });
    run_tasks(key_heads, [&](int64_t head) {
      for (size_t i = 0; i < parts.size(); ++i) {
        const Part& part = parts[i];
        const T* mine = prefix_sums.get() + (start[i] * key_heads + part.prefix() * head) * depth;
        for (int64_t t = 0; t < part.prefix(); ++t, mine += depth) {
          const int64_t at = key_at(part.row, part.prefix_begin + t, head);
          add_scaled_row(d_key + at, mine, depth, T(1));
          add_scaled_row(d_value + at, mine + kept, depth, T(1));
        }
      }
    });
  }
};

void check_inputs(const Tensor& query, const Tensor& key, const Tensor& value) {
  check_dim(kOp, "query", query, 4);
  check_dim(kOp, "key", key, 4);
  for (int64_t i : {0, 1, 3}) check_size(kOp, "key", key, i, query.size(i));
  require(key.size(2) > 0 && query.size(2) % key.size(2) == 0, kOp,
          ": query must have a multiple of the ", key.size(2), " heads of key, got ",
          query.size(2));
  check_dim(kOp, "value", value, 4);
  for (int64_t i = 0; i < 4; ++i) check_size(kOp, "value", value, i, key.size(i));
}

template <class T>
struct Call {
  const Tensor query, key, value;
  const std::vector<Part> parts;
  const Attention<T> attention;

  Call(const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& parts_,
       double scale)
      : query(in_compute_type<T>(query_)),
        key(in_compute_type<T>(key_)),
        value(in_compute_type<T>(value_)),
        parts(checked_parts(parts_, query.size(0), query.size(1))),
        attention{query.size(1),        query.size(2),         key.size(2),
                  query.size(3),        static_cast<T>(scale), parts,
                  data<const T>(query), data<const T>(key),    data<const T>(value)} {}
};

template <class T>
Tensor zeros_like(const Tensor& t) {
  return torch::stable::new_zeros(t, t.sizes(), kTypeOf<T>);
}

template <class T>
std::tuple<Tensor, Tensor> run(const Tensor& query, const Tensor& key, const Tensor& value,
                               const Tensor& parts, double scale) {
  const Call<T> call(query, key, value, parts, scale);
  Tensor out = zeros_like<T>(query);
  Tensor lse =
      torch::stable::new_zeros(query, {query.size(0), query.size(1), query.size(2)}, kTypeOf<T>);
  call.attention.forward(data<T>(out), data<T>(lse));
  return {out, lse};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> run_backward(const Tensor& grad, const Tensor& query,
                                                const Tensor& key, const Tensor& value,
                                                const Tensor& parts, const Tensor& out,
                                                const Tensor& lse, double scale) {
  const Call<T> call(query, key, value, parts, scale);
  const Tensor upstream = in_compute_type<T>(grad), forward = in_compute_type<T>(out),
               sums = in_compute_type<T>(lse);
  Tensor d_query = zeros_like<T>(query), d_key = zeros_like<T>(key), d_value = zeros_like<T>(value);
  call.attention.backward(data<const T>(upstream), data<const T>(forward), data<const T>(sums),
                          data<T>(d_query), data<T>(d_key), data<T>(d_value));
  return {d_query, d_key, d_value};
}

std::tuple<Tensor, Tensor> tree_attention(Tensor query, Tensor key, Tensor value, Tensor parts,
                                          double scale) {
  check_inputs(query, key, value);
  const auto call = computes_in_double(query) ? &run<double> : &run<float>;
  return call(query, key, value, parts, scale);
}

std::tuple<Tensor, Tensor, Tensor> tree_attention_backward(Tensor grad, Tensor query, Tensor key,
                                                           Tensor value, Tensor parts, Tensor out,
                                                           Tensor lse, double scale) {
  check_inputs(query, key, value);
  for (const auto& [name, t] : {std::pair{"grad", grad}, std::pair{"out", out}}) {
    check_dim(kOp, name, t, 4);
    for (int64_t i = 0; i < 4; ++i) check_size(kOp, name, t, i, query.size(i));
  }
  check_dim(kOp, "lse", lse, 3);
  for (int64_t i = 0; i < 3; ++i) check_size(kOp, "lse", lse, i, query.size(i));
  const auto call = computes_in_double(query) ? &run_backward<double> : &run_backward<float>;
  return call(grad, query, key, value, parts, out, lse, scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compact, CPU, m) {
  m.impl("tree_attention", TORCH_BOX(&tree_attention));
  m.impl("tree_attention_backward", TORCH_BOX(&tree_attention_backward));
}

}  // namespace compact
