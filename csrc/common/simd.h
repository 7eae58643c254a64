// Lanes: kLanes independent floats that go through the same instructions (gcc vector extensions). Only for kernels in
// csrc/cpu/isa/, which are compiled once per instruction set; nothing here may instantiate a template of the standard
// library, or the linker could hand its AVX-512 copy to a machine without it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX512F__)
#define FASTLOOP_LANES 16
#elif defined(__AVX2__)
#define FASTLOOP_LANES 8
#else
#define FASTLOOP_LANES 4  // SSE2, NEON
#endif

#define FASTLOOP_INLINE static inline __attribute__((always_inline))

namespace {

constexpr size_t kLanes = FASTLOOP_LANES;
typedef float Lanes __attribute__((vector_size(4 * FASTLOOP_LANES)));
typedef int32_t IntLanes __attribute__((vector_size(4 * FASTLOOP_LANES)));
typedef float Quad __attribute__((vector_size(16)));
typedef float UnalignedQuad __attribute__((vector_size(16), aligned(4), may_alias));

FASTLOOP_INLINE Quad load4(const float* from) { return *reinterpret_cast<const UnalignedQuad*>(from); }
FASTLOOP_INLINE void store4(float* to, Quad value) { *reinterpret_cast<UnalignedQuad*>(to) = value; }

FASTLOOP_INLINE Lanes splat(float value) { return value - Lanes{}; }

// Rows a, b, c, d of a 4 x 4 block become its columns.
FASTLOOP_INLINE void transpose4(Quad& a, Quad& b, Quad& c, Quad& d) {
    const Quad ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Quad cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    a = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
    b = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
    c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
    d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
}

// log10 of normal positive floats, within 1 ulp of the result's magnitude (anything else: some finite value or NaN).
// x = 2^e m with m in [sqrt(1/2), sqrt(2)); log10(1 + f) = f (log10(e) + f q(f)), q the polynomial of
// degree 6 whose largest absolute error is least: 1.6e-8. log10(2) is split so that e * kHigh is exact.
FASTLOOP_INLINE Lanes log10(Lanes x) {
    constexpr int32_t kSqrtHalf = 0x3f3504f3;
    const IntLanes bits = reinterpret_cast<IntLanes>(x);
    const IntLanes exponent = (bits - kSqrtHalf) >> 23;
    const Lanes f = reinterpret_cast<Lanes>(bits - (exponent << 23)) - 1.0f;
    const Lanes e = __builtin_convertvector(exponent, Lanes);
    constexpr float kLow = 4.60503898e-6f, kHigh = 0.301025390625f, kLog10E = 0.434294482f;
    Lanes q = splat(-0.0435793623f);
    q = q * f + 0.0709447265f;
    q = q * f - 0.0752459392f;
    q = q * f + 0.0863737017f;
    q = q * f - 0.108406261f;
    q = q * f + 0.144773200f;
    q = q * f - 0.217149779f;
    return e * kHigh + (e * kLow + f * (q * f + kLog10E));
}

// Denormals count as zero while this lives: on many machines each one costs a hundred cycles.
class FlushDenormals {
  public:
#if defined(__x86_64__)
    FlushDenormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8040u); }
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved_); }

  private:
    unsigned saved_;
#elif defined(__aarch64__)
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" : : "r"(saved_ | (uint64_t{1} << 24)));
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

  private:
    uint64_t saved_;
#else
    FlushDenormals() {}
    ~FlushDenormals() {}
#endif
};

}  // namespace
