// What a product of small matrices takes and gives, by the type of its left factor. No torch header.
#pragma once

#include <cstdint>

#include "half_types.h"

namespace admfast {

constexpr int64_t kTileBytes = 64;  // of a row of a tile of left factors

// Products of bfloat16 have sums in float; those of 8 bits have exact sums.
template <typename T>
struct Factors {
  using Right = bfloat16;
  using Sum = float;
};
template <>
struct Factors<uint8_t> {
  using Right = int8_t;
  using Sum = int32_t;
};

}  // namespace admfast
