// linear: out = epilogue(x W^T + bias) + residual, bf16, for the few rows of a step (fastloop/ops/linear.py defines it).
//
//   linear_wgmma_*  sm_90a    linear_mma_*, linear_e4m3_*, linear_int4_*  sm_80 and newer
//
//   *: rows a block computes, 8, 16, 32 or 64; e4m3 and int4: how the weights are stored
//
// The weights are the left operand, so that 13 rows sit in n = 16; a block owns 128 of their rows (silu_gate: 64 of the
// gate and the same 64 of up) for one range of the depth and streams them through a ring of stages of 64 inputs. Bytes
// moved: the weights once from memory, past L2's lasting part (evict first); x once for each block, from L2.
//
// wgmma: one thread fills the ring by TMA (128-byte swizzle), the weights of the whole ring before it waits for the
// kernel in front (programmatic dependent launch); four warps multiply. The ranges of the depth are the blocks of a
// cluster: each leaves its sums in its shared memory, and all of them add those of all, in the order of the ranges, each
// for its share of the outputs. mma: cp.async and mma.sync; the sums of a range go through memory, and the block
// that comes last adds them in order. So a result is the same to the bit in every run.
//
// Why: at 1 to 64 rows the time is that of the weights' bytes, if enough of them are on their way: 4.8 TB/s x 1 us are
// 36 KB a processor, the ring of one block is 96 KB of weights, and two blocks fit.
#include "hopper.cuh"
#include "linear.h"
#include "linear_finish.cuh"
#include "linear_mma.cuh"

