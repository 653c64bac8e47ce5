// The body of the CUDA update as functions of a thread's index, so that the host can run them too (tests/csrc).
//
// `out` (and `out2`) may have three layouts. Planar: a thread updates 16 bytes of one channel, four elements of float32
// or eight of half precision. Interleaved (NHWC): a thread updates the fewest positions (four or eight), in all
// channels, that fill a multiple of 16 bytes. Strided: a thread updates one block of noise, four elements, one by one,
// for any shape, stride and alignment.
#pragma once

#include "half_types.h"
#include "noise.h"
#include "sampler_step.h"
#include "sampler_update.h"

namespace admfast {

enum class Layout : int { kStrided = 0, kPlanar = 1, kInterleaved = 2 };

// How a call is executed: the layout of out, and that of the gradient.
struct SamplerPlan {
  Layout layout, grad_layout;
  int64_t items;  // pieces of work of one image
};

ADMFAST_HD int64_t size_of(Type type) { return type == Type::kFloat32 ? 4 : 2; }

ADMFAST_HD bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Tell whether runs of `run` elements of a channel can be read 16 bytes at a time.
inline bool is_planar(const Strided& t, int64_t N, int64_t channels, int64_t P, int64_t run) {
  const int64_t per = 16 / size_of(t.type);
  return aligned16(t.data) && P % run == 0 && t.p == 1 && (N == 1 || t.n % per == 0) &&
         (channels == 1 || t.c % per == 0);
}

// Tell whether runs of `run` positions, with all their channels, can be read 16 bytes at a time.
inline bool is_interleaved(const Strided& t, int64_t N, int64_t channels, int64_t P, int64_t run) {
  const int64_t per = 16 / size_of(t.type);
  return aligned16(t.data) && P % run == 0 && channels > 1 && t.c == 1 && t.p == channels && (N == 1 || t.n % per == 0);
}

// Positions of an interleaved tensor that a thread takes: four, or eight if four don't fill a multiple of 16 bytes.
ADMFAST_HD constexpr int interleaved_run(int64_t channels, int64_t size) { return channels * size % 4 == 0 ? 4 : 8; }

inline SamplerPlan sampler_plan(const SamplerArgs& args) {
  const int64_t size = size_of(args.out.type), outputs = args.has_variance ? 2 * args.C : args.C;
  const auto all = [&](auto&& has, const Strided& t, int64_t channels, int64_t run) {
    return !t.data || has(t, args.N, channels, args.P, run);
  };
  SamplerPlan plan{Layout::kStrided, Layout::kStrided, (args.C * args.P + 3) / 4};
  const bool state = aligned16(args.x) && aligned16(args.x0) && aligned16(args.saved) && aligned16(args.history) &&
                     aligned16(args.noise) && args.P % 4 == 0;
  if (!state) return plan;
  const int64_t planar = 16 / size, joint = interleaved_run(outputs, size);
  if (all(is_planar, args.out, outputs, planar) && all(is_planar, args.out2, outputs, planar)) {
    plan.layout = Layout::kPlanar;
    plan.items = args.C * args.P / planar;
  } else if (all(is_interleaved, args.out, outputs, joint) && all(is_interleaved, args.out2, outputs, joint) &&
             (args.C == 3 || args.C == 1)) {
    plan.layout = Layout::kInterleaved;
    plan.items = args.P / joint;
  }
  if (all(is_planar, args.grad, args.C, 4)) {
    plan.grad_layout = Layout::kPlanar;
  } else if (all(is_interleaved, args.grad, args.C, 4)) {
    plan.grad_layout = Layout::kInterleaved;
  }
  return plan;
}

#if !defined(__CUDACC__)
inline int misaligned = 0;  // the host allows misaligned accesses; tests count those that a GPU would not
#endif

// Read 16 bytes at once.
template <typename T>
ADMFAST_HD void read16(const T* from, T* to) {
#if defined(__CUDA_ARCH__)
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  memcpy(to, &v, 16);
#else
#if !defined(__CUDACC__)
  misaligned += !aligned16(from);
#endif
  std::memcpy(to, from, 16);
#endif
}

ADMFAST_HD void write16(const float* from, float* to) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
#else
#if !defined(__CUDACC__)
  misaligned += !aligned16(to);
#endif
  std::memcpy(to, from, 16);
#endif
}

