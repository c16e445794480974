// CUDA's execution model on the host, for running the kernel bodies of csrc/kernels/cuda without a
// GPU.
//
// Fibers: one thread of the machine plays every CUDA thread. Order is drawn from a seed: blocks in
// any order, warps run ahead to the next barrier, lanes in any order between shuffles; shared
// memory starts as NaN; a barrier or shuffle that not all threads reach aborts. Threads: one
// std::thread a CUDA thread and two blocks at a time, for ThreadSanitizer, AddressSanitizer and
// UBSan. A shuffle passes its values through relaxed atomics, since CUDA's orders no memory either.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define SIMT_DEVICE inline
#define SIMT_KERNEL(max_threads) inline void
#define SIMT_SHARED(type, name, count) \
  type(&name)[count] = *static_cast<type(*)[count]>(simt::host::shared(sizeof(type) * (count)))
#define SIMT_DYNAMIC_SHARED(name) unsigned char* name = simt::host::dynamic_shared()

namespace simt {

namespace host {

enum class Mode { kFibers, kThreads };
struct Config {
  Mode mode = Mode::kFibers;
  uint64_t seed = 0;
  std::vector<int64_t> only;  // of a large grid the blocks to be played; empty for all
};
// How run() plays a launch. Read at each launch.
Config& config();

// Plays kernel<<<blocks, threads, dynamic_bytes>>>: calls body once a CUDA thread.
void run(int64_t blocks, int threads, size_t dynamic_bytes, const std::function<void()>& body);

// What run() has played in total, for reports.
struct Counts {
  uint64_t launches, blocks, barriers, shuffles;
};
Counts counts();

// Where the present CUDA thread stands.
struct Position {
  int thread, threads;
  int64_t block, blocks;
};
const Position& position();
void* shared(size_t bytes);
unsigned char* dynamic_shared();
void barrier(int line, const char* file);
uint64_t shuffle(uint64_t bits, int mask);
uint64_t ballot(bool yes);
[[noreturn]] void misaligned();

}  // namespace host

inline int thread() { return host::position().thread; }
inline int threads() { return host::position().threads; }
inline int64_t block() { return host::position().block; }
inline int64_t blocks() { return host::position().blocks; }

inline void barrier(int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
  host::barrier(line, file);
}

template <typename T>
T shuffle_xor(T value, int mask) {
  uint64_t bits = 0;
  static_assert(sizeof(T) <= sizeof(bits));
  std::memcpy(&bits, &value, sizeof(T));
  bits = host::shuffle(bits, mask);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline uint32_t ballot(bool yes) { return static_cast<uint32_t>(host::ballot(yes)); }
inline int count_bits(uint32_t bits) { return std::popcount(bits); }

inline void must_be_aligned(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) host::misaligned();
}

using half = _Float16;
struct bfloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(half x) { return static_cast<float>(x); }
inline float to_float(bfloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
inline double to_float(double x) { return x; }
template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline half from_float<half>(float x) {
  return static_cast<half>(x);
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

}  // namespace simt
