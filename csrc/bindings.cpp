// The only file that includes torch: checks tensors, fills the plain structs, registers the ops.
#include <ATen/Parallel.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <optional>

#include "sampler_step.h"

namespace admfast {
namespace {

using at::Tensor;

bool is_word(int64_t value) { return value >= 0 && value <= 0xFFFFFFFFll; }

void check_state(const Tensor& t, const char* name, const Tensor& x) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_contiguous(), "sampler_step_: ", name,
              " must be contiguous float32");
  TORCH_CHECK(t.sizes() == x.sizes(), "sampler_step_: ", name, " has shape ", t.sizes(), ", x has ", x.sizes());
}

// View [N, C', *spatial] as [N, C', P]; copies only where the spatial dimensions can't be merged.
Strided merge_spatial(const Tensor& t, Tensor& keep) {
  keep = t.dim() == 3 ? t : t.flatten(2);
  return {keep.const_data_ptr(), keep.stride(0), keep.stride(1), keep.stride(2)};
}

// An input that lives in the state's memory would be overwritten while others of its elements are still to be read.
Tensor apart(const Tensor& t, const Tensor& x, const Tensor& x0, const std::optional<Tensor>& saved,
             const std::optional<Tensor>& history) {
  const bool shared = t.is_alias_of(x) || t.is_alias_of(x0) || (saved && t.is_alias_of(*saved)) ||
                      (history && t.is_alias_of(*history));
  return shared ? t.clone() : t;
}

OutType out_type(const Tensor& out) {
  switch (out.scalar_type()) {
    case at::kFloat: return OutType::kFloat32;
    case at::kBFloat16: return OutType::kBFloat16;
    case at::kHalf: return OutType::kFloat16;
    default: TORCH_CHECK(false, "sampler_step_: out is ", out.scalar_type(), "; float32, bfloat16 or float16");
  }
}

