// The complex DFT of 200 points in every lane, in place: 25 DFTs of 8, then 8 of 25 = 5 x 5 (see MelTables).
#pragma once

#include "mel.h"
#include "simd.h"

namespace {

struct Complex {
    Lanes re, im;
};

FASTLOOP_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
FASTLOOP_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
FASTLOOP_INLINE Complex minus_i(Complex a) { return {a.im, -a.re}; }
FASTLOOP_INLINE Complex times(Complex a, float re, float im) {
    return {a.re * re - a.im * im, a.re * im + a.im * re};
}

// y[k] = sum_n x[n] e^(-2 pi i n k / 8); element n at x[stride n], y over x.
FASTLOOP_INLINE void dft8(Complex* x, size_t stride) {
    constexpr float kHalfRoot = 0.707106781f;
    const Complex x0 = x[0], x1 = x[stride], x2 = x[2 * stride], x3 = x[3 * stride];
    const Complex x4 = x[4 * stride], x5 = x[5 * stride], x6 = x[6 * stride], x7 = x[7 * stride];
    const Complex a = x0 + x4, b = x0 - x4, c = x2 + x6, d = minus_i(x2 - x6);
    const Complex e = x1 + x5, f = x1 - x5, g = x3 + x7, h = minus_i(x3 - x7);
    const Complex even0 = a + c, even1 = b + d, even2 = a - c, even3 = b - d;
    const Complex odd0 = e + g, odd1 = f + h, odd2 = minus_i(e - g), odd3 = f - h;
    // e^(-i pi / 4) odd1 and e^(-3 i pi / 4) odd3
    const Complex turned1 = {kHalfRoot * (odd1.re + odd1.im), kHalfRoot * (odd1.im - odd1.re)};
    const Complex turned3 = {kHalfRoot * (odd3.im - odd3.re), -kHalfRoot * (odd3.re + odd3.im)};
    x[0] = even0 + odd0;
    x[stride] = even1 + turned1;
    x[2 * stride] = even2 + odd2;
    x[3 * stride] = even3 + turned3;
    x[4 * stride] = even0 - odd0;
    x[5 * stride] = even1 - turned1;
    x[6 * stride] = even2 - odd2;
    x[7 * stride] = even3 - turned3;
}

// y[k] = sum_n x[n] e^(-2 pi i n k / 5)
FASTLOOP_INLINE void dft5(const Complex (&x)[5], Complex (&y)[5]) {
    constexpr float kCos1 = 0.309016994f, kCos2 = -0.809016994f;  // cos(2 pi / 5), cos(4 pi / 5)
    constexpr float kSin1 = 0.951056516f, kSin2 = 0.587785252f;
    const Complex p = x[1] + x[4], q = x[2] + x[3], r = x[1] - x[4], s = x[2] - x[3];
    const Complex a = {x[0].re + kCos1 * p.re + kCos2 * q.re, x[0].im + kCos1 * p.im + kCos2 * q.im};
    const Complex b = {x[0].re + kCos2 * p.re + kCos1 * q.re, x[0].im + kCos2 * p.im + kCos1 * q.im};
    const Complex u = {kSin1 * r.re + kSin2 * s.re, kSin1 * r.im + kSin2 * s.im};
    const Complex v = {kSin2 * r.re - kSin1 * s.re, kSin2 * r.im - kSin1 * s.im};
    y[0] = x[0] + (p + q);
    y[1] = {a.re + u.im, a.im - u.re};
    y[2] = {b.re + v.im, b.im - v.re};
    y[3] = {b.re - v.im, b.im + v.re};
    y[4] = {a.re - u.im, a.im + u.re};
}

// n2 = 5 a + b, k2 = c + 5 d: DFTs over a, twiddles e^(-2 pi i b c / 25), DFTs over b. Result c, d at x[5 c + d].
FASTLOOP_INLINE void dft25(Complex* x, const fastloop::MelTables& t) {
    for (size_t b = 0; b < 5; ++b) {
        Complex y[5];
        dft5({x[b], x[5 + b], x[10 + b], x[15 + b], x[20 + b]}, y);
        x[b] = y[0];
        for (size_t c = 1; c < 5; ++c) x[5 * c + b] = times(y[c], t.twiddle[c][b][0], t.twiddle[c][b][1]);
    }
    for (size_t c = 0; c < 5; ++c) {
        Complex y[5];
        dft5({x[5 * c], x[5 * c + 1], x[5 * c + 2], x[5 * c + 3], x[5 * c + 4]}, y);
        for (size_t d = 0; d < 5; ++d) x[5 * c + d] = y[d];
    }
}

FASTLOOP_INLINE void dft200(Complex* z, const fastloop::MelTables& t) {
    for (size_t n2 = 0; n2 < 25; ++n2) dft8(z + n2, 25);
    for (size_t k1 = 0; k1 < 8; ++k1) dft25(z + 25 * k1, t);
}

}  // namespace
