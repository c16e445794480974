// Weighted accumulation of unit gradients into hidden rows; torch-free.
#pragma once

#include <cstdint>

namespace compact::cpu {

// One output row: out[h] = sum over the listed items i of weight[group[i]] * unit[i, h], in list order.
void accumulate_row(const float* unit, const int64_t* items, int64_t count, const float* weight,
                    const int64_t* group, int64_t width, float* out);

}  // namespace compact::cpu
