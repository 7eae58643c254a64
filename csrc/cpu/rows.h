// Kernels on single rows: norms, rope_append and decide. Floats unless said.
#pragma once

#include <cmath>
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

// (cos, sin) of position x inv_freq [half] -> turn [half][2]; in float64: at hour-long positions a float32 angle is 0.01 rad off.
inline void turn_of(int64_t position, const double* inv_freq, size_t half, float* turn) {
    for (size_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(position) * inv_freq[i];
        turn[2 * i] = static_cast<float>(std::cos(angle));
        turn[2 * i + 1] = static_cast<float>(std::sin(angle));
    }
}

}  // namespace fastloop

// to += x; [count] each.
FASTLOOP_DECLARE_KERNEL(void add_row(const float* x, size_t count, float* to))
// y = x / sqrt(mean(x^2) + eps) * weight; [count] each.
FASTLOOP_DECLARE_KERNEL(void rms_norm(const float* x, const float* weight, size_t count, float eps, float* y))
// y = (x - mean) / sqrt(var + eps) * weight + bias; [count] each.
FASTLOOP_DECLARE_KERNEL(void layer_norm(const float* x, const float* weight, const float* bias, size_t count, float eps,
                                        float* y))
// One row: qkv [(H + 2G) K] + bias (or NULL), rotated by turn [K / 2][2] = (cos, sin) -> q [H K]; key and value go to slot
// `slot` of the pages, or nowhere where it is negative.
FASTLOOP_DECLARE_KERNEL(void rope_append(const float* qkv, const float* bias, const float* turn, int64_t slot, size_t heads,
                                         const ::fastloop::Pages& pages, float* q))
// The logits of a normed row: rms_norm(x) . head[0] and head[1], head [2][count]; summed alike, so equal heads tie.
FASTLOOP_DECLARE_KERNEL(void decide(const float* x, const float* norm_weight, const float* head, size_t count, double eps,
                                    double* logits))
