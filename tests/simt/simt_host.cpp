// The two ways of playing a kernel launch on the host: fibers in a seeded order, and real threads.
#include "simt_host.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <thread>

namespace simt::host {
namespace {

constexpr int kWarp = 32;
constexpr int kBallot = -1;    // in place of a shuffle's mask
constexpr int kPoison = 0xff;  // NaN in every floating type, -1 in every integer
constexpr int kCanary = 0x5a;
constexpr size_t kCanaryBytes = 64;
constexpr size_t kStackBytes = 128 << 10;
constexpr int64_t kConcurrentBlocks = 2;

[[noreturn]] void fail(const char* what, const Position& at, const char* file, int line) {
  std::fprintf(stderr, "simt: %s (block %lld, thread %d, %s:%d)\n", what,
               static_cast<long long>(at.block), at.thread, file, line);
  std::abort();
}

// Where a thread waits. Line 0 is the end of the kernel: a thread that returns early while another
// waits at a barrier shows as two different sites.
struct Site {
  const char* file = "end of kernel";
  int line = 0;
  bool operator==(const Site& other) const { return line == other.line && file == other.file; }
};

// Shared memory of one block: the arrays in the order in which the kernel declares them.
class SharedMemory {
 public:
  explicit SharedMemory(size_t dynamic_bytes) : dynamic_(dynamic_bytes) {}

  void poison() {
    dynamic_.poison();
    for (Array& array : arrays_) array.poison();
  }
  void* array(size_t ordinal, size_t bytes, const Position& at) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (ordinal == arrays_.size()) arrays_.emplace_back(bytes);
    if (ordinal > arrays_.size() || arrays_[ordinal].bytes != bytes)
      fail("threads of a block declare different shared arrays", at, "", 0);
    return arrays_[ordinal].data.get();
  }
  unsigned char* dynamic() { return dynamic_.data.get(); }
  void check(const Position& at) const {
    bool intact = dynamic_.intact();
    for (const Array& array : arrays_) intact = intact && array.intact();
    if (!intact) fail("a write past the end of a shared array", at, "", 0);
  }

 private:
  struct Array {
    size_t bytes;
    std::unique_ptr<unsigned char[]> data;
#if defined(__SANITIZE_ADDRESS__)
    static constexpr size_t kTail = 0;  // the sanitizer watches the end itself
#else
    static constexpr size_t kTail = kCanaryBytes;
#endif
    explicit Array(size_t size) : bytes(size), data(new unsigned char[size + kTail]) { poison(); }
    void poison() {
      std::memset(data.get(), kPoison, bytes);
      std::memset(data.get() + bytes, kCanary, kTail);
    }
    bool intact() const {
      return std::all_of(data.get() + bytes, data.get() + bytes + kTail,
                         [](unsigned char c) { return c == kCanary; });
    }
  };
  Array dynamic_;
  std::vector<Array> arrays_;
  std::mutex mutex_;
};

// What one CUDA thread needs of its surroundings; the two modes derive from it.
struct Thread {
  Position at{};
  SharedMemory* memory = nullptr;
  size_t next_array = 0;
  virtual void wait(Site site) = 0;
  virtual uint64_t exchange(uint64_t bits, int mask) = 0;

 protected:
  ~Thread() = default;
};

thread_local Thread* current = nullptr;
Config the_config;
std::atomic<uint64_t> launches, blocks_run, barriers, shuffles;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t operator()() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ >> 11;
  }
  template <typename T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[(*this)() % i]);
  }

 private:
  uint64_t state_;
};

// --- fibers
// -------------------------------------------------------------------------------------------

struct Fiber final : Thread {
  enum class State { kReady, kShuffle, kWaiting } state = State::kReady;
  ucontext_t first;
  jmp_buf place;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Site site;
  uint64_t bits = 0, received = 0;
  int mask = 0;
  const std::function<void()>* body = nullptr;

  // The context in which the first resume() starts `main` on the fiber's own stack.
  void prepare(void (*main)()) {
    getcontext(&first);
    first.uc_stack.ss_sp = stack.get();
    first.uc_stack.ss_size = kStackBytes;
    first.uc_link = nullptr;
    makecontext(&first, main, 0);
  }
  void pause();
  void wait(Site where) override {
    site = where;
    state = State::kWaiting;
    pause();
  }
  uint64_t exchange(uint64_t value, int lane_mask) override {
    bits = value;
    mask = lane_mask;
    state = State::kShuffle;
    pause();
    return received;
  }
};

thread_local jmp_buf scheduler;

void Fiber::pause() {
  if (_setjmp(place) == 0) _longjmp(scheduler, 1);
}

// Every fiber runs this for ever: one pass a block.
void fiber_main() {
  auto* self = static_cast<Fiber*>(current);
  for (;;) {
    (*self->body)();
    self->wait(Site{});
  }
}

