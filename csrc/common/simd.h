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
FASTLOOP_INLINE Lanes load(const float* from) {
    Lanes v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}
FASTLOOP_INLINE void store(float* to, Lanes v) { __builtin_memcpy(to, &v, sizeof v); }

// The first `count` < kLanes floats, zeros behind them; and back.
FASTLOOP_INLINE Lanes load_some(const float* from, size_t count) {
    Lanes v = {};
    __builtin_memcpy(&v, from, count * sizeof(float));
    return v;
}
FASTLOOP_INLINE void store_some(float* to, Lanes v, size_t count) { __builtin_memcpy(to, &v, count * sizeof(float)); }

// Halves of a vector, folded by + or > until one lane is left: sum and maximum over the lanes, always in the same order.
// The maximum takes no NaN: it is one only where all lanes are.
#define FASTLOOP_FOLD(name, combine)                                                                  \
    FASTLOOP_INLINE float name(Quad v) {                                                              \
        const Quad half = combine(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));                      \
        const Quad last = combine(half, __builtin_shufflevector(half, half, 1, 0, 3, 2));             \
        return last[0];                                                                               \
    }                                                                                                 \
    FASTLOOP_FOLD_8(name, combine)                                                                    \
    FASTLOOP_FOLD_16(name, combine)
#if FASTLOOP_LANES >= 8
typedef float Oct __attribute__((vector_size(32)));
#define FASTLOOP_FOLD_8(name, combine)                                                                \
    FASTLOOP_INLINE float name(Oct v) {                                                               \
        return name(combine(__builtin_shufflevector(v, v, 0, 1, 2, 3),                                \
                            __builtin_shufflevector(v, v, 4, 5, 6, 7)));                              \
    }
#else
#define FASTLOOP_FOLD_8(name, combine)
#endif
#if FASTLOOP_LANES == 16
#define FASTLOOP_FOLD_16(name, combine)                                                               \
    FASTLOOP_INLINE float name(Lanes v) {                                                             \
        return name(combine(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),                    \
                            __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)));            \
    }
#else
#define FASTLOOP_FOLD_16(name, combine)
#endif
#define FASTLOOP_ADD(a, b) ((a) + (b))
#define FASTLOOP_MORE(a, b) ((a) > (b) ? (a) : (b))
FASTLOOP_FOLD(sum, FASTLOOP_ADD)
FASTLOOP_FOLD(maximum, FASTLOOP_MORE)
FASTLOOP_INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

// kDoubles doubles, for what must not be rounded on the way: from that many floats, or from the first `count` of them and zeros.
constexpr size_t kDoubles = kLanes / 2;
typedef double DoubleLanes __attribute__((vector_size(4 * FASTLOOP_LANES)));
typedef float NarrowLanes __attribute__((vector_size(2 * FASTLOOP_LANES)));
FASTLOOP_INLINE DoubleLanes load_doubles(const float* from) {
    NarrowLanes v;
    __builtin_memcpy(&v, from, sizeof v);
    return __builtin_convertvector(v, DoubleLanes);
}
FASTLOOP_INLINE DoubleLanes load_doubles(const float* from, size_t count) {
    NarrowLanes v = {};
    __builtin_memcpy(&v, from, count * sizeof(float));
    return __builtin_convertvector(v, DoubleLanes);
}
FASTLOOP_INLINE double sum(DoubleLanes v) {
    double total = 0;
    for (size_t i = 0; i < kDoubles; ++i) total += v[i];
    return total;
}

