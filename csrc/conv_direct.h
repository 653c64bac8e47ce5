// Loops of convolutions as sums of products of small matrices: in bfloat16, or in 8 bits with x and y in bfloat16 or
// float. The division of the work is in csrc/README.md. Nothing here depends on torch or on threads.
#pragma once

#include <cstdint>

#include "factors.h"

namespace admfast {

constexpr int64_t kDirectGroup = 16;  // positions of a group: the rows of a product
constexpr int64_t kDirectPanel = 32;  // output channels of a panel: two products
template <typename T>
constexpr int64_t kDirectChunk = kTileBytes / sizeof(T);  // input channels of a chunk: the terms of a product
template <typename T>
constexpr int64_t kDirectStep = kDirectChunk<T>* kDirectPanel;  // weights of a chunk, a tap and a panel

// How the inputs of an image are stored in 8 bits: x = scale (q - zero), q = clamp(round(x / scale) + zero, 0, 255).
struct DirectLevels {
  float scale;
  int32_t zero;
};

// Positions whose inputs are read with one stride: a row of an image, or whole images. `from`: the element of x of the
// first position and tap; `to`: the first position in y and residual; `rows`: the number of positions that are written;
// `image`: the index of their levels.
struct DirectGroup {
  int64_t from, to, rows, image;
};

// The outputs of some groups in one panel:
//   y[to + r, o] = bias[o] + residual[to + r, o]
//                  + the sum over chunks k, taps t and channels c of x[from + r row + k chunk + tap[t] + c] w[k, t, c, o]
// In 8 bits, x stands for scale (x - zero) of the group's image, and w[..., o] for weight_scale[o] w[..., o].
template <typename T, typename Y>
struct DirectPanel {
  const DirectGroup* groups;
  int64_t count;
  const T* x;
  int64_t row, chunk, chunks;  // elements of x from position to position and from chunk to chunk; number of chunks
  const int64_t* tap;          // elements of x from the first tap to each
  int64_t taps;
  const typename Factors<T>::Right* w;  // [chunks][taps][2][16][16][n]: halves of the panel, n channels, outputs
  const Y* bias;                            // of the panel, or null
  const Y* residual;                        // of the panel, or null
  Y* y;                                     // of the panel
  int64_t stride, outputs;  // elements of y and residual from position to position; channels of the panel
  // In 8 bits only.
  const DirectLevels* levels;  // of all images
  const float* weight_scale;   // of the panel
  const float* weight_sum;     // of the panel: the sum of w over all inputs, a whole number
};

// The loops of convolutions of 8 bits between tensors of type Y.
template <typename Y>
struct DirectInt8Loops {
  void (*panel)(const DirectPanel<uint8_t, Y>& panel);
  // As `pack` below, to levels; behind the channels it writes nothing.
  void (*pack)(const Y* from, int64_t count, int64_t channels, const DirectLevels& levels, uint8_t* to, int64_t chunk);
  // Return the smallest and the largest of `count` numbers and zero. NaN counts as beyond infinity.
  void (*range)(const Y* from, int64_t count, float* least, float* most);
};

struct DirectLoops {
  const char* name;
  void (*panel)(const DirectPanel<bfloat16, bfloat16>& panel);
  // Copy `count` positions of `channels` adjacent channels to chunks, whose first positions are `chunk` elements apart;
  // the last chunk is filled with zeros.
  void (*pack)(const bfloat16* from, int64_t count, int64_t channels, bfloat16* to, int64_t chunk);
  DirectInt8Loops<bfloat16> half;
  DirectInt8Loops<float> single;
};

extern const DirectLoops direct_generic;
#if defined(__x86_64__) && !defined(__clang__)
extern const DirectLoops direct_avx512_bf16, direct_amx;
#endif

// The widest loops for the instruction set of cpu_isa.h.
const DirectLoops& direct_loops();

}  // namespace admfast
