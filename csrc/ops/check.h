// Argument checks for all operators; a message names the argument, what was expected, what was
// found. The Python functions check the same first; these are for callers of torch.ops.compact.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>

namespace compact {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Most columns of score_ids; a warp of the CUDA kernel has a lane for each.
constexpr int64_t kMostScores = 16;

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim, op, ": ", name, " must have ", dim, " dimension(s), got ",
                  t.dim());
}

inline void check_size(const char* op, const char* name, const Tensor& t, int64_t axis,
                       int64_t size) {
  STD_TORCH_CHECK(t.size(axis) == size, op, ": ", name, " must have size ", size, " at dimension ",
                  axis, ", got ", t.size(axis));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t,
                        std::initializer_list<ScalarType> allowed) {
  bool found = false;
  for (ScalarType type : allowed) found = found || t.scalar_type() == type;
  STD_TORCH_CHECK(found, op, ": ", name, " has an unsupported dtype ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

}  // namespace compact
