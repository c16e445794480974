#include "kernels/cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace compact::cpu {
namespace {

constexpr const char* kNames[] = {"base", "avx2", "avx512"};

Isa best() {
#if defined(__x86_64__)
  // The avx512 build needs F, DQ, VL and BW.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::base;
}

Isa choose() {
  const Isa supported = best();
  const char* wanted = std::getenv("COMPACT_CPU_CAPABILITY");
  if (wanted == nullptr) return supported;
  for (Isa choice : {Isa::base, Isa::avx2, Isa::avx512}) {
    if (kNames[static_cast<int>(choice)] != std::string(wanted)) continue;
    if (choice <= supported) return choice;
    throw std::invalid_argument(std::string("COMPACT_CPU_CAPABILITY=") + wanted +
                                ", but this CPU supports at most " +
                                kNames[static_cast<int>(supported)]);
  }
  throw std::invalid_argument(
      std::string("COMPACT_CPU_CAPABILITY must be base, avx2 or avx512, got ") + wanted);
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() { return kNames[static_cast<int>(isa())]; }

}  // namespace compact::cpu
