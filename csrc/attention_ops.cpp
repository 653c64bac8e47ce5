// Self-attention in bfloat16 as torch ops: checks, heads, division of the work.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <ATen/ops/empty.h>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>

#include "attention.h"
#include "tensors.h"

namespace admfast {
namespace {

constexpr int64_t kTasks = 4;  // tasks for each thread, so that a thread that is slowed down takes fewer of them

void check(const char* op, const char* name, const Tensor& t, at::ScalarType type) {
  TORCH_CHECK(t.scalar_type() == type && t.is_cpu(), op, ": ", name, " is ", t.scalar_type(), " on ", t.device(), "; ",
              type, " on the CPU");
}

// The heads of qkv [N, S, 3 h d], which is laid out [3, h, d], or [h, 3, d] in the legacy order.
struct Heads {
  const Tensor& qkv;
  int64_t N, S, h, d, part, step;  // elements from q to k and from k to v, and from head to head

  Heads(const char* op, const Tensor& qkv, int64_t heads, bool legacy) : qkv(qkv), h(heads) {
    check(op, "qkv", qkv, at::kBFloat16);
    TORCH_CHECK(qkv.dim() == 3 && heads > 0 && qkv.size(2) > 0 && qkv.size(2) % (3 * heads) == 0, op,
                ": qkv must be [N, S, 3*h*d] with h = ", heads, ", it is ", qkv.sizes());
    TORCH_CHECK(qkv.stride(2) == 1, op, ": the last dimension of qkv is not contiguous");
    N = qkv.size(0), S = qkv.size(1), d = qkv.size(2) / (3 * h);
    part = legacy ? d : h * d;
    step = legacy ? 3 * d : d;
  }

  int64_t at(int64_t i) const { return i % h * step; }

  AttentionHead head(int64_t i) const {
    const auto* q = static_cast<const bfloat16*>(qkv.const_data_ptr()) + i / h * qkv.stride(0) + at(i);
    return {q, q + part, q + 2 * part, qkv.stride(1), S, d, static_cast<float>(1 / std::sqrt(static_cast<double>(d)))};
  }
};

char* kept(int64_t bytes) {
  static thread_local KeptMemory memory;
  return reinterpret_cast<char*>(memory.of(divided_up(bytes, 4)));
}

// Run work(task) for all tasks. They are taken one by one, because other programs slow down the threads of a shared
// machine unequally.
template <typename Work>
void share(int64_t tasks, Work work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
    auto own = work();
    for (int64_t task; (task = next++) < tasks;) own(task);
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& qkv, int64_t heads, bool legacy) {
  const Heads all("attention_fwd", qkv, heads, legacy);
  const int64_t width = all.h * all.d;
  Tensor out = at::empty({all.N, all.S, width}, qkv.options());
  Tensor lse = at::empty({all.N, all.h, all.S}, qkv.options().dtype(at::kFloat));
  if (out.numel() == 0) return {out, lse};
  auto* to = static_cast<bfloat16*>(out.mutable_data_ptr());
  auto* sums = lse.mutable_data_ptr<float>();
  const int64_t count = all.N * all.h, blocks = divided_up(all.S, kAttentionQueries);
  const int64_t parts = std::clamp(divided_up(kTasks * at::get_num_threads(), count), int64_t{1}, blocks);
  share(count * parts, [&] {
    char* memory = kept(attention_loops().memory(all.head(0), false));
    return [&, memory, made = int64_t{-1}](int64_t task) mutable {
      const int64_t i = task / parts, part = task % parts;
      const auto bound = [&](int64_t p) { return std::min(all.S, blocks * p / parts * kAttentionQueries); };
      attention_loops().forward(all.head(i), bound(part), bound(part + 1), made == i,
                                to + i / all.h * all.S * width + i % all.h * all.d, width, sums + i * all.S, memory);
      made = i;
    };
  });
  return {out, lse};
}

Tensor backward(const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& lse, int64_t heads,
                bool legacy) {
  const char* op = "attention_bwd";
  const Heads all(op, qkv, heads, legacy);
  const int64_t width = all.h * all.d;
  for (const auto& [name, t] : {std::pair{"dout", &dout}, std::pair{"out", &out}}) {
    check(op, name, *t, at::kBFloat16);
    TORCH_CHECK(t->sizes() == at::IntArrayRef({all.N, all.S, width}) && t->is_contiguous(), op, ": ", name,
                " must be contiguous ", at::IntArrayRef({all.N, all.S, width}), ", it is ", t->sizes());
  }
  check(op, "lse", lse, at::kFloat);
  TORCH_CHECK(lse.sizes() == at::IntArrayRef({all.N, all.h, all.S}) && lse.is_contiguous(), op,
              ": lse must be contiguous ", at::IntArrayRef({all.N, all.h, all.S}), ", it is ", lse.sizes());
  Tensor dqkv = at::empty({all.N, all.S, 3 * width}, qkv.options());
  if (dqkv.numel() == 0) return dqkv;
  auto* to = static_cast<bfloat16*>(dqkv.mutable_data_ptr());
  const auto* gradients = static_cast<const bfloat16*>(dout.const_data_ptr());
  const auto* results = static_cast<const bfloat16*>(out.const_data_ptr());
  share(all.N * all.h, [&] {
    char* memory = kept(attention_loops().memory(all.head(0), true));
    return [&, memory](int64_t i) {
      const int64_t token = i / all.h * all.S, own = token * width + i % all.h * all.d;
      bfloat16* dq = to + token * 3 * width + all.at(i);
      attention_loops().gradient(all.head(i), gradients + own, results + own, width,
                                 lse.const_data_ptr<float>() + i * all.S, dq, dq + all.part, dq + 2 * all.part,
                                 3 * width, memory);
    };
  });
  return dqkv;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(admfast, m) {
  m.def("attention_fwd(Tensor qkv, int heads, bool legacy_order) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int heads, bool legacy_order) -> Tensor");
}

TORCH_LIBRARY_IMPL(admfast, CPU, m) {
  m.impl("attention_fwd", &forward);
  m.impl("attention_bwd", &backward);
}

}  // namespace admfast
