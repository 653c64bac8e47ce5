// Loops of self-attention in bfloat16 and of its gradient; how they divide the work is in csrc/README.md. Nothing here
// depends on torch or on threads.
#pragma once

#include <cstdint>

#include "half_types.h"

namespace admfast {

constexpr int64_t kAttentionQueries = 32;  // queries that the forward takes at a time
constexpr int64_t kAttentionKeys = 128;    // keys that the gradient takes at a time

// The queries, keys and values of a head: rows of `width` adjacent elements for each token.
struct AttentionHead {
  const bfloat16 *q, *k, *v;
  int64_t row;  // elements from token to token
  int64_t tokens, width;
  float scale;  // of the logits
};

struct AttentionLoops {
  const char* name;
  // The bytes of memory that a call of `forward` or `gradient` needs, a multiple of 64.
  int64_t (*memory)(const AttentionHead& head, bool gradient);
  // out = softmax(scale q k^T) v, and the logarithm of the sum of the exponentials, for queries [begin, end); begin is
  // a multiple of kAttentionQueries. `ready`: the memory holds this head's keys and values from an earlier call.
  void (*forward)(const AttentionHead& head, int64_t begin, int64_t end, bool ready, bfloat16* out, int64_t out_row,
                  float* lse, char* memory);
  // The gradients of q, k and v; dout and out have rows `out_row` apart, the gradients rows `row` apart.
  void (*gradient)(const AttentionHead& head, const bfloat16* dout, const bfloat16* out, int64_t out_row,
                   const float* lse, bfloat16* dq, bfloat16* dk, bfloat16* dv, int64_t row, char* memory);
};

extern const AttentionLoops attention_generic;
#if defined(__x86_64__) && !defined(__clang__)
extern const AttentionLoops attention_avx512_bf16, attention_amx;
#endif

// The widest loops for the instruction set of cpu_isa.h.
const AttentionLoops& attention_loops();

}  // namespace admfast
