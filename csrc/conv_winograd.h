// Loops of the 3x3 convolution by Winograd's F(4x4, 3x3) on the CPU; the formulas are in csrc/README.md.
// Nothing here depends on torch or on threads.
#pragma once

#include <cstdint>

namespace admfast {

constexpr int64_t kWinogradTile = 4;     // outputs of a tile along a side
constexpr int64_t kWinogradPatch = 6;    // inputs that a tile depends on, along a side
constexpr int64_t kWinogradPoints = 36;  // products of a tile, for each pair of channels
constexpr int64_t kWinogradPanel = 32;   // output channels that are adjacent in U and M
constexpr int64_t kWinogradChunk = 16;   // input channels that are adjacent in V

// Images in channels-last memory, [N, H, W, C].
struct WinogradImages {
  int64_t H, W, C_in, C_out;
  const float* x;
  const float* zeros;     // C_in zeros, read as the padding around an image
  const float* bias;      // [C_out]
  const float* residual;  // like y, or null
  float* y;
};

// A block of tiles, and its layout in the buffers V and M. Tiles are counted row by row and image by image. A product
// takes a group of `rows` tiles: V [36][groups][chunks][rows][16], M [36][panels][tiles][32], with `v_point` and
// `m_point` floats from point to point.
struct WinogradBlock {
  int64_t first, tiles, rows, groups, chunks, v_point, m_point;
};

// A product of one point, one group and one panel: m[r] = v[r] U for `rows` tiles r; each row of m is a panel wide.
// A chunk of v holds `stride` rows. Meanwhile it prefetches from `ahead`, `lines` cache lines per chunk.
struct WinogradProduct {
  const float *v, *u;
  float* m;
  int64_t stride, rows, C_in;
  const float* ahead;
  int64_t lines;
};

// Weights [C_out, C_in, 3, 3] and their strides in elements.
struct WinogradWeights {
  const float* from;
  int64_t C_out, C_in, out_step, in_step, row_step, column_step;
};

// The products of a block that make the gradient of the weights between a chunk of input channels and a panel of
// output channels: m[p][c][o] = the sum over tiles of v[p][tile][c] e[p][tile][o], m [36][16][32].
struct WinogradGradient {
  const float *v, *e;
  int64_t tiles, v_point, e_point;
};

struct WinogradLoops {
  const char* name;
  int64_t rows;  // most rows (tiles) of a product
  // V = B^T d B of tiles [begin, end) of a block.
  void (*input)(const WinogradImages& images, const WinogradBlock& block, int64_t begin, int64_t end, float* v);
  void (*product)(const WinogradProduct& product);
  // y = A^T M A + bias (+ residual) of tiles [begin, end) of a block.
  void (*output)(const WinogradImages& images, const WinogradBlock& block, int64_t begin, int64_t end, const float* m);
  // U = G g G^T, rounded once, for pairs [begin, end) of a panel and an input channel, counted panel by panel.
  void (*weights)(const WinogradWeights& weights, int64_t begin, int64_t end, float* u);
  // E = A dy A^T of tiles [begin, end) of a block; images.x is dy: E [36][panels][tiles][32].
  void (*gradient_input)(const WinogradImages& images, const WinogradBlock& block, int64_t begin, int64_t end, float* e);
  void (*gradient_product)(const WinogradGradient& products, float* m);
  // dg += G^T M G, or dg = G^T M G for the first block; dg [9][16][32].
  void (*gradient_output)(const float* m, bool first, float* dg);
};

extern const WinogradLoops winograd_generic;
#if defined(__x86_64__) && !defined(__clang__)
extern const WinogradLoops winograd_avx2, winograd_avx512;
#endif

// The widest loops for the instruction set of cpu_isa.h.
const WinogradLoops& winograd_loops();

}  // namespace admfast
