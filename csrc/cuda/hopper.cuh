// What kernels for sm_90 say in PTX beyond intrinsics.cuh: clusters, mbarriers, named barriers, bulk copies by tensor map
// (TMA), products of four warps (wgmma, sm_90a), registers moved between warps (sm_90a). On CPUs the same words are those of
// tests/native/cuda_emulation/hopper.h.
#pragma once

#include "intrinsics.cuh"

#if defined(FASTLOOP_CUDA_EMULATION)
#include "hopper.h"
#else
#if __CUDA_ARCH__ >= 900

namespace fastloop {

using Word = unsigned long long;  // an mbarrier, a descriptor, a policy

// ---- clusters ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ unsigned cluster_blocks() {
    unsigned blocks;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    return blocks;
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The same place of shared memory in another block of the cluster.
template <class T>
__device__ __forceinline__ T* cluster_map(T* own, unsigned rank) {
    Word there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<Word>(own)), "r"(rank));
    return reinterpret_cast<T*>(there);
}

// ---- mbarriers -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(Word* at, unsigned count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(count) : "memory");
}
// Initialised barriers are seen by the copy engine and by the cluster.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(Word* at) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(at)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_bytes(Word* at, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(at)), "r"(bytes) : "memory");
}
// Whether phase `phase` (0, 1, 0, ...) has ended.
__device__ __forceinline__ bool mbarrier_passed(Word* at, unsigned phase) {
    unsigned passed;
    asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(passed)
                 : "r"(shared_address(at)), "r"(phase)
                 : "memory");
    return passed != 0;
}
__device__ __forceinline__ void mbarrier_wait(Word* at, unsigned phase) {
    while (!mbarrier_passed(at, phase)) {
    }
}

// ---- barriers of some of a block's warps (1 to 15; 0 is __syncthreads) -------------------------------------------------

// Until `threads` threads have come, those that only arrive among them.
__device__ __forceinline__ void named_barrier_wait(int id, int threads) {
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- bulk copies (TMA) ---------------------------------------------------------------------------------------------

struct alignas(128) TensorMap {
    Word opaque[16];
};

// How long L2 keeps what is read: weights once, what all blocks read as long as there is room.
__device__ __forceinline__ Word evict_first() {
    Word policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ Word evict_last() {
    Word policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// A multiple of 16 bytes; `mbarrier` expects as many.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, unsigned bytes, Word* mbarrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(mbarrier))
                 : "memory");
}
// The map's box at element (column, row); outside the matrix it is zero.
__device__ __forceinline__ void tensor_copy(void* to, const TensorMap* map, int column, int row, Word* mbarrier, Word policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
                 "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(mbarrier)), "l"(policy)
                 : "memory");
}
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Writes of this thread to shared memory come before the copy engine's that it starts next.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }


#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- matrices of four warps (wgmma) --------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int left>
__device__ __forceinline__ void wgmma_wait() {  // for all groups but the newest `left`
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}

// d [64, N] += a [64, 16] b [N, 16]^T, of bf16. Thread t of 128 holds d[2 j + i + 4 k] = row 16 (t / 32) + t % 32 / 4 + 8 j,
// column 8 k + 2 (t % 4) + i.
#define FASTLOOP_F8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
                          "+f"(d[i + 6]), "+f"(d[i + 7])
