// GroupNorm + SiLU as torch ops: layouts, division of the work, merging of moments and sums.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "group_norm.h"
#include "tensors.h"

namespace admfast {
namespace {

constexpr int64_t kShareElements = 1 << 16;  // elements of a share of the work, which stays in a second-level cache

NormType norm_type(const Tensor& x, const char* op) {
  switch (x.scalar_type()) {
    case at::kFloat: return NormType::kFloat32;
    case at::kBFloat16: return NormType::kBFloat16;
    default: TORCH_CHECK(false, op, ": x is ", x.scalar_type(), "; float32 or bfloat16");
  }
}

char* at_element(const Tensor& t, int64_t element) {
  return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) + element * t.element_size();
}

// The one or two sources of a call; the channels of the second follow those of the first.
struct Sources {
  Tensor x[2];
  int64_t count, N, P, channels[2], C;
  bool channels_last;
  NormType type;

  Sources(const Tensor& first, const OptionalTensor& second, const char* op) {
    TORCH_CHECK(first.dim() >= 3, op, ": x must be [N, C, *spatial], it has ", first.dim(), " dimensions");
    type = norm_type(first, op);
    channels_last = is_channels_last(first);
    x[0] = dense(first, channels_last);
    count = 1;
    N = first.size(0);
    C = channels[0] = first.size(1);
    P = 1;  // computed from the sizes, because a source may have no channels
    for (const int64_t size : first.sizes().slice(2)) P *= size;
    channels[1] = 0;
    if (second) {
      TORCH_CHECK(second->dim() == first.dim() && second->size(0) == N &&
                      second->sizes().slice(2) == first.sizes().slice(2) &&
                      second->scalar_type() == first.scalar_type(),
                  op, ": x2 has shape ", second->sizes(), " and dtype ", second->scalar_type(), ", x has ",
                  first.sizes(), " and ", first.scalar_type());
      x[1] = dense(*second, channels_last);
      count = 2;
      channels[1] = second->size(1);
      C += channels[1];
    }
  }
};

// A share of the work, in one source of one image. Channels-last: `rows` positions of all channels. Channels-first: all
// positions of `lanes` channels. Its 2 * lanes partial results begin at `part`.
struct Share {
  int64_t n, source, channel, first, rows, lanes, part;
};

std::vector<Share> shares(const Sources& s) {
  std::vector<Share> all;
  int64_t part = 0;
  const auto add = [&](int64_t n, int64_t source, int64_t channel, int64_t first, int64_t rows, int64_t lanes) {
    all.push_back({n, source, channel, first, rows, lanes, part});
    part += 2 * lanes;
  };
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t source = 0; source < s.count; ++source) {
      const int64_t C = s.channels[source];
      if (C == 0) continue;
      if (s.channels_last) {
        const int64_t rows = std::max<int64_t>(16, kShareElements / C / 16 * 16);
        for (int64_t i = 0; i < s.P; i += rows) add(n, source, 0, i, std::min(rows, s.P - i), C);
      } else {
        const int64_t lanes = std::max<int64_t>(1, kShareElements / s.P);
        for (int64_t i = 0; i < C; i += lanes) add(n, source, i, 0, s.P, std::min(lanes, C - i));
      }
    }
  return all;
}

std::vector<double> parts_of(const std::vector<Share>& all) {
  return std::vector<double>(all.back().part + 2 * all.back().lanes);
}

// One call of a loop. `shape`: the rows of a source (channels-first: one channel). `own`, `joint`: where they begin in
// the source, and in a tensor that has the channels of both sources. `channel`: their first channel, counted over all
// images. `part`: where their partial results go.
struct Piece {
  NormRows shape;
  int64_t own, joint, joint_stride, channel, part, lane_parts;
};

