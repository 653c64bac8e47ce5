// The update and its noise on CUDA tensors: device, stream and launch; compiled only with CUDA.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "sampler_step_cuda.h"
#include "sampler_step_ops.h"

namespace admfast {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// The whole call can be captured in a graph: counters stay on the device, nothing is read back, and the copy of an
// input that shares the state's memory comes from the caching allocator.
void update_cuda(Tensor x, Tensor x0, Optional saved, Optional history, const Tensor& out, const Optional& out2,
                 const Optional& grad, const Optional& seeds, const Optional& noise, const Tensor& table,
                 const Optional& row, const Optional& noise_row, int64_t row_at, int64_t noise_at, int64_t stream) {
  const c10::cuda::CUDAGuard guard(x.device());
  Kept kept;
  const SamplerArgs args = sampler_args({x, x0, saved, history, out, out2, grad, seeds, noise, table, row, noise_row,
                                         row_at, noise_at, stream}, kept);
  if (x.numel() == 0) return;
  const auto current = c10::cuda::getCurrentCUDAStream(x.device().index());
  C10_CUDA_CHECK(static_cast<cudaError_t>(sampler_step_launch(args, current.stream())));
}

Tensor normal_cuda(const Tensor& seeds, int64_t count, int64_t row, int64_t stream) {
  check_normal(seeds, count, row, stream);
  const c10::cuda::CUDAGuard guard(seeds.device());
  Tensor z = at::empty({seeds.size(0), count}, seeds.options().dtype(at::kFloat));
  const auto current = c10::cuda::getCurrentCUDAStream(seeds.device().index());
  C10_CUDA_CHECK(static_cast<cudaError_t>(
      normal_launch(reinterpret_cast<const uint64_t*>(seeds.const_data_ptr<int64_t>()), seeds.size(0), count,
                    static_cast<uint32_t>(row), static_cast<uint32_t>(stream), z.data_ptr<float>(), current.stream())));
  return z;
}

}  // namespace

TORCH_LIBRARY_IMPL(admfast, CUDA, m) {
  m.impl("sampler_step_", &update_cuda);
  m.impl("normal", &normal_cuda);
}

}  // namespace admfast
