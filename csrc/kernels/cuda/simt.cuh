// The primitives that CUDA kernels of this project may use, with the same names for nvcc and for
// the host.
//
// With nvcc they are those of the hardware. Otherwise tests/simt/simt_host.h implements them. So
// the same kernel bodies can be run, checked for races and tested with planted faults on a machine
// without a GPU. Kernels use nothing else (no inline PTX, CUB, cooperative groups, float atomics).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define SIMT_DEVICE __device__ __forceinline__
#define SIMT_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads)
// An array of `count` elements shared by the block, uninitialised.
#define SIMT_SHARED(type, name, count) __shared__ type name[count]
// The dynamic shared memory of the launch, 16-byte aligned, uninitialised.
#define SIMT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace simt {

using half = __half;
using bfloat16 = __nv_bfloat16;

SIMT_DEVICE int thread() { return threadIdx.x; }
SIMT_DEVICE int threads() { return blockDim.x; }
SIMT_DEVICE int64_t block() { return blockIdx.x; }
SIMT_DEVICE int64_t blocks() { return gridDim.x; }

// All threads of the block arrive before any continues; orders memory within the block.
SIMT_DEVICE void barrier() { __syncthreads(); }

// The value that the lane `lane ^ mask` of the warp passed in; all 32 lanes must call it. Does not
// order memory.
template <typename T>
SIMT_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// One bit per lane: its `yes`; all 32 lanes must call it. Does not order memory.
SIMT_DEVICE uint32_t ballot(bool yes) { return __ballot_sync(0xffffffffu, yes); }
SIMT_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

// The device fails on a 16-byte access to an unaligned address; the host's version aborts.
SIMT_DEVICE void must_be_aligned(const void*) {}

SIMT_DEVICE float to_float(float x) { return x; }
SIMT_DEVICE float to_float(half x) { return __half2float(x); }
SIMT_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }
SIMT_DEVICE double to_float(double x) { return x; }
template <typename T>
SIMT_DEVICE T from_float(float x);
template <>
SIMT_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
SIMT_DEVICE half from_float<half>(float x) {
  return __float2half_rn(x);
}
template <>
SIMT_DEVICE bfloat16 from_float<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

}  // namespace simt

#else
#include "simt_host.h"
#endif

namespace simt {

inline constexpr int kWarp = 32;

SIMT_DEVICE int lane() { return thread() % kWarp; }
SIMT_DEVICE int warp() { return thread() / kWarp; }
SIMT_DEVICE int warps() { return threads() / kWarp; }

// The type in which a row of T is summed.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

// Rounds to T, to nearest even.
template <typename T, typename A>
SIMT_DEVICE T narrow(A x) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return x;
  } else {
    return from_float<T>(static_cast<float>(x));
  }
}

// Two to the power of x: one instruction in float.
SIMT_DEVICE float exp2(float x) { return ::exp2f(x); }
SIMT_DEVICE double exp2(double x) { return ::exp2(x); }

inline constexpr double kLog2e = 1.4426950408889634;

SIMT_DEVICE float log(float x) { return ::logf(x); }
SIMT_DEVICE double log(double x) { return ::log(x); }
SIMT_DEVICE float tanh(float x) { return ::tanhf(x); }
SIMT_DEVICE double tanh(double x) { return ::tanh(x); }
SIMT_DEVICE float expm1(float x) { return ::expm1f(x); }
SIMT_DEVICE double expm1(double x) { return ::expm1(x); }
SIMT_DEVICE float sqrt(float x) { return ::sqrtf(x); }
SIMT_DEVICE double sqrt(double x) { return ::sqrt(x); }

SIMT_DEVICE float abs(float x) { return ::fabsf(x); }
SIMT_DEVICE double abs(double x) { return ::fabs(x); }

// The bits of a float as a number.
SIMT_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// The larger of two numbers; if one is NaN, the other.
SIMT_DEVICE float max(float a, float b) { return ::fmaxf(a, b); }
SIMT_DEVICE double max(double a, double b) { return ::fmax(a, b); }

template <typename A>
SIMT_DEVICE A infinity() {
  return static_cast<A>(INFINITY);
}
template <typename A>
SIMT_DEVICE A nan() {
  return static_cast<A>(NAN);
}

// Sixteen bytes of T: one memory access if the address is a multiple of 16.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T item[kSize];
};

template <typename T>
SIMT_DEVICE Pack<T> load_pack(const T* at) {
  must_be_aligned(at);
  return *reinterpret_cast<const Pack<T>*>(at);
}
template <typename T>
SIMT_DEVICE void store_pack(T* at, const Pack<T>& value) {
  must_be_aligned(at);
  *reinterpret_cast<Pack<T>*>(at) = value;
}

template <typename T, typename A>
SIMT_DEVICE void widen(const Pack<T>& pack, A (&z)[Pack<T>::kSize]) {
  for (int i = 0; i < Pack<T>::kSize; ++i) z[i] = to_float(pack.item[i]);
}
template <typename T, typename A>
SIMT_DEVICE Pack<T> narrow_pack(const A (&z)[Pack<T>::kSize]) {
  Pack<T> pack;
  for (int i = 0; i < Pack<T>::kSize; ++i) pack.item[i] = narrow<T>(z[i]);
  return pack;
}

// Splits an array of `count` elements at any address into a head of single elements up to the next
// multiple of 16 bytes, whole packs, and a tail of single elements.
template <typename T>
struct Split {
  int64_t head, packs, tail;
  SIMT_DEVICE Split(const T* at, int64_t count) {
    const int64_t past = reinterpret_cast<uintptr_t>(at) % 16 / sizeof(T);
    head = (Pack<T>::kSize - past) % Pack<T>::kSize;
    if (head > count) head = count;
    packs = (count - head) / Pack<T>::kSize;
    tail = count - head - packs * Pack<T>::kSize;
  }
  // The element of head and tail together that thread i processes, or -1 for none.
  SIMT_DEVICE int64_t single(int i) const {
    if (i < head) return i;
    if (i < head + tail) return i + packs * Pack<T>::kSize;
    return -1;
  }
};

// The sum over the warp, the same in every lane and in every run.
template <typename A>
SIMT_DEVICE A warp_sum(A value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <typename A>
SIMT_DEVICE A warp_max(A value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = max(value, shuffle_xor(value, mask));
  return value;
}

}  // namespace simt