__device__ __forceinline__ void wgmma_bf16(float (&d)[4], Word a, Word b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma_bf16(float (&d)[8], Word a, Word b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, 1, 1, 1, "
                 "0, 0;"
                 : FASTLOOP_F8(d, 0)
                 : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma_bf16(float (&d)[16], Word a, Word b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
                 "%12, %13, %14, %15}, %16, %17, 1, 1, 1, 0, 0;"
                 : FASTLOOP_F8(d, 0), FASTLOOP_F8(d, 8)
                 : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma_bf16(float (&d)[32], Word a, Word b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
                 "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, 1, 1, 1, 0, 0;"
                 : FASTLOOP_F8(d, 0), FASTLOOP_F8(d, 8), FASTLOOP_F8(d, 16), FASTLOOP_F8(d, 24)
                 : "l"(a), "l"(b));
}

// d [64, N] (+)= a [64, 16] b [N, 16]^T of 16-bit floats; the last argument says which. `a` is in registers, as mma.sync's
// (multiply): thread t has rows 16 (t / 32) + t % 32 / 4 and 8 behind. kFresh: d is set. kTransposed: b is stored [16, N].
// `a` may not change, and d not be touched, before the product has been waited for.
#define FASTLOOP_A4(a) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define FASTLOOP_WGMMA_64(type, kind)                                                                                     \
    template <bool kFresh, bool kTransposed>                                                                              \
    __device__ __forceinline__ void wgmma(float (&d)[32], const unsigned (&a)[4], Word b, type) {                         \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." kind "." kind " {%0, %1, %2, %3, %4, %5, %6, %7, %8, "  \
                     "%9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, " \
                     "%29, %30, %31}, {%32, %33, %34, %35}, %36, %37, 1, 1, %38;"                                         \
                     : FASTLOOP_F8(d, 0), FASTLOOP_F8(d, 8), FASTLOOP_F8(d, 16), FASTLOOP_F8(d, 24)                       \
                     : FASTLOOP_A4(a), "l"(b), "n"(kFresh ? 0 : 1), "n"(kTransposed ? 1 : 0));                            \
    }
#define FASTLOOP_WGMMA_128(type, kind)                                                                                    \
    template <bool kFresh, bool kTransposed>                                                                              \
    __device__ __forceinline__ void wgmma(float (&d)[64], const unsigned (&a)[4], Word b, type) {                         \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." kind "." kind " {%0, %1, %2, %3, %4, %5, %6, %7, %8, " \
                     "%9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, " \
                     "%29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "    \
                     "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                  \
                     "{%64, %65, %66, %67}, %68, %69, 1, 1, %70;"                                                         \
                     : FASTLOOP_F8(d, 0), FASTLOOP_F8(d, 8), FASTLOOP_F8(d, 16), FASTLOOP_F8(d, 24), FASTLOOP_F8(d, 32),  \
                       FASTLOOP_F8(d, 40), FASTLOOP_F8(d, 48), FASTLOOP_F8(d, 56)                                         \
                     : FASTLOOP_A4(a), "l"(b), "n"(kFresh ? 0 : 1), "n"(kTransposed ? 1 : 0));                            \
    }
FASTLOOP_WGMMA_64(bf16, "bf16")
FASTLOOP_WGMMA_64(f16, "f16")
FASTLOOP_WGMMA_128(bf16, "bf16")
FASTLOOP_WGMMA_128(f16, "f16")
#undef FASTLOOP_WGMMA_128
#undef FASTLOOP_WGMMA_64
#undef FASTLOOP_A4
#undef FASTLOOP_F8

// What has been waited for: no use of d is moved in front of the wait.
template <int count> __device__ __forceinline__ void wgmma_done(float (&d)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Registers that each thread of these four warps may have from here on; of all warps of the block no more than at its start.
template <int registers> __device__ __forceinline__ void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers> __device__ __forceinline__ void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

#endif  // sm_90a

}  // namespace fastloop

#endif  // sm_90
#endif

#if defined(FASTLOOP_CUDA_EMULATION) || __CUDA_ARCH__ >= 900
namespace fastloop {

// A tile in shared memory, rows of 128 bytes, its 16-byte pieces exchanged as TMA's 128-byte swizzle does; it begins at a
// multiple of 1024 bytes. `column_bytes` within a row: a multiple of 32, below 128.
__device__ __forceinline__ Word wgmma_tile(const void* tile, unsigned column_bytes) {
    constexpr Word LAYOUT_128B = 1ull << 62, ROWS_8 = (1024ull >> 4) << 32, UNUSED = 1ull << 16;
    return LAYOUT_128B | ROWS_8 | UNUSED | ((shared_address(tile) + column_bytes) & 0x3ffff) >> 4;
}

// The same tile as a transposed operand: 16 of its rows from `row` (a multiple of 8) on are the depth, its 64 columns the
// operand's rows; the next 64 are `next_bytes` behind.
__device__ __forceinline__ Word wgmma_tile_transposed(const void* tile, unsigned row, unsigned next_bytes) {
    constexpr Word LAYOUT_128B = 1ull << 62, ROWS_8 = (1024ull >> 4) << 32;
    return LAYOUT_128B | ROWS_8 | static_cast<Word>(next_bytes >> 4) << 16 |
           ((shared_address(tile) + row * 128) & 0x3ffff) >> 4;
}

}  // namespace fastloop
#endif