void sampler_step_cpu(Tensor x, Tensor x0, std::optional<Tensor> saved, std::optional<Tensor> history,
                      const Tensor& out, const std::optional<Tensor>& out2, const std::optional<Tensor>& grad,
                      const std::optional<Tensor>& seeds, const std::optional<Tensor>& noise, const Tensor& table,
                      const Tensor& row, const Tensor& noise_row, int64_t stream) {
  TORCH_CHECK(x.dim() >= 3, "sampler_step_: x must be [N, C, *spatial], it has ", x.dim(), " dimensions");
  check_state(x, "x", x);
  check_state(x0, "x0", x);
  const int64_t columns = sizeof(SamplerRow) / sizeof(float);
  TORCH_CHECK(table.scalar_type() == at::kFloat && table.dim() == 2 && table.size(1) == columns &&
                  table.is_contiguous(), "sampler_step_: table must be contiguous float32 [rows, ", columns, "]");
  TORCH_CHECK(row.numel() == 1 && noise_row.numel() == 1, "sampler_step_: row and noise_row must have one element");
  const int64_t index = row.item<int64_t>();
  TORCH_CHECK(index >= 0 && index < table.size(0), "sampler_step_: row ", index, " of a table of ", table.size(0));
  const SamplerRow& coefficients = *reinterpret_cast<const SamplerRow*>(table.const_data_ptr<float>() + index * columns);

  SamplerArgs args{};
  args.N = x.size(0);
  args.C = x.size(1);
  args.P = x.numel() == 0 ? 0 : x.numel() / (args.N * args.C);
  if (x.numel() == 0) return;
  args.x = x.data_ptr<float>();
  args.x0 = x0.data_ptr<float>();
  const bool reads_history = coefficients.d[0] != 0 || coefficients.d[1] != 0 || coefficients.d[2] != 0;
  if (saved) {
    check_state(*saved, "saved", x);
    args.saved = saved->data_ptr<float>();
  }
  if (history) {
    TORCH_CHECK(history->scalar_type() == at::kFloat && history->is_contiguous() && history->dim() == x.dim() + 1 &&
                    history->size(0) == 3 && history->sizes().slice(1) == x.sizes(),
                "sampler_step_: history must be contiguous float32 [3, *x.shape]");
    args.history = history->data_ptr<float>();
  }
  TORCH_CHECK(coefficients.push_slot < 3, "sampler_step_: row ", index, " pushes to slot ", coefficients.push_slot,
              " of 3");
  TORCH_CHECK(args.saved || (coefficients.a_s == 0 && coefficients.save == 0), "sampler_step_: row ", index,
              " uses a saved point and none was given");
  TORCH_CHECK(args.history || (!reads_history && coefficients.push_slot < 0), "sampler_step_: row ", index,
              " uses history and none was given");

  TORCH_CHECK(out.dim() == x.dim() && out.size(0) == args.N && out.sizes().slice(2) == x.sizes().slice(2) &&
                  (out.size(1) == args.C || out.size(1) == 2 * args.C),
              "sampler_step_: out has shape ", out.sizes(), ", x has ", x.sizes());
  Tensor kept_out, kept_out2, kept_grad, kept_noise;
  args.out_type = out_type(out);
  args.has_variance = out.size(1) == 2 * args.C;
  TORCH_CHECK(args.has_variance || coefficients.l1 == 0, "sampler_step_: row ", index,
              " reads variance channels and out has none");
  args.out = merge_spatial(apart(out, x, x0, saved, history), kept_out);
  if (out2) {
    TORCH_CHECK(out2->sizes() == out.sizes() && out2->scalar_type() == out.scalar_type(),
                "sampler_step_: out2 must be like out");
    args.out2 = merge_spatial(apart(*out2, x, x0, saved, history), kept_out2);
  }
  if (grad) {
    TORCH_CHECK(grad->sizes() == x.sizes(), "sampler_step_: grad has shape ", grad->sizes(), ", x has ", x.sizes());
    args.grad = merge_spatial(apart(grad->to(at::kFloat), x, x0, saved, history), kept_grad);
  }
  if (noise) {
    TORCH_CHECK(noise->sizes() == x.sizes(), "sampler_step_: noise has shape ", noise->sizes(), ", x has ", x.sizes());
    kept_noise = apart(noise->to(at::kFloat).contiguous(), x, x0, saved, history);
    args.noise = kept_noise.const_data_ptr<float>();
  } else if (coefficients.k_z != 0) {
    TORCH_CHECK(seeds && seeds->scalar_type() == at::kLong && seeds->numel() == args.N && seeds->is_contiguous(),
                "sampler_step_: seeds must be contiguous int64 [", args.N, "] where no noise is given");
    args.seeds = reinterpret_cast<const uint64_t*>(seeds->const_data_ptr<int64_t>());
  }
  const int64_t counter = noise_row.item<int64_t>();
  TORCH_CHECK(is_word(counter) && is_word(stream), "sampler_step_: noise_row ", counter, " and stream ", stream,
              " must be in 0..2^32-1");
  args.noise_row = static_cast<uint32_t>(counter);
  args.stream = static_cast<uint32_t>(stream);

  // Shares are multiples of four elements, so that no block of noise is made twice.
  constexpr int64_t kShare = 4096;
  const int64_t image = args.C * args.P, shares = (image + kShare - 1) / kShare;
  at::parallel_for(0, args.N * shares, 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = (i % shares) * kShare;
      sampler_step_range(args, coefficients, i / shares, begin, std::min(image, begin + kShare));
    }
  });
}

// Standard normals [N, count] for the seeds: the noise of sampler_step_ by itself (x_T, tests).
Tensor normal_cpu(const Tensor& seeds, int64_t count, int64_t row, int64_t stream) {
  TORCH_CHECK(seeds.scalar_type() == at::kLong && seeds.dim() == 1 && seeds.is_contiguous(),
              "normal: seeds must be contiguous int64 [N]");
  TORCH_CHECK(count >= 0, "normal: count is ", count);
  TORCH_CHECK(is_word(row) && is_word(stream), "normal: row ", row, " and stream ", stream, " must be in 0..2^32-1");
  Tensor z = at::empty({seeds.size(0), count}, at::kFloat);
  const int64_t* key = seeds.const_data_ptr<int64_t>();
  float* data = z.data_ptr<float>();
  at::parallel_for(0, seeds.size(0), 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n)
      normal_range(static_cast<uint64_t>(key[n]), static_cast<uint32_t>(row), static_cast<uint32_t>(stream), 0, count,
                   data + n * count);
  });
  return z;
}

}  // namespace
}  // namespace admfast

TORCH_LIBRARY(admfast, m) {
  m.def(
      "sampler_step_(Tensor(a!) x, Tensor(b!) x0, Tensor(c!)? saved, Tensor(d!)? history, Tensor out, Tensor? out2, "
      "Tensor? grad, Tensor? seeds, Tensor? noise, Tensor table, Tensor row, Tensor noise_row, int stream) -> ()");
  m.def("normal(Tensor seeds, int count, int row, int stream) -> Tensor");
}

TORCH_LIBRARY_IMPL(admfast, CPU, m) {
  m.impl("sampler_step_", &admfast::sampler_step_cpu);
  m.impl("normal", &admfast::normal_cpu);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.doc() = "Compiled ops of admfast; use them through admfast.ops."; }
