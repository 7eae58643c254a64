// sample, one row: the likeliest token, and what each token weighs in a draw. Bytes moved: the logits and the bans, once or twice.
#include "sample.h"

#include "simd.h"

namespace {

typedef int64_t LongLanes __attribute__((vector_size(4 * FASTLOOP_LANES)));
typedef uint8_t BanLanes __attribute__((vector_size(FASTLOOP_LANES)));
typedef uint8_t HalfBans __attribute__((vector_size(FASTLOOP_LANES / 2)));

constexpr double kMagic = 6755399441055744.0;  // 1.5 x 2^52: the units are the whole numbers, and the low bits are theirs

// 2^n of whole n in -1022..1023: the exponent's bits.
FASTLOOP_INLINE DoubleLanes power_of_two(DoubleLanes n) {
    return reinterpret_cast<DoubleLanes>(reinterpret_cast<LongLanes>(n + (kMagic + 1023.0)) << 52);
}

// e^x of x <= 0 within 1 ulp, 0 where it underflows. x = n ln 2 + f, |f| <= ln 2 / 2; Taylor's series of e^f to f^13: 4e-18.
FASTLOOP_INLINE DoubleLanes exp_below_zero(DoubleLanes x) {
    constexpr double kLog2E = 1.4426950408889634, kHigh = 0.6931471803691238, kLow = 1.9082149292705877e-10;
    const DoubleLanes inside = x < -745.5 ? (DoubleLanes{} - 745.5) : x;
    const DoubleLanes n = (inside * kLog2E + kMagic) - kMagic;
    const DoubleLanes f = (inside - n * kHigh) - n * kLow;
    DoubleLanes q = DoubleLanes{} + 1.0 / 6227020800;
    q = q * f + 1.0 / 479001600;
    q = q * f + 1.0 / 39916800;
    q = q * f + 1.0 / 3628800;
    q = q * f + 1.0 / 362880;
    q = q * f + 1.0 / 40320;
    q = q * f + 1.0 / 5040;
    q = q * f + 1.0 / 720;
    q = q * f + 1.0 / 120;
    q = q * f + 1.0 / 24;
    q = q * f + 1.0 / 6;
    q = q * f + 0.5;
    const DoubleLanes y = (f * f) * q + f + 1.0;
    const DoubleLanes most = n < -1000.0 ? (DoubleLanes{} - 1000.0) : n;
    return x < -745.5 ? DoubleLanes{} : (y * power_of_two(most)) * power_of_two(n - most);
}

// `count` <= kLanes logits, -Inf where they are banned or there are none.
FASTLOOP_INLINE Lanes legal(const float* logits, const uint8_t* banned, size_t count) {
    BanLanes bans = {};
    Lanes v;
    if (count == kLanes) {
        v = load(logits);
        __builtin_memcpy(&bans, banned, sizeof bans);
    } else {
        v = load_some(logits, count);
        __builtin_memset(&bans, 1, sizeof bans);
        __builtin_memcpy(&bans, banned, count);
    }
    const IntLanes wide = __builtin_convertvector(bans, IntLanes);
    return wide != 0 ? splat(-__builtin_inff()) : v;
}

}  // namespace

namespace FASTLOOP_ISA {

float sample_peak(const float* logits, const uint8_t* banned, size_t count, size_t* token) {
    Lanes best = splat(-__builtin_inff()), odd = {};
    IntLanes at = {}, here = {};
    for (size_t i = 0; i < kLanes; ++i) here[i] = static_cast<int32_t>(i);
    for (size_t i = 0; i < count; i += kLanes) {
        const Lanes v = legal(logits + i, banned + i, count - i < kLanes ? count - i : kLanes);
        const IntLanes more = v > best;
        best = more ? v : best;
        at = more ? here : at;
        odd = v != v ? v : odd;
        here += static_cast<int32_t>(kLanes);
    }
    float top = best[0], nan = odd[0];
    int32_t first = at[0];
    for (size_t i = 1; i < kLanes; ++i) {
        if (best[i] > top || (best[i] == top && at[i] < first)) {
            top = best[i];
            first = at[i];
        }
        if (odd[i] != odd[i]) nan = odd[i];
    }
    *token = static_cast<size_t>(first);
    return nan != nan ? nan : top;
}

void sample_tops(const float* logits, const uint8_t* banned, size_t count, float* tops) {
    for (size_t first = 0; first < count; first += fastloop::kTopBlock) {
        const size_t last = first + fastloop::kTopBlock < count ? first + fastloop::kTopBlock : count;
        Lanes top = splat(-__builtin_inff());
        for (size_t i = first; i < last; i += kLanes)
            top = larger(top, legal(logits + i, banned + i, last - i < kLanes ? last - i : kLanes));
        *tops++ = maximum(top);
    }
}

void sample_weights(const float* logits, const uint8_t* banned, size_t count, double peak, double temperature,
                    double* weights) {
    for (size_t i = 0; i < count; i += kDoubles) {
        const size_t some = count - i < kDoubles ? count - i : kDoubles;
        HalfBans bans = {};
        if (some == kDoubles) __builtin_memcpy(&bans, banned + i, sizeof bans);
        else __builtin_memcpy(&bans, banned + i, some);
        const LongLanes wide = __builtin_convertvector(bans, LongLanes);
        const DoubleLanes logit = some == kDoubles ? load_doubles(logits + i) : load_doubles(logits + i, some);
        const DoubleLanes x = (logit - peak) / temperature;
        const DoubleLanes w = wide != 0 ? DoubleLanes{} : exp_below_zero(x);
        __builtin_memcpy(weights + i, &w, some * sizeof(double));
    }
}

}  // namespace FASTLOOP_ISA
