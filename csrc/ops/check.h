// Argument checks for all operators; a message names the argument, what was expected, what was
// found. The Python functions check the same first; these are for callers of torch.ops.compact.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace compact {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Most columns of score_ids; a warp of the CUDA kernel has a lane for each.
constexpr int64_t kMostScores = 16;

// Throws a message made of `parts` unless `good`. torch's own macro would put this source's
// function, file and line before it.
template <typename... Parts>
void require(bool good, const Parts&... parts) {
  if (good) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  require(t.dim() == dim, op, ": ", name, " must have ", dim, " dimension(s), got ", t.dim());
}

inline void check_size(const char* op, const char* name, const Tensor& t, int64_t axis,
                       int64_t size) {
  require(t.size(axis) == size, op, ": ", name, " must have size ", size, " at dimension ", axis,
          ", got ", t.size(axis));
}

// Checks the size of vectors, each given with its name.
inline void check_sizes(const char* op, int64_t size,
                        std::initializer_list<std::pair<const char*, const Tensor*>> vectors) {
  for (const auto& [name, t] : vectors) check_size(op, name, *t, 0, size);
}

inline void check_dtype(const char* op, const char* name, const Tensor& t,
                        std::initializer_list<ScalarType> allowed) {
  bool found = false;
  for (ScalarType type : allowed) found = found || t.scalar_type() == type;
  if (found) return;
  std::string names;
  for (ScalarType type : allowed)
    names += (names.empty() ? "" : " or ") + std::string(torch::headeronly::toString(type));
  require(false, op, ": ", name, " must have dtype ", names, ", got ",
          torch::headeronly::toString(t.scalar_type()));
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  require(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

// Checks the buffer of linear_token_stats_fused: a row for each of `count` rows of `hidden`, in the
// dtype of the arithmetic.
inline void check_blocks(const char* op, const Tensor& blocks, int64_t count, int64_t vocabulary,
                         const Tensor& hidden) {
  const bool in_double = hidden.scalar_type() == ScalarType::Double;
  check_dim(op, "blocks", blocks, 2);
  check_contiguous(op, "blocks", blocks);
  check_dtype(op, "blocks", blocks, {in_double ? ScalarType::Double : ScalarType::Float});
  check_size(op, "blocks", blocks, 1, vocabulary);
  require(blocks.size(0) >= count, op, ": blocks must have at least ", count, " rows, got ",
          blocks.size(0));
}

// Checks an int64 index vector: its length, and that every entry is in [0, high) or equal to
// `also`. Returns it as contiguous.
inline Tensor checked_index(const char* op, const char* name, const Tensor& index, int64_t length,
                            int64_t high, std::optional<int64_t> also = std::nullopt) {
  check_dim(op, name, index, 1);
  check_size(op, name, index, 0, length);
  check_dtype(op, name, index, {ScalarType::Long});
  Tensor flat = torch::stable::contiguous(index);
  const auto* entries = static_cast<const int64_t*>(flat.data_ptr());
  for (int64_t i = 0; i < length; ++i) {
    require((entries[i] >= 0 && entries[i] < high) || entries[i] == also, op, ": ", name, "[", i,
            "] must be in [0, ", high, "), got ", entries[i]);
  }
  return flat;
}

}  // namespace compact
