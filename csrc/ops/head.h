// Shared code of the CPU operators: the LM head's arguments in the compute type, single-threaded
// products on raw blocks, and the fixed grid of tasks, which makes results independent of the
// number of threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <vector>

#include "kernels/cpu/linear_token_stats.h"
#include "ops/ceil_div.h"
#include "ops/check.h"

namespace compact {

using namespace cpu;

using OptionalTensor = std::optional<Tensor>;

template <class T>
constexpr ScalarType kTypeOf = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

// The dtype of the arithmetic: float64 for float64 hidden states, else float32.
inline bool computes_in_double(const Tensor& hidden) {
  return hidden.scalar_type() == ScalarType::Double;
}

template <class T>
Tensor empty_of(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, kTypeOf<T>);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// `t` as a contiguous tensor of the compute type; `t` itself if it already is one.
template <class T>
Tensor in_compute_type(const Tensor& t) {
  return torch::stable::contiguous(torch::stable::to(t, kTypeOf<T>));
}

// source[index], with rows in the compute type: [index.size(0), width].
template <class T>
Tensor gather_rows(const Tensor& source, const Tensor& index) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(source),
                                    torch::stable::detail::from(int64_t{0}),
                                    torch::stable::detail::from(index)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return in_compute_type<T>(torch::stable::detail::to<Tensor>(stack[0]));
}

// A view of raw memory as a matrix with the given strides. These views never require a gradient.
// That matters, because worker threads do not inherit the caller's no-grad state.
inline Tensor strided(const void* data, ScalarType type, int64_t rows, int64_t columns,
                      int64_t row_stride, int64_t column_stride) {
  return torch::stable::from_blob(const_cast<void*>(data), {rows, columns},
                                  {row_stride, column_stride},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), type);
}

// The rows of a matrix in the compute type, [rows.size(), width].
template <class T>
Tensor gather_rows(const Tensor& source, const std::vector<int64_t>& rows) {
  const auto count = static_cast<int64_t>(rows.size());
  return gather_rows<T>(
      source, torch::stable::flatten(strided(rows.data(), ScalarType::Long, count, 1, 1, 1)));
}

template <class T>
Tensor matrix(const T* data, int64_t rows, int64_t columns) {
  return strided(data, kTypeOf<T>, rows, columns, columns, 1);
}

// The transpose of a row-major [rows, columns] block.
template <class T>
Tensor transposed(const T* data, int64_t rows, int64_t columns) {
  return strided(data, kTypeOf<T>, columns, rows, 1, columns);
}

// out = a @ b, and out = alpha * a @ b (+ out if `keep`). Inside a parallel region torch's products
// run on the calling thread.
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

inline void multiply_add(const Tensor& out, const Tensor& a, const Tensor& b, bool keep,
                         double alpha = 1.0) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), keep ? 1.0 : 0.0, alpha));
}

// Memory of one task, aligned to cache lines. The offset of an array within a cache line may change
// the rounding of a library's product, and without alignment it would depend on the memory of other
// tasks.
constexpr std::align_val_t kLine{64};

template <class T>
struct FreeScratch {
  void operator()(T* at) const { ::operator delete[](at, kLine); }
};

template <class T>
using Scratch = std::unique_ptr<T[], FreeScratch<T>>;

template <class T>
Scratch<T> scratch(int64_t count) {
  return Scratch<T>(static_cast<T*>(::operator new[](count * sizeof(T), kLine)));
}

// The limit of MKL threads for the calling thread; the name is that of the C interface (in lower
// case it is the Fortran one, which takes a pointer). Null in torch builds without MKL.
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));

// While it exists, products of the calling thread run on this thread alone. With one thread in all,
// torch runs a region without OpenMP; MKL then takes another path than inside a parallel region,
// and on some processors (Xeon with AMX) rounds differently.
class OneThread {
 public:
  OneThread() : before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

// Runs task(0) .. task(count - 1), each on the next free thread. Always as a parallel region, also
// for one task: a product outside a parallel region would use several threads and could round
// differently. Rethrows the first exception of a task; torch's interface would lose its message.
template <class Task>
void run_tasks(int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failing;
  const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 2);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const OneThread one;
    try {
      for (int64_t i = next++; i < count; i = next++) task(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failing);
      if (failure == nullptr) failure = std::current_exception();
    }
  });
  if (failure != nullptr) std::rethrow_exception(failure);
}

// The stash has one reference per row and block of this many entries (csrc/library.cpp).
constexpr int64_t kStashBlock = 256;