void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.first);
}

class FiberBlocks {
 public:
  FiberBlocks(int64_t blocks, int threads, size_t dynamic_bytes, const std::function<void()>& body,
              uint64_t seed)
      : random_(seed), memory_(dynamic_bytes), order_(kWarp) {
    std::iota(order_.begin(), order_.end(), 0);
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = *fibers_.emplace_back(new Fiber);
      fiber.at = {i, threads, 0, blocks};
      fiber.memory = &memory_;
      fiber.body = &body;
      fiber.prepare(fiber_main);
    }
  }

  void run_block(int64_t block) {
    memory_.poison();
    for (auto& fiber : fibers_) {
      fiber->at.block = block;
      fiber->next_array = 0;
      fiber->state = Fiber::State::kReady;
    }
    std::vector<int> live;
    for (;;) {
      live.resize(fibers_.size() / kWarp);
      std::iota(live.begin(), live.end(), 0);
      while (!live.empty()) {
        const size_t pick = random_() % live.size();
        if (run_warp(live[pick])) {
          live[pick] = live.back();
          live.pop_back();
        }
      }
      const Fiber& first = *fibers_[0];
      for (auto& fiber : fibers_) {
        if (!(fiber->site == first.site))
          fail("divergent barrier: thread 0 waits elsewhere", fiber->at, fiber->site.file,
               fiber->site.line);
      }
      if (first.site.line == 0) break;
      ++barriers;
      for (auto& fiber : fibers_) fiber->state = Fiber::State::kReady;
    }
    memory_.check(fibers_[0]->at);
    ++blocks_run;
  }

  Random& random() { return random_; }

 private:
  // Runs a warp up to the next barrier, or now and then only to a shuffle; true when it waits.
  bool run_warp(int warp) {
    Fiber* lanes[kWarp];
    for (int i = 0; i < kWarp; ++i) lanes[i] = fibers_[warp * kWarp + i].get();
    for (;;) {
      random_.shuffle(order_);
      for (int i : order_)
        if (lanes[i]->state == Fiber::State::kReady) resume(*lanes[i]);
      const auto at_shuffle = std::count_if(lanes, lanes + kWarp, [](const Fiber* lane) {
        return lane->state == Fiber::State::kShuffle;
      });
      if (at_shuffle == 0) return true;
      for (const Fiber* lane : lanes)
        if (at_shuffle != kWarp || lane->mask != lanes[0]->mask)
          fail("divergent shuffle: not all lanes of the warp take part", lane->at, lane->site.file,
               lane->site.line);
      for (int i = 0; i < kWarp; ++i) {
        lanes[i]->received = 0;
        if (lanes[i]->mask == kBallot) {
          for (int j = 0; j < kWarp; ++j) lanes[i]->received |= lanes[j]->bits << j;
        } else {
          lanes[i]->received = lanes[i ^ lanes[i]->mask]->bits;
        }
      }
      for (Fiber* lane : lanes) lane->state = Fiber::State::kReady;
      ++shuffles;
      if (random_() % 8 == 0) return false;
    }
  }

  Random random_;
  SharedMemory memory_;
  std::vector<int> order_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
};

// The blocks of a launch that are played.
std::vector<int64_t> chosen_blocks(int64_t blocks) {
  if (!the_config.only.empty()) return the_config.only;
  std::vector<int64_t> all(blocks);
  std::iota(all.begin(), all.end(), 0);
  return all;
}

void run_fibers(int64_t blocks, int threads, size_t dynamic_bytes,
                const std::function<void()>& body) {
  FiberBlocks player(blocks, threads, dynamic_bytes, body, the_config.seed + launches);
  std::vector<int64_t> order = chosen_blocks(blocks);
  player.random().shuffle(order);
  Thread* outer = current;
  for (int64_t block : order) player.run_block(block);
  current = outer;
}

// --- threads
// ------------------------------------------------------------------------------------------

// One block's worth of threads. Blocks of one group follow each other; groups run side by side.
class Group {
 public:
  Group(int threads, size_t dynamic_bytes)
      : memory(dynamic_bytes), threads_(threads), warps_(threads / kWarp) {}

