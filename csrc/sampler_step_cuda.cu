// Kernels and launches of the sampler update and its noise on a CUDA device. The work of a thread is defined in
// sampler_step_kernel.h. There is no torch header here, so that any machine with nvcc can compile this file.
#include "sampler_step_cuda.h"
#include "sampler_step_kernel.h"

namespace admfast {
namespace {

constexpr int kThreads = 128;
// Most blocks per multiprocessor; a thread with more work loops, and its block reads the row only once.
constexpr int64_t kBlocksEach = 16;

// Blocks that must fit on a multiprocessor at once, chosen so that every thread has enough registers: with 6 blocks
// 65536 / 128 / 6 = 85 of them. A thread of an interleaved tensor holds four or eight positions of all channels.
template <typename T, Layout kLayout, int kC, int kOutputs>
constexpr int resident() {
  if (kLayout == Layout::kInterleaved && kC == 3) return interleaved_run(kOutputs, sizeof(T)) == 8 ? 2 : 3;
  return kLayout == Layout::kPlanar && sizeof(T) == 4 ? 6 : 4;
}

template <typename T, Layout kLayout, int kC, int kOutputs>
__global__ void __launch_bounds__(kThreads, resident<T, kLayout, kC, kOutputs>())
    sampler_step_kernel(const SamplerArgs args, const SamplerPlan plan) {
  __shared__ RowNow now;
  if (threadIdx.x == 0) now = row_now(args);
  __syncthreads();
  sampler_share<T, kLayout, kC, kOutputs>(args, plan, now, static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x,
                                          static_cast<int64_t>(gridDim.x) * blockDim.x);
}

__global__ void __launch_bounds__(kThreads)
    normal_kernel(const uint64_t* seeds, uint32_t row, uint32_t stream, int64_t N, int64_t count, float* z) {
  const int64_t items = (count + 3) / 4, threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < N * items; i += threads) {
    int64_t n, item;
    divide(i, items, n, item);
    normal_item(seeds, row, stream, count, n, item, z);
  }
}

struct Shape {
  unsigned blocks, threads;
};

// Choose the launch's blocks and threads. Small states get small blocks, so that they reach more multiprocessors.
cudaError_t shape_of(int64_t work, Shape& shape) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  shape.threads = work < int64_t{processors} * 2 * kThreads ? 64 : kThreads;
  const int64_t blocks = (work + shape.threads - 1) / shape.threads, most = processors * kBlocksEach;
  shape.blocks = static_cast<unsigned>(blocks < most ? blocks : most);
  return cudaSuccess;
}

template <typename T>
cudaError_t launch(const SamplerArgs& args, const SamplerPlan& plan, Shape shape, cudaStream_t stream) {
  auto kernel = sampler_step_kernel<T, Layout::kStrided, 0, 0>;
  if (plan.layout == Layout::kPlanar) kernel = sampler_step_kernel<T, Layout::kPlanar, 0, 0>;
  if (plan.layout == Layout::kInterleaved) {
    if (args.C == 1) {
      kernel = sampler_step_kernel<T, Layout::kInterleaved, 1, 2>;
    } else {
      kernel = args.has_variance ? sampler_step_kernel<T, Layout::kInterleaved, 3, 6>
                                 : sampler_step_kernel<T, Layout::kInterleaved, 3, 3>;
    }
  }
  kernel<<<shape.blocks, shape.threads, 0, stream>>>(args, plan);
  return cudaGetLastError();
}

}  // namespace

int sampler_step_launch(const SamplerArgs& args, void* stream) {
  const SamplerPlan plan = sampler_plan(args);
  if (args.N * plan.items == 0) return cudaSuccess;
  Shape shape;
  const cudaError_t error = shape_of(args.N * plan.items, shape);
  if (error != cudaSuccess) return error;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args.out.type) {
    case Type::kFloat32: return launch<float>(args, plan, shape, on);
    case Type::kBFloat16: return launch<bfloat16>(args, plan, shape, on);
    case Type::kFloat16: return launch<float16>(args, plan, shape, on);
  }
  return cudaErrorInvalidValue;
}

int normal_launch(const uint64_t* seeds, int64_t N, int64_t count, uint32_t row, uint32_t stream_of_noise, float* z,
                  void* stream) {
  const int64_t work = N * ((count + 3) / 4);
  if (work == 0) return cudaSuccess;
  Shape shape;
  const cudaError_t error = shape_of(work, shape);
  if (error != cudaSuccess) return error;
  normal_kernel<<<shape.blocks, shape.threads, 0, static_cast<cudaStream_t>(stream)>>>(seeds, row, stream_of_noise, N,
                                                                                     count, z);
  return cudaGetLastError();
}

}  // namespace admfast
