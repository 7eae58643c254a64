// Kernels that show what the emulation does, and faults that it must find (tests/native/test_cuda_emulation.py).
#include "intrinsics.h"

extern "C" __global__ void reverse_block(const float* in, float* out, int n, int faulty) {
    __shared__ float held[1024];
    const int i = blockIdx.x * n + threadIdx.x;
    held[threadIdx.x] = in[i];
    if (!faulty) __syncthreads();
    out[i] = held[n - 1 - threadIdx.x];
}

extern "C" __global__ void warp_sum(const float* in, float* out, int n) {
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += 32) sum += in[i];
    for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
    out[threadIdx.x] = sum;
}

extern "C" __global__ void last_block(const float* in, float* out, float* parts, unsigned* count) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = in[blockIdx.x];
        __threadfence();
        last = atomicInc(count, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        float sum = 0;
        for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b];
        *out = sum;
    }
}

extern "C" __global__ void cluster_sum(const float* in, float* out) {
    FASTLOOP_SHARED(float, own);
    __shared__ float beside[32];  // of this block alone
    own[threadIdx.x] = in[blockIdx.x * 32 + threadIdx.x];
    beside[threadIdx.x] = float(blockIdx.x);
    cuda_emulation::cluster_arrive();
    cuda_emulation::cluster_wait();
    float sum = 0;
    for (unsigned rank = 0; rank < cuda_emulation::cluster_blocks(); ++rank)
        sum += cuda_emulation::cluster_map(own, rank)[threadIdx.x];
    if (beside[31 - threadIdx.x] != float(blockIdx.x)) __trap();
    out[blockIdx.x * 32 + threadIdx.x] = sum;
    cuda_emulation::cluster_arrive();
    cuda_emulation::cluster_wait();
}

extern "C" __global__ void copy_async(const float4* in, float4* out, int waits) {
    FASTLOOP_SHARED(float4, held);
    cuda_emulation::cp_async(held + threadIdx.x, in + threadIdx.x, 16, threadIdx.x ? 16 : 8);
    cuda_emulation::cp_async_commit();
    cuda_emulation::cp_async(held + 32 + threadIdx.x, in + 32 + threadIdx.x, 16, 16);
    cuda_emulation::cp_async_commit();
    cuda_emulation::cp_async_wait(1);
    if (waits) cuda_emulation::cp_async_wait(0);
    __syncwarp();
    out[threadIdx.x] = held[31 - threadIdx.x];
    out[32 + threadIdx.x] = held[63 - threadIdx.x];
}

extern "C" __global__ void copy_bulk(const float* in, float* out, int rounds) {
    FASTLOOP_SHARED(float, held);
    __shared__ uint64_t full;
    if (threadIdx.x == 0) cuda_emulation::mbarrier_init(&full, 1);
    __syncthreads();
    for (int round = 0; round < rounds; ++round) {
        if (threadIdx.x == 0) {
            cuda_emulation::mbarrier_arrive_expect_bytes(&full, 64 * sizeof(float));
            cuda_emulation::bulk_copy(held, in + 64 * round, 64 * sizeof(float), &full);
        }
        cuda_emulation::mbarrier_wait(&full, round & 1);
        out[64 * round + threadIdx.x] = held[63 - threadIdx.x];
        __syncthreads();
    }
}

// A warp copies, another one adds; the place is let go when it has been read, or too soon. The sum goes by a named barrier.
extern "C" __global__ void copy_and_add(const float* in, float* out, int rounds, int early) {
    FASTLOOP_SHARED(float, held);
    __shared__ uint64_t full, free;
    __shared__ float sums[32];
    const bool lead = threadIdx.x % 32 == 0;
    if (threadIdx.x == 0) {
        cuda_emulation::mbarrier_init(&full, 1);
        cuda_emulation::mbarrier_init(&free, 1);
    }
    __syncthreads();
    float sum = 0;
    for (int round = 0; round < rounds; ++round)
        if (threadIdx.x < 32) {
            cuda_emulation::mbarrier_wait(&free, (round & 1) ^ 1);
            __syncwarp();  // or a lane would find the phase behind this one
            if (lead) {
                cuda_emulation::mbarrier_arrive_expect_bytes(&full, 32 * sizeof(float));
                cuda_emulation::bulk_copy(held, in + 32 * round, 32 * sizeof(float), &full);
            }
            __syncwarp();
        } else {
            cuda_emulation::mbarrier_wait(&full, round & 1);
            if (early && lead) cuda_emulation::mbarrier_arrive(&free);
            sum += held[threadIdx.x % 32];
            __syncwarp();
            if (!early && lead) cuda_emulation::mbarrier_arrive(&free);
        }
    if (threadIdx.x >= 32) {
        sums[threadIdx.x % 32] = sum;
        cuda_emulation::named_barrier_arrive(1, 64);
    } else {
        cuda_emulation::named_barrier(1, 64);
        out[threadIdx.x] = sums[31 - threadIdx.x];
    }
}

// One warp: d [16, 8] = a [16, 16] b [8, 16]^T + c.
extern "C" __global__ void multiply(const uint16_t* a, const uint16_t* b, const float* c, float* d) {
    FASTLOOP_SHARED(uint16_t, held);  // a, then b
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (int i = lane; i < 256; i += 32) held[i] = a[i];
    for (int i = lane; i < 128; i += 32) held[256 + i] = b[i];
    __syncwarp();
    uint32_t left[4], right[2], turned[2];
    cuda_emulation::ldmatrix<4>(left, held + lane % 16 * 16 + lane / 16 * 8, false);
    cuda_emulation::ldmatrix<2>(right, held + 256 + lane % 8 * 16 + lane / 8 % 2 * 8, false);
    __syncwarp();
    for (int i = lane; i < 128; i += 32) held[256 + i % 16 * 8 + i / 16] = b[i];  // transposed
    __syncwarp();
    cuda_emulation::ldmatrix<2>(turned, held + 256 + lane % 16 * 8, true);
    if (turned[0] != right[0] || turned[1] != right[1]) __trap();
    float sum[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t], c[(g + 8) * 8 + 2 * t + 1]};
    cuda_emulation::mma_m16n8k16_bf16(sum, left, right, sum);
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

extern "C" __global__ void faults(float* out, int kind) {
    FASTLOOP_SHARED(float, held);
    if (kind == 0) *out = held[3];                                 // never written
    if (kind == 1 && threadIdx.x < 7) __syncthreads();             // not by all; the others wait below
    if (kind == 1) __syncwarp();
    if (kind == 2) held[blockDim.x + threadIdx.x] = 0;             // behind the end
    if (kind == 3 && threadIdx.x == 0) __trap();
    if (kind == 4) out[1 << 20] = held[threadIdx.x + 400];         // far outside
    if (kind == 5) while (*static_cast<volatile float*>(out) != 7) __nanosleep(10);
}