template <typename T, int kCount>
ADMFAST_HD void read_run(const T* from, T (&to)[kCount]) {
  constexpr int kPer = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < kCount; i += kPer) read16(from + i, to + i);
}

template <int kCount>
ADMFAST_HD void write_run(const float (&from)[kCount], float* to) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) write16(from + i, to + i);
}

// Quotient and remainder, by a 32-bit division if possible: a 64-bit division takes a GPU a hundred instructions.
ADMFAST_HD void divide(int64_t a, int64_t b, int64_t& quotient, int64_t& remainder) {
  if (((static_cast<uint64_t>(a) | static_cast<uint64_t>(b)) >> 32) == 0) {
    quotient = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  } else {
    quotient = a / b;
  }
  remainder = a - quotient * b;
}

// A whole number from the device's memory.
ADMFAST_HD int64_t read_counter(const Counter& counter) {
  if (counter.at == nullptr) return counter.offset;
  if (counter.wide) return counter.offset + *static_cast<const int64_t*>(counter.at);
  return counter.offset + *static_cast<const int32_t*>(counter.at);
}

// The row of a call, for all its threads. `runs` is false if the row is outside the table or needs a buffer that wasn't
// given. A device can't raise errors, so x and x0 then become NaN, which no later row removes.
struct RowNow {
  Update u;
  uint32_t noise_row;
  bool runs;
};

ADMFAST_HD RowNow row_now(const SamplerArgs& args) {
  RowNow now{};
  const int64_t row = read_counter(args.row), counter = read_counter(args.noise_row);
  now.noise_row = static_cast<uint32_t>(counter);
  if (row < 0 || row >= args.rows || counter < 0 || counter > 0xFFFFFFFFll) return now;
  now.u = update_of(*reinterpret_cast<const SamplerRow*>(args.table + row * kRowColumns), args.out2.data != nullptr,
                    args.grad.data != nullptr);
  const SamplerRow& k = now.u.k;
  now.runs = k.push_slot < 3.0f && (args.saved || !uses_saved(k)) && (args.history || !uses_history(k)) &&
             (args.has_variance || k.l1 == 0.0f) && (args.noise || args.seeds || !now.u.noise);
  return now;
}

// A thread's values of the state and the inputs, for kCount consecutive elements.
template <int kCount>
struct Run {
  float x[kCount], o[kCount], v[kCount], g[kCount];
};

// Update elements [e, e + kCount) of image n, which must all exist and be aligned; e is a multiple of four.
template <int kCount>
ADMFAST_HD void update_run(const SamplerArgs& args, const RowNow& now, int64_t n, int64_t e, const Run<kCount>& in) {
  const Update& u = now.u;
  const int64_t image = args.C * args.P, at = n * image + e, volume = args.N * image;
  float x0[kCount], next[kCount], more[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) next[i] = predict(u, in.x[i], in.o[i], in.g[i], x0[i]);
  if (u.k.a_s != 0.0f) {
    read_run(args.saved + at, more);
#pragma unroll
    for (int i = 0; i < kCount; ++i) next[i] += u.k.a_s * more[i];
  }
#pragma unroll
  for (int slot = 0; slot < 3; ++slot) {
    if (u.k.d[slot] == 0.0f) continue;
    read_run(args.history + slot * volume + at, more);
#pragma unroll
    for (int i = 0; i < kCount; ++i) next[i] += u.k.d[slot] * more[i];
  }
  if (u.mean || u.noise) {
    float sigma[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) sigma[i] = sigma_of(u.learned ? log_variance(u, in.v[i]) : u.k.l0);
    if (u.mean) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) next[i] += u.k.k_mean * (sigma[i] * sigma[i]) * in.g[i];
    }
    if (u.noise) {
      if (args.noise) {
        read_run(args.noise + at, more);
      } else {
#pragma unroll
        for (int i = 0; i < kCount; i += 4)
          normal_block(args.seeds[n], static_cast<uint64_t>(e + i) / 4, now.noise_row, args.stream, more + i);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) next[i] += u.k.k_z * sigma[i] * more[i];
    }
  }
  if (u.k.save != 0.0f) write_run(in.x, args.saved + at);
  if (u.k.push_slot >= 0.0f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) more[i] = pushed(u, in.x[i], x0[i]);
    write_run(more, args.history + static_cast<int64_t>(u.k.push_slot) * volume + at);
  }
  write_run(x0, args.x0 + at);
  write_run(next, args.x + at);
}

