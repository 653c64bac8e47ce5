// The direct convolution in bfloat16 as a torch op: checks, layouts, division of the work.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <optional>
#include <vector>

#include "conv_direct.h"
#include "tensors.h"

namespace admfast {
namespace {

constexpr const char* kOp = "conv_direct";
constexpr int64_t kSide = 3;  // taps of a 3x3 filter along a side
// Bytes of the inputs of a block. They stay in a second-level cache of 2 MB with the weights of a panel. Weights of up
// to kSmallWeights bytes stay there as a whole if the inputs leave room for them.
constexpr int64_t kBlockBytes = 1280 << 10, kSmallBlockBytes = 512 << 10, kSmallWeights = 1 << 20;
constexpr int64_t kFewestPositions = 256;
constexpr int64_t kTasks = 4;  // tasks for each thread, so that a thread that is slowed down takes fewer of them

bfloat16* values(const Tensor& t) { return static_cast<bfloat16*>(const_cast<void*>(t.const_data_ptr())); }

// Some rows of some images, as one thread sees them: their inputs, packed or in place, and groups of positions.
struct Block {
  const bfloat16* x = nullptr;
  int64_t row = 0, chunk = 0;
  std::array<int64_t, kSide * kSide> tap{};
  std::vector<DirectGroup> groups;
};

struct Direct {
  const DirectLoops& loops;
  int64_t N, H, W, C_in, C_out, taps;
  const bfloat16 *x, *w, *bias, *residual;
  bfloat16* y;
  int64_t chunks, panels, images, rows, parts;  // images and rows of a block; the panels are divided into parts

  // A 1x1 convolution is one over a single image with one row.
  bool padded() const { return taps > 1; }
  // A row of a whole number of groups needs one copy of the inputs. In others, a group spans rows, and needs copies that
  // are shifted by each column of the filter, whose rows adjoin.
  bool whole_groups() const { return W % kDirectGroup == 0; }
  bool in_place() const { return !padded() && C_in % kDirectChunk == 0 && whole_groups(); }
  int64_t copies() const { return !padded() || whole_groups() ? 1 : kSide; }

