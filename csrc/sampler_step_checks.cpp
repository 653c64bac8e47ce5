// Checks of the update's tensors, the same for every device.
#include <ATen/ATen.h>

#include "sampler_step_ops.h"

namespace admfast {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

void check_device(const Tensor& t, const char* name, const Tensor& x) {
  TORCH_CHECK(t.device() == x.device(), "sampler_step_: ", name, " is on ", t.device(), ", x on ", x.device());
}

float* state_data(const Tensor& t, const char* name, const Tensor& x, at::IntArrayRef sizes) {
  check_device(t, name, x);
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_contiguous(), "sampler_step_: ", name,
              " must be contiguous float32");
  TORCH_CHECK(t.sizes() == sizes, "sampler_step_: ", name, " has shape ", t.sizes(), ", it must have ", sizes);
  return t.data_ptr<float>();
}

Type type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return Type::kFloat32;
    case at::kBFloat16: return Type::kBFloat16;
    case at::kHalf: return Type::kFloat16;
    default:
      TORCH_CHECK(false, "sampler_step_: ", name, " is ", t.scalar_type(), "; float32, bfloat16 or float16");
  }
}

// View [N, C', *spatial] as [N, C', P]; copies only where the spatial dimensions can't be merged.
Strided merge_spatial(const Tensor& t, const char* name, Tensor& keep) {
  keep = t.dim() == 3 ? t : t.flatten(2);
  return {keep.const_data_ptr(), keep.stride(0), keep.stride(1), keep.stride(2), type_of(keep, name)};
}

// Clone an input that shares memory with the state: it would be overwritten before all of it is read.
Tensor apart(const Tensor& t, const SamplerTensors& given) {
  const bool shared = t.is_alias_of(given.x) || t.is_alias_of(given.x0) ||
                      (given.saved && t.is_alias_of(*given.saved)) ||
                      (given.history && t.is_alias_of(*given.history));
  return shared ? t.clone() : t;
}

Counter counter_of(const Optional& t, int64_t offset, const char* name, const Tensor& x) {
  if (!t) return {nullptr, false, offset};
  check_device(*t, name, x);
  TORCH_CHECK(t->numel() == 1 && (t->scalar_type() == at::kLong || t->scalar_type() == at::kInt), "sampler_step_: ",
              name, " must be one int32 or int64");
  return {t->const_data_ptr(), t->scalar_type() == at::kLong, offset};
}

}  // namespace

SamplerArgs sampler_args(const SamplerTensors& given, Kept& kept) {
  const Tensor &x = given.x, &out = given.out, &table = given.table;
  TORCH_CHECK(x.dim() >= 3, "sampler_step_: x must be [N, C, *spatial], it has ", x.dim(), " dimensions");
  SamplerArgs args{};
  args.N = x.size(0);
  args.C = x.size(1);
  args.P = x.numel() == 0 ? 0 : x.numel() / (args.N * args.C);
  args.x = state_data(x, "x", x, x.sizes());
  args.x0 = state_data(given.x0, "x0", x, x.sizes());
  if (given.saved) args.saved = state_data(*given.saved, "saved", x, x.sizes());
  std::vector<int64_t> three{3};
  three.insert(three.end(), x.sizes().begin(), x.sizes().end());
  if (given.history) args.history = state_data(*given.history, "history", x, three);

  check_device(table, "table", x);
  TORCH_CHECK(table.scalar_type() == at::kFloat && table.dim() == 2 && table.size(1) == kRowColumns &&
                  table.is_contiguous(), "sampler_step_: table must be contiguous float32 [rows, ", kRowColumns, "]");
  args.table = table.const_data_ptr<float>();
  args.rows = table.size(0);
  args.row = counter_of(given.row, given.row_at, "row", x);
  args.noise_row = counter_of(given.noise_row, given.noise_at, "noise_row", x);
  TORCH_CHECK(given.row || (given.row_at >= 0 && given.row_at < args.rows), "sampler_step_: row ", given.row_at,
              " of a table of ", args.rows);
  TORCH_CHECK(given.noise_row || (given.noise_at >= 0 && given.noise_at <= kWord), "sampler_step_: noise_row ",
              given.noise_at, " must be in 0..2^32-1");
  TORCH_CHECK(given.stream >= 0 && given.stream <= kWord, "sampler_step_: stream ", given.stream,
              " must be in 0..2^32-1");
  args.stream = static_cast<uint32_t>(given.stream);

  check_device(out, "out", x);
  TORCH_CHECK(out.dim() == x.dim() && out.size(0) == args.N && out.sizes().slice(2) == x.sizes().slice(2) &&
                  (out.size(1) == args.C || out.size(1) == 2 * args.C),
              "sampler_step_: out has shape ", out.sizes(), ", x has ", x.sizes());
  args.has_variance = args.C > 0 && out.size(1) == 2 * args.C;
  args.out = merge_spatial(apart(out, given), "out", kept.out);
  if (given.out2) {
    check_device(*given.out2, "out2", x);
    TORCH_CHECK(given.out2->sizes() == out.sizes() && given.out2->scalar_type() == out.scalar_type(),
                "sampler_step_: out2 must be like out");
    args.out2 = merge_spatial(apart(*given.out2, given), "out2", kept.out2);
  }
  if (given.grad) {
    check_device(*given.grad, "grad", x);
    TORCH_CHECK(given.grad->sizes() == x.sizes(), "sampler_step_: grad has shape ", given.grad->sizes(), ", x has ",
                x.sizes());
    args.grad = merge_spatial(apart(given.grad->to(at::kFloat), given), "grad", kept.grad);
  }
  if (given.noise) {
    check_device(*given.noise, "noise", x);
    TORCH_CHECK(given.noise->sizes() == x.sizes(), "sampler_step_: noise has shape ", given.noise->sizes(),
                ", x has ", x.sizes());
    kept.noise = apart(given.noise->to(at::kFloat).contiguous(), given);
    args.noise = kept.noise.const_data_ptr<float>();
  }
  if (given.seeds) {
    check_device(*given.seeds, "seeds", x);
    TORCH_CHECK(given.seeds->scalar_type() == at::kLong && given.seeds->numel() == args.N &&
                    given.seeds->is_contiguous(), "sampler_step_: seeds must be contiguous int64 [", args.N, "]");
    args.seeds = reinterpret_cast<const uint64_t*>(given.seeds->const_data_ptr<int64_t>());
  }
  return args;
}

void check_normal(const Tensor& seeds, int64_t count, int64_t row, int64_t stream) {
  TORCH_CHECK(seeds.scalar_type() == at::kLong && seeds.dim() == 1 && seeds.is_contiguous(),
              "normal: seeds must be contiguous int64 [N]");
  TORCH_CHECK(count >= 0, "normal: count is ", count);
  TORCH_CHECK(row >= 0 && row <= kWord && stream >= 0 && stream <= kWord, "normal: row ", row, " and stream ",
              stream, " must be in 0..2^32-1");
}

}  // namespace admfast