// Read the gradient of kCount positions of one channel.
template <int kCount>
ADMFAST_HD void read_grad(const SamplerArgs& args, Layout layout, int64_t n, int64_t c, int64_t p, float (&g)[kCount]) {
  const float* from = static_cast<const float*>(args.grad.data) + n * args.grad.n + c * args.grad.c + p * args.grad.p;
  if (layout == Layout::kPlanar) {
    read_run(from, g);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) g[i] = from[i * args.grad.p];
  }
}

template <typename T>
ADMFAST_HD const T* place(const Strided& t, int64_t n, int64_t c, int64_t p) {
  return static_cast<const T*>(t.data) + n * t.n + c * t.c + p * t.p;
}

// Work of one thread in the planar layout: one run of one channel.
template <typename T>
ADMFAST_HD void planar_item(const SamplerArgs& args, const SamplerPlan& plan, const RowNow& now, int64_t n,
                            int64_t item) {
  constexpr int kCount = 16 / sizeof(T);
  const int64_t e = item * kCount;
  int64_t c, p;
  divide(e, args.P, c, p);
  Run<kCount> run{};
  T raw[kCount], raw2[kCount];
  read_run(args.x + n * args.C * args.P + e, run.x);
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    if (part == 1 && !now.u.learned) continue;
    float(&to)[kCount] = part == 0 ? run.o : run.v;
    const bool mixes = part == 0 && now.u.mixes;  // the variance is the first output's
    read_run(place<T>(args.out, n, part * args.C + c, p), raw);
    if (mixes) read_run(place<T>(args.out2, n, c, p), raw2);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      to[i] = to_float(raw[i]);
      if (mixes) to[i] = mixed(to[i], to_float(raw2[i]), now.u.k.mix);
    }
  }
  if (now.u.pre || now.u.post || now.u.mean) read_grad(args, plan.grad_layout, n, c, p, run.g);
  update_run(args, now, n, e, run);
}

// Work of one thread in the interleaved layout: a run of positions in all channels.
template <typename T, int kC, int kOutputs>
ADMFAST_HD void interleaved_item(const SamplerArgs& args, const SamplerPlan& plan, const RowNow& now, int64_t n,
                                 int64_t item) {
  constexpr int kCount = interleaved_run(kOutputs, sizeof(T));
  const int64_t p = item * kCount;
  const bool guided = now.u.pre || now.u.post || now.u.mean;
  Run<kCount> run[kC] = {};
  T raw[kCount * kOutputs], raw2[kCount * kOutputs];
  read_run(place<T>(args.out, n, 0, p), raw);
  const bool mixes = now.u.mixes;
  if (mixes) read_run(place<T>(args.out2, n, 0, p), raw2);
#pragma unroll
  for (int c = 0; c < kC; ++c) read_run(args.x + (n * kC + c) * args.P + p, run[c].x);
  if (guided && plan.grad_layout == Layout::kInterleaved) {
    float g[kCount * kC];
    read_run(place<float>(args.grad, n, 0, p), g);
#pragma unroll
    for (int i = 0; i < kCount * kC; ++i) run[i % kC].g[i / kC] = g[i];
  } else if (guided) {
#pragma unroll
    for (int c = 0; c < kC; ++c) read_grad(args, plan.grad_layout, n, c, p, run[c].g);
  }
#pragma unroll
  for (int i = 0; i < kCount * kOutputs; ++i) {
    float o = to_float(raw[i]);
    const int c = i % kOutputs;
    if (mixes && c < kC) o = mixed(o, to_float(raw2[i]), now.u.k.mix);
    (c < kC ? run[c % kC].o : run[c % kC].v)[i / kOutputs] = o;
  }
#pragma unroll
  for (int c = 0; c < kC; ++c) update_run(args, now, n, c * args.P + p, run[c]);
}

