// Compiles the body named by COMPACT_BODY three times: in namespaces base, avx2 and avx512.
// Included by csrc/kernels/cpu/<op>.cpp, once, after every other header: code in a header that is
// parsed under a target pragma could be picked by the linker for a CPU that lacks it. No include
// guard on purpose, no -march, and no -ffast-math.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace compact::cpu::base {
constexpr int kVectorBytes = 16;
#include "kernels/cpu/vec.inl"
#include COMPACT_BODY
}  // namespace compact::cpu::base

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace compact::cpu::avx2 {
constexpr int kVectorBytes = 32;
#include "kernels/cpu/vec.inl"
#include COMPACT_BODY
}  // namespace compact::cpu::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512vl,avx512bw,prefer-vector-width=512")
namespace compact::cpu::avx512 {
constexpr int kVectorBytes = 64;
#include "kernels/cpu/vec.inl"
#include COMPACT_BODY
}  // namespace compact::cpu::avx512
#pragma GCC pop_options
