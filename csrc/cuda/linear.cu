// linear: out = epilogue(x W^T + bias) + residual, bf16, for the few rows of a step (fastloop/ops/linear.py defines it).
//
//   linear_wgmma_*  sm_90a    linear_mma_*  sm_80 and newer      *: rows a block computes, 8, 16, 32 or 64
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
        Pair v = sum(n, c);
        if (p.bias != nullptr) {
            const Pair b = load_pair(p.bias, channel, second, p.paired);
            v = {v.low + b.low, v.high + b.high};
        }
        if (gated) {
            Pair up = sum(n, HALF + c);
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

// The steps (stages of 64 inputs) of one range of the depth: [begin, end).
__device__ __forceinline__ int range_begin(const LinearParams& p, int split) {
    const int steps = (p.depth + LINEAR_DEPTH - 1) / LINEAR_DEPTH;
    return static_cast<int>(static_cast<long long>(steps) * split / p.splits);
}

// ---- sm_90a ----------------------------------------------------------------------------------------------------------
#if defined(FASTLOOP_CUDA_EMULATION) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int ROWS>
__device__ __forceinline__ void linear_wgmma(const TensorMap& weight_map, const TensorMap& x_map, const LinearParams& p) {
    constexpr int STAGES = linear_wgmma_stages(ROWS), STAGE_BYTES = linear_stage_bytes(ROWS), CONSUMERS = 4;
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
                const int column = (begin + i) * LINEAR_DEPTH;
                mbarrier_arrive_expect_bytes(barrier, STAGE_BYTES);
                tensor_copy(stage, &weight_map, column, channel0, barrier, once);
                tensor_copy(stage + TILE_BYTES, &weight_map, column, second, barrier, once);
            };
            const auto load_x = [&](int i) {
                tensor_copy(ring + i % STAGES * STAGE_BYTES + WEIGHT_BYTES, &x_map, (begin + i) * LINEAR_DEPTH, row0,
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

// ---- sm_80 -----------------------------------------------------------------------------------------------------------

// Where 16 bytes of a row of 128 lie: pieces exchanged, so that eight rows of one column meet all banks.
__device__ __forceinline__ int swizzled(int row, int piece) { return row * 128 + (piece ^ row % 8) * 16; }

// Eight elements at `column` of a row with `depth` of them; zeros behind its end, and where the row is not there.
__device__ __forceinline__ void load_piece(unsigned char* to, const bf16* row, int column, int depth, bool there, bool aligned) {
    const int left = there ? depth - column : 0;
    if (aligned) {
        copy_async_16_part(to, left > 0 ? row + column : row, left <= 0 ? 0 : left >= 8 ? 16 : 2 * left);
        return;
    }
    unsigned word[4] = {};
    for (int e = 0; e < 8; ++e)
        if (e < left) word[e / 2] |= static_cast<unsigned>(row[column + e].bits) << e % 2 * 16;
    *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
}

template <int ROWS>
__device__ __forceinline__ void linear_mma(const LinearParams& p) {
    constexpr int STAGES = linear_mma_stages(ROWS), STAGE_BYTES = linear_stage_bytes(ROWS);
    static_assert(ROWS * LINEAR_PITCH * 4 <= STAGES * STAGE_BYTES, "the sums take the ring's place");
    FASTLOOP_SHARED(unsigned char, ring);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int split = blockIdx.z, row0 = blockIdx.y * ROWS;
    const bool gated = p.epilogue == LINEAR_GATE;
    const int channel0 = blockIdx.x * (gated ? HALF : LINEAR_CHANNELS);
    const int begin = range_begin(p, split), steps = range_begin(p, split + 1) - begin;
    const int rows = p.rows - row0 < ROWS ? p.rows - row0 : ROWS;

    const int piece = threadIdx.x % 8;  // of a row; a thread takes the same one of every 16th row
    const auto load_weights = [&](int i) {
        unsigned char* stage = ring + i % STAGES * STAGE_BYTES;
        const int column = (begin + i) * LINEAR_DEPTH + 8 * piece;
#pragma unroll
        for (int r = threadIdx.x / 8; r < LINEAR_CHANNELS; r += LINEAR_MMA_THREADS / 8) {
            const int channel = channel0 + (gated ? r % HALF : r);
            const long long row = channel + (gated && r >= HALF ? p.width : 0);
            load_piece(stage + swizzled(r, piece), static_cast<const bf16*>(p.weight) + row * p.weight_stride, column,
                       p.depth, channel < p.width, p.aligned);
        }
    };
    const auto load_x = [&](int i) {
        unsigned char* stage = ring + i % STAGES * STAGE_BYTES + WEIGHT_BYTES;
        const int column = (begin + i) * LINEAR_DEPTH + 8 * piece;
        for (int r = threadIdx.x / 8; r < ROWS; r += LINEAR_MMA_THREADS / 8)
            load_piece(stage + swizzled(r, piece), static_cast<const bf16*>(p.x) + (row0 + (r < rows ? r : 0)) * p.x_stride,
                       column, p.depth, r < rows, p.aligned);
    };

    for (int i = 0; i < STAGES - 1 && i < steps; ++i) load_weights(i);
    wait_for_previous_kernel();
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < steps) load_x(i);
        commit_copies();
    }
    float sum[2][ROWS / 8][4] = {};
    for (int i = 0; i < steps; ++i) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        if (i + STAGES - 1 < steps) {
            load_weights(i + STAGES - 1);
            load_x(i + STAGES - 1);
        }
        commit_copies();
        const unsigned char* stage = ring + i % STAGES * STAGE_BYTES;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            unsigned a[2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m)
                load_matrices(a[m], stage + swizzled(32 * warp + 16 * m + lane % 16, 2 * k + lane / 16));
#pragma unroll
            for (int n = 0; n < ROWS / 8; ++n) {
                unsigned b[2];
                load_matrices(b, stage + WEIGHT_BYTES + swizzled(8 * n + lane % 8, 2 * k + lane / 8 % 2));
                multiply(sum[0][n], a[0], b, bf16{});
                multiply(sum[1][n], a[1], b, bf16{});
            }
        }
    }
    let_next_kernel_start();
    wait_for_copies<0>();
    __syncthreads();  // nobody reads the ring any more

    float* const own = reinterpret_cast<float*>(ring);  // [row][LINEAR_PITCH]
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < ROWS / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                own[(8 * n + 2 * (lane % 4) + e % 2) * LINEAR_PITCH + 32 * warp + 16 * m + lane / 4 + e / 2 * 8] = sum[m][n][e];
    __syncthreads();
    if (p.splits == 1) {
        finish(p, row0, rows, channel0, threadIdx.x, LINEAR_MMA_THREADS,
               [&](int n, int c) { return Pair{own[n * LINEAR_PITCH + c], own[n * LINEAR_PITCH + c + 1]}; });
        return;
    }

    // Through memory: the block that comes last finds the sums of all ranges.
    const int tile = blockIdx.y * gridDim.x + blockIdx.x;
    constexpr int SIZE = ROWS * LINEAR_CHANNELS;
    float* const all = p.partial + static_cast<long long>(tile) * p.splits * SIZE;
    for (int i = threadIdx.x; i < rows * (LINEAR_CHANNELS / 4); i += LINEAR_MMA_THREADS) {
        const int n = i / (LINEAR_CHANNELS / 4), c = i % (LINEAR_CHANNELS / 4) * 4;
        __stcg(reinterpret_cast<float4*>(all + split * SIZE + n * LINEAR_CHANNELS + c),
               *reinterpret_cast<const float4*>(own + n * LINEAR_PITCH + c));
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *reinterpret_cast<unsigned*>(ring) = atomicAdd(p.arrived + tile, 1u);
    __syncthreads();
    if (*reinterpret_cast<const unsigned*>(ring) + 1 != static_cast<unsigned>(p.splits)) return;
    __threadfence();
    if (threadIdx.x == 0) p.arrived[tile] = 0;
    finish(p, row0, rows, channel0, threadIdx.x, LINEAR_MMA_THREADS, [&](int n, int c) {
        Pair v{0.0f, 0.0f};
#pragma unroll 4
        for (int s = 0; s < p.splits; ++s) {
            const float2 part = __ldcg(reinterpret_cast<const float2*>(all + s * SIZE + n * LINEAR_CHANNELS + c));
            v = {v.low + part.x, v.high + part.y};
        }
        return v;
    });
}

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
    linear_mma_8(const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_mma<8>(p); }
extern "C" __global__ void __launch_bounds__(128, 2)
    linear_mma_16(const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_mma<16>(p); }
extern "C" __global__ void __launch_bounds__(128, 2)
    linear_mma_32(const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_mma<32>(p); }
extern "C" __global__ void __launch_bounds__(128, 2)
    linear_mma_64(const __grid_constant__ fastloop::LinearParams p) { fastloop::linear_mma<64>(p); }
