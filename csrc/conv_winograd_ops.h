// Shared by the torch bindings of Winograd's convolution and of its gradient.
#pragma once

#include <initializer_list>
#include <utility>

#include "conv_winograd.h"
#include "tensors.h"

namespace admfast {

constexpr int64_t kTileGrain = 8;  // fewest tiles of a transform that a thread takes at a time
constexpr int64_t kTaps = 3;       // weights of a filter along a side

// The memory that a thread keeps for the transformed tiles of a block.
float* winograd_memory(int64_t floats);

// Raise an error unless all tensors are float32 on the CPU; null tensors pass.
void check_floats(const char* op, std::initializer_list<std::pair<const char*, const Tensor*>> tensors);

// The number of tiles of all images.
inline int64_t tiles_of(const Tensor& x) {
  return x.size(0) * divided_up(x.size(2), kWinogradTile) * divided_up(x.size(3), kWinogradTile);
}

}  // namespace admfast
