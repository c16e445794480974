// Chooses the instruction set once, at run time; the same body is compiled for each.
#pragma once

namespace compact::cpu {

enum class Isa { base, avx2, avx512 };

// The best instruction set of this CPU, or the one that COMPACT_CPU_CAPABILITY (base, avx2, avx512)
// names. Throws std::invalid_argument for another name or an instruction set that this CPU lacks.
Isa isa();

const char* isa_name();

// Picks one of the three builds of a kernel.
template <class Function>
Function pick(Function base, Function avx2, Function avx512) {
  switch (isa()) {
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return base;
  }
}

}  // namespace compact::cpu
