// The update on the CPU, in loops that the compiler vectorises. Include it once for each instruction set, after
// `#pragma GCC target`. ADMFAST_ISA is the namespace, ADMFAST_LOOPS and ADMFAST_LOOPS_NAME are the struct of the loops
// and its name, and ADMFAST_BITS is the width of the vectors that intrinsics may use, or 0.
// This file includes nothing, so that no other function is compiled for an instruction set that the machine may lack.

namespace admfast {
namespace ADMFAST_ISA {

constexpr int64_t kPiece = 256;     // positions processed at a time: all buffers stay in the first-level cache
constexpr int64_t kBlocks = 64;     // Philox blocks made at a time
constexpr int64_t kInterleaved = 6;  // most channels with which an interleaved tensor is split instead of gathered

// The words of kBlocks blocks from `first` on. Even and odd blocks are kept in separate vectors of 64-bit lanes, so a
// widening product is one instruction; GCC would choose the 64-bit product, which costs three times as much.
static inline void philox_blocks(uint64_t seed, uint32_t row, uint32_t stream, uint64_t first,
                                 uint32_t (&r)[4][kBlocks]) {
#if ADMFAST_BITS == 512
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  const __m512i even = _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0);
  for (int64_t j = 0; j < kBlocks; j += 16) {
    __m512i c[2][4];
    for (int odd = 0; odd < 2; ++odd) {
      const __m512i block = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first) + j + odd), even);
      c[odd][0] = block;
      c[odd][1] = _mm512_srli_epi64(block, 32);
      c[odd][2] = _mm512_set1_epi64(row);
      c[odd][3] = _mm512_set1_epi64(stream);
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1)
      for (int odd = 0; odd < 2; ++odd) {
        const __m512i p0 = _mm512_mul_epu32(c[odd][0], m0), p1 = _mm512_mul_epu32(c[odd][2], m1);
        c[odd][0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c[odd][1], _mm512_set1_epi64(k0), 0x96);
        c[odd][1] = p1;
        c[odd][2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c[odd][3], _mm512_set1_epi64(k1), 0x96);
        c[odd][3] = p0;
      }
    for (int w = 0; w < 4; ++w)
      _mm512_storeu_si512(&r[w][j], _mm512_mask_blend_epi32(0xAAAA, c[0][w], _mm512_slli_epi64(c[1][w], 32)));
  }
#elif ADMFAST_BITS == 256
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  const __m256i even = _mm256_set_epi64x(6, 4, 2, 0);
  for (int64_t j = 0; j < kBlocks; j += 8) {
    __m256i c[2][4];
    for (int odd = 0; odd < 2; ++odd) {
      const __m256i block = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first) + j + odd), even);
      c[odd][0] = block;
      c[odd][1] = _mm256_srli_epi64(block, 32);
      c[odd][2] = _mm256_set1_epi64x(row);
      c[odd][3] = _mm256_set1_epi64x(stream);
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1)
      for (int odd = 0; odd < 2; ++odd) {
        const __m256i p0 = _mm256_mul_epu32(c[odd][0], m0), p1 = _mm256_mul_epu32(c[odd][2], m1);
        const __m256i high0 = _mm256_srli_epi64(p0, 32), high1 = _mm256_srli_epi64(p1, 32);
        c[odd][0] = _mm256_xor_si256(_mm256_xor_si256(high1, c[odd][1]), _mm256_set1_epi64x(k0));
        c[odd][1] = p1;
        c[odd][2] = _mm256_xor_si256(_mm256_xor_si256(high0, c[odd][3]), _mm256_set1_epi64x(k1));
        c[odd][3] = p0;
      }
    for (int w = 0; w < 4; ++w)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(&r[w][j]),
                          _mm256_blend_epi32(c[0][w], _mm256_slli_epi64(c[1][w], 32), 0xAA));
  }
#else
  for (int64_t j = 0; j < kBlocks; ++j) {
    const uint64_t block = first + static_cast<uint64_t>(j);
    uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), row, stream};
    philox4x32_10(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    for (int w = 0; w < 4; ++w) r[w][j] = c[w];
  }
#endif
}

// The 4 * kBlocks normals from block `first` on.
static void normal_blocks(uint64_t seed, uint32_t row, uint32_t stream, uint64_t first, float* z) {
  alignas(64) uint32_t r[4][kBlocks];
  alignas(64) float v[4][kBlocks];
  philox_blocks(seed, row, stream, first, r);
  for (int64_t j = 0; j < kBlocks; ++j) box_muller(r[0][j], r[1][j], v[0][j], v[1][j]);
  for (int64_t j = 0; j < kBlocks; ++j) box_muller(r[2][j], r[3][j], v[2][j], v[3][j]);
  for (int64_t j = 0; j < kBlocks; ++j) {
    z[4 * j] = v[0][j];
    z[4 * j + 1] = v[1][j];
    z[4 * j + 2] = v[2][j];
    z[4 * j + 3] = v[3][j];
  }
}

