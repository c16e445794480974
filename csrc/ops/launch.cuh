// Shared host code of the CUDA operators: launches on the caller's stream, choice of the kernel by
// dtype, products and gathers through torch's dispatcher.
//
// nvcc compiles the operators for CUDA, registered under `compact`. A C++ compiler (CMake's
// COMPACT_SIMT) compiles the same operators for the host harness of tests/simt, registered for CPU
// tensors under `compact_simt`.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels/cuda/simt.cuh"
#include "ops/ceil_div.h"
#include "ops/check.h"
#include "ops/waves.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define COMPACT_DEVICE_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(compact, CUDA, m)

// Weak, so that the library also loads into a torch without CUDA, which never calls it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#else
#define COMPACT_DEVICE_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(compact_simt, CPU, m)
#endif

namespace compact::cuda {

using OptionalTensor = std::optional<Tensor>;

#if defined(__CUDACC__)

inline void check_cuda(cudaError_t error, const char* what) {
  require(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Makes the tensor's device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& on) : guard_(on.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// Bytes of dynamic shared memory that a block may use; a kernel's own arrays are not included.
inline int64_t shared_bytes(const Tensor& on) {
  int bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                    on.get_device_index()),
             "shared memory of the device");
  return bytes - 2048;
}

inline int64_t processors(const Tensor& on) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, on.get_device_index()),
             "multiprocessors of the device");
  return count;
}

// Memory for a block of logits: large enough to keep the products at full speed. 2,048 rows of a
// vocabulary of 152k in bfloat16 fit.
inline constexpr int64_t kBlockBytes = int64_t{640} << 20;

// Whether host memory that is sent to the device must be pinned, so that the host need not wait.
inline constexpr bool kPinned = true;

template <typename Args>
void launch(const char* op, const Tensor& on, void (*kernel)(Args), int64_t blocks, int64_t threads,
            const Args& args, int64_t dynamic_bytes = 0) {
  if (blocks == 0) return;
  require(blocks <= INT32_MAX, op, ": too many rows for one launch: ", blocks);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  // A block has 48 KiB if it does not ask for more, and the kernel's own arrays count too. A
  // kernel that uses dynamic memory has less than 8 KiB of them.
  if (dynamic_bytes > (40 << 10)) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(dynamic_bytes)),
               op);
  }
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), dynamic_bytes,
           static_cast<cudaStream_t>(stream)>>>(args);
  check_cuda(cudaGetLastError(), op);
}

#else

struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};

inline int64_t processors(const Tensor&) { return 3; }

// Small, so that in tests of ordinary size only a part of a row is staged and the logits need
// several blocks.
inline int64_t shared_bytes(const Tensor&) { return 1 << 10; }
inline constexpr int64_t kBlockBytes = 32 << 10;
inline constexpr bool kPinned = false;

template <typename Args>
void launch(const char*, const Tensor&, void (*kernel)(Args), int64_t blocks, int64_t threads,
            const Args& args, int64_t dynamic_bytes = 0) {
  if (blocks == 0) return;
  simt::host::run(blocks, static_cast<int>(threads), dynamic_bytes, [&] { kernel(args); });
}

#endif

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls f with the tag of the kernels' type for a floating dtype.
template <typename F>
void for_dtype(const char* op, const char* name, const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(TypeTag<float>{});
    case ScalarType::Double:
      return f(TypeTag<double>{});
    case ScalarType::Half:
      return f(TypeTag<simt::half>{});
    case ScalarType::BFloat16:
      return f(TypeTag<simt::bfloat16>{});
    default:
      check_dtype(op, name, t,
                  {ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16});
  }
}

// The dtype of statistics and sums for tensors of this dtype.
inline ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
template <typename T>
T* data(const OptionalTensor& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

// Whether rows of `width` elements that follow each other from `t` on all start at multiples of 16
// bytes.
inline bool rows_aligned(const Tensor& t, int64_t width) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 &&
         width * static_cast<int64_t>(t.element_size()) % 16 == 0;
}

// Number of threads for a row of `items` pieces of work: whole warps, about `share` pieces per
// thread, at most `most` threads.
inline int64_t threads_for(int64_t items, int64_t share, int64_t most) {
  return std::clamp<int64_t>(ceil_div(items, share * simt::kWarp) * simt::kWarp, simt::kWarp, most);
}

template <size_t kCount>
Tensor call_torch(const char* name, const char* overload, std::array<StableIValue, kCount> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The same data, detached: torch's products with an output argument reject tensors that require a
// gradient.
inline Tensor detached(const Tensor& t) {
  return call_torch<1>("aten::detach", "", {torch::stable::detail::from(t)});
}

inline Tensor contiguous_as(const Tensor& t, ScalarType type) {
  return torch::stable::contiguous(torch::stable::to(detached(t), type));
}
inline OptionalTensor contiguous_as(const OptionalTensor& t, ScalarType type) {
  if (!t) return std::nullopt;
  return contiguous_as(*t, type);
}

// Checks an index vector of `length` entries. It does not check the values, because that would wait
// for the device. For an index out of range the kernels return NaN; accumulate_weighted leaves out
// a token whose row is out of range.
inline Tensor index_vector(const char* op, const char* name, const Tensor& t, int64_t length) {
  check_dim(op, name, t, 1);
  check_size(op, name, t, 0, length);
  check_dtype(op, name, t, {ScalarType::Long});
  return torch::stable::contiguous(t);
}

// An int64 vector of the host on the device of `like`; the host does not wait for the copy.
inline Tensor sent(const std::vector<int64_t>& values, const Tensor& like) {
  const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
  const Tensor buffer = torch::stable::empty({static_cast<int64_t>(values.size())},
                                             ScalarType::Long, std::nullopt, host, kPinned);
  std::copy(values.begin(), values.end(), data<int64_t>(buffer));
  return torch::stable::to(buffer, like.device(), /*non_blocking=*/true);
}

// out = a @ b.
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  call_torch<3>("aten::mm", "out",
                {torch::stable::detail::from(a), torch::stable::detail::from(b),
                 torch::stable::detail::from(out)});
}

// out = a @ b; out may have a wider dtype than a and b.
inline void multiply_to(Tensor out, const Tensor& a, const Tensor& b) {
  if (out.scalar_type() == a.scalar_type()) return multiply(out, a, b);
  Tensor product = torch::stable::new_empty(a, {a.size(0), b.size(1)});
  multiply(product, a, b);
  torch::stable::copy_(out, product);
}

// source[index], or source[begin : begin + count] without an index.
inline Tensor take_rows(Tensor source, const OptionalTensor& index, int64_t begin, int64_t count) {
  if (!index) return torch::stable::narrow(source, 0, begin, count);
  Tensor all = *index;
  return call_torch<3>(
      "aten::index_select", "",
      {torch::stable::detail::from(source), torch::stable::detail::from(int64_t{0}),
       torch::stable::detail::from(torch::stable::narrow(all, 0, begin, count))});
}

inline Tensor slice(Tensor t, int64_t begin, int64_t count) {
  return torch::stable::narrow(t, 0, begin, count);
}

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

// Number of rows of a block of logits [rows, width] within the memory for it, where a product with
// them has `columns` columns.
inline int64_t rows_of_block(int64_t rows, int64_t width, int64_t columns, const Tensor& like) {
  const int64_t fit = kBlockBytes / std::max<int64_t>(width * like.element_size(), 1);
  return rows_in_waves(rows, fit, columns, processors(like));
}

}  // namespace compact::cuda
