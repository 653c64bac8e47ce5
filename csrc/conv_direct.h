// Loops of convolutions in bfloat16 as sums of products of small matrices; the division of the work is in
// csrc/README.md. Nothing here depends on torch or on threads.
#pragma once

#include <cstdint>

#include "half_types.h"

namespace admfast {

constexpr int64_t kDirectGroup = 16;  // positions of a group: the rows of a product
constexpr int64_t kDirectChunk = 32;  // input channels of a chunk: the terms of a product
constexpr int64_t kDirectPanel = 32;  // output channels of a panel: two products
constexpr int64_t kDirectStep = kDirectChunk * kDirectPanel;  // weights of a chunk, a tap and a panel

// Positions whose inputs are read with one stride: a row of an image, or whole images. `from`: the element of x of the
// first position and tap; `to`: the first position in y and residual; `rows`: the number of positions that are written.
struct DirectGroup {
  int64_t from, to, rows;
};

// The outputs of some groups in one panel:
//   y[to + r, o] = bias[o] + residual[to + r, o]
//                  + the sum over chunks k, taps t and channels c of x[from + r row + k chunk + tap[t] + c] w[k, t, c, o]
struct DirectPanel {
  const DirectGroup* groups;
  int64_t count;
  const bfloat16* x;
  int64_t row, chunk, chunks;  // elements of x from position to position and from chunk to chunk; number of chunks
  const int64_t* tap;          // elements of x from the first tap to each
  int64_t taps;
  const bfloat16* w;           // [chunks][taps][2][16][16][2]: halves of the panel, pairs of channels, outputs
  const bfloat16* bias;        // of the panel, or null
  const bfloat16* residual;    // of the panel, or null
  bfloat16* y;                 // of the panel
  int64_t stride, outputs;     // elements of y and residual from position to position; channels of the panel
};

struct DirectLoops {
  const char* name;
  void (*panel)(const DirectPanel& panel);
  // Copy `count` positions of `channels` adjacent channels to chunks of 32, whose first positions are `chunk` elements
  // apart; the last chunk is filled with zeros.
  void (*pack)(const bfloat16* from, int64_t count, int64_t channels, bfloat16* to, int64_t chunk);
};

extern const DirectLoops direct_generic;
#if defined(__x86_64__) && !defined(__clang__)
extern const DirectLoops direct_avx512_bf16, direct_amx;
#endif

// The widest loops for the instruction set of cpu_isa.h.
const DirectLoops& direct_loops();

}  // namespace admfast
