// Integer division that rounds up, for CPU and GPU operators.
#pragma once

#include <cstdint>

namespace compact {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace compact