template <typename T>
ADMFAST_HD float read_output(const SamplerArgs& args, const Update& u, int64_t n, int64_t c, int64_t p) {
  const float o = to_float(*place<T>(args.out, n, c, p));
  const bool mixes = c < args.C && u.mixes;
  return mixes ? mixed(o, to_float(*place<T>(args.out2, n, c, p)), u.k.mix) : o;
}

// Work of one thread in any layout: the elements of one block of noise, one by one.
template <typename T>
ADMFAST_HD void strided_item(const SamplerArgs& args, const RowNow& now, int64_t n, int64_t item) {
  const Update& u = now.u;
  const int64_t image = args.C * args.P, volume = args.N * image;
  float z[4] = {};
  if (u.noise && !args.noise)
    normal_block(args.seeds[n], static_cast<uint64_t>(item), now.noise_row, args.stream, z);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t e = item * 4 + i, at = n * image + e;
    if (e >= image) continue;
    int64_t c, p;
    divide(e, args.P, c, p);
    const float x = args.x[at], g = u.pre || u.post || u.mean ? *place<float>(args.grad, n, c, p) : 0.0f;
    float x0, next = predict(u, x, read_output<T>(args, u, n, c, p), g, x0);
    if (u.k.a_s != 0.0f) next += u.k.a_s * args.saved[at];
    for (int slot = 0; slot < 3; ++slot)
      if (u.k.d[slot] != 0.0f) next += u.k.d[slot] * args.history[slot * volume + at];
    if (u.mean || u.noise) {
      const float sigma =
          sigma_of(u.learned ? log_variance(u, read_output<T>(args, u, n, args.C + c, p)) : u.k.l0);
      if (u.mean) next += u.k.k_mean * (sigma * sigma) * g;
      if (u.noise) next += u.k.k_z * sigma * (args.noise ? args.noise[at] : z[i]);
    }
    if (u.k.save != 0.0f) args.saved[at] = x;
    if (u.k.push_slot >= 0.0f) args.history[static_cast<int64_t>(u.k.push_slot) * volume + at] = pushed(u, x, x0);
    args.x0[at] = x0;
    args.x[at] = next;
  }
}

// Piece `item` of image n, in a layout known to the compiler. kC and kOutputs are 0 unless it is interleaved.
template <typename T, Layout kLayout, int kC, int kOutputs>
ADMFAST_HD void sampler_item(const SamplerArgs& args, const SamplerPlan& plan, const RowNow& now, int64_t n,
                             int64_t item) {
  if constexpr (kLayout == Layout::kPlanar) {
    planar_item<T>(args, plan, now, n, item);
  } else if constexpr (kLayout == Layout::kInterleaved) {
    interleaved_item<T, kC, kOutputs>(args, plan, now, n, item);
  } else {
    strided_item<T>(args, now, n, item);
  }
}

// Share `index` of the `count` shares of the work: that of one thread on a GPU, or of one loop iteration on the host.
template <typename T, Layout kLayout, int kC, int kOutputs>
ADMFAST_HD void sampler_share(const SamplerArgs& args, const SamplerPlan& plan, const RowNow& now, int64_t index,
                              int64_t count) {
  if (!now.runs) {
    for (int64_t i = index; i < args.N * args.C * args.P; i += count)
      args.x[i] = args.x0[i] = float_of_bits(0x7FC00000u);
    return;
  }
  for (int64_t i = index; i < args.N * plan.items; i += count) {
    int64_t n, item;
    divide(i, plan.items, n, item);
    sampler_item<T, kLayout, kC, kOutputs>(args, plan, now, n, item);
  }
}

// The normals of block `item` of image n; an image has `count` elements.
ADMFAST_HD void normal_item(const uint64_t* seeds, uint32_t row, uint32_t stream, int64_t count, int64_t n,
                            int64_t item, float* z) {
  float values[4];
  normal_block(seeds[n], static_cast<uint64_t>(item), row, stream, values);
  float* to = z + n * count + 4 * item;
  if (4 * item + 4 <= count && count % 4 == 0 && aligned16(z)) {
    write16(values, to);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (4 * item + i < count) to[i] = values[i];
  }
}

}  // namespace admfast
