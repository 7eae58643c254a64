// What the kernels of linear share: a block's share of the work, and what becomes of its sums (linear.cu).
#pragma once

#include "intrinsics.cuh"
#include "linear.h"

namespace fastloop {
namespace {

constexpr int HALF = LINEAR_CHANNELS / 2;      // rows of one product
constexpr int TILE_BYTES = HALF * 128;         // of its weights in a stage
constexpr int WEIGHT_BYTES = 2 * TILE_BYTES;

__device__ __forceinline__ float activate(float v, int epilogue) {
    return epilogue == LINEAR_GELU ? 0.5f * v * (1.0f + erff(v * 0.70710678f)) : v;
}

struct Pair {
    float low, high;
};

__device__ __forceinline__ Pair load_pair(const void* from, long long at, bool second, bool paired) {
    const auto* values = static_cast<const bf16*>(from) + at;
    if (paired) {
        const unsigned both = *reinterpret_cast<const unsigned*>(values);
        return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
    }
    return {widen(values[0]), second ? widen(values[1]) : 0.0f};
}

// Sums of weights that have one scale for each of their rows.
__device__ __forceinline__ Pair scaled(const LinearParams& p, Pair v, int channel, bool second) {
    if (p.format != LINEAR_E4M3) return v;
    const float* scale = static_cast<const float*>(p.scale) + channel;
    return {v.low * scale[0], second ? v.high * scale[1] : 0.0f};
}

// What a block that knows its sums does with them: sum(n, c) are those of row n and weight rows c, c + 1 of the block's
// 128, c even. Threads first, first + stride, ... take turns over pairs of outputs of `rows` rows.
template <class Sum>
__device__ __forceinline__ void finish(const LinearParams& p, int row0, int rows, int channel0, int first, int stride,
                                       Sum&& sum) {
    const bool gated = p.epilogue == LINEAR_GATE;
    const int pairs = (gated ? HALF : LINEAR_CHANNELS) / 2;
    for (int i = first; i < rows * pairs; i += stride) {
        const int n = i / pairs, c = 2 * (i % pairs), channel = channel0 + c;
        if (channel >= p.width) continue;
        const bool second = channel + 1 < p.width;
        Pair v = scaled(p, sum(n, c), channel, second);
        if (p.bias != nullptr) {
            const Pair b = load_pair(p.bias, channel, second, p.paired);
            v = {v.low + b.low, v.high + b.high};
        }
        if (gated) {
            Pair up = scaled(p, sum(n, HALF + c), p.width + channel, second);
            if (p.bias != nullptr) {
                const Pair b = load_pair(p.bias, p.width + channel, second, p.paired);
                up = {up.low + b.low, up.high + b.high};
            }
            v = {v.low / (1.0f + expf(-v.low)) * up.low, v.high / (1.0f + expf(-v.high)) * up.high};
        } else {
            v = {activate(v.low, p.epilogue), activate(v.high, p.epilogue)};
        }
        const long long row = row0 + n;
        if (p.residual != nullptr) {
            const Pair r = load_pair(p.residual, row * p.residual_stride + channel, second, p.paired);
            v = {v.low + r.low, v.high + r.high};
        }
        auto* out = static_cast<bf16*>(p.out) + row * p.out_stride + channel;
        const bf16 low = narrow_bf16(v.low), high = narrow_bf16(v.high);
        if (p.paired)
            *reinterpret_cast<unsigned*>(out) = low.bits | static_cast<unsigned>(high.bits) << 16;
        else {
            out[0] = low;
            if (second) out[1] = high;
        }
    }
}

// Where a range of the depth begins, in steps (stages of the ring); it ends where the next one begins.
__device__ __forceinline__ int range_begin(const LinearParams& p, int split) {
    const int inputs = linear_depth(p.format), steps = (p.depth + inputs - 1) / inputs;
    return static_cast<int>(static_cast<long long>(steps) * split / p.splits);
}

}  // namespace
}  // namespace fastloop
