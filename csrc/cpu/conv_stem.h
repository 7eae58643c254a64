// The convolutions in front of the encoder, for the op `conv_stem` and for a pass of the encoder (csrc/cpu/conv_stem.cpp).
#pragma once

#include <cstddef>

#include "stage.h"

namespace fastloop {

struct ConvStem {
    size_t bins, width;      // C, E
    const Weight* conv1;     // [E, 3C], inputs in the order (tap, bin)
    const float* bias1;      // [E]
    const Weight* conv2;     // [E, 3E], inputs in the order (tap, channel)
    const float* bias2;      // [E]
    const float* positions;  // [T or more, E]
};

// What a pass over B blocks of F frames needs beside its result.
struct StemBuffers {
    float* frames;          // [B, F + 2, C], zeros before and behind each block
    float* hidden;          // [B, F, E]
    float* padded;          // [B, F + 2, E]
    unsigned char* packed;  // [stem_packed]
};
size_t stem_packed(const ConvStem& stem, size_t blocks, size_t frames);

// Weights of the right shapes; fails with `where` and what is wrong.
void check_stem(const char* where, size_t bins, size_t width, const fastloop_weight* conv1, const fastloop_weight* conv2);

// mel [B, F, C] -> out [B, (F + 1) / 2, E]
void run_stem(Stage& s, const ConvStem& stem, size_t blocks, size_t frames, const float* mel, const StemBuffers& b, float* out);

}  // namespace fastloop
