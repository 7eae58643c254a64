// What decide and sample share. Blocks that work on one thing together: a cluster on sm_90, one block alone elsewhere.
#pragma once

#include "hopper.cuh"

namespace fastloop {

#if defined(FASTLOOP_CUDA_EMULATION) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ int team_rank() { return static_cast<int>(cluster_rank()); }
__device__ __forceinline__ int team_blocks() { return static_cast<int>(cluster_blocks()); }
// For all threads of all blocks; what they wrote to each other's shared memory is there.
__device__ __forceinline__ void team_sync() {
    cluster_arrive();
    cluster_wait();
}
template <class T> __device__ __forceinline__ T* team_map(T* own, int rank) {
    return cluster_map(own, static_cast<unsigned>(rank));
}
#else
__device__ __forceinline__ int team_rank() { return 0; }
__device__ __forceinline__ int team_blocks() { return 1; }
__device__ __forceinline__ void team_sync() { __syncthreads(); }
template <class T> __device__ __forceinline__ T* team_map(T* own, int) { return own; }
#endif

// Eight floats at a multiple of 16 bytes, widened.
template <class T> __device__ __forceinline__ void load_8(const T* from, float (&to)[8]) {
    constexpr int kWords = 8 * static_cast<int>(sizeof(T)) / 16;
    union {
        uint4 words[kWords];
        T items[8];
    } both;
#pragma unroll
    for (int i = 0; i < kWords; ++i) both.words[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = widen(both.items[i]);
}

}  // namespace fastloop
