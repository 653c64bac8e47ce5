// Shared by the torch bindings of Winograd's convolution and of its gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <utility>

#include "conv_winograd.h"

namespace admfast {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kTileGrain = 8;  // fewest tiles of a transform that a thread takes at a time
constexpr int64_t kTaps = 3;       // weights of a filter along a side

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

// The memory that a thread keeps for the transformed tiles of a block.
float* winograd_memory(int64_t floats);

// Raise an error unless all tensors are float32 on the CPU; null tensors pass.
void check_floats(const char* op, std::initializer_list<std::pair<const char*, const Tensor*>> tensors);

// The tensor in channels-last memory; a copy only if needed.
inline Tensor channels_inside(const Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

// The number of tiles of all images.
inline int64_t tiles_of(const Tensor& x) {
  return x.size(0) * divided_up(x.size(2), kWinogradTile) * divided_up(x.size(3), kWinogradTile);
}

}  // namespace admfast
