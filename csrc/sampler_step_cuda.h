// Launchers of the CUDA update and of its noise; sampler_step_cuda.cu defines, sampler_step_cuda_ops.cpp calls them.
#pragma once

#include "sampler_step.h"

namespace admfast {

// Each launches on `stream` (a cudaStream_t) of the current device and returns the launch's cudaError_t.
int sampler_step_launch(const SamplerArgs& args, void* stream);
int normal_launch(const uint64_t* seeds, int64_t N, int64_t count, uint32_t row, uint32_t stream_of_noise, float* z,
                  void* stream);

}  // namespace admfast
