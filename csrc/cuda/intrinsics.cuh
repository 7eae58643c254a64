// What the kernels say in PTX, each word once; and the same words for g++, which runs the kernels on CPUs in tests
// (FASTLOOP_CUDA_EMULATION, tests/native/cuda_emulation). For nvcc and NVRTC: no header of the host is needed.
#pragma once

#if defined(FASTLOOP_CUDA_EMULATION)
#include "intrinsics.h"
#else
// Dynamic shared memory of the block, as a pointer `name` to `type`, 1,024-byte aligned.
#define FASTLOOP_SHARED(type, name)                                     \
    extern __shared__ __align__(1024) unsigned char name##_bytes[];     \
    type* const name = reinterpret_cast<type*>(name##_bytes)
#endif

namespace fastloop {

// Floats as they are stored. widen() is exact, narrow() rounds to nearest, ties to even.
struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };
struct e4m3 { unsigned char bits; };

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

#if defined(FASTLOOP_CUDA_EMULATION)

__device__ __forceinline__ float widen(f16 x) { return cuda_emulation::widen_f16(x.bits); }
__device__ __forceinline__ float widen(e4m3 x) { return cuda_emulation::widen_e4m3(x.bits); }
__device__ __forceinline__ bf16 narrow_bf16(float x) { return {cuda_emulation::narrow_bf16(x)}; }
__device__ __forceinline__ f16 narrow_f16(float x) { return {cuda_emulation::narrow_f16(x)}; }
__device__ __forceinline__ float exp2_fast(float x) { return exp2f(x); }

// cp.async of 16 bytes into shared memory; where `real` is false nothing is read and zeros are written.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool real) {
    cuda_emulation::cp_async(to, from, 16, real ? 16 : 0);
}
// a b + c of two bf16 at a time, rounded once.
__device__ __forceinline__ unsigned fma_bf16x2(unsigned a, unsigned b, unsigned c) {
    unsigned both = 0;
    for (int s = 0; s < 32; s += 16) {
        const auto part = [s](unsigned x) { return double(cuda_emulation::widen_bf16(static_cast<uint16_t>(x >> s))); };
        const float sum = static_cast<float>(part(a) * part(b) + part(c));  // exact but for what bf16 cannot hold either
        both |= static_cast<unsigned>(cuda_emulation::narrow_bf16(sum)) << s;
    }
    return both;
}
// Of the 16 bytes only the first `read` come from memory, the others are zero.
__device__ __forceinline__ void copy_async_16_part(void* to, const void* from, int read) {
    cuda_emulation::cp_async(to, from, 16, read);
}
__device__ __forceinline__ void commit_copies() { cuda_emulation::cp_async_commit(); }
template <int left> __device__ __forceinline__ void wait_for_copies() { cuda_emulation::cp_async_wait(left); }

template <int count> __device__ __forceinline__ void load_matrices(unsigned (&r)[count], const void* row) {
    cuda_emulation::ldmatrix<count>(r, row, false);
}
template <int count> __device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[count], const void* row) {
    cuda_emulation::ldmatrix<count>(r, row, true);
}
__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bf16) {
    cuda_emulation::mma_m16n8k16_bf16(d, a, b, d);
}
__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], f16) {
    cuda_emulation::mma_m16n8k16_f16(d, a, b, d);
}

__device__ __forceinline__ void let_next_kernel_start() {}
__device__ __forceinline__ void wait_for_previous_kernel() {}

#else

__device__ __forceinline__ float widen(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
// Exponent and mantissa moved into a float16, which is 2^8 too small then; NaN (all ones) apart.
__device__ __forceinline__ float widen(e4m3 x) {
    const unsigned short half = static_cast<unsigned short>((x.bits & 0x80) << 8 | (x.bits & 0x7F) << 7);
    return (x.bits & 0x7F) == 0x7F ? __uint_as_float(0x7FC00000u) : widen(f16{half}) * 256.0f;
}
__device__ __forceinline__ bf16 narrow_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
__device__ __forceinline__ f16 narrow_f16(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// cp.async of 16 bytes into shared memory; where `real` is false nothing is read and zeros are written.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(real ? 16 : 0)
                 : "memory");
}
// a b + c of two bf16 at a time, rounded once.
__device__ __forceinline__ unsigned fma_bf16x2(unsigned a, unsigned b, unsigned c) {
    unsigned both;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(both) : "r"(a), "r"(b), "r"(c));
    return both;
}
// Of the 16 bytes only the first `read` come from memory, the others are zero.
__device__ __forceinline__ void copy_async_16_part(void* to, const void* from, int read) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(read) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// ldmatrix: each lane names one row of 16 bytes; 8 x 8 matrices of 16-bit elements, one register each.
template <int count> __device__ __forceinline__ void load_matrices(unsigned (&r)[count], const void* row) {
    static_assert(count == 2 || count == 4, "ldmatrix loads 2 or 4 matrices here");
    if constexpr (count == 4)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
template <int count> __device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[count], const void* row) {
    static_assert(count == 2 || count == 4, "ldmatrix loads 2 or 4 matrices here");
    if constexpr (count == 4)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8] of 16-bit floats with float32 sums; the last argument says which floats.
__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], f16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Programmatic dependent launch: the next kernel's blocks may be scheduled; what the previous kernel wrote is there.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif

template <class T> __device__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { return narrow_bf16(x); }
template <> __device__ __forceinline__ f16 narrow<f16>(float x) { return narrow_f16(x); }

// Two 16-bit floats in a register, the first one in its lower half.
template <class T> __device__ __forceinline__ unsigned pair(float first, float second) {
    return static_cast<unsigned>(narrow<T>(first).bits) | static_cast<unsigned>(narrow<T>(second).bits) << 16;
}

}  // namespace fastloop
