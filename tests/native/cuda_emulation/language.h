// What CUDA C++ adds to C++, for g++: keywords, built-in variables and functions, vector types, atomics.
//
// Dynamic shared memory is the one thing that has another spelling: FASTLOOP_SHARED(type, name) is a pointer to it.
// __shared__ variables are thread_local behind the scenes, and the runtime exchanges their contents with the block, so
// another block of a cluster reaches dynamic shared memory only. Not there: textures, device-side launches, wgmma.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "runtime.h"

#define __global__ __attribute__((used))  // emulation.py finds kernels by it
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define FASTLOOP_SHARED(type, name) type* const name = reinterpret_cast<type*>(::cuda_emulation::fiber().block->shared)

#define threadIdx (::cuda_emulation::fiber().thread)
#define blockIdx (::cuda_emulation::fiber().block->index)
#define blockDim (::cuda_emulation::machine->configuration().block)
#define gridDim (::cuda_emulation::machine->configuration().grid)
constexpr int warpSize = 32;

#define CUDA_EMULATION_VECTOR(type, name, bytes)                                                  \
    struct alignas(bytes) name##2 { type x, y; };                                                 \
    struct name##3 { type x, y, z; };                                                             \
    struct alignas(2 * bytes > 16 ? 16 : 2 * bytes) name##4 { type x, y, z, w; };                 \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                              \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                   \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
#define uint3 cuda_emulation_uint3  // is there already
CUDA_EMULATION_VECTOR(float, float, 8)
CUDA_EMULATION_VECTOR(double, double, 16)
CUDA_EMULATION_VECTOR(int, int, 8)
CUDA_EMULATION_VECTOR(unsigned, uint, 8)
CUDA_EMULATION_VECTOR(long long, longlong, 16)
CUDA_EMULATION_VECTOR(unsigned long long, ulonglong, 16)
CUDA_EMULATION_VECTOR(short, short, 4)
CUDA_EMULATION_VECTOR(unsigned short, ushort, 4)
CUDA_EMULATION_VECTOR(signed char, char, 2)
CUDA_EMULATION_VECTOR(unsigned char, uchar, 2)
#undef uint3

