// Shared by the torch bindings of the update: its arguments as the dispatcher gives them, and their checks.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "sampler_step.h"

namespace admfast {

struct SamplerTensors {
  at::Tensor x, x0;
  std::optional<at::Tensor> saved, history;
  at::Tensor out;
  std::optional<at::Tensor> out2, grad, seeds, noise;
  at::Tensor table;
  std::optional<at::Tensor> row, noise_row;
  int64_t row_at, noise_at, stream;
};

// Views and copies that the arguments point into; they must live until the update is done.
struct Kept {
  at::Tensor out, out2, grad, noise;
};

// Check everything that doesn't depend on the row's coefficients, and fill the plain struct; reads no tensor's values.
SamplerArgs sampler_args(const SamplerTensors& given, Kept& kept);

// Check the arguments of `normal`.
void check_normal(const at::Tensor& seeds, int64_t count, int64_t row, int64_t stream);

constexpr int64_t kWord = 0xFFFFFFFFll;

}  // namespace admfast
