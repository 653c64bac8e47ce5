// The direct convolution, in bfloat16 and of 8 bits, as torch ops: checks, layouts, division of the work.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

#include "conv_direct.h"
#include "tensors.h"

namespace admfast {
namespace {

constexpr int64_t kSide = 3;  // taps of a 3x3 filter along a side
// Bytes of the inputs of a block. They stay in a second-level cache of 2 MB with the weights of a panel. Weights of up
// to kSmallWeights bytes stay there as a whole if the inputs leave room for them.
constexpr int64_t kBlockBytes = 1280 << 10, kSmallBlockBytes = 512 << 10, kSmallWeights = 1 << 20;
constexpr float kSmallestStep = 0x1p-100f;              // of levels, so that its reciprocal is finite
constexpr int64_t kMostTerms = (int64_t{1} << 31) / (255 * 127);  // of a sum in 32 bits
constexpr int64_t kFewestPositions = 256;
constexpr int64_t kRangePositions = 64;  // positions of which one task finds the range
constexpr int64_t kTasks = 4;  // tasks for each thread, so that a thread that is slowed down takes fewer of them

template <typename T>
T* values(const Tensor& t) {
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

// Some rows of some images, as one thread sees them: their inputs, packed or in place, and groups of positions.
template <typename T>
struct Block {
  const T* x = nullptr;
  int64_t row = 0, chunk = 0;
  std::array<int64_t, kSide * kSide> tap{};
  std::vector<DirectGroup> groups;
};

// A convolution of tensors of type Y, whose products take inputs of type T.
template <typename T, typename Y>
struct Direct {
  const DirectLoops& loops;
  int64_t N, H, W, C_in, C_out, taps;
  const Y* x;
  const typename Factors<T>::Right* w;
  const Y *bias, *residual;
  Y* y;
  // In 8 bits only: of each output, and of each image.
  const float *weight_scale = nullptr, *weight_sum = nullptr;
  std::vector<DirectLevels> levels{};
  int64_t chunks = 0, panels = 0, images = 0, rows = 0, parts = 0;  // images and rows of a block; the panels are divided into parts

  static constexpr int64_t kChunk = kDirectChunk<T>;
  static constexpr bool kLevels = sizeof(T) == 1;

  // A 1x1 convolution is one over a single image with one row.
  bool padded() const { return taps > 1; }
  // A row of a whole number of groups needs one copy of the inputs. In others, a group spans rows, and needs copies that
  // are shifted by each column of the filter, whose rows adjoin.
  bool whole_groups() const { return W % kDirectGroup == 0; }
  bool in_place() const { return !padded() && C_in % kChunk == 0 && whole_groups(); }
  int64_t copies() const { return !padded() || whole_groups() ? 1 : kSide; }

  void plan() {
    chunks = divided_up(C_in, kChunk);
    panels = divided_up(C_out, kDirectPanel);
    const int64_t position = kTileBytes * chunks * copies(), weights = sizeof(T) * C_out * C_in * taps;
    const int64_t bytes = weights <= kSmallWeights ? kSmallBlockBytes : kBlockBytes;
    // Blocks that are divided into parts are packed by several threads, so there are many small ones if there can be.
    const int64_t fair = std::max(kFewestPositions, N * H * W / (kTasks * at::get_num_threads()));
    const int64_t fits = std::max<int64_t>(1, bytes / position);
    const int64_t most = weights <= kSmallWeights ? std::min(fits, fair) : fits;  // positions of a block
    const auto even = [](int64_t all, int64_t limit) { return divided_up(all, divided_up(all, std::max<int64_t>(1, limit))); };
    if (padded()) {
      rows = even(H, most / W);
      images = rows < H ? 1 : even(N, most / (H * W));
    } else {  // divided into runs of positions, which `rows` counts by the group
      rows = even(divided_up(W, kDirectGroup), most / kDirectGroup);
      images = 1;
    }
    parts = std::clamp(divided_up(kTasks * at::get_num_threads(), blocks()), int64_t{1}, panels);
  }

  int64_t down() const { return divided_up(padded() ? H : divided_up(W, kDirectGroup), rows); }
  int64_t blocks() const { return down() * divided_up(N, images); }

  void fill(int64_t number, Block<T>& block, KeptMemory& memory) const {
    block.groups.clear();
    if constexpr (kLevels)  // only for 3x3 filters
      fill_rows(number, block, memory);
    else
      padded() ? fill_rows(number, block, memory) : fill_positions(number, block, memory);
  }

  // Positions of a 1x1 convolution.
  void fill_positions(int64_t number, Block<T>& block, KeptMemory& memory) const {
    const int64_t begin = number * rows * kDirectGroup, end = std::min(W, begin + rows * kDirectGroup);
    block.row = C_in, block.chunk = kChunk, block.x = x + begin * C_in;
    if (!in_place()) {
      const int64_t count = divided_up(end - begin, kDirectGroup) * kDirectGroup;
      block.row = kChunk, block.chunk = count * kChunk;
      T* to = packed(memory, block.chunk);
      pack(x + begin * C_in, end - begin, 0, to, block.chunk);
      block.x = to;
    }
    groups(block, begin, end - begin, 0, 0);
  }

  // Rows of a 3x3 convolution, with zeros around each image.
  void fill_rows(int64_t number, Block<T>& block, KeptMemory& memory) const {
    const int64_t first = number / down() * images, last = std::min(N, first + images);
    const int64_t top = number % down() * rows, bottom = std::min(H, top + rows);
    const int64_t width = whole_groups() ? W + 2 : W, plane = (bottom - top + 2) * width * kChunk;
    block.row = kChunk, block.chunk = (last - first) * copies() * plane;
    T* to = packed(memory, block.chunk);
    block.x = to;
    for (int64_t n = first; n < last; ++n) {
      for (int64_t copy = 0; copy < copies(); ++copy)
        for (int64_t h = top - 1; h <= bottom; ++h) {
          const int64_t place = ((n - first) * copies() + copy) * plane + (h - top + 1) * width * kChunk;
          // The position of column 0 in the row.
          pack_row(to + place, width, whole_groups() ? 1 : 1 - copy, n, h, block.chunk);
        }
      const int64_t at = (n - first) * copies() * plane;
      if (whole_groups())
        for (int64_t h = top; h < bottom; ++h) groups(block, (n * H + h) * W, W, at + (h - top) * width * kChunk, n);
      else
        groups(block, (n * H + top) * W, (bottom - top) * W, at, n);
    }
    for (int64_t i = 0; i < kSide; ++i)
      for (int64_t j = 0; j < kSide; ++j)
        block.tap[i * kSide + j] = i * width * kChunk + j * (whole_groups() ? kChunk : plane);
  }

  // Pack row h of image n, shifted to the right by `shift` positions; zeros where it has no pixel.
  void pack_row(T* to, int64_t width, int64_t shift, int64_t n, int64_t h, int64_t chunk) const {
    const auto zeros = [&](int64_t begin, int64_t end) {
      for (int64_t k = 0; k < chunks && begin < end; ++k)
        std::fill_n(to + k * chunk + begin * kChunk, (end - begin) * kChunk, zero(n));
    };
    if (h < 0 || h >= H) return zeros(0, width);
    const int64_t begin = std::max<int64_t>(0, shift), end = std::min(width, W + shift);
    zeros(0, begin);
    pack(x + ((n * H + h) * W + begin - shift) * C_in, end - begin, n, to + begin * kChunk, chunk);
    zeros(end, width);
  }

  T zero([[maybe_unused]] int64_t n) const {
    if constexpr (kLevels)
      return static_cast<T>(levels[n].zero);
    else
      return {0};
  }

  // Pack adjacent positions of image n.
  void pack(const Y* from, int64_t count, [[maybe_unused]] int64_t n, T* to, int64_t chunk) const {
    if constexpr (kLevels)
      int8_loops().pack(from, count, C_in, levels[n], to, chunk);
    else
      loops.pack(from, count, C_in, to, chunk);
  }

  // Add the groups of `count` adjacent positions of image n, of which `to` is the first one in y.
  void groups(Block<T>& block, int64_t to, int64_t count, int64_t from, int64_t n) const {
    for (int64_t i = 0; i < count; i += kDirectGroup)
      block.groups.push_back({from + i * block.row, to + i, std::min(kDirectGroup, count - i), n});
  }

  T* packed(KeptMemory& memory, int64_t chunk) const {
    // The last group of all may read positions behind the last one.
    return reinterpret_cast<T*>(memory.of((chunks * chunk + kDirectGroup * kChunk) * sizeof(T) / sizeof(float)));
  }

  const DirectInt8Loops<Y>& int8_loops() const {
    if constexpr (sizeof(Y) == sizeof(float))
      return loops.single;
    else
      return loops.half;
  }

  void run_panel(const DirectPanel<T, Y>& panel) const {
    if constexpr (kLevels)
      int8_loops().panel(panel);
    else
      loops.panel(panel);
  }

  void run_part(const Block<T>& block, int64_t part) const {
    const int64_t weights = chunks * taps * kDirectStep<T>;
    for (int64_t p = panels * part / parts; p < panels * (part + 1) / parts; ++p) {
      const int64_t first = p * kDirectPanel;
      const auto of_panel = [first](auto* from) { return from ? from + first : from; };
      run_panel({block.groups.data(), static_cast<int64_t>(block.groups.size()), block.x, block.row, block.chunk,
                   chunks, block.tap.data(), taps, w + p * weights, of_panel(bias), of_panel(residual), of_panel(y),
                   C_out, std::min(kDirectPanel, C_out - first), levels.data(),
                   of_panel(weight_scale), of_panel(weight_sum)});
    }
  }

  // Find the levels of every image: 255 steps from the smallest to the largest of its inputs and 0.
  void find_levels() {
    const int64_t size = H * W, share = kRangePositions, shares = divided_up(size, share);
    std::vector<std::array<float, 2>> ranges(N * shares);
    at::parallel_for(0, N * shares, std::max<int64_t>(1, (1 << 15) / (share * C_in)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % shares * share, count = std::min(share, size - first);
        int8_loops().range(x + (i / shares * size + first) * C_in, count * C_in, &ranges[i][0], &ranges[i][1]);
      }
    });
    levels.resize(N);
    for (int64_t n = 0; n < N; ++n) {
      double least = 0.0, most = 0.0;
      bool finite = true;
      for (int64_t i = n * shares; i < (n + 1) * shares; ++i) {
        finite &= std::isfinite(ranges[i][0]) && std::isfinite(ranges[i][1]);
        least = std::min<double>(least, ranges[i][0]), most = std::max<double>(most, ranges[i][1]);
      }
      const float step = std::max(kSmallestStep, static_cast<float>((most - least) / 255.0));
      // Every output of an image that is not finite is NaN.
      levels[n] = finite ? DirectLevels{step, static_cast<int32_t>(std::nearbyint(-least / step))} : DirectLevels{NAN, 0};
    }
  }

  void run() {
    plan();
    if constexpr (kLevels) find_levels();
    const int64_t tasks = blocks() * parts;
    std::atomic<int64_t> next{0};
    // Tasks are taken one by one, because other programs slow down the threads of a shared machine unequally.
    at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
      static thread_local KeptMemory memory;
      Block<T> block;
      int64_t filled = -1;
      for (int64_t task; (task = next++) < tasks;) {
        if (filled != task / parts) fill(filled = task / parts, block, memory);
        run_part(block, task % parts);
      }
    });
  }
};