static void normal(uint64_t seed, uint32_t row, uint32_t stream, int64_t begin, int64_t end, float* z) {
  constexpr int64_t kValues = 4 * kBlocks;
  alignas(64) float values[kValues];
  while (begin < end) {
    const int64_t skipped = begin % 4;
    const int64_t count = end - begin < kValues - skipped ? end - begin : kValues - skipped;
    float* to = count == kValues ? z : values;
    normal_blocks(seed, row, stream, static_cast<uint64_t>(begin / 4), to);
    if (to == values) std::memcpy(z, values + skipped, static_cast<size_t>(count) * sizeof(float));
    begin += count;
    z += count;
  }
}


// Separate k interleaved rows: to[j][i] = from[k * i + j].
template <int k>
static void split(const float* from, int64_t count, float* to, int64_t stride) {
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < k; ++j) to[j * stride + i] = from[k * i + j];
}

// The channels of a piece of one tensor as rows of floats, for any strides and type.
class Rows {
 public:
  Rows(const Strided& tensor, int64_t channels)
      : from_(tensor), channels_(channels),
        joint_(tensor.data && tensor.c == 1 && tensor.p == channels && channels > 1 && channels <= kInterleaved &&
               channels != 5) {}

  bool given() const { return from_.data != nullptr; }
  bool joint() const { return joint_; }

  // Select positions [begin, begin + count) of image n.
  void begin(int64_t n, int64_t begin, int64_t count) {
    start_ = n * from_.n + begin * from_.p;
    count_ = count;
    if (joint_) read_joint();
  }

  // Channel c as floats; valid until the next call.
  const float* row(int64_t c) {
    if (joint_) return values_ + c * kPiece;
    const int64_t offset = start_ + c * from_.c;
    if (from_.type == Type::kFloat32 && from_.p == 1) return static_cast<const float*>(from_.data) + offset;
    switch (from_.type) {
      case Type::kFloat32: gather(static_cast<const float*>(from_.data) + offset); break;
      case Type::kBFloat16: gather(static_cast<const bfloat16*>(from_.data) + offset); break;
      case Type::kFloat16: gather(static_cast<const float16*>(from_.data) + offset); break;
    }
    return values_;
  }

 private:
  template <typename T>
  void gather(const T* from) {
    const int64_t stride = from_.p;
    if (stride == 1) {
      for (int64_t i = 0; i < count_; ++i) values_[i] = to_float(from[i]);
    } else {
      for (int64_t i = 0; i < count_; ++i) values_[i] = to_float(from[i * stride]);
    }
  }

  template <typename T>
  const float* contiguous(const T* from, float* to) {
    const int64_t count = count_ * channels_;
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
    return to;
  }

  // Six channels are split by two and then by three, four by two and by two: loops that the compiler vectorises.
  void read_joint() {
    alignas(64) float flat[kInterleaved * kPiece], half[kInterleaved * kPiece];
    const float* from = flat;
    switch (from_.type) {
      case Type::kFloat32: from = static_cast<const float*>(from_.data) + start_; break;
      case Type::kBFloat16: contiguous(static_cast<const bfloat16*>(from_.data) + start_, flat); break;
      case Type::kFloat16: contiguous(static_cast<const float16*>(from_.data) + start_, flat); break;
    }
    if (channels_ == 2) return split<2>(from, count_, values_, kPiece);
    if (channels_ == 3) return split<3>(from, count_, values_, kPiece);
    const int64_t middle = kInterleaved / 2 * kPiece;
    split<2>(from, count_ * channels_ / 2, half, middle);
    for (int64_t j = 0; j < 2; ++j) {
      if (channels_ == 4) split<2>(half + j * middle, count_, values_ + j * kPiece, 2 * kPiece);
      if (channels_ == 6) split<3>(half + j * middle, count_, values_ + j * kPiece, 2 * kPiece);
    }
  }

  const Strided& from_;
  const int64_t channels_;
  const bool joint_;
  int64_t start_ = 0, count_ = 0;
  alignas(64) float values_[kInterleaved * kPiece];
};

template <bool kGrad>
static void predict_row(const Update& update, const float* x, const float* o, const float* g, int64_t count,
                        float* x0, float* next) {
  const Update u = update;
  for (int64_t i = 0; i < count; ++i) next[i] = predict(u, x[i], o[i], kGrad ? g[i] : 0.0f, x0[i]);
}

static void push_row(const Update& update, const float* x, const float* x0, int64_t count, float* to) {
  const Update u = update;
  for (int64_t i = 0; i < count; ++i) to[i] = pushed(u, x[i], x0[i]);
}

