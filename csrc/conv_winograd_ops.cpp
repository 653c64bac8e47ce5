// The 3x3 convolution by Winograd's F(4x4, 3x3) as a torch op: checks, layouts, buffers, shares of the work.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <ATen/ops/empty.h>
#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <utility>

#include "conv_winograd.h"

namespace admfast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "conv3x3_winograd";
// Tiles of a block, at least and at most. V and M of a block go through the last-level cache and U is read once a
// block: from 96 to 256 tiles the time is the same within 3 % at every shape of the ADM models, at 32 it is up to
// 25 % more.
constexpr int64_t kFewestTiles = 48, kMostTiles = 192;
constexpr int64_t kMemory = 64 << 20;  // bytes of V and M that all threads hold together where that is enough
constexpr int64_t kTileGrain = 8;      // tiles of a share of a transform
constexpr int64_t kTaps = 3;           // weights of a filter along a side

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that a thread keeps from call to call: fresh pages would cost 2 ms a call.
float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<float[], Free> memory;
  static thread_local int64_t size = 0;
  if (floats > size) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, divided_up(floats * 4, 64) * 64)));
    if (!memory) throw std::bad_alloc();
    size = floats;
  }
  return memory.get();
}

// With the channels beside each other; a copy where they don't lie so.
Tensor channels_inside(const Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

void check(const Tensor& x, const Tensor& u, const OptionalTensor& bias, const OptionalTensor& residual, int64_t C_out) {
  TORCH_CHECK(x.dim() == 4, kOp, ": x must be [N, C, H, W], it has ", x.dim(), " dimensions");
  for (const auto& [name, t] : {std::pair<const char*, const Tensor*>{"x", &x},
                                {"u", &u},
                                {"bias", bias ? &*bias : nullptr},
                                {"residual", residual ? &*residual : nullptr}})
    TORCH_CHECK(!t || (t->scalar_type() == at::kFloat && t->is_cpu()), kOp, ": ", name, " is ", t->scalar_type(), " on ",
                t->device(), "; float32 on the CPU");
  TORCH_CHECK(C_out > 0 && x.size(1) > 0, kOp, ": ", x.size(1), " channels in, ", C_out, " out");
  const std::array<int64_t, 4> form{divided_up(C_out, kWinogradPanel), kWinogradPoints, x.size(1), kWinogradPanel};
  TORCH_CHECK(u.sizes() == at::IntArrayRef(form) && u.is_contiguous(), kOp, ": u must be contiguous ",
              at::IntArrayRef(form), ", it is ", u.sizes());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == C_out), kOp, ": bias must be [", C_out, "]");
  const std::array<int64_t, 4> shape{x.size(0), C_out, x.size(2), x.size(3)};
  TORCH_CHECK(!residual || residual->sizes() == at::IntArrayRef(shape), kOp, ": residual must be ",
              at::IntArrayRef(shape));
}

// One convolution: its images, its weights U [panels][36][C_in][32], and how its tiles make blocks.
struct Winograd {
  const WinogradLoops& loops;
  WinogradImages images;
  const float* u;
  int64_t tiles, panels, block_tiles;
  bool apart;  // each thread takes blocks of its own; else all threads share each block

  void plan() {
    const int64_t threads = at::get_num_threads();
    // Threads that share a block meet three times in it; one that waits for the others, or for a busy CPU, lets all
    // wait. With too few tiles each would read all of U for a handful of them.
    apart = tiles >= threads * kFewestTiles;
    const int64_t tile_bytes = 4 * kWinogradPoints * (images.C_in + panels * kWinogradPanel);
    const int64_t most = std::clamp(kMemory / (apart ? threads : 1) / tile_bytes, kFewestTiles, kMostTiles);
    const int64_t rounds = divided_up(tiles, apart ? most * threads : most);
    block_tiles = divided_up(tiles, apart ? rounds * threads : rounds);  // blocks of the same size
  }

  WinogradBlock block(int64_t first) const {
    WinogradBlock b{};
    b.first = first;
    b.tiles = std::min(block_tiles, tiles - first);
    // Groups of the same size, so that none is left with a row or two.
    b.rows = divided_up(b.tiles, divided_up(b.tiles, loops.rows));
    b.groups = divided_up(b.tiles, b.rows);
    b.chunks = divided_up(images.C_in, kWinogradChunk);
    // A step that is an odd number of cache lines: a power of two would bring all points into one set of the cache.
    b.v_point = (b.groups * b.chunks * b.rows | 1) * kWinogradChunk;
    b.m_point = (2 * panels * b.tiles | 1) * 16;
    return b;
  }

  // One point of one panel, for all groups of the block; meanwhile the weights of `next` are fetched.
  void product(const WinogradBlock& b, int64_t point, int64_t panel, const float* next, const float* v, float* m) const {
    const int64_t lines = divided_up(2 * kWinogradChunk, b.groups);
    for (int64_t group = 0; group < b.groups; ++group) {
      const int64_t done = group * b.rows;
      loops.product({v + point * b.v_point + done * b.chunks * kWinogradChunk,
                     u + (panel * kWinogradPoints + point) * images.C_in * kWinogradPanel,
                     m + point * b.m_point + (panel * b.tiles + done) * kWinogradPanel, b.rows,
                     std::min(b.rows, b.tiles - done), images.C_in, next + group * lines * b.chunks * 16, lines});
    }
  }

