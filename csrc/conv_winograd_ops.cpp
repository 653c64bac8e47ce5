// The 3x3 convolution by Winograd's F(4x4, 3x3) as torch ops: checks, layouts, buffers, division of the work.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <ATen/ops/empty.h>
#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "conv_winograd_ops.h"

namespace admfast {
namespace {

constexpr const char* kOp = "conv3x3_winograd";
// Fewest and most tiles of a block. V and M of a block go through the last-level cache, and U is read once per block.
// From 96 to 256 tiles the time is the same within 3 % at every shape of the ADM models; at 32 it is up to 25 % more.
constexpr int64_t kFewestTiles = 48, kMostTiles = 192;
constexpr int64_t kMemory = 64 << 20;  // bytes of V and M of all threads, unless kFewestTiles need more

void check(const Tensor& x, const OptionalTensor& bias, const OptionalTensor& residual, int64_t C_out) {
  TORCH_CHECK(x.dim() == 4, kOp, ": x must be [N, C, H, W], it has ", x.dim(), " dimensions");
  check_floats(kOp, {{"x", &x}, {"bias", bias ? &*bias : nullptr}, {"residual", residual ? &*residual : nullptr}});
  TORCH_CHECK(C_out > 0 && x.size(1) > 0, kOp, ": ", x.size(1), " channels in, ", C_out, " out");
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == C_out), kOp, ": bias must be [", C_out, "]");
  const std::array<int64_t, 4> shape{x.size(0), C_out, x.size(2), x.size(3)};
  TORCH_CHECK(!residual || residual->sizes() == at::IntArrayRef(shape), kOp, ": residual must be ",
              at::IntArrayRef(shape));
}

void transform_weights(const WinogradWeights& w, float* u) {
  at::parallel_for(0, divided_up(w.C_out, kWinogradPanel) * w.C_in, 64,
                   [&](int64_t begin, int64_t end) { winograd_loops().weights(w, begin, end, u); });
}

float* kept_weights(int64_t floats) {
  static thread_local KeptMemory memory;
  return memory.of(floats);
}

// One convolution: its images, its weights U [panels][36][C_in][32] (or the weights to make U of), and the division of
// its tiles into blocks.
struct Winograd {
  const WinogradLoops& loops;
  WinogradImages images;
  const float* u;
  const WinogradWeights* weights;
  int64_t tiles, panels, block_tiles;
  bool apart;  // true: each thread takes blocks of its own; false: all threads share each block

  void plan() {
    const int64_t threads = at::get_num_threads();
    // Threads that share a block synchronise three times in it, and one slow thread makes all others wait. But threads
    // with blocks of their own each read all of U, which doesn't pay for a handful of tiles.
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
    // Groups of the same size, so that no last group has only a row or two.
    b.rows = divided_up(b.tiles, divided_up(b.tiles, loops.rows));
    b.groups = divided_up(b.tiles, b.rows);
    b.chunks = divided_up(images.C_in, kWinogradChunk);
    // Strides of an odd number of cache lines: a power of two would put all points into the same set of the cache.
    b.v_point = (b.groups * b.chunks * b.rows | 1) * kWinogradChunk;
    b.m_point = (2 * panels * b.tiles | 1) * 16;
    return b;
  }

  // One point of one panel, for all groups of the block; meanwhile the weights at `next` are prefetched.
  void product(const WinogradBlock& b, int64_t point, int64_t panel, const float* own_u, const float* next,
               const float* v, float* m) const {
    const int64_t lines = divided_up(2 * kWinogradChunk, b.groups);
    for (int64_t group = 0; group < b.groups; ++group) {
      const int64_t done = group * b.rows;
      loops.product({v + point * b.v_point + done * b.chunks * kWinogradChunk, own_u,
                     m + point * b.m_point + (panel * b.tiles + done) * kWinogradPanel, b.rows,
                     std::min(b.rows, b.tiles - done), images.C_in, next + group * lines * b.chunks * 16, lines});
    }
  }