// A product as it is rounded, though a sum follows that it could be fused with: instruction sets with and without such
// instructions then agree to the bit.
FASTLOOP_INLINE Lanes unfused(Lanes v) {
#if defined(__x86_64__)
    asm("" : "+x"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#else
    asm("" : "+m"(v));
#endif
    return v;
}

// The nearest whole number, half to even; |x| < 2^22.
FASTLOOP_INLINE Lanes nearest(Lanes x) {
    constexpr float kMagic = 12582912.0f;  // 1.5 x 2^23: the units are the whole numbers
    return (x + kMagic) - kMagic;
}

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

// e^x within 2 ulp; 0 below -87.3 (no denormals), Inf above 88.7, NaN of NaN.
// x = n ln 2 + f, |f| <= ln 2 / 2; e^f = 1 + f + f^2 q(f), q the polynomial of degree 4 of least relative error, 3e-9.
FASTLOOP_INLINE Lanes exp(Lanes x) {
    constexpr float kLog2E = 1.44269504f, kHigh = 0.693145752f, kLow = 1.42860677e-6f;  // ln 2, high part exact times n
    const Lanes inside = x < -87.3f ? splat(-87.3f) : (x > 88.7f ? splat(88.7f) : x);
    const Lanes n = nearest(inside * kLog2E);
    const Lanes f = (inside - n * kHigh) - n * kLow;
    Lanes q = splat(0.00138144649f);
    q = q * f + 0.00836878084f;
    q = q * f + 0.0416683927f;
    q = q * f + 0.166665196f;
    q = q * f + 0.49999994f;
    const Lanes y = (f * f) * q + f + 1.0f;
    const IntLanes whole = __builtin_convertvector(n, IntLanes), half = whole >> 1;
    const Lanes a = reinterpret_cast<Lanes>((half + 127) << 23), b = reinterpret_cast<Lanes>((whole - half + 127) << 23);
    const Lanes scaled = (y * a) * b;  // in two steps: 2^128 alone is no float
    return x < -87.3f ? Lanes{} : (x > 88.7228f ? splat(__builtin_inff()) : scaled);
}

// 2^x for x <= 0, -inf or NaN, 0 below -126.5: what an online softmax asks for. x = n + f, 2^f = 1 + f q(f); q is the
// polynomial of degree 5 of least relative error, 2e-9, or of degree 3, 3e-6, where the result will be a bfloat16.
FASTLOOP_INLINE Lanes scaled_by_power(Lanes y, Lanes n) {
    return y * reinterpret_cast<Lanes>((__builtin_convertvector(n, IntLanes) + 127) << 23);  // n = -127 makes 0
}
FASTLOOP_INLINE Lanes exp2_below(Lanes x) {
    const Lanes inside = x < -127.0f ? splat(-127.0f) : x, n = nearest(inside), f = inside - n;
    Lanes q = splat(0.000153533634f);
    q = q * f + 0.0013398875f;
    q = q * f + 0.00961843692f;
    q = q * f + 0.0555033237f;
    q = q * f + 0.240226477f;
    q = q * f + 0.693147182f;
    return scaled_by_power(q * f + 1.0f, n);
}
FASTLOOP_INLINE Lanes exp2_below_short(Lanes x) {
    const Lanes inside = x < -127.0f ? splat(-127.0f) : x, n = nearest(inside), f = inside - n;
    Lanes q = splat(0.00958285481f);
    q = q * f + 0.0559064299f;
    q = q * f + 0.240240991f;
    q = q * f + 0.693124175f;
    return scaled_by_power(q * f + 1.0f, n);
}

// x / (1 + e^-x)
FASTLOOP_INLINE Lanes silu(Lanes x) { return x / (1.0f + exp(-x)); }

// x times the normal distribution's Phi(x), the exact GELU: Phi(-|x|) = e^(-z^2) u r(u) / 2 with z = |x| / sqrt(2),
// u = 1 / (1 + 0.4 z) and r the polynomial of degree 9 for which the relative error of erfc is least up to z = 14: 2e-8.
FASTLOOP_INLINE Lanes gelu(Lanes x) {
    const Lanes z = (x < 0.0f ? -x : x) * 0.707106781f;
    const Lanes u = 1.0f / (1.0f + 0.4f * z);
    Lanes r = splat(-0.0231016371f);
    r = r * u + 0.163407043f;
    r = r * u - 0.419151723f;
    r = r * u + 0.44375214f;
    r = r * u - 0.200491488f;
    r = r * u + 0.228449017f;
    r = r * u + 0.144222796f;
    r = r * u + 0.21192804f;
    r = r * u + 0.225295693f;
    r = r * u + 0.225690126f;
    const Lanes tail = 0.5f * (exp(-(z * z)) * (u * r));
    return x * (x < 0.0f ? tail : 1.0f - tail);
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
