// What the front of `sample` (csrc/cpu/sample.cpp) wants of its kernel (csrc/cpu/isa/sample.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace fastloop {
constexpr size_t kTopBlock = 64;  // tokens that share an entry of `tops`
}

// The largest of the logits that are not banned and the first token that has it; -Inf where all are banned, NaN where one is
// NaN. banned [count]: 0 or 1.
FASTLOOP_DECLARE_KERNEL(float sample_peak(const float* logits, const uint8_t* banned, size_t count, size_t* token))
// The largest logit that is not banned of every kTopBlock tokens -> tops [count / kTopBlock, rounded up]; -Inf where there is none.
FASTLOOP_DECLARE_KERNEL(void sample_tops(const float* logits, const uint8_t* banned, size_t count, float* tops))
// e^((logit - peak) / temperature) -> weights [count]; 0 for banned tokens.
FASTLOOP_DECLARE_KERNEL(void sample_weights(const float* logits, const uint8_t* banned, size_t count, double peak,
                                            double temperature, double* weights))