// Barriers.
inline void cuda_emulation_barrier(unsigned id, unsigned count) {
    auto& block = *cuda_emulation::fiber().block;
    auto& m = *cuda_emulation::machine;
    if (id >= 16 || (id && (count % 32 || count > block.threads))) m.fail("barrier %u of %u threads", id, count);
    m.wait(block.barriers[id], m.arrive(block.barriers[id], id ? count : block.live));
}
inline void __syncthreads() { cuda_emulation_barrier(0, 0); }
inline int __syncthreads_count(int predicate) {
    auto& block = *cuda_emulation::fiber().block;
    auto& m = *cuda_emulation::machine;
    const uint64_t phase = block.barriers[0].phase;
    block.votes += predicate != 0;
    if (block.barriers[0].arrived + 1 >= block.live) block.voted[phase % 2] = std::exchange(block.votes, 0);
    m.wait(block.barriers[0], m.arrive(block.barriers[0], block.live));
    return block.voted[phase % 2];
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(!predicate) == 0; }
inline void __syncwarp(unsigned mask = ~0u) { cuda_emulation::exchange(mask, &mask, sizeof mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { cuda_emulation::machine->poll(); }
[[noreturn]] inline void __trap() { cuda_emulation::machine->fail("a trap"); }

// Warp exchanges.
template <class T> T cuda_emulation_from(unsigned mask, T value, unsigned source) {
    const auto* all = cuda_emulation::exchange(mask, &value, sizeof value);
    T result;
    memcpy(&result, all[source], sizeof result);
    return result;
}
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const unsigned own = cuda_emulation::lane();
    return cuda_emulation_from(mask, value, (own & ~(width - 1u)) | (unsigned(source) & (width - 1u)));
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const unsigned own = cuda_emulation::lane(), other = own ^ unsigned(bits);
    return cuda_emulation_from(mask, value, other / width > own / width ? own : other);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned own = cuda_emulation::lane(), base = own & ~(width - 1u);
    return cuda_emulation_from(mask, value, own >= base + delta ? own - delta : own);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned own = cuda_emulation::lane(), base = own & ~(width - 1u);
    return cuda_emulation_from(mask, value, own + delta < base + width ? own + delta : own);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const unsigned char mine = predicate != 0;
    const unsigned live = cuda_emulation::warp().live;
    const auto* all = cuda_emulation::exchange(mask, &mine, 1);
    unsigned result = 0;
    for (unsigned l = 0; l < 32; ++l)
        if ((mask & live) >> l & 1 && all[l][0] == 1) result |= 1u << l;
    return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <class T, class F> T cuda_emulation_reduce(unsigned mask, T value, F&& both) {
    const auto* all = cuda_emulation::exchange(mask, &value, sizeof value);
    T result{};
    bool first = true;
    for (unsigned l = 0; l < 32; ++l)
        if (mask >> l & 1) {
            T other;
            memcpy(&other, all[l], sizeof other);
            result = first ? other : both(result, other);
            first = false;
        }
    return result;
}
template <class T> T __reduce_add_sync(unsigned mask, T v) { return cuda_emulation_reduce(mask, v, [](T a, T b) { return a + b; }); }
template <class T> T __reduce_max_sync(unsigned mask, T v) { return cuda_emulation_reduce(mask, v, [](T a, T b) { return std::max(a, b); }); }
template <class T> T __reduce_min_sync(unsigned mask, T v) { return cuda_emulation_reduce(mask, v, [](T a, T b) { return std::min(a, b); }); }

// Memory. Only one thread runs at a time, so an operation between two waits is atomic as it stands.
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcg(T* p, T value) { *p = value; }
template <class T> void __stcs(T* p, T value) { *p = value; }
#define CUDA_EMULATION_ATOMIC(name, result)                                    \
    template <class T> T name(T* p, std::type_identity_t<T> value) {           \
        const T old = *p;                                                      \
        *p = result;                                                           \
        cuda_emulation::machine->progress();                                   \
        if (cuda_emulation::machine->configuration().seed) cuda_emulation::machine->yield(); \
        return old;                                                            \
    }
CUDA_EMULATION_ATOMIC(atomicAdd, static_cast<T>(old + value))
CUDA_EMULATION_ATOMIC(atomicSub, static_cast<T>(old - value))
CUDA_EMULATION_ATOMIC(atomicMax, std::max(old, value))
CUDA_EMULATION_ATOMIC(atomicMin, std::min(old, value))
CUDA_EMULATION_ATOMIC(atomicAnd, old & value)
CUDA_EMULATION_ATOMIC(atomicOr, old | value)
CUDA_EMULATION_ATOMIC(atomicXor, old ^ value)
CUDA_EMULATION_ATOMIC(atomicExch, value)
CUDA_EMULATION_ATOMIC(atomicInc, old >= value ? T(0) : T(old + 1))
template <class T> T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
    const T old = *p;
    if (old == compare) *p = value;
    return old;
}

// Bits and numbers.
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __clzll(long long x) { return std::countl_zero((unsigned long long)x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
    return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t both = uint64_t(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned s = selector >> 4 * i & 15;
        unsigned byte = unsigned(both >> 8 * (s & 7)) & 255;
        if (s & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
    return c;
}
inline float __expf(float x) { return expf(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __frsqrt_rn(float x) { return float(1 / std::sqrt(double(x))); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float sinpif(float x) { return float(std::sin(M_PI * std::fmod(double(x), 2.0))); }
inline float cospif(float x) { return float(std::cos(M_PI * std::fmod(double(x), 2.0))); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __saturatef(float x) { return x > 0 ? std::min(x, 1.0f) : 0.0f; }
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
    else return T(a) < T(b) ? T(b) : T(a);
}
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
    else return T(b) < T(a) ? T(b) : T(a);
}

// 16- and 8-bit floats as bits: widened exactly, narrowed to nearest, ties to even.
namespace cuda_emulation {
inline float widen_bf16(uint16_t x) { return std::bit_cast<float>(uint32_t(x) << 16); }
inline uint16_t narrow_bf16(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if (x != x) return 0x7FFF;
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline float widen_f16(uint16_t x) { return float(std::bit_cast<_Float16>(x)); }
inline uint16_t narrow_f16(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline float widen_e4m3(uint8_t x) {
    if ((x & 0x7F) == 0x7F) return std::numeric_limits<float>::quiet_NaN();
    const int exponent = x >> 3 & 15, mantissa = x & 7;
    const float value = exponent ? std::ldexp(8.0f + float(mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
    return x & 0x80 ? -value : value;
}
}  // namespace cuda_emulation
