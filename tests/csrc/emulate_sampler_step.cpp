// The CUDA update's kernel body run on the host, one fake thread after another; called by test_kernel_body.py.
#include "sampler_step_kernel.h"

using namespace admfast;

namespace {

template <typename T, Layout kLayout, int kC, int kOutputs>
void run(const SamplerArgs& args, const SamplerPlan& plan, int64_t threads) {
  const RowNow now = row_now(args);
  for (int64_t i = 0; i < threads; ++i) sampler_share<T, kLayout, kC, kOutputs>(args, plan, now, i, threads);
}

template <typename T>
void launch(const SamplerArgs& args, const SamplerPlan& plan, int64_t threads) {
  if (plan.layout == Layout::kStrided) return run<T, Layout::kStrided, 0, 0>(args, plan, threads);
  if (plan.layout == Layout::kPlanar) return run<T, Layout::kPlanar, 0, 0>(args, plan, threads);
  if (args.C == 1) return run<T, Layout::kInterleaved, 1, 2>(args, plan, threads);
  if (args.has_variance) return run<T, Layout::kInterleaved, 3, 6>(args, plan, threads);
  run<T, Layout::kInterleaved, 3, 3>(args, plan, threads);
}

}  // namespace

// Runs an update and returns its layouts (out's + 10 times the gradient's), or -1 where an access of 16 bytes wasn't
// aligned. `wanted` below 0 takes the layout that the launch would.
extern "C" int emulate_update(const SamplerArgs* args, int64_t threads, int wanted) {
  misaligned = 0;
  SamplerPlan plan = sampler_plan(*args);
  if (wanted == static_cast<int>(Layout::kStrided))
    plan = {Layout::kStrided, Layout::kStrided, (args->C * args->P + 3) / 4};
  switch (args->out.type) {
    case Type::kFloat32: launch<float>(*args, plan, threads); break;
    case Type::kBFloat16: launch<bfloat16>(*args, plan, threads); break;
    case Type::kFloat16: launch<float16>(*args, plan, threads); break;
  }
  return misaligned ? -1 : static_cast<int>(plan.layout) + 10 * static_cast<int>(plan.grad_layout);
}

extern "C" int emulate_normal(const uint64_t* seeds, int64_t N, int64_t count, uint32_t row, uint32_t stream,
                              float* z) {
  misaligned = 0;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t item = 0; item < (count + 3) / 4; ++item) normal_item(seeds, row, stream, count, n, item, z);
  return misaligned;
}

extern "C" int args_size() { return sizeof(SamplerArgs); }
