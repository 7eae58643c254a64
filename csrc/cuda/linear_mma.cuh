// linear on sm_80 and newer: cp.async and mma.sync, for weights in bf16, and for those in float8 e4m3 or int4, which are
// widened to bf16 in registers on their way into the products (linear.cu says the rest).
#pragma once

#include "linear_finish.cuh"

namespace fastloop {
namespace {

// Where 16 bytes of a row of 128 lie: pieces exchanged, so that eight rows of one column meet all banks.
__device__ __forceinline__ int swizzled(int row, int piece) { return row * 128 + (piece ^ row % 8) * 16; }

// The same for a row of x: of its inputs a lane reads 16 bytes of 16-bit weights' (ldmatrix, eight rows at a time), 8 beside
// each four of e4m3 (four rows), 16 beside each eight of int4 (two rows).
template <int FORMAT>
__device__ __forceinline__ int swizzled_x(int row, int piece) {
    constexpr int BYTES = 2 * linear_depth(FORMAT);
    const int turn = FORMAT == LINEAR_BF16 ? row % 8 : FORMAT == LINEAR_E4M3 ? 2 * (row % 4) : 4 * (row % 2);
    return row * BYTES + (piece ^ turn) * 16;
}

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

// Four float8 e4m3 -> bf16, exactly, as (first, second) and (third, fourth). Exponent and mantissa moved into a bf16 are
// 2^-120 of the number, subnormal ones too. There is no NaN among weights: its bits would be 480.
__device__ __forceinline__ void widen_weights_e4m3(unsigned word, unsigned& first, unsigned& second) {
    const unsigned low = __byte_perm(word, 0, 0x1404), high = __byte_perm(word, 0, 0x3424);
    constexpr unsigned POWER = 0x7b807b80u, ZERO = 0x80008000u;  // 2^120, -0
    first = fma_bf16x2((low & 0x80008000u) | (low & 0x7f007f00u) >> 4, POWER, ZERO);
    second = fma_bf16x2((high & 0x80008000u) | (high & 0x7f007f00u) >> 4, POWER, ZERO);
}

// Inputs i and i + 4 of eight int4 -> bf16, times their scale. 128 + q are the bits of 128 with q in the last ones.
__device__ __forceinline__ unsigned widen_weights_int4(unsigned word, int i, unsigned scale) {
    const unsigned raised = (word >> 4 * i & 0x000f000fu) | 0x43004300u;
    constexpr unsigned ONE = 0x3f803f80u, RAISED_BY = 0xc308c308u, ZERO = 0x80008000u;  // 1, -136, -0
    return fma_bf16x2(fma_bf16x2(raised, ONE, RAISED_BY), scale, ZERO);
}

// sum += the products of a stage, 32 weight rows of each warp.
template <int ROWS, int FORMAT>
__device__ __forceinline__ void multiply_stage(const unsigned char* stage, int group, float (&sum)[2][ROWS / 8][4]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const unsigned char* const x = stage + WEIGHT_BYTES;
    if constexpr (FORMAT == LINEAR_BF16) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            unsigned a[2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m)
                load_matrices(a[m], stage + swizzled(32 * warp + 16 * m + lane % 16, 2 * k + lane / 16));
#pragma unroll
            for (int n = 0; n < ROWS / 8; ++n) {
                unsigned b[2];
                load_matrices(b, x + swizzled_x<FORMAT>(8 * n + lane % 8, 2 * k + lane / 8 % 2));
                multiply(sum[0][n], a[0], b, bf16{});
                multiply(sum[1][n], a[1], b, bf16{});
            }
        }
    } else if constexpr (FORMAT == LINEAR_E4M3) {
        // The order of inputs within a product is free: a lane takes four neighbours, of the weights and of x.
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            unsigned a[2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int row = 32 * warp + 16 * m + 8 * h + g;
                    const unsigned word = *reinterpret_cast<const unsigned*>(stage + swizzled(row, k) + 4 * t);
                    widen_weights_e4m3(word, a[m][h], a[m][2 + h]);
                }
#pragma unroll
            for (int n = 0; n < ROWS / 8; ++n) {
                const uint2 pair = *reinterpret_cast<const uint2*>(
                    x + swizzled_x<FORMAT>(8 * n + g, 2 * k + t / 2) + 8 * (t % 2));
                const unsigned b[2] = {pair.x, pair.y};
                multiply(sum[0][n], a[0], b, bf16{});
                multiply(sum[1][n], a[1], b, bf16{});
            }
        }
    } else {
        // Of 32 inputs a lane takes eight neighbours, for two products: their (0, 4), (1, 5) and (2, 6), (3, 7).
        const auto* scales = reinterpret_cast<const unsigned short*>(x + ROWS * 2 * linear_depth(FORMAT));
#pragma unroll 2
        for (int k = 0; k < 8; ++k) {
            unsigned a[2][2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int row = 32 * warp + 16 * m + 8 * h + g;
                    const unsigned word = *reinterpret_cast<const unsigned*>(stage + swizzled(row, k) + 4 * t);
                    const unsigned scale = scales[row * LINEAR_SCALES + 32 * k / group] * 0x10001u;
#pragma unroll
                    for (int s = 0; s < 2; ++s) {
                        a[s][m][h] = widen_weights_int4(word, 2 * s, scale);
                        a[s][m][2 + h] = widen_weights_int4(word, 2 * s + 1, scale);
                    }
                }
#pragma unroll
            for (int n = 0; n < ROWS / 8; ++n) {
                const uint4 eight = *reinterpret_cast<const uint4*>(x + swizzled_x<FORMAT>(8 * n + g, 4 * k + t));
                const unsigned b[2][2] = {{__byte_perm(eight.x, eight.z, 0x5410), __byte_perm(eight.x, eight.z, 0x7632)},
                                          {__byte_perm(eight.y, eight.w, 0x5410), __byte_perm(eight.y, eight.w, 0x7632)}};
#pragma unroll
                for (int s = 0; s < 2; ++s) {
                    multiply(sum[0][n], a[s][0], b[s], bf16{});
                    multiply(sum[1][n], a[s][1], b[s], bf16{});
                }
            }
        }
    }
}

