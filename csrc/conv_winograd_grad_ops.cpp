// The gradient of the 3x3 convolution's weights by Winograd's F(3x3, 4x4) as a torch op.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <ATen/ops/empty.h>
#include <algorithm>

#include "conv_winograd_ops.h"

namespace admfast {
namespace {

constexpr const char* kOp = "conv3x3_winograd_weight_grad";
// Most tiles of a block: with these, the points of a panel and of a chunk fit into a second-level cache of 1 MB. The
// sums of the nine taps are read and written once per block.
constexpr int64_t kMostTiles = 64;
// The tiles are divided into at most kParts parts, at most one for every kMostTiles tiles and with sums that fit into
// kMemoryOfParts bytes. Each part is summed by one thread. If there would be fewer than kFewestParts, one part is made,
// and all threads share each of its blocks and synchronise twice in it. The choice depends only on the shapes, so the
// number of threads doesn't change a bit.
constexpr int64_t kParts = 16, kFewestParts = 8, kMemoryOfParts = 16 << 20;
constexpr int64_t kPairs = kWinogradChunk * kWinogradPanel, kSums = kTaps * kTaps * kPairs;

struct WeightGradient {
  const WinogradLoops& loops;
  WinogradImages x, dy;  // dy's channels are its C_in
  int64_t tiles, chunks, panels;

  WinogradBlock block(int64_t first, int64_t count) const {
    WinogradBlock b{first, count, count, 1, chunks};
    // Strides of an odd number of cache lines: a power of two would put all points into the same set of the cache.
    b.v_point = (chunks * count | 1) * kWinogradChunk;
    b.m_point = (2 * panels * count | 1) * 16;
    return b;
  }

  // Pairs [begin, end) of a panel and a chunk, counted panel by panel; dg [panels][chunks][9][16][32].
  void products(const WinogradBlock& b, bool first, int64_t begin, int64_t end, const float* v, const float* e,
                float* dg) const {
    alignas(64) float m[kWinogradPoints * kPairs];
    for (int64_t i = begin; i < end; ++i) {
      const float *own_v = v + i % chunks * b.tiles * kWinogradChunk, *own_e = e + i / chunks * b.tiles * kWinogradPanel;
      loops.gradient_product({own_v, own_e, b.tiles, b.v_point, b.m_point}, m);
      loops.gradient_output(m, first, dg + i * kSums);
    }
  }

  // Write the sums of output channels [begin, end) in the order of the weights.
  void store(int64_t begin, int64_t end, const float* dg, float* dw) const {
    for (int64_t o = begin; o < end; ++o)
      for (int64_t c = 0; c < x.C_in; ++c) {
        const int64_t pair = o / kWinogradPanel * chunks + c / kWinogradChunk;
        const float* from = dg + pair * kSums + c % kWinogradChunk * kWinogradPanel + o % kWinogradPanel;
        for (int64_t t = 0; t < kTaps * kTaps; ++t) *dw++ = from[t * kPairs];
      }
  }

  // Sum over tiles [begin, end), in blocks of the same size. In a parallel region, the calling thread does all of it.
  void part(int64_t begin, int64_t end, float* dg) const {
    const int64_t most = divided_up(end - begin, divided_up(end - begin, kMostTiles));
    const WinogradBlock largest = block(0, most);
    const int64_t zeros = divided_up(std::max(x.C_in, dy.C_in), 16) * 16;
    const int64_t v_size = kWinogradPoints * largest.v_point, e_size = kWinogradPoints * largest.m_point;
    float* memory = winograd_memory(zeros + v_size + e_size);
    std::fill_n(memory, zeros, 0.0f);
    WinogradImages own_x = x, own_dy = dy;
    own_x.zeros = own_dy.zeros = memory;
    float *v = memory + zeros, *e = v + v_size;
    for (int64_t first = begin; first < end; first += most) {
      const WinogradBlock b = block(first, std::min(most, end - first));
      at::parallel_for(0, b.tiles, kTileGrain, [&](int64_t i, int64_t j) {
        loops.input(own_x, b, i, j, v);
        loops.gradient_input(own_dy, b, i, j, e);
      });
      at::parallel_for(0, panels * chunks, 1, [&](int64_t i, int64_t j) { products(b, first == begin, i, j, v, e, dg); });
    }
  }

  void run(float* dw) const {
    const int64_t sums = panels * chunks * kSums;
    const int64_t fitting = std::min({kParts, divided_up(tiles, kMostTiles), kMemoryOfParts / 4 / sums});
    const int64_t parts = fitting < kFewestParts ? 1 : fitting;
    static thread_local KeptMemory memory;
    float* dg = memory.of(parts * sums);
    if (parts == 1) {
      part(0, tiles, dg);
    } else {
      at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) part(i * tiles / parts, (i + 1) * tiles / parts, dg + i * sums);
      });
      at::parallel_for(0, sums, 1 << 14, [&](int64_t begin, int64_t end) {
        for (int64_t i = 1; i < parts; ++i)
          for (int64_t at = begin; at < end; ++at) dg[at] += dg[i * sums + at];
      });
    }
    at::parallel_for(0, dy.C_in, 4, [&](int64_t begin, int64_t end) {
      store(begin, end, dg, dw + begin * x.C_in * kTaps * kTaps);
    });
  }
};

Tensor weight_gradient(const Tensor& x, const Tensor& dy) {
  check_floats(kOp, {{"x", &x}, {"dy", &dy}});
  TORCH_CHECK(x.dim() == 4, kOp, ": x must be [N, C, H, W], it has ", x.dim(), " dimensions");
  TORCH_CHECK(dy.dim() == 4 && dy.size(0) == x.size(0) && dy.size(2) == x.size(2) && dy.size(3) == x.size(3), kOp,
              ": dy must be [", x.size(0), ", C_out, ", x.size(2), ", ", x.size(3), "], it is ", dy.sizes());
  const int64_t C_in = x.size(1), C_out = dy.size(1), H = x.size(2), W = x.size(3);
  Tensor dw = at::empty({C_out, C_in, kTaps, kTaps}, x.options());
  if (x.numel() == 0 || dy.numel() == 0) return dw.zero_();
  const Tensor x_inside = dense(x, true), dy_inside = dense(dy, true);
  WeightGradient g{winograd_loops(), {H, W, C_in}, {H, W, C_out}};
  g.x.x = x_inside.const_data_ptr<float>();
  g.dy.x = dy_inside.const_data_ptr<float>();
  g.tiles = tiles_of(x);
  g.chunks = divided_up(C_in, kWinogradChunk);
  g.panels = divided_up(C_out, kWinogradPanel);
  g.run(dw.data_ptr<float>());
  return dw;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(admfast, m) { m.def("conv3x3_winograd_weight_grad(Tensor x, Tensor dy) -> Tensor"); }

TORCH_LIBRARY_IMPL(admfast, CPU, m) { m.impl("conv3x3_winograd_weight_grad", &weight_gradient); }

}  // namespace admfast