  int64_t point_size() const { return images.C_in * kWinogradPanel; }

  // Products with a U that exists as a whole: pairs [begin, end) of a point and a panel, counted point by point.
  void products(const WinogradBlock& b, int64_t begin, int64_t end, const float* v, float* m) const {
    const auto at = [&](int64_t i) { return u + (i % panels * kWinogradPoints + i / panels) * point_size(); };
    for (int64_t i = begin; i < end; ++i)
      product(b, i / panels, i % panels, at(i), at(i + 1 < end ? i + 1 : i), v, m);
  }

  // Products for panels [begin, end), with the U of each panel made here: it stays in a cache, and U is never in memory
  // as a whole.
  void panels_of(const WinogradBlock& b, int64_t begin, int64_t end, const float* v, float* m) const {
    float* own = kept_weights(kWinogradPoints * point_size());
    for (int64_t panel = begin; panel < end; ++panel) {
      WinogradWeights w = *weights;
      w.from += panel * kWinogradPanel * w.out_step;
      w.C_out -= panel * kWinogradPanel;
      loops.weights(w, 0, w.C_in, own);
      for (int64_t point = 0; point < kWinogradPoints; ++point) {
        const int64_t after = std::min(point + 1, kWinogradPoints - 1);
        product(b, point, panel, own + point * point_size(), own + after * point_size(), v, m);
      }
    }
  }

  // In a parallel region, the calling thread does all of this work itself.
  void run(const WinogradBlock& b) const {
    const int64_t zeros = divided_up(std::max(images.C_in, images.C_out), 16) * 16;
    const int64_t v_size = kWinogradPoints * b.v_point;
    float* memory = winograd_memory(zeros + v_size + kWinogradPoints * b.m_point);
    std::fill_n(memory, zeros, 0.0f);
    float *v = memory + zeros, *m = v + v_size;
    WinogradImages own = images;
    own.zeros = memory;
    if (!own.bias) own.bias = memory;
    const auto share = [](int64_t count, int64_t grain, auto work) { at::parallel_for(0, count, grain, work); };
    share(b.tiles, kTileGrain, [&](int64_t begin, int64_t end) { loops.input(own, b, begin, end, v); });
    if (u)
      share(kWinogradPoints * panels, 1, [&](int64_t begin, int64_t end) { products(b, begin, end, v, m); });
    else
      share(panels, 1, [&](int64_t begin, int64_t end) { panels_of(b, begin, end, v, m); });
    share(b.tiles, kTileGrain, [&](int64_t begin, int64_t end) { loops.output(own, b, begin, end, m); });
  }
};

// Convolve with a given U, or if `u` is null with weights that change from call to call.
Tensor convolved(const Tensor& x, const float* u, const WinogradWeights* weights, const OptionalTensor& bias,
                 const OptionalTensor& residual, int64_t channels) {
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  Tensor y = at::empty({N, channels, H, W}, x.options(), at::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  const Tensor inside = dense(x, true), added = residual ? dense(*residual, true) : Tensor();
  const Tensor offset = bias ? bias->contiguous() : Tensor();

  Winograd w{winograd_loops(), {H, W, C, channels}, u, weights};
  w.images.x = inside.const_data_ptr<float>();
  w.images.bias = bias ? offset.const_data_ptr<float>() : nullptr;
  w.images.residual = residual ? added.const_data_ptr<float>() : nullptr;
  w.images.y = y.data_ptr<float>();
  w.tiles = tiles_of(x);
  w.panels = divided_up(channels, kWinogradPanel);
  w.plan();
  const int64_t blocks = divided_up(w.tiles, w.block_tiles);
  if (weights && (blocks > 1 || w.panels < at::get_num_threads())) {  // else `panels_of` makes the U of each panel
    float* made = kept_weights(w.panels * kWinogradPoints * w.point_size());
    transform_weights(*weights, made);
    w.u = made;
  }
  at::parallel_for(0, blocks, w.apart ? 1 : blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) w.run(w.block(i * w.block_tiles));
  });
  return y;
}