template <int ROWS, int FORMAT>
__device__ __forceinline__ void linear_mma(const LinearParams& p) {
    constexpr int DEPTH = linear_depth(FORMAT), STAGES = linear_mma_stages(ROWS, FORMAT);
    constexpr int STAGE_BYTES = linear_stage_bytes(ROWS, FORMAT), INPUTS = DEPTH / 8;  // of a 16-byte piece of weights
    static_assert(ROWS * LINEAR_PITCH * 4 <= STAGES * STAGE_BYTES, "the sums take the ring's place");
    FASTLOOP_SHARED(unsigned char, ring);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int split = blockIdx.z, row0 = blockIdx.y * ROWS;
    const bool gated = p.epilogue == LINEAR_GATE;
    const int channel0 = blockIdx.x * (gated ? HALF : LINEAR_CHANNELS);
    const int begin = range_begin(p, split), steps = range_begin(p, split + 1) - begin;
    const int rows = p.rows - row0 < ROWS ? p.rows - row0 : ROWS;

    const int piece = threadIdx.x % 8;  // of a row of weights; a thread takes the same one of every 16th row
    const auto load_weights = [&](int i) {
        unsigned char* stage = ring + i % STAGES * STAGE_BYTES;
        const int column = (begin + i) * DEPTH + INPUTS * piece;
#pragma unroll
        for (int r = threadIdx.x / 8; r < LINEAR_CHANNELS; r += LINEAR_MMA_THREADS / 8) {
            const int channel = channel0 + (gated ? r % HALF : r);
            const long long row = channel + (gated && r >= HALF ? p.width : 0);
            unsigned char* const to = stage + swizzled(r, piece);
            if constexpr (FORMAT == LINEAR_BF16) {
                load_piece(to, static_cast<const bf16*>(p.weight) + row * p.weight_stride, column, p.depth,
                           channel < p.width, p.aligned);
            } else {  // rows are whole pieces
                const bool there = channel < p.width && column < p.depth;
                const auto* from = static_cast<const unsigned char*>(p.weight) + row * p.weight_stride + column * 16ll / INPUTS;
                copy_async_16(to, there ? from : static_cast<const unsigned char*>(p.weight), there);
            }
        }
        if constexpr (FORMAT == LINEAR_INT4) {  // a thread for each row
            const int r = threadIdx.x, channel = channel0 + (gated ? r % HALF : r), groups = p.depth / p.group;
            const long long row = channel + (gated && r >= HALF ? p.width : 0);
            load_piece(stage + WEIGHT_BYTES + ROWS * 2 * DEPTH + r * LINEAR_SCALES * 2,
                       static_cast<const bf16*>(p.scale) + row * groups, (begin + i) * (DEPTH / p.group), groups,
                       channel < p.width, p.scales_aligned);
        }
    };
    const auto load_x = [&](int i) {
        unsigned char* stage = ring + i % STAGES * STAGE_BYTES + WEIGHT_BYTES;
        for (int e = threadIdx.x; e < ROWS * (DEPTH / 8); e += LINEAR_MMA_THREADS) {
            const int r = e / (DEPTH / 8), of = e % (DEPTH / 8);
            load_piece(stage + swizzled_x<FORMAT>(r, of),
                       static_cast<const bf16*>(p.x) + (row0 + (r < rows ? r : 0)) * p.x_stride,
                       (begin + i) * DEPTH + 8 * of, p.depth, r < rows, p.aligned);
        }
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
        multiply_stage<ROWS, FORMAT>(ring + i % STAGES * STAGE_BYTES, p.group, sum);
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