  void products(const WinogradBlock& b, int64_t begin, int64_t end, const float* v, float* m) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t after = i + 1 < end ? i + 1 : i;
      const float* next = u + (after % panels * kWinogradPoints + after / panels) * images.C_in * kWinogradPanel;
      product(b, i / panels, i % panels, next, v, m);
    }
  }

  // Within a parallel region what is shared out here stays with the calling thread.
  void run(const WinogradBlock& b) const {
    const int64_t zeros = divided_up(std::max(images.C_in, images.C_out), 16) * 16;
    const int64_t v_size = kWinogradPoints * b.v_point;
    float* memory = scratch(zeros + v_size + kWinogradPoints * b.m_point);
    std::fill_n(memory, zeros, 0.0f);
    float *v = memory + zeros, *m = v + v_size;
    WinogradImages own = images;
    own.zeros = memory;
    if (!own.bias) own.bias = memory;
    const auto share = [](int64_t count, int64_t grain, auto work) { at::parallel_for(0, count, grain, work); };
    share(b.tiles, kTileGrain, [&](int64_t begin, int64_t end) { loops.input(own, b, begin, end, v); });
    share(kWinogradPoints * panels, 1, [&](int64_t begin, int64_t end) { products(b, begin, end, v, m); });
    share(b.tiles, kTileGrain, [&](int64_t begin, int64_t end) { loops.output(own, b, begin, end, m); });
  }
};

Tensor winograd(const Tensor& x, const Tensor& u, const OptionalTensor& bias, const OptionalTensor& residual,
                int64_t channels) {
  check(x, u, bias, residual, channels);
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  Tensor y = at::empty({N, channels, H, W}, x.options(), at::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  const Tensor inside = channels_inside(x), added = residual ? channels_inside(*residual) : Tensor();
  const Tensor offset = bias ? bias->contiguous() : Tensor();

  Winograd w{winograd_loops(), {H, W, C, channels}, u.const_data_ptr<float>()};
  w.images.x = inside.const_data_ptr<float>();
  w.images.bias = bias ? offset.const_data_ptr<float>() : nullptr;
  w.images.residual = residual ? added.const_data_ptr<float>() : nullptr;
  w.images.y = y.data_ptr<float>();
  w.tiles = N * divided_up(H, kWinogradTile) * divided_up(W, kWinogradTile);
  w.panels = u.size(0);
  w.plan();
  const int64_t blocks = divided_up(w.tiles, w.block_tiles);
  at::parallel_for(0, blocks, w.apart ? 1 : blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) w.run(w.block(i * w.block_tiles));
  });
  return y;
}

// U = G g G^T for the weights [C_out, C_in, 3, 3], a panel of output channels at a time, in double.
Tensor weights(const Tensor& weight, const Tensor& transform) {
  const char* op = "winograd_weights";
  const auto wanted = [op](const Tensor& t, const char* name, at::IntArrayRef last) {
    TORCH_CHECK(t.scalar_type() == at::kDouble && t.is_contiguous() && t.dim() >= 2 && t.sizes().slice(t.dim() - 2) == last,
                op, ": ", name, " must be contiguous float64 [..., ", last, "], it is ", t.scalar_type(), " ", t.sizes());
  };
  wanted(weight, "weight", {kTaps, kTaps});
  wanted(transform, "transform", {kWinogradPatch, kTaps});
  TORCH_CHECK(weight.dim() == 4 && transform.dim() == 2, op, ": weight must be [C_out, C_in, 3, 3], transform [6, 3]");
  const int64_t C_out = weight.size(0), C_in = weight.size(1), panels = divided_up(C_out, kWinogradPanel);
  Tensor u = at::empty({panels, kWinogradPoints, C_in, kWinogradPanel}, weight.options().dtype(at::kFloat));
  const double *from = weight.const_data_ptr<double>(), *g = transform.const_data_ptr<double>();
  float* to = u.data_ptr<float>();
  at::parallel_for(0, panels * C_in, 64, [&](int64_t begin, int64_t end) {
    using Lanes = double[kWinogradPanel];
    Lanes taps[kTaps][kTaps] = {}, half[kWinogradPatch][kTaps];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / C_in, c = i % C_in, first = panel * kWinogradPanel;
      for (int64_t lane = 0; lane < kWinogradPanel; ++lane)
        for (int64_t t = 0; t < kTaps * kTaps; ++t)
          taps[t / kTaps][t % kTaps][lane] =
              first + lane < C_out ? from[((first + lane) * C_in + c) * kTaps * kTaps + t] : 0.0;
      for (int64_t p = 0; p < kWinogradPatch; ++p)
        for (int64_t t = 0; t < kTaps; ++t)
          for (int64_t lane = 0; lane < kWinogradPanel; ++lane)
            half[p][t][lane] = g[p * kTaps] * taps[0][t][lane] + g[p * kTaps + 1] * taps[1][t][lane] +
                               g[p * kTaps + 2] * taps[2][t][lane];
      for (int64_t p = 0; p < kWinogradPoints; ++p) {
        const double *row = g + p % kWinogradPatch * kTaps;
        const Lanes* values = half[p / kWinogradPatch];
        float* out = to + ((panel * kWinogradPoints + p) * C_in + c) * kWinogradPanel;
        for (int64_t lane = 0; lane < kWinogradPanel; ++lane)
          out[lane] = static_cast<float>(row[0] * values[0][lane] + row[1] * values[1][lane] + row[2] * values[2][lane]);
      }
    }
  });
  return u;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(admfast, m) {
  m.def("conv3x3_winograd(Tensor x, Tensor u, Tensor? bias, Tensor? residual, int channels) -> Tensor");
  m.def("winograd_weights(Tensor weight, Tensor transform) -> Tensor");
}

TORCH_LIBRARY_IMPL(admfast, CPU, m) {
  m.impl("conv3x3_winograd", &winograd);
  m.impl("winograd_weights", &weights);
}

}  // namespace admfast
