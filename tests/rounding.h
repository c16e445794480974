// Stochastic rounding as compact_ops/reference.py has it: what the CPU and CUDA kernels are held
// to.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

inline float rounded_by_reference(float entry, float threshold, int64_t column) {
  if (std::abs(entry) >= threshold) return entry;
  uint32_t h;
  std::memcpy(&h, &entry, sizeof h);
  h ^= static_cast<uint32_t>(column) * 0x9e3779b1u;
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  h ^= h >> 16;
  const float chance = static_cast<float>(h >> 8) * 0x1p-24f;
  return std::abs(entry) > chance * threshold ? std::copysign(threshold, entry) : 0.0f;
}
