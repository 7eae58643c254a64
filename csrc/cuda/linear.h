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
constexpr int LINEAR_DEPTH = 64;     // inputs of a pipeline stage: 128 bytes of a row
constexpr int LINEAR_PITCH = LINEAR_CHANNELS + 4;  // floats between the rows of a block's sums: no bank is met twice
constexpr int LINEAR_WGMMA_THREADS = 160;          // four warps that multiply, one that loads
constexpr int LINEAR_MMA_THREADS = 128;

// Stages of the rings, so that two blocks fit into a processor's shared memory (227 KB of sm_90, 164 KB of sm_80).
FASTLOOP_BOTH constexpr int linear_stage_bytes(int row_block) { return (LINEAR_CHANNELS + row_block) * LINEAR_DEPTH * 2; }
FASTLOOP_BOTH constexpr int linear_wgmma_stages(int row_block) { return row_block <= 16 ? 6 : row_block == 32 ? 5 : 4; }
FASTLOOP_BOTH constexpr int linear_mma_stages(int row_block) { return row_block <= 32 ? 4 : 3; }
FASTLOOP_BOTH constexpr int linear_wgmma_shared(int row_block) {
    return linear_wgmma_stages(row_block) * (linear_stage_bytes(row_block) + 2 * 8);
}
FASTLOOP_BOTH constexpr int linear_mma_shared(int row_block) { return linear_mma_stages(row_block) * linear_stage_bytes(row_block); }

struct LinearParams {
    const void* x;         // bf16 [rows, depth]
    const void* weight;    // bf16 [outputs, depth]
    const void* bias;      // bf16 [outputs] or null
    const void* residual;  // bf16 [rows, width] or null
    void* out;             // bf16 [rows, width]
    float* partial;        // [row block][tile][split][row][LINEAR_CHANNELS], mma with splits only
    unsigned* arrived;     // [row block][tile]: zero before and after
    long long x_stride, weight_stride, residual_stride, out_stride;  // elements
    int rows, depth, width;  // width: of out; the weights have twice as many rows where gated
    int epilogue;            // LinearEpilogue
    int splits;              // of the depth
    int aligned;             // rows of x and of the weights begin at multiples of 16 bytes
    int paired;              // two neighbouring elements of out, residual and bias may be moved as one
};

}  // namespace fastloop