template <bool kLearned, bool kMean, bool kNoise>
static void spread_row(const Update& update, const float* v, const float* g, const float* z, int64_t count,
                       const float* next, float* x) {
  const Update u = update;
  const float constant = sigma_of(u.k.l0);
  for (int64_t i = 0; i < count; ++i) {
    const float sigma = kLearned ? sigma_of(log_variance(u, v[i])) : constant;
    float value = next[i];
    if (kMean) value += u.k.k_mean * (sigma * sigma) * g[i];
    if (kNoise) value += u.k.k_z * sigma * z[i];
    x[i] = value;
  }
}

using Spread = void (*)(const Update&, const float*, const float*, const float*, int64_t, const float*, float*);
static Spread spread_of(const Update& u) {
  if (u.mean && u.noise) return u.learned ? spread_row<true, true, true> : spread_row<false, true, true>;
  if (u.mean) return u.learned ? spread_row<true, true, false> : spread_row<false, true, false>;
  return u.learned ? spread_row<true, false, true> : spread_row<false, false, true>;
}

// The inputs of one call, and the update of one channel's row.
class Piece {
 public:
  Piece(const SamplerArgs& args, const SamplerRow& row, uint32_t noise_row, int64_t n)
      : args_(args), u_(update_of(row, args.out2.data != nullptr, args.grad.data != nullptr)),
        noise_row_(noise_row), n_(n), out_(args.out, outputs()), out2_(args.out2, outputs()), grad_(args.grad, args.C) {}

  bool joint() const { return out_.joint() || out2_.joint() || grad_.joint(); }

  void begin(int64_t position, int64_t count) {
    position_ = position;
    count_ = count;
    for (Rows* rows : {&out_, &out2_, &grad_})
      if (rows->given()) rows->begin(n_, position, count);
  }

  void update(int64_t c) {
    const int64_t image = args_.C * args_.P, element = c * args_.P + position_, state = n_ * image + element;
    float* x = args_.x + state;
    float* x0 = args_.x0 + state;
    const float* g = u_.pre || u_.post || u_.mean ? grad_.row(c) : nullptr;
    alignas(64) float next[kPiece], mean[kPiece], noise[kPiece];
    (u_.pre || u_.post ? predict_row<true> : predict_row<false>)(u_, x, mean_output(c, mean), g, count_, x0, next);
    if (u_.k.a_s != 0.0f) add(u_.k.a_s, args_.saved + state, next);
    for (int64_t slot = 0; slot < 3; ++slot)
      if (u_.k.d[slot] != 0.0f) add(u_.k.d[slot], args_.history + slot * args_.N * image + state, next);
    const size_t bytes = static_cast<size_t>(count_) * sizeof(float);
    if (u_.k.save != 0.0f) std::memcpy(args_.saved + state, x, bytes);
    if (u_.k.push_slot >= 0.0f)
      push_row(u_, x, x0, count_, args_.history + static_cast<int64_t>(u_.k.push_slot) * args_.N * image + state);
    if (!u_.mean && !u_.noise) {
      std::memcpy(x, next, bytes);
      return;
    }
    const float* z = args_.noise ? args_.noise + state : noise;
    if (u_.noise && !args_.noise)
      normal(args_.seeds[n_], noise_row_, args_.stream, element, element + count_, noise);
    const float* v = u_.learned ? out_.row(args_.C + c) : nullptr;
    spread_of(u_)(u_, v, g, z, count_, next, x);
  }

 private:
  int64_t outputs() const { return args_.has_variance ? 2 * args_.C : args_.C; }

  const float* mean_output(int64_t c, float* buffer) {
    const float* o = out_.row(c);
    if (!u_.mixes) return o;
    const float* o2 = out2_.row(c);
    for (int64_t i = 0; i < count_; ++i) buffer[i] = mixed(o[i], o2[i], u_.k.mix);
    return buffer;
  }

  void add(float k, const float* from, float* to) const {
    for (int64_t i = 0; i < count_; ++i) to[i] += k * from[i];
  }

  const SamplerArgs& args_;
  const Update u_;
  const uint32_t noise_row_;
  const int64_t n_;
  Rows out_, out2_, grad_;
  int64_t position_ = 0, count_ = 0;
};

static void update(const SamplerArgs& args, const SamplerRow& row, uint32_t noise_row, int64_t n, int64_t begin,
                   int64_t end) {
  Piece piece(args, row, noise_row, n);
  // Planar tensors are processed channel by channel; interleaved ones are read once for all channels.
  const int64_t together = piece.joint() ? args.C : 1;
  for (int64_t first = 0; first < args.C; first += together)
    for (int64_t position = begin; position < end; position += kPiece) {
      piece.begin(position, kPiece < end - position ? kPiece : end - position);
      for (int64_t c = first; c < first + together; ++c) piece.update(c);
    }
}

}  // namespace ADMFAST_ISA

const SamplerLoops ADMFAST_LOOPS = {ADMFAST_LOOPS_NAME, ADMFAST_ISA::update, ADMFAST_ISA::normal};

}  // namespace admfast