// The vocabulary is processed in blocks of this many entries: a block of weights [256, H] and the
// logits of a tile of rows for it fit into the second-level cache.
constexpr int64_t kBlock = 256;

// The size of a cache, or `otherwise` if the system does not report it (some containers and virtual
// machines).
inline int64_t cache_bytes(int which, int64_t otherwise) {
  const long found = sysconf(which);
  return found > 0 ? found : otherwise;
}

// Rows are processed in tiles of this many: the logits of a tile for one block of the vocabulary
// fill a quarter of the second-level cache (256 rows of float32 for 1 MB), next to the block of
// weights. The number depends on the machine but not on the threads. So the last bits of a sum may
// differ between machines, as they do between instruction sets, but not between runs on one
// machine.
template <class T>
int64_t tile_rows() {
  static const int64_t fitting =
      cache_bytes(_SC_LEVEL2_CACHE_SIZE, 1 << 20) / 4 / (kBlock * static_cast<int64_t>(sizeof(T)));
  return std::clamp<int64_t>(fitting / 32 * 32, 64, 512);
}

// The work is split into about this many tasks: enough for sixteen threads.
constexpr int64_t kTasks = 16;

// Tiles of rows x slices of the vocabulary; each pair is a task. The grid depends only on shapes.
struct Grid {
  int64_t rows, vocabulary, tile_rows, tiles, slices;

  Grid(int64_t rows, int64_t vocabulary, int64_t tile_rows, int64_t tasks)
      : rows(rows),
        vocabulary(vocabulary),
        tile_rows(tile_rows),
        tiles(ceil_div(rows, tile_rows)),
        slices(std::clamp<int64_t>(tasks / std::max<int64_t>(tiles, 1), 1,
                                   ceil_div(vocabulary, kBlock))) {}

  int64_t tile_begin(int64_t tile) const { return tile * tile_rows; }
  int64_t tile_end(int64_t tile) const { return std::min(rows, (tile + 1) * tile_rows); }
  // Slices are whole blocks.
  int64_t slice_begin(int64_t slice) const {
    return std::min(vocabulary, ceil_div(vocabulary, kBlock) * slice / slices * kBlock);
  }
  int64_t slice_end(int64_t slice) const { return slice_begin(slice + 1); }
};

// The head in the compute type. Weights of another dtype are converted block by block.
template <class T>
struct Head {
  Tensor weight;        // [V, H], contiguous, any dtype
  OptionalTensor bias;  // [V], in the compute type
  int64_t vocabulary, width;
  LogitShape<T> shape;

  Head(const Tensor& weight_, const OptionalTensor& bias_, double softcap, double logit_scale)
      : weight(torch::stable::contiguous(weight_)),
        vocabulary(weight.size(0)),
        width(weight.size(1)) {
    if (bias_) bias = in_compute_type<T>(*bias_);
    shape = {static_cast<T>(logit_scale), static_cast<T>(softcap),
             bias ? data<const T>(*bias) : nullptr};
  }

  bool converts() const { return weight.scalar_type() != kTypeOf<T>; }

  // Rows first .. first + count of the weight. If they must be converted, they are stored in
  // `buffer` [count, H]; otherwise it may be null.
  const T* block(int64_t first, int64_t count, T* buffer) const {
    const auto* bytes =
        static_cast<const char*>(weight.data_ptr()) + first * width * weight.element_size();
    if (!converts()) return reinterpret_cast<const T*>(bytes);
    Tensor to = matrix(buffer, count, width);
    torch::stable::copy_(to, strided(bytes, weight.scalar_type(), count, width, width, 1));
    return buffer;
  }
};

// The place where linear_token_stats_fused stores e [rows, block] for the tile of rows from
// row_begin on and the block of the vocabulary from `first` on. It is contiguous, so that products
// need no copy.
template <class T>
T* fused_block(T* blocks, int64_t vocabulary, int64_t row_begin, int64_t rows, int64_t first) {
  return blocks + row_begin * vocabulary + rows * first;
}

// Repeats the Python checks; shared by every operator that takes a head.
inline void check_head(const char* op, const Tensor& hidden, const Tensor& weight,
                       const OptionalTensor& bias) {
  check_dim(op, "hidden", hidden, 2);
  check_dim(op, "weight", weight, 2);
  check_size(op, "weight", weight, 1, hidden.size(1));
  require(weight.size(0) > 0, op, ": weight must have at least one row");
  if (bias) check_size(op, "bias", *bias, 0, weight.size(0));
}

}  // namespace compact
