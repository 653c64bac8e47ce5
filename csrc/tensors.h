// Shared by the torch bindings of the CPU's ops: layouts of tensors, and memory that is kept.
#pragma once

#include <ATen/core/Tensor.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <vector>

namespace admfast {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that grows and is kept from call to call: new pages would cost 2 ms per call.
class KeptMemory {
 public:
  float* of(int64_t floats) {
    if (floats > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, divided_up(floats * 4, 64) * 64)));
      if (!memory_) throw std::bad_alloc();
      size_ = floats;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float[], Free> memory_;
  int64_t size_ = 0;
};

// Strides of a dense [N, C, *spatial] with adjacent channels. Computed, because a view would go through the dispatcher.
inline std::vector<int64_t> channels_last_strides(at::IntArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  strides[1] = step;
  step *= sizes[1];
  for (size_t dim = sizes.size() - 1; dim >= 2; --dim) {
    strides[dim] = step;
    step *= sizes[dim];
  }
  strides[0] = step;
  return strides;
}

inline bool is_channels_last(const Tensor& x) {
  if (x.is_contiguous()) return false;
  const std::vector<int64_t> strides = channels_last_strides(x.sizes());
  for (int64_t dim = 0; dim < x.dim(); ++dim)
    if (x.size(dim) != 1 && x.stride(dim) != strides[dim]) return false;
  return true;
}

inline Tensor dense(const Tensor& x, bool channels_last) {
  if (!channels_last) return x.contiguous();
  return is_channels_last(x) ? x : x.movedim(1, -1).contiguous().movedim(-1, 1);
}

inline Tensor empty_dense(at::IntArrayRef sizes, const Tensor& like, bool channels_last) {
  if (!channels_last) return at::empty(sizes, like.options());
  return at::empty_strided(sizes, channels_last_strides(sizes), like.options());
}

}  // namespace admfast