namespace fastloop {
namespace {

// ---- sm_90a ----------------------------------------------------------------------------------------------------------
#if defined(FASTLOOP_CUDA_EMULATION) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int ROWS>
__device__ __forceinline__ void linear_wgmma(const TensorMap& weight_map, const TensorMap& x_map, const LinearParams& p) {
    constexpr int DEPTH = linear_depth(LINEAR_BF16);
    constexpr int STAGES = linear_wgmma_stages(ROWS), STAGE_BYTES = linear_stage_bytes(ROWS, LINEAR_BF16), CONSUMERS = 4;
    static_assert(ROWS * LINEAR_PITCH * 4 <= STAGES * STAGE_BYTES, "the sums take the ring's place");
    FASTLOOP_SHARED(unsigned char, ring);
    Word* const full = reinterpret_cast<Word*>(ring + STAGES * STAGE_BYTES);
    Word* const empty = full + STAGES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int split = blockIdx.x % p.splits, row0 = blockIdx.y * ROWS;  // the cluster's blocks are neighbours
    const bool gated = p.epilogue == LINEAR_GATE;
    const int channel0 = blockIdx.x / p.splits * (gated ? HALF : LINEAR_CHANNELS);
    const int begin = range_begin(p, split), steps = range_begin(p, split + 1) - begin;

    if (threadIdx.x == 0) {
        if (shared_address(ring) % 1024 != 0) __trap();  // the swizzle counts from there
        for (int s = 0; s < STAGES; ++s) {
            mbarrier_init(full + s, 1);
            mbarrier_init(empty + s, CONSUMERS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    float sum[2][ROWS / 2] = {};
    if (warp == CONSUMERS) {
        if (lane == 0) {
            const Word once = evict_first(), often = evict_last();
            const int second = gated ? p.width + channel0 : channel0 + HALF;
            const auto load_weights = [&](int i) {
                unsigned char* stage = ring + i % STAGES * STAGE_BYTES;
                Word* barrier = full + i % STAGES;
                const int column = (begin + i) * DEPTH;
                mbarrier_arrive_expect_bytes(barrier, STAGE_BYTES);
                tensor_copy(stage, &weight_map, column, channel0, barrier, once);
                tensor_copy(stage + TILE_BYTES, &weight_map, column, second, barrier, once);
            };
            const auto load_x = [&](int i) {
                tensor_copy(ring + i % STAGES * STAGE_BYTES + WEIGHT_BYTES, &x_map, (begin + i) * DEPTH, row0,
                            full + i % STAGES, often);
            };
            prefetch_tensor_map(&weight_map);
            prefetch_tensor_map(&x_map);
            const int ahead = steps < STAGES ? steps : STAGES;
            for (int i = 0; i < ahead; ++i) load_weights(i);
            wait_for_previous_kernel();
            for (int i = 0; i < ahead; ++i) load_x(i);
            for (int i = ahead; i < steps; ++i) {
                mbarrier_wait(empty + i % STAGES, (i / STAGES - 1) & 1);
                load_weights(i);
                load_x(i);
            }
            let_next_kernel_start();
        }
        __syncwarp();
    } else {
        for (int i = 0; i < steps; ++i) {
            const unsigned char* stage = ring + i % STAGES * STAGE_BYTES;
            mbarrier_wait(full + i % STAGES, i / STAGES & 1);
            __syncwarp();
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const Word x = wgmma_tile(stage + WEIGHT_BYTES, 32 * k);
                wgmma_bf16(sum[0], wgmma_tile(stage, 32 * k), x);
                wgmma_bf16(sum[1], wgmma_tile(stage + TILE_BYTES, 32 * k), x);
            }
            wgmma_commit();
            wgmma_wait<1>();
            if (i > 0 && lane == 0) mbarrier_arrive(empty + (i - 1) % STAGES);  // what the step before read
        }
        wgmma_wait<0>();
    }
    wait_for_previous_kernel();
    __syncthreads();  // nobody reads the ring any more

    float* const own = reinterpret_cast<float*>(ring);  // [row][LINEAR_PITCH]
    if (warp < CONSUMERS) {
        const int channel = 16 * warp + lane / 4, row = 2 * (lane % 4);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int j = 0; j < ROWS / 2; ++j)
                own[(row + j / 4 * 8 + j % 2) * LINEAR_PITCH + HALF * half + channel + j / 2 % 2 * 8] = sum[half][j];
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    const int rows = p.rows - row0 < ROWS ? p.rows - row0 : ROWS;
    finish(p, row0, rows, channel0, split * LINEAR_WGMMA_THREADS + threadIdx.x, p.splits * LINEAR_WGMMA_THREADS,
           [&](int n, int c) {
               Pair v{0.0f, 0.0f};
#pragma unroll 8
               for (int s = 0; s < p.splits; ++s) {
                   const float2 part = *reinterpret_cast<const float2*>(cluster_map(own, s) + n * LINEAR_PITCH + c);
                   v = {v.low + part.x, v.high + part.y};
               }
               return v;
           });
    __syncwarp();
    cluster_arrive();  // the others may still read here
    cluster_wait();
}

#endif

}  // namespace
}  // namespace fastloop

#if defined(FASTLOOP_CUDA_EMULATION) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
extern "C" __global__ void __launch_bounds__(160, 2)
    linear_wgmma_8(const __grid_constant__ fastloop::TensorMap weight, const __grid_constant__ fastloop::TensorMap x,
                   const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_wgmma<8>(weight, x, p); }
extern "C" __global__ void __launch_bounds__(160, 2)
    linear_wgmma_16(const __grid_constant__ fastloop::TensorMap weight, const __grid_constant__ fastloop::TensorMap x,
                    const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_wgmma<16>(weight, x, p); }
extern "C" __global__ void __launch_bounds__(160, 2)
    linear_wgmma_32(const __grid_constant__ fastloop::TensorMap weight, const __grid_constant__ fastloop::TensorMap x,
                    const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_wgmma<32>(weight, x, p); }
extern "C" __global__ void __launch_bounds__(160, 2)
    linear_wgmma_64(const __grid_constant__ fastloop::TensorMap weight, const __grid_constant__ fastloop::TensorMap x,
                    const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_wgmma<64>(weight, x, p); }
#endif

extern "C" __global__ void __launch_bounds__(128, 2)
    linear_mma_8(const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_mma<8, fastloop::LINEAR_BF16>(p); }
extern "C" __global__ void __launch_bounds__(128, 2)
    linear_mma_16(const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_mma<16, fastloop::LINEAR_BF16>(p); }
extern "C" __global__ void __launch_bounds__(128, 2)
    linear_mma_32(const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_mma<32, fastloop::LINEAR_BF16>(p); }
extern "C" __global__ void __launch_bounds__(128, 2)
    linear_mma_64(const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_mma<64, fastloop::LINEAR_BF16>(p); }

extern "C" __global__ void __launch_bounds__(128, 1)
    linear_e4m3_8(const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_mma<8, fastloop::LINEAR_E4M3>(p); }
extern "C" __global__ void __launch_bounds__(128, 1)
    linear_e4m3_16(const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_mma<16, fastloop::LINEAR_E4M3>(p); }
extern "C" __global__ void __launch_bounds__(128, 1)
    linear_e4m3_32(const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_mma<32, fastloop::LINEAR_E4M3>(p); }
extern "C" __global__ void __launch_bounds__(128, 1)
    linear_e4m3_64(const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_mma<64, fastloop::LINEAR_E4M3>(p); }

extern "C" __global__ void __launch_bounds__(128, 1)
    linear_int4_8(const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_mma<8, fastloop::LINEAR_INT4>(p); }
extern "C" __global__ void __launch_bounds__(128, 1)
    linear_int4_16(const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_mma<16, fastloop::LINEAR_INT4>(p); }
extern "C" __global__ void __launch_bounds__(128, 1)
    linear_int4_32(const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_mma<32, fastloop::LINEAR_INT4>(p); }
extern "C" __global__ void __launch_bounds__(128, 1)
    linear_int4_64(const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_mma<64, fastloop::LINEAR_INT4>(p); }
