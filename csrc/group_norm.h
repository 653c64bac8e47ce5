// Loops of GroupNorm + SiLU on the CPU; the formulas are in admfast/ops/norm/grad.py.
// A source is seen as rows of `lanes` elements. In a channels-last source, a row is a position and a lane is a channel;
// in a channels-first source, a row is all positions of a channel. Nothing here depends on torch or on groups.
#pragma once

#include <cstdint>

namespace admfast {

enum class NormType : int { kFloat32 = 0, kBFloat16 = 1 };

// u = (x - mean) * factor + offset, with one value per lane, or one for all lanes (`uniform`).
struct NormCoefficients {
  const float *mean, *factor, *offset;
  bool uniform;
};

// dx = du * factor + (x - mean) * slope + constant, with values per lane as above.
struct NormGradCoefficients {
  NormCoefficients forward;
  const float *slope, *constant;
};

// Rows of one source in memory, in elements of its type.
struct NormRows {
  int64_t rows, stride, lanes;
};

struct GroupNormLoops {
  const char* name;
  // The mean of each lane, and the sum of squares about it.
  void (*moments)(NormType type, const void* x, NormRows shape, double* mean, double* squares);
  // One mean and one sum of squares of `count` adjacent elements.
  void (*line_moments)(NormType type, const void* x, int64_t count, double* mean, double* squares);
  // y = act(u), with `y_stride` elements from row to row.
  void (*apply)(NormType type, const void* x, NormRows shape, NormCoefficients k, bool silu, void* y,
                int64_t y_stride);
  // sums[lane] += du, weighted_sums[lane] += du (x - mean); one sum of each kind if uniform.
  void (*gradient_sums)(NormType type, const void* dy, int64_t dy_stride, const void* x, NormRows shape,
                        NormCoefficients k, bool silu, double* sums, double* weighted_sums);
  // dx; its rows are laid out as those of x.
  void (*gradient)(NormType type, const void* dy, int64_t dy_stride, const void* x, NormRows shape,
                   NormGradCoefficients k, bool silu, void* dx);
};

extern const GroupNormLoops group_norm_generic;
#if defined(__x86_64__) && !defined(__clang__)
extern const GroupNormLoops group_norm_avx2, group_norm_avx512, group_norm_avx512_bf16;
#endif

// The widest loops for the instruction set of cpu_isa.h.
const GroupNormLoops& group_norm_loops();

}  // namespace admfast
