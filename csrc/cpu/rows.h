// Kernels on single rows, for the plan (csrc/cpu/model.cpp): norms, and rope_append. Floats unless said.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace fastloop {

// Where keys and values live: pages [P][Q][G][K] in float32 or bfloat16 (fastloop_format).
struct Pages {
    int32_t format;
    void* keys;
    void* values;
    size_t page_tokens, groups, width;  // Q, G, K
};

}  // namespace fastloop

// y = x / sqrt(mean(x^2) + eps) * weight; [count] each.
FASTLOOP_DECLARE_KERNEL(void rms_norm(const float* x, const float* weight, size_t count, float eps, float* y))
// y = (x - mean) / sqrt(var + eps) * weight + bias; [count] each.
FASTLOOP_DECLARE_KERNEL(void layer_norm(const float* x, const float* weight, const float* bias, size_t count, float eps,
                                        float* y))
// One row: qkv [(H + 2G) K] + bias (or NULL), rotated by turn [K / 2][2] = (cos, sin) -> q [H K]; key and value go to slot
// `slot` of the pages, or nowhere where it is negative.
FASTLOOP_DECLARE_KERNEL(void rope_append(const float* qkv, const float* bias, const float* turn, int64_t slot, size_t heads,
                                         const ::fastloop::Pages& pages, float* q))