  void wait(Site site, const Position& at) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (arrived_ == 0) site_ = site;
    if (!(site == site_))
      fail("divergent barrier: others wait elsewhere", at, site.file, site.line);
    const uint64_t turn = turn_;
    if (++arrived_ == threads_) {
      if (site.line == 0) {
        memory.check(at);
        memory.poison();
        ++blocks_run;
      }
      ++barriers;
      arrived_ = 0;
      ++turn_;
      turned_.notify_all();
    } else if (!turned_.wait_for(lock, std::chrono::seconds(60), [&] { return turn_ != turn; })) {
      fail("not every thread reaches this barrier", at, site.file, site.line);
    }
  }

  // Values and the number of the exchange travel in one relaxed atomic, which orders nothing else.
  // Two sets of slots in turn: a lane is at most one exchange ahead of the others.
  uint64_t exchange(uint32_t number, uint64_t bits, int mask, const Position& at) {
    Slots& slots = warps_[at.thread / kWarp].set[number % 2];
    const int lane = at.thread % kWarp;
    const uint64_t tag = static_cast<uint64_t>(number) << 32;
    slots.low[lane].store(tag | (bits & 0xffffffffu), std::memory_order_relaxed);
    slots.high[lane].store(tag | bits >> 32, std::memory_order_relaxed);
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kWarp;) {
      const bool there = slots.low[i].load(std::memory_order_relaxed) >> 32 == number &&
                         slots.high[i].load(std::memory_order_relaxed) >> 32 == number;
      if (there) {
        ++i;
        continue;
      }
      std::this_thread::yield();
      if (std::chrono::steady_clock::now() - start > std::chrono::seconds(60))
        fail("divergent shuffle: not all lanes of the warp take part", at, "", 0);
    }
    if (lane == 0) ++shuffles;
    if (mask == kBallot) {
      uint64_t votes = 0;
      for (int i = 0; i < kWarp; ++i)
        votes |= (slots.low[i].load(std::memory_order_relaxed) & 1) << i;
      return votes;
    }
    const uint64_t low = slots.low[lane ^ mask].load(std::memory_order_relaxed);
    const uint64_t high = slots.high[lane ^ mask].load(std::memory_order_relaxed);
    return (high << 32) | (low & 0xffffffffu);
  }

  SharedMemory memory;

 private:
  struct Slots {
    std::atomic<uint64_t> low[kWarp]{}, high[kWarp]{};
  };
  struct Warp {
    Slots set[2];
  };
  int threads_, arrived_ = 0;
  uint64_t turn_ = 0;
  Site site_;
  std::vector<Warp> warps_;
  std::mutex mutex_;
  std::condition_variable turned_;
};

struct RealThread final : Thread {
  Group* group = nullptr;
  uint32_t exchanges = 0;
  void wait(Site site) override { group->wait(site, at); }
  uint64_t exchange(uint64_t bits, int mask) override {
    return group->exchange(++exchanges, bits, mask, at);
  }
};

void run_threads(int64_t blocks, int threads, size_t dynamic_bytes,
                 const std::function<void()>& body) {
  const std::vector<int64_t> chosen = chosen_blocks(blocks);
  const int64_t side_by_side = std::min<int64_t>(chosen.size(), kConcurrentBlocks);
  std::vector<std::unique_ptr<Group>> groups;
  std::vector<std::thread> pool;
  for (int64_t g = 0; g < side_by_side; ++g) {
    Group* group = groups.emplace_back(new Group(threads, dynamic_bytes)).get();
    for (int i = 0; i < threads; ++i) {
      pool.emplace_back([=, &body, &chosen] {
        const auto owner = std::make_unique<RealThread>();
        RealThread& self = *owner;
        self.group = group;
        self.memory = &group->memory;
        current = owner.get();
        for (size_t next = g; next < chosen.size(); next += side_by_side) {
          self.at = {i, threads, chosen[next], blocks};
          self.next_array = 0;
          body();
          self.wait(Site{});
        }
      });
    }
  }
  for (std::thread& thread : pool) thread.join();
}

}  // namespace

Config& config() { return the_config; }
Counts counts() { return {launches, blocks_run, barriers, shuffles}; }
const Position& position() { return current->at; }
unsigned char* dynamic_shared() { return current->memory->dynamic(); }
void* shared(size_t bytes) {
  return current->memory->array(current->next_array++, bytes, current->at);
}
void barrier(int line, const char* file) { current->wait({file, line}); }
uint64_t shuffle(uint64_t bits, int mask) { return current->exchange(bits, mask); }
uint64_t ballot(bool yes) { return current->exchange(yes, kBallot); }
void misaligned() { fail("a misaligned access of 16 bytes", current->at, "", 0); }

void run(int64_t blocks, int threads, size_t dynamic_bytes, const std::function<void()>& body) {
  const Position at{0, threads, 0, blocks};
  if (threads <= 0 || threads > 1024 || threads % kWarp != 0)
    fail("a block must have a multiple of 32 threads, at most 1,024", at, "", 0);
  if (blocks <= 0 || blocks > INT32_MAX) fail("a grid must have 1 to 2^31 - 1 blocks", at, "", 0);
  for (int64_t block : the_config.only)
    if (block < 0 || block >= blocks) fail("this block to be played is not of the grid", at, "", 0);
  ++launches;
  if (the_config.mode == Mode::kFibers) {
    run_fibers(blocks, threads, dynamic_bytes, body);
  } else {
    run_threads(blocks, threads, dynamic_bytes, body);
  }
}

}  // namespace simt::host
