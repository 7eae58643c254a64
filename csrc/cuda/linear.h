// What the host (linear.cpp) hands the kernels of `linear` (linear.cu): plain C++ for both, and for NVRTC.
#pragma once

#if defined(__CUDACC__)
#define FASTLOOP_BOTH __host__ __device__
#else
#define FASTLOOP_BOTH
#endif

namespace fastloop {

enum LinearEpilogue : int { LINEAR_NONE = 0, LINEAR_GELU = 1, LINEAR_GATE = 2 };

// A block computes so many rows of the weights: of one matrix, or half of them gate and half up.
constexpr int LINEAR_CHANNELS = 128;
constexpr int LINEAR_PITCH = LINEAR_CHANNELS + 4;  // floats between the rows of a block's sums: no bank is met twice
constexpr int LINEAR_WGMMA_THREADS = 160;          // four warps that multiply, one that loads
constexpr int LINEAR_MMA_THREADS = 128;

// How weights are stored. A stage of the ring has 128 bytes of each of their rows, so it has so many inputs:
enum LinearFormat : int { LINEAR_BF16 = 0, LINEAR_E4M3 = 1, LINEAR_INT4 = 2 };
FASTLOOP_BOTH constexpr int linear_depth(int format) { return format == LINEAR_BF16 ? 64 : format == LINEAR_E4M3 ? 128 : 256; }
constexpr int LINEAR_SCALES = 8;  // of a row in a stage of int4: a group is 32 inputs, or 64 and half of them are unused

// Stages of the rings, so that two blocks fit into a processor's shared memory (227 KB of sm_90, 164 KB of sm_80), but for
// many rows beside small weights.
FASTLOOP_BOTH constexpr int linear_stage_bytes(int row_block, int format) {
    return LINEAR_CHANNELS * 128 + row_block * linear_depth(format) * 2 +
           (format == LINEAR_INT4 ? LINEAR_CHANNELS * LINEAR_SCALES * 2 : 0);
}
FASTLOOP_BOTH constexpr int linear_wgmma_stages(int row_block) { return row_block <= 16 ? 6 : row_block == 32 ? 5 : 4; }
FASTLOOP_BOTH constexpr int linear_mma_stages(int row_block, int format) {
    return row_block == 64 ? (format == LINEAR_INT4 ? 2 : 3) : format == LINEAR_INT4 && row_block > 8 ? 3 : 4;
}
FASTLOOP_BOTH constexpr int linear_wgmma_shared(int row_block) {
    return linear_wgmma_stages(row_block) * (linear_stage_bytes(row_block, LINEAR_BF16) + 2 * 8);
}
FASTLOOP_BOTH constexpr int linear_mma_shared(int row_block, int format) {
    return linear_mma_stages(row_block, format) * linear_stage_bytes(row_block, format);
}

struct LinearParams {
    const void* x;         // bf16 [rows, depth]
    const void* weight;    // [outputs, depth] in `format`; int4: two in a byte, input 2 i low, each + 8
    const void* scale;     // e4m3: float [outputs]; int4: bf16 [outputs, depth / group]
    const void* bias;      // bf16 [outputs] or null
    const void* residual;  // bf16 [rows, width] or null
    void* out;             // bf16 [rows, width]
    float* partial;        // [row block][tile][split][row][LINEAR_CHANNELS], mma with splits only
    unsigned* arrived;     // [row block][tile]: zero before and after
    long long x_stride, weight_stride, residual_stride, out_stride;  // stored elements: bytes of e4m3 and int4
    int rows, depth, width;  // width: of out; the weights have twice as many rows where gated
    int format;              // LinearFormat
    int group;               // int4: inputs that share a scale, 32 or 64
    int epilogue;            // LinearEpilogue
    int splits;              // of the depth
    int aligned;             // rows of x and of bf16 weights begin at multiples of 16 bytes; others always do
    int scales_aligned;      // int4: so do eight scales at a time
    int paired;              // two neighbouring elements of out, residual and bias may be moved as one
};

}  // namespace fastloop