  void plan() {
    chunks = divided_up(C_in, kDirectChunk);
    panels = divided_up(C_out, kDirectPanel);
    const int64_t position = 2 * chunks * kDirectChunk * copies(), weights = 2 * C_out * C_in * taps;
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

  void fill(int64_t number, Block& block, KeptMemory& memory) const {
    block.groups.clear();
    padded() ? fill_rows(number, block, memory) : fill_positions(number, block, memory);
  }

  // Positions of a 1x1 convolution.
  void fill_positions(int64_t number, Block& block, KeptMemory& memory) const {
    const int64_t begin = number * rows * kDirectGroup, end = std::min(W, begin + rows * kDirectGroup);
    block.row = C_in, block.chunk = kDirectChunk, block.x = x + begin * C_in;
    if (!in_place()) {
      const int64_t count = divided_up(end - begin, kDirectGroup) * kDirectGroup;
      block.row = kDirectChunk, block.chunk = count * kDirectChunk;
      bfloat16* to = packed(memory, block.chunk);
      loops.pack(x + begin * C_in, end - begin, C_in, to, block.chunk);
      block.x = to;
    }
    groups(block, begin, end - begin, 0);
  }

  // Rows of a 3x3 convolution, with zeros around each image.
  void fill_rows(int64_t number, Block& block, KeptMemory& memory) const {
    const int64_t first = number / down() * images, last = std::min(N, first + images);
    const int64_t top = number % down() * rows, bottom = std::min(H, top + rows);
    const int64_t width = whole_groups() ? W + 2 : W, plane = (bottom - top + 2) * width * kDirectChunk;
    block.row = kDirectChunk, block.chunk = (last - first) * copies() * plane;
    bfloat16* to = packed(memory, block.chunk);
    block.x = to;
    for (int64_t n = first; n < last; ++n) {
      for (int64_t copy = 0; copy < copies(); ++copy)
        for (int64_t h = top - 1; h <= bottom; ++h) {
          const int64_t place = ((n - first) * copies() + copy) * plane + (h - top + 1) * width * kDirectChunk;
          // The position of column 0 in the row.
          pack_row(to + place, width, whole_groups() ? 1 : 1 - copy, n, h, block.chunk);
        }
      const int64_t at = (n - first) * copies() * plane;
      if (whole_groups())
        for (int64_t h = top; h < bottom; ++h) groups(block, (n * H + h) * W, W, at + (h - top) * width * kDirectChunk);
      else
        groups(block, (n * H + top) * W, (bottom - top) * W, at);
    }
    for (int64_t i = 0; i < kSide; ++i)
      for (int64_t j = 0; j < kSide; ++j)
        block.tap[i * kSide + j] = i * width * kDirectChunk + j * (whole_groups() ? kDirectChunk : plane);
  }

  // Pack row h of image n, shifted to the right by `shift` positions; zeros where it has no pixel.
  void pack_row(bfloat16* to, int64_t width, int64_t shift, int64_t n, int64_t h, int64_t chunk) const {
    const auto zeros = [&](int64_t begin, int64_t end) {
      for (int64_t k = 0; k < chunks && begin < end; ++k)
        std::fill_n(to + k * chunk + begin * kDirectChunk, (end - begin) * kDirectChunk, bfloat16{0});
    };
    if (h < 0 || h >= H) return zeros(0, width);
    const int64_t begin = std::max<int64_t>(0, shift), end = std::min(width, W + shift);
    zeros(0, begin);
    loops.pack(x + ((n * H + h) * W + begin - shift) * C_in, end - begin, C_in, to + begin * kDirectChunk, chunk);
    zeros(end, width);
  }

  // Add the groups of `count` adjacent positions, of which `to` is the first one in y.
  void groups(Block& block, int64_t to, int64_t count, int64_t from) const {
    for (int64_t i = 0; i < count; i += kDirectGroup)
      block.groups.push_back({from + i * block.row, to + i, std::min(kDirectGroup, count - i)});
  }

  bfloat16* packed(KeptMemory& memory, int64_t chunk) const {
    // The last group of all may read positions behind the last one.
    return reinterpret_cast<bfloat16*>(memory.of((chunks * chunk + kDirectGroup * kDirectChunk) / 2));
  }

  void run_part(const Block& block, int64_t part) const {
    const int64_t weights = chunks * taps * kDirectStep;
    for (int64_t p = panels * part / parts; p < panels * (part + 1) / parts; ++p) {
      const int64_t first = p * kDirectPanel;
      const auto of_panel = [first](auto* from) { return from ? from + first : from; };
      loops.panel({block.groups.data(), static_cast<int64_t>(block.groups.size()), block.x, block.row, block.chunk,
                   chunks, block.tap.data(), taps, w + p * weights, of_panel(bias), of_panel(residual), of_panel(y),
                   C_out, std::min(kDirectPanel, C_out - first)});
    }
  }

  void run() {
    plan();
    const int64_t tasks = blocks() * parts;
    std::atomic<int64_t> next{0};
    // Tasks are taken one by one, because other programs slow down the threads of a shared machine unequally.
    at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
      static thread_local KeptMemory memory;
      Block block;
      int64_t filled = -1;
      for (int64_t task; (task = next++) < tasks;) {
        if (filled != task / parts) fill(filled = task / parts, block, memory);
        run_part(block, task % parts);
      }
    });
  }
};

void check(const char* name, const Tensor& t) {
  TORCH_CHECK(t.scalar_type() == at::kBFloat16 && t.is_cpu(), kOp, ": ", name, " is ", t.scalar_type(), " on ",
              t.device(), "; bfloat16 on the CPU");
}

Tensor convolved(const Tensor& x, const Tensor& w, const OptionalTensor& bias, const OptionalTensor& residual,
                 int64_t channels) {
  check("x", x);
  check("w", w);
  TORCH_CHECK(x.dim() >= 3 && x.size(1) > 0, kOp, ": x must be [N, C, *spatial], it is ", x.sizes());
  TORCH_CHECK(w.dim() == 7 && w.is_contiguous(), kOp, ": w must be contiguous [panels, chunks, taps, 2, 16, 16, 2]");
  const int64_t taps = w.size(2);
  const std::array<int64_t, 7> form{divided_up(channels, kDirectPanel), divided_up(x.size(1), kDirectChunk), taps, 2,
                                    kDirectChunk / 2, kDirectPanel / 2, 2};
  TORCH_CHECK(channels > 0 && w.sizes() == at::IntArrayRef(form), kOp, ": w must be ", at::IntArrayRef(form),
              ", it is ", w.sizes());
  TORCH_CHECK(taps == 1 || (taps == kSide * kSide && x.dim() == 4), kOp, ": ", taps, " taps of ", x.dim() - 2,
              " dimensions; 1, or 9 of 2 dimensions");
  if (bias) {
    check("bias", *bias);
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == channels, kOp, ": bias must be [", channels, "]");
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes[1] = channels;
  if (residual) {
    check("residual", *residual);
    TORCH_CHECK(residual->sizes() == at::IntArrayRef(sizes), kOp, ": residual must be ", at::IntArrayRef(sizes));
  }
  Tensor y = empty_dense(sizes, x, true);
  if (y.numel() == 0) return y;
  const Tensor inside = dense(x, true), added = residual ? dense(*residual, true) : Tensor();
  const Tensor offset = bias ? bias->contiguous() : Tensor();
  const int64_t positions = y.numel() / channels;
  const bool padded = taps > 1;
  Direct direct{direct_loops(), padded ? x.size(0) : 1, padded ? x.size(2) : 1, padded ? x.size(3) : positions,
                x.size(1), channels, taps};
  direct.x = values(inside), direct.w = values(w), direct.y = values(y);
  direct.bias = bias ? values(offset) : nullptr;
  direct.residual = residual ? values(added) : nullptr;
  direct.run();
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(admfast, m) {
  m.def("conv_direct(Tensor x, Tensor w, Tensor? bias, Tensor? residual, int channels) -> Tensor");
}

TORCH_LIBRARY_IMPL(admfast, CPU, m) { m.impl("conv_direct", &convolved); }

}  // namespace admfast
