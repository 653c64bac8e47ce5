// Runs the CPU loops of every instruction set that this machine has, and the CUDA kernel's body, over buffers of
// exactly the size they need, and prints a digest of the results for each: they must agree, and a sanitizer must be
// silent.
#include <cstdio>
#include <memory>
#include <vector>

#include "sampler_step_kernel.h"
#include "numbers.h"

using namespace admfast;

namespace {

uint64_t digest_of = 0;

void add_to_digest(const float* data, size_t count) {
  for (size_t i = 0; i < count; ++i) digest_of = (digest_of ^ bits_of_float(data[i])) * 0x100000001B3ull;
}

struct Buffer {
  std::unique_ptr<unsigned char[]> bytes;
  Strided strided;
  // Values [N, channels, P], in a buffer without a byte to spare.
  Buffer(Numbers& numbers, int64_t N, int64_t channels, int64_t P, Type type, bool interleaved) {
    const int64_t count = N * channels * P;
    bytes = std::make_unique<unsigned char[]>(static_cast<size_t>(count * size_of(type)));
    for (int64_t i = 0; i < count; ++i) {
      const float value = numbers.next();
      const uint16_t half = static_cast<uint16_t>(bits_of_float(value) >> 16);
      if (type == Type::kFloat32) {
        std::memcpy(bytes.get() + 4 * i, &value, 4);
      } else {
        std::memcpy(bytes.get() + 2 * i, &half, 2);
      }
    }
    strided = {bytes.get(), channels * P, interleaved ? 1 : P, interleaved ? channels : 1, type};
  }
};

template <typename Run>
void cases(Run&& run) {
  const int64_t shapes[][3] = {{1, 3, 35}, {2, 3, 64}, {1, 1, 1}, {2, 1, 300}, {1, 3, 1500}, {2, 5, 77}, {1, 2, 512}};
  for (const auto& [N, C, P] : shapes)
    for (Type type : {Type::kFloat32, Type::kBFloat16, Type::kFloat16})
      for (int bits = 0; bits < 16; ++bits) {
        const bool interleaved = bits & 1, variance = bits & 2, full = bits & 4, given = bits & 8;
        Numbers numbers;
        const int64_t outputs = variance ? 2 * C : C;
        const Buffer out(numbers, N, outputs, P, type, interleaved), out2(numbers, N, outputs, P, type, interleaved);
        const Buffer grad(numbers, N, C, P, Type::kFloat32, interleaved);
        const Buffer noise(numbers, N, C, P, Type::kFloat32, false);
        std::vector<float> state(static_cast<size_t>(6 * N * C * P));
        for (float& value : state) value = numbers.next();
        SamplerRow row{0.9f, -0.4f, 0.1f, 0.2f, -1, variance ? 0.5f : 0, 0.3f, 0, 0.6f, {}, 0.3f, 0.7f, 0.5f, 1, 0, 0, 0, -1};
        if (full) row.a_s = row.d[0] = row.d[2] = row.save = 1, row.p_x = 0.4f, row.p_0 = -1.3f, row.push_slot = 1;
        const std::vector<uint64_t> seeds{0x0123456789ABCDEFull, ~0ull};
        SamplerArgs args{};
        args.N = N, args.C = C, args.P = P;
        const size_t volume = static_cast<size_t>(N * C * P);
        args.x = state.data(), args.x0 = args.x + volume;
        args.saved = full ? args.x0 + volume : nullptr, args.history = full ? args.saved + volume : nullptr;
        args.out = out.strided;
        if (full) args.out2 = out2.strided;
        if (bits != 2) args.grad = grad.strided;
        args.has_variance = variance, args.seeds = seeds.data();
        args.noise = given ? reinterpret_cast<const float*>(noise.bytes.get()) : nullptr;
        args.table = &row.k_x, args.rows = 1, args.stream = 1;
        args.noise_row.offset = 7;
        run(args, row);
        add_to_digest(state.data(), state.size());
      }
}

void with_loops(const SamplerLoops& loops) {
  digest_of = 0xCBF29CE484222325ull;
  cases([&](const SamplerArgs& args, const SamplerRow& row) {
    for (int64_t n = 0; n < args.N; ++n)
      for (int64_t p = 0; p < args.P; p += 700) loops.update(args, row, 7, n, p, args.P < p + 700 ? args.P : p + 700);
  });
  for (int64_t begin : {0, 4, 5, 255, 1022})
    for (int64_t count : {0, 1, 3, 4, 5, 255, 256, 257, 1000}) {
      std::vector<float> z(static_cast<size_t>(count));
      loops.normal(0x0123456789ABCDEFull, 5, 1, begin, begin + count, z.data());
      add_to_digest(z.data(), z.size());
    }
  std::printf("%s %016llx\n", loops.name, static_cast<unsigned long long>(digest_of));
}

template <typename T>
void body(const SamplerArgs& args, const SamplerPlan& plan) {
  const RowNow now = row_now(args);
  const bool three = args.C == 3, joint = plan.layout == Layout::kInterleaved;
  for (int64_t i = 0; i < 50; ++i) {
    if (plan.layout == Layout::kPlanar) sampler_share<T, Layout::kPlanar, 0, 0>(args, plan, now, i, 50);
    if (plan.layout == Layout::kStrided) sampler_share<T, Layout::kStrided, 0, 0>(args, plan, now, i, 50);
    if (joint && !three) sampler_share<T, Layout::kInterleaved, 1, 2>(args, plan, now, i, 50);
    if (joint && three && args.has_variance) sampler_share<T, Layout::kInterleaved, 3, 6>(args, plan, now, i, 50);
    if (joint && three && !args.has_variance) sampler_share<T, Layout::kInterleaved, 3, 3>(args, plan, now, i, 50);
  }
}

void with_body() {
  digest_of = 0xCBF29CE484222325ull;
  cases([&](const SamplerArgs& args, const SamplerRow&) {
    const SamplerPlan plan = sampler_plan(args);
    if (args.out.type == Type::kFloat32) body<float>(args, plan);
    if (args.out.type == Type::kBFloat16) body<bfloat16>(args, plan);
    if (args.out.type == Type::kFloat16) body<float16>(args, plan);
  });
  for (int64_t begin : {0, 4, 5, 255, 1022})
    for (int64_t count : {0, 1, 3, 4, 5, 255, 256, 257, 1000}) {
      const uint64_t seed = 0x0123456789ABCDEFull;
      std::vector<float> z(static_cast<size_t>(begin + count));
      for (int64_t item = 0; item < (begin + count + 3) / 4; ++item)
        normal_item(&seed, 5, 1, begin + count, 0, item, z.data());
      add_to_digest(z.data() + begin, static_cast<size_t>(count));
    }
  std::printf("body %016llx\n", static_cast<unsigned long long>(digest_of));
}

}  // namespace

int main() {
  with_loops(sampler_loops_generic);
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (__builtin_cpu_supports("avx2")) with_loops(sampler_loops_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    with_loops(sampler_loops_avx512);
#endif
  with_body();
  std::printf("chosen %s\n", sampler_loops().name);
}
