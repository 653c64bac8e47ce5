// The update and its noise as torch ops: the schemas, and the implementation for CPUs.
#include "sampler_step_ops.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "sampler_update.h"

namespace admfast {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// Values of one share of the work: enough to make a thread worth waking, few enough that threads end together.
constexpr int64_t kShare = 8192;

int64_t read(const Counter& counter) {
  if (!counter.at) return counter.offset;
  return counter.offset + (counter.wide ? *static_cast<const int64_t*>(counter.at)
                                        : static_cast<int64_t>(*static_cast<const int32_t*>(counter.at)));
}

void check_row(const SamplerArgs& args, const SamplerRow& row, int64_t index) {
  TORCH_CHECK(row.push_slot < 3, "sampler_step_: row ", index, " pushes to slot ", row.push_slot, " of 3");
  TORCH_CHECK(args.saved || !uses_saved(row), "sampler_step_: row ", index, " uses a saved point and none was given");
  TORCH_CHECK(args.history || !uses_history(row), "sampler_step_: row ", index, " uses history and none was given");
  TORCH_CHECK(args.has_variance || row.l1 == 0, "sampler_step_: row ", index,
              " reads variance channels and out has none");
  TORCH_CHECK(args.seeds || args.noise || row.k_z == 0, "sampler_step_: seeds or noise must be given: row ", index,
              " uses noise");
}

void update_cpu(Tensor x, Tensor x0, Optional saved, Optional history, const Tensor& out, const Optional& out2,
                const Optional& grad, const Optional& seeds, const Optional& noise, const Tensor& table,
                const Optional& row, const Optional& noise_row, int64_t row_at, int64_t noise_at, int64_t stream) {
  Kept kept;
  const SamplerArgs args = sampler_args({x, x0, saved, history, out, out2, grad, seeds, noise, table, row, noise_row,
                                         row_at, noise_at, stream}, kept);
  const int64_t index = read(args.row), counter = read(args.noise_row);
  TORCH_CHECK(index >= 0 && index < args.rows, "sampler_step_: row ", index, " of a table of ", args.rows);
  TORCH_CHECK(counter >= 0 && counter <= kWord, "sampler_step_: noise_row ", counter, " must be in 0..2^32-1");
  const SamplerRow& coefficients = *reinterpret_cast<const SamplerRow*>(args.table + index * kRowColumns);
  if (x.numel() == 0) return;
  check_row(args, coefficients, index);

  const SamplerLoops& loops = sampler_loops();
  const int64_t positions = std::max<int64_t>(kShare / args.C, 1), shares = (args.P + positions - 1) / positions;
  at::parallel_for(0, args.N * shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = (i % shares) * positions;
      loops.update(args, coefficients, static_cast<uint32_t>(counter), i / shares, begin,
                   std::min(args.P, begin + positions));
    }
  });
}

// Standard normals [N, count] for the seeds: the noise of sampler_step_ on its own (for x_T and tests).
Tensor normal_cpu(const Tensor& seeds, int64_t count, int64_t row, int64_t stream) {
  check_normal(seeds, count, row, stream);
  Tensor z = at::empty({seeds.size(0), count}, seeds.options().dtype(at::kFloat));
  const int64_t* key = seeds.const_data_ptr<int64_t>();
  float* data = z.data_ptr<float>();
  const SamplerLoops& loops = sampler_loops();
  const int64_t shares = (count + kShare - 1) / kShare;
  at::parallel_for(0, seeds.size(0) * shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t n = i / shares, begin = (i % shares) * kShare;
      loops.normal(static_cast<uint64_t>(key[n]), static_cast<uint32_t>(row), static_cast<uint32_t>(stream), begin,
                   std::min(count, begin + kShare), data + n * count + begin);
    }
  });
  return z;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(admfast, m) {
  m.def(
      "sampler_step_(Tensor(a!) x, Tensor(b!) x0, Tensor(c!)? saved, Tensor(d!)? history, Tensor out, Tensor? out2, "
      "Tensor? grad, Tensor? seeds, Tensor? noise, Tensor table, Tensor? row, Tensor? noise_row, int row_at, "
      "int noise_at, int stream) -> ()");
  m.def("normal(Tensor seeds, int count, int row, int stream) -> Tensor");
}

TORCH_LIBRARY_IMPL(admfast, CPU, m) {
  m.impl("sampler_step_", &update_cpu);
  m.impl("normal", &normal_cpu);
}

}  // namespace admfast