void check(const char* op, const char* name, const Tensor& t, at::ScalarType type) {
  TORCH_CHECK(t.scalar_type() == type && t.is_cpu(), op, ": ", name, " is ", t.scalar_type(), " on ", t.device(), "; ",
              type, " on the CPU");
}

template <typename T>
constexpr at::ScalarType kTypeOf = std::is_same_v<T, float> ? at::kFloat : at::kBFloat16;

// scales: [2, channels], or none for products in bfloat16.
template <typename T, typename Y>
Tensor convolved(const char* op, const Tensor& x, const Tensor& w, const OptionalTensor& scales,
                 const OptionalTensor& bias, const OptionalTensor& residual, int64_t channels) {
  constexpr int64_t kWord = 4 / sizeof(T);
  check(op, "x", x, kTypeOf<Y>);
  check(op, "w", w, sizeof(T) == 1 ? at::kChar : at::kBFloat16);
  TORCH_CHECK(x.dim() >= 3 && x.size(1) > 0, op, ": x must be [N, C, *spatial], it is ", x.sizes());
  TORCH_CHECK(w.dim() == 7 && w.is_contiguous(), op, ": w must be contiguous [panels, chunks, taps, 2, 16, 16, ", kWord,
              "]");
  const int64_t taps = w.size(2);
  const std::array<int64_t, 7> form{divided_up(channels, kDirectPanel), divided_up(x.size(1), kDirectChunk<T>), taps, 2,
                                    16, kDirectPanel / 2, kWord};
  TORCH_CHECK(channels > 0 && w.sizes() == at::IntArrayRef(form), op, ": w must be ", at::IntArrayRef(form),
              ", it is ", w.sizes());
  const bool padded = taps == kSide * kSide && x.dim() == 4;
  TORCH_CHECK(padded || (taps == 1 && sizeof(T) > 1), op, ": ", taps, " taps of ", x.dim() - 2, " dimensions; ",
              sizeof(T) > 1 ? "1, or " : "", "9 of 2 dimensions");
  if (sizeof(T) == 1)
    TORCH_CHECK(taps * x.size(1) <= kMostTerms, op, ": sums of ", taps * x.size(1), " terms exceed 32 bits");
  if (scales) {
    check(op, "scales", *scales, at::kFloat);
    TORCH_CHECK(scales->dim() == 2 && scales->size(0) == 2 && scales->size(1) == channels && scales->is_contiguous(),
                op, ": scales must be contiguous [2, ", channels, "]");
  }
  if (bias) {
    check(op, "bias", *bias, kTypeOf<Y>);
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == channels, op, ": bias must be [", channels, "]");
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes[1] = channels;
  if (residual) {
    check(op, "residual", *residual, kTypeOf<Y>);
    TORCH_CHECK(residual->sizes() == at::IntArrayRef(sizes), op, ": residual must be ", at::IntArrayRef(sizes));
  }
  Tensor y = empty_dense(sizes, x, true);
  if (y.numel() == 0) return y;
  const Tensor inside = dense(x, true), added = residual ? dense(*residual, true) : Tensor();
  const Tensor offset = bias ? bias->contiguous() : Tensor();
  const int64_t positions = y.numel() / channels;
  Direct<T, Y> direct{direct_loops(), padded ? x.size(0) : 1, padded ? x.size(2) : 1, padded ? x.size(3) : positions,
                      x.size(1), channels, taps};
  direct.x = values<Y>(inside), direct.w = values<typename Factors<T>::Right>(w);
  direct.y = values<Y>(y);
  direct.bias = bias ? values<Y>(offset) : nullptr;
  direct.residual = residual ? values<Y>(added) : nullptr;
  if (scales) {
    direct.weight_scale = values<float>(*scales);
    direct.weight_sum = direct.weight_scale + channels;
  }
  direct.run();
  return y;
}

Tensor in_bfloat16(const Tensor& x, const Tensor& w, const OptionalTensor& bias, const OptionalTensor& residual,
                   int64_t channels) {
  return convolved<bfloat16, bfloat16>("conv_direct", x, w, std::nullopt, bias, residual, channels);
}

Tensor in_int8(const Tensor& x, const Tensor& w, const Tensor& scales, const OptionalTensor& bias,
               const OptionalTensor& residual, int64_t channels) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "conv_int8: x is ", x.scalar_type(),
              "; float32 or bfloat16");
  const auto convolve = x.scalar_type() == at::kFloat ? convolved<uint8_t, float> : convolved<uint8_t, bfloat16>;
  return convolve("conv_int8", x, w, scales, bias, residual, channels);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(admfast, m) {
  m.def("conv_direct(Tensor x, Tensor w, Tensor? bias, Tensor? residual, int channels) -> Tensor");
  m.def("conv_int8(Tensor x, Tensor w, Tensor scales, Tensor? bias, Tensor? residual, int channels) -> Tensor");
}

TORCH_LIBRARY_IMPL(admfast, CPU, m) {
  m.impl("conv_direct", &in_bfloat16);
  m.impl("conv_int8", &in_int8);
}

}  // namespace admfast
