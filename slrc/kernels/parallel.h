// Tasks on threads, and memory that a thread keeps.
#pragma once

#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <new>

#include "weight.h"

namespace slrc {

// Runs task(data, i) for every i < count, on as many threads as it likes.
struct Parallel {
  void (*run)(void* context, size_t count, void (*task)(void* data, size_t i), void* data);
  void* context;
};
extern const Parallel kSerial;

// Memory of a thread that grows and stays, so that nothing is allocated after the first call of a shape.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { free(data_); }

  // Returns at least `count` floats, aligned to cache lines.
  float* Get(int64_t count) {
    if (count > size_) {
      free(data_);
      size_ = 0;
      data_ = static_cast<float*>(aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64));
      if (!data_) throw std::bad_alloc();
      size_ = count;
    }
    return data_;
  }

  // The same; `fresh` says whether they hold something other than what the same owner left there under the same key.
  float* Get(int64_t count, uint64_t owner, int64_t key, bool* fresh) {
    *fresh = owner != owner_ || key != key_ || count > size_;
    owner_ = 0;
    Get(count);
    owner_ = owner;
    key_ = key;
    return data_;
  }

  static Scratch& Inputs() {
    static thread_local Scratch inputs;
    return inputs;
  }
  static Scratch& Sums() {
    static thread_local Scratch sums;
    return sums;
  }
  static Scratch& Words() {
    static thread_local Scratch words;
    return words;
  }
  static Scratch& Hidden() {
    static thread_local Scratch hidden;
    return hidden;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
  uint64_t owner_ = 0;
  int64_t key_ = 0;
};

// Returns a number that no other call gets.
inline uint64_t NewOwner() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

// Splits `panels` x `units`, parts of a panel, into tasks, task(panel, first unit, end), panel by panel: a thread that
// goes on with a panel finds it in its scratch memory. `multiply_adds` is the work of all; `together` units stay so.
template <class Task>
void RunTasks(const Parallel& parallel, int64_t panels, int64_t units, int64_t together, double multiply_adds,
              const Task& task) {
  if (panels == 0 || units == 0) return;
  constexpr double kWorthATask = 5e5;  // some 20 us: far above the cost of handing a task to a thread
  constexpr int64_t kTasks = 64;
  const int64_t wanted = std::min<int64_t>(kTasks, static_cast<int64_t>(multiply_adds / kWorthATask) + 1);
  struct Shared {
    const Task& task;
    int64_t splits, units, together;
    std::atomic<bool> out_of_memory;
  } shared{task, std::min(CeilDiv(units, together), CeilDiv(wanted, panels)), units, together, {false}};
  auto one = [](void* data, size_t i) {
    Shared& s = *static_cast<Shared*>(data);
    const int64_t panel = i / s.splits, part = i % s.splits;
    auto begin = [&s](int64_t k) {
      return std::min(s.units, k * CeilDiv(s.units, s.together) / s.splits * s.together);
    };
    try {
      s.task(panel, begin(part), begin(part + 1));
    } catch (const std::bad_alloc&) {
      s.out_of_memory = true;  // an exception must not leave a thread that is not ours
    }
  };
  parallel.run(parallel.context, panels * shared.splits, one, &shared);
  if (shared.out_of_memory) throw std::bad_alloc();
}

}  // namespace slrc