template <typename Work>
void for_pieces(const Sources& s, const std::vector<Share>& all, Work work) {
  at::parallel_for(0, static_cast<int64_t>(all.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Share& one = all[i];
      const int64_t C = s.channels[one.source], before = one.source == 0 ? 0 : s.channels[0];
      const int64_t image = one.n * C * s.P, joint_image = one.n * s.C * s.P, channel = one.n * s.C + before;
      if (s.channels_last) {
        work(one, Piece{{one.rows, C, C}, image + one.first * C, joint_image + one.first * s.C + before, s.C, channel,
                        one.part, C});
        continue;
      }
      for (int64_t lane = 0; lane < one.lanes; ++lane) {
        const int64_t c = one.channel + lane;
        work(one, Piece{{1, s.P, s.P}, image + c * s.P, joint_image + (before + c) * s.P, s.P, channel + c,
                        one.part + lane, one.lanes});
      }
    }
  });
}

// Call `visit(share, channel)` for every share, in order; `channel`: its first channel, counted over all images.
template <typename Visit>
void for_lanes(const Sources& s, const std::vector<Share>& all, Visit visit) {
  for (const Share& one : all) visit(one, one.n * s.C + (one.source == 0 ? 0 : s.channels[0]) + one.channel);
}

// The combination of weight, bias, scale and shift: u = x^ w' + b'.
struct Affine {
  Tensor weight, bias, scale, shift;
  Affine(const Sources& s, const Tensor& w, const Tensor& b, const OptionalTensor& scale_, const OptionalTensor& shift_,
         const char* op) {
    TORCH_CHECK(w.numel() == s.C && b.numel() == s.C, op, ": weight and bias have ", w.numel(), " and ", b.numel(),
                " elements for ", s.C, " channels");
    TORCH_CHECK(scale_.has_value() == shift_.has_value(), op, ": scale and shift come together");
    weight = w.to(at::kFloat).contiguous();
    bias = b.to(at::kFloat).contiguous();
    if (!scale_) return;
    TORCH_CHECK(scale_->dim() == 2 && scale_->size(0) == s.N && scale_->size(1) == s.C &&
                    shift_->sizes() == scale_->sizes(),
                op, ": scale and shift must be [", s.N, ", ", s.C, "]");
    scale = scale_->to(at::kFloat).contiguous();
    shift = shift_->to(at::kFloat).contiguous();
  }

  // Write w' = weight (1 + scale) and b' = bias (1 + scale) + shift of image n, [C] each.
  void of_image(int64_t n, int64_t C, float* factor, float* offset) const {
    const float *w = weight.const_data_ptr<float>(), *b = bias.const_data_ptr<float>();
    std::copy(w, w + C, factor);
    std::copy(b, b + C, offset);
    if (!scale.defined()) return;
    const float *by = scale.const_data_ptr<float>() + n * C, *add = shift.const_data_ptr<float>() + n * C;
    for (int64_t c = 0; c < C; ++c) {
      factor[c] = w[c] * (1.0f + by[c]);
      offset[c] = b[c] * (1.0f + by[c]) + add[c];
    }
  }
};

// The coefficients [N, C] that the loops need. The loops subtract the mean in float32; its rounding remainder, `rest`,
// enters through the offset, so that a large mean costs no digits.
struct Coefficients {
  std::vector<float> mean, factor, offset;
  std::vector<double> rest;
  Coefficients(const Sources& s, const Affine& affine, const Tensor& group_mean, const Tensor& group_rstd)
      : mean(s.N * s.C), factor(s.N * s.C), offset(s.N * s.C), rest(s.N * group_mean.size(1)) {
    const int64_t G = group_mean.size(1), D = s.C / G;
    const double *m = group_mean.const_data_ptr<double>(), *r = group_rstd.const_data_ptr<double>();
    for (int64_t n = 0; n < s.N; ++n) affine.of_image(n, s.C, &factor[n * s.C], &offset[n * s.C]);
    for (int64_t g = 0; g < s.N * G; ++g) {
      const float rounded = static_cast<float>(m[g]);
      rest[g] = m[g] - static_cast<double>(rounded);
      for (int64_t i = g * D; i < (g + 1) * D; ++i) {
        const double by = static_cast<double>(factor[i]) * r[g];
        mean[i] = rounded;
        factor[i] = static_cast<float>(by);
        offset[i] = static_cast<float>(static_cast<double>(offset[i]) - rest[g] * by);
      }
    }
  }

  NormCoefficients at(const Sources& s, int64_t channel) const {
    return {&mean[channel], &factor[channel], &offset[channel], !s.channels_last};
  }
};

