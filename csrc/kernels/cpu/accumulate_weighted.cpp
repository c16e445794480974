#include "kernels/cpu/accumulate_weighted.h"

namespace compact::cpu {

void accumulate_row(const float* unit, const int64_t* items, int64_t count, const float* weight,
                    const int64_t* group, int64_t width, float* out) {
  for (int64_t h = 0; h < width; ++h) out[h] = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float w = weight[group ? group[items[i]] : items[i]];
    const float* row = unit + items[i] * width;
    for (int64_t h = 0; h < width; ++h) out[h] += w * row[h];
  }
}

}  // namespace compact::cpu
