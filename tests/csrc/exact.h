// Memory of exactly the size that is asked for, filled with NaN. A sanitizer sees an access beside it, except by a tile
// of AMX. Without a sanitizer a page that can't be accessed follows, so that there a tile ends the program too.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "half_types.h"
#include "numbers.h"

template <typename T>
class Exact {
 public:
  explicit Exact(int64_t count) : count_(count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
#if defined(__SANITIZE_ADDRESS__)
    data_ = static_cast<T*>(std::malloc(bytes));
    if (!data_) throw std::bad_alloc();
#else
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    used_ = (bytes + page - 1) / page * page;
    length_ = used_ + page;
    void* place = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (place == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(place);
    if (mprotect(base_ + used_, page, PROT_NONE)) std::abort();
    data_ = reinterpret_cast<T*>(base_ + used_ - bytes);
#endif
    std::memset(static_cast<void*>(data_), 0xFF, bytes);
  }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  ~Exact() {
#if defined(__SANITIZE_ADDRESS__)
    std::free(data_);
#else
    munmap(base_, length_);
#endif
  }

  int64_t size() const { return count_; }
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  // No byte of element i has been written since it was made.
  bool untouched(int64_t i) const {
    const T fresh = filled();
    return std::memcmp(data_ + i, &fresh, sizeof(T)) == 0;
  }

 private:
  static T filled() {
    T value;
    std::memset(static_cast<void*>(&value), 0xFF, sizeof value);
    return value;
  }

  int64_t count_;
  T* data_ = nullptr;
  char* base_ = nullptr;
  size_t used_ = 0, length_ = 0;
};

// A number in [-1, 1] as bfloat16: the upper half of a float.
inline admfast::bfloat16 half_of(Numbers& numbers) {
  return {static_cast<uint16_t>(admfast::bits_of_float(numbers.next()) >> 16)};
}