// Merge the moments of the shares into moments of each channel, and these into moments of each group, in double: first
// the means, then the squares about them.
void merge_moments(const Sources& s, const std::vector<Share>& all, const std::vector<double>& parts, double eps,
                   Tensor& group_mean, Tensor& group_rstd) {
  const int64_t G = group_mean.size(1), D = s.C / G;
  const double positions = static_cast<double>(s.P);
  std::vector<double> mean(s.N * s.C), squares(s.N * s.C);
  for_lanes(s, all, [&](const Share& one, int64_t channel) {
    const double *means = parts.data() + one.part, weight = static_cast<double>(one.rows) / positions;
    double* to = mean.data() + channel;
    for (int64_t i = 0; i < one.lanes; ++i) to[i] += means[i] * weight;
  });
  for_lanes(s, all, [&](const Share& one, int64_t channel) {
    const double *means = parts.data() + one.part, *own = means + one.lanes, *whole = mean.data() + channel;
    const double rows = static_cast<double>(one.rows);
    double* to = squares.data() + channel;
    for (int64_t i = 0; i < one.lanes; ++i) to[i] += own[i] + rows * (means[i] - whole[i]) * (means[i] - whole[i]);
  });
  const double elements = static_cast<double>(D) * positions;
  for (int64_t g = 0; g < s.N * G; ++g) {
    double group = 0.0, about = 0.0;
    for (int64_t i = g * D; i < (g + 1) * D; ++i) group += mean[i];
    group /= static_cast<double>(D);
    for (int64_t i = g * D; i < (g + 1) * D; ++i)
      about += squares[i] + positions * (mean[i] - group) * (mean[i] - group);
    group_mean.data_ptr<double>()[g] = group;
    group_rstd.data_ptr<double>()[g] = 1.0 / std::sqrt(about / elements + eps);
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& x2, const Tensor& weight,
                                           const Tensor& bias, const OptionalTensor& scale,
                                           const OptionalTensor& shift, int64_t groups, double eps, bool silu) {
  const char* op = "group_norm_silu_fwd";
  const Sources s(x, x2, op);
  TORCH_CHECK(groups > 0 && s.C % groups == 0, op, ": ", groups, " groups don't divide ", s.C, " channels");
  const Affine affine(s, weight, bias, scale, shift, op);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[1] = s.C;
  Tensor y = empty_dense(sizes, x, s.channels_last);
  Tensor mean = at::empty({s.N, groups}, x.options().dtype(at::kDouble)), rstd = at::empty_like(mean);
  if (y.numel() == 0) return {y, mean.fill_(NAN), rstd.fill_(NAN)};

  const GroupNormLoops& loops = group_norm_loops();
  const std::vector<Share> all = shares(s);
  std::vector<double> parts = parts_of(all);
  for_pieces(s, all, [&](const Share& one, const Piece& piece) {
    const void* from = at_element(s.x[one.source], piece.own);
    double *means = parts.data() + piece.part, *squares = means + piece.lane_parts;
    if (s.channels_last) {
      loops.moments(s.type, from, piece.shape, means, squares);
    } else {
      loops.line_moments(s.type, from, s.P, means, squares);
    }
  });
  merge_moments(s, all, parts, eps, mean, rstd);
  const Coefficients k(s, affine, mean, rstd);
  for_pieces(s, all, [&](const Share& one, const Piece& piece) {
    loops.apply(s.type, at_element(s.x[one.source], piece.own), piece.shape, k.at(s, piece.channel), silu,
                at_element(y, piece.joint), piece.joint_stride);
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const OptionalTensor& x2,
                                                    const Tensor& weight, const Tensor& bias,
                                                    const OptionalTensor& scale, const OptionalTensor& shift,
                                                    const Tensor& mean, const Tensor& rstd, bool silu) {
  const char* op = "group_norm_silu_bwd";
  const Sources s(x, x2, op);
  const Affine affine(s, weight, bias, scale, shift, op);
  TORCH_CHECK(mean.dim() == 2 && mean.size(0) == s.N && mean.sizes() == rstd.sizes() && mean.is_contiguous() &&
                  rstd.is_contiguous() && mean.scalar_type() == at::kDouble && rstd.scalar_type() == at::kDouble,
              op, ": mean and rstd must be contiguous float64 [N, G]");
  TORCH_CHECK(dy.dim() == x.dim() && dy.size(0) == s.N && dy.size(1) == s.C && dy.numel() == s.N * s.C * s.P, op,
              ": dy has shape ", dy.sizes(), ", x has ", x.sizes());
  const Tensor gradient = dense(dy.to(x.scalar_type()), s.channels_last);
  Tensor dx[2] = {empty_dense(x.sizes(), x, s.channels_last),
                  x2 ? empty_dense(x2->sizes(), x, s.channels_last) : at::empty({0}, x.options())};
  Tensor sums1 = at::empty({s.N, s.C}, x.options().dtype(at::kFloat)), sums2 = at::empty_like(sums1);
  if (dy.numel() == 0) return {dx[0], dx[1], sums1.zero_(), sums2.zero_()};

  const GroupNormLoops& loops = group_norm_loops();
  const std::vector<Share> all = shares(s);
  const Coefficients k(s, affine, mean, rstd);
  std::vector<double> parts = parts_of(all);
  for_pieces(s, all, [&](const Share& one, const Piece& piece) {
    loops.gradient_sums(s.type, at_element(gradient, piece.joint), piece.joint_stride,
                        at_element(s.x[one.source], piece.own), piece.shape, k.at(s, piece.channel), silu,
                        parts.data() + piece.part, parts.data() + piece.part + piece.lane_parts);
  });
  std::vector<double> s1(s.N * s.C), t(s.N * s.C);
  for_lanes(s, all, [&](const Share& one, int64_t channel) {
    const double *from = parts.data() + one.part, *weighted = from + one.lanes;
    double *to = s1.data() + channel, *weighted_to = t.data() + channel;
    for (int64_t i = 0; i < one.lanes; ++i) {
      to[i] += from[i];
      weighted_to[i] += weighted[i];
    }
  });
  const int64_t G = mean.size(1), D = s.C / G;
  const double elements = static_cast<double>(D * s.P);
  std::vector<float> slope(s.N * s.C), constant(s.N * s.C);
  float *out1 = sums1.data_ptr<float>(), *out2 = sums2.data_ptr<float>();
  for (int64_t g = 0; g < s.N * G; ++g) {
    const double r = rstd.const_data_ptr<double>()[g];
    double first = 0.0, second = 0.0;  // k.factor is rstd w', so `first` becomes rstd times the mean of w' S1
    for (int64_t i = g * D; i < (g + 1) * D; ++i) {
      t[i] -= k.rest[g] * s1[i];
      first += k.factor[i] * s1[i];
      second += k.factor[i] * t[i];
      out1[i] = static_cast<float>(s1[i]);
      out2[i] = static_cast<float>(t[i] * r);
    }
    first /= elements;
    second /= elements;
    const double by = -r * r * second;
    std::fill_n(slope.begin() + g * D, D, static_cast<float>(by));
    std::fill_n(constant.begin() + g * D, D, static_cast<float>(-first - k.rest[g] * by));
  }
  for_pieces(s, all, [&](const Share& one, const Piece& piece) {
    loops.gradient(s.type, at_element(gradient, piece.joint), piece.joint_stride,
                   at_element(s.x[one.source], piece.own), piece.shape,
                   {k.at(s, piece.channel), &slope[piece.channel], &constant[piece.channel]}, silu,
                   at_element(dx[one.source], piece.own));
  });
  return {dx[0], dx[1], sums1, sums2};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(admfast, m) {
  m.def(
      "group_norm_silu_fwd(Tensor x, Tensor? x2, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, "
      "int groups, float eps, bool silu) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "group_norm_silu_bwd(Tensor dy, Tensor x, Tensor? x2, Tensor weight, Tensor bias, Tensor? scale, "
      "Tensor? shift, Tensor mean, Tensor rstd, bool silu) -> (Tensor dx, Tensor dx2, Tensor s1, Tensor s2)");
}

TORCH_LIBRARY_IMPL(admfast, CPU, m) {
  m.impl("group_norm_silu_fwd", &forward);
  m.impl("group_norm_silu_bwd", &backward);
}

}  // namespace admfast
