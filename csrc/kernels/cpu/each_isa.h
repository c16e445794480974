// Compiles the body named by COMPACT_BODY three times: in namespaces base, avx2 and avx512. Where
// the processor is not an x86-64 the three are one. Include it in csrc/kernels/cpu/<op>.cpp, once,
// after every other header. Otherwise the target pragma would also apply to inline functions of a
// later header, and the linker could use that code on a CPU that lacks the instructions. It has no
// include guard on purpose; do not use -march or -ffast-math.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace compact::cpu::base {
constexpr int kVectorBytes = 16;
#include "kernels/cpu/vec.inl"
#include COMPACT_BODY
}  // namespace compact::cpu::base

#if defined(__x86_64__)
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
#else
namespace compact::cpu {
namespace avx2 = base;
namespace avx512 = base;
}  // namespace compact::cpu
#endif