Tensor winograd(const Tensor& x, const Tensor& u, const OptionalTensor& bias, const OptionalTensor& residual,
                int64_t channels) {
  check(x, bias, residual, channels);
  check_floats(kOp, {{"u", &u}});
  const std::array<int64_t, 4> form{divided_up(channels, kWinogradPanel), kWinogradPoints, x.size(1), kWinogradPanel};
  TORCH_CHECK(u.sizes() == at::IntArrayRef(form) && u.is_contiguous(), kOp, ": u must be contiguous ",
              at::IntArrayRef(form), ", it is ", u.sizes());
  return convolved(x, u.const_data_ptr<float>(), nullptr, bias, residual, channels);
}

// The weights of the convolution, or if `transposed` those of its transpose: flipped, with channels exchanged.
WinogradWeights described(const char* op, const Tensor& weight, bool transposed) {
  check_floats(op, {{"weight", &weight}});
  TORCH_CHECK(weight.dim() == 4 && weight.size(2) == kTaps && weight.size(3) == kTaps && weight.numel() > 0, op,
              ": weight must be [C_out, C_in, 3, 3], it is ", weight.sizes());
  WinogradWeights w{weight.const_data_ptr<float>(), weight.size(0),   weight.size(1),  weight.stride(0),
                    weight.stride(1),               weight.stride(2), weight.stride(3)};
  if (transposed) {
    w.from += (kTaps - 1) * (w.row_step + w.column_step);
    w.row_step = -w.row_step, w.column_step = -w.column_step;
    std::swap(w.C_out, w.C_in), std::swap(w.out_step, w.in_step);
  }
  return w;
}

Tensor weights(const Tensor& weight, bool transposed) {
  const WinogradWeights w = described("winograd_weights", weight, transposed);
  Tensor u = at::empty({divided_up(w.C_out, kWinogradPanel), kWinogradPoints, w.C_in, kWinogradPanel}, weight.options());
  transform_weights(w, u.data_ptr<float>());
  return u;
}

// Convolve with weights that change from call to call.
Tensor winograd_once(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& residual, bool transposed) {
  const char* op = "conv3x3_winograd_once";
  const WinogradWeights w = described(op, weight, transposed);
  check(x, bias, residual, w.C_out);
  TORCH_CHECK(x.size(1) == w.C_in, op, ": x has ", x.size(1), " channels, the weights take ", w.C_in);
  return convolved(x, nullptr, &w, bias, residual, w.C_out);
}

}  // namespace

void check_floats(const char* op, std::initializer_list<std::pair<const char*, const Tensor*>> tensors) {
  for (const auto& [name, t] : tensors)
    TORCH_CHECK(!t || (t->scalar_type() == at::kFloat && t->is_cpu()), op, ": ", name, " is ", t->scalar_type(), " on ",
                t->device(), "; float32 on the CPU");
}

float* winograd_memory(int64_t floats) {
  static thread_local KeptMemory memory;
  return memory.of(floats);
}

TORCH_LIBRARY_FRAGMENT(admfast, m) {
  m.def("conv3x3_winograd(Tensor x, Tensor u, Tensor? bias, Tensor? residual, int channels) -> Tensor");
  m.def(
      "conv3x3_winograd_once(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool transposed) "
      "-> Tensor");
  m.def("winograd_weights(Tensor weight, bool transposed) -> Tensor");
}

TORCH_LIBRARY_IMPL(admfast, CPU, m) {
  m.impl("conv3x3_winograd", &winograd);
  m.impl("conv3x3_winograd_once", &winograd_once);
  m.impl("winograd_weights", &weights);
}

}  // namespace admfast
