// The heart of `linear` and of the attentions: the sums of up to kBlock rows x 32 channels, in registers.
//
// A step takes one unit (4 bytes: a float, two bfloat16, four int8) of each row and of each channel. Blocks are structs of
// structs because a compiler keeps those in registers, and arrays on the stack. Only for kernels in csrc/cpu/isa/.
#pragma once

#include "linear.h"
#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(FASTLOOP_BLOCK)
constexpr size_t kBlock = FASTLOOP_BLOCK;  // fewer, for builds that are to be quick
#elif defined(__AVX512F__)
constexpr size_t kBlock = 14;
#elif defined(__AVX2__)
constexpr size_t kBlock = 3;
#else
constexpr size_t kBlock = 1;
#endif
constexpr size_t kPanel = fastloop::kPanel;
constexpr size_t kVectors = kPanel / kLanes;  // of a unit of a panel

#define FASTLOOP_FORCE inline __attribute__((always_inline))

typedef int32_t AnyUnit __attribute__((may_alias));  // of a row, whatever was stored there

// ---- one step of a sum: four bytes of a row against kLanes channels ------------------------------------------------

FASTLOOP_INLINE IntLanes raw(const unsigned char* from) {
    IntLanes v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}

// bfloat16, half to even; NaN stays NaN.
FASTLOOP_INLINE uint16_t bfloat16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Signed bytes as int32; gcc 12 converts them one by one where it is not told how.
typedef int8_t ByteLanes __attribute__((vector_size(FASTLOOP_LANES)));
FASTLOOP_INLINE IntLanes wide(ByteLanes v) {
#if defined(__AVX512F__)
    return reinterpret_cast<IntLanes>(_mm512_maskz_cvtepi8_epi32(0xffff, reinterpret_cast<__m128i>(v)));
#elif defined(__AVX2__)
    __m128i both = _mm_setzero_si128();
    __builtin_memcpy(&both, &v, sizeof v);
    return reinterpret_cast<IntLanes>(_mm256_cvtepi8_epi32(both));
#else
    return __builtin_convertvector(v, IntLanes);
#endif
}

struct Float32 {
    typedef Lanes Sum;
    typedef Lanes Channel;
    typedef Lanes Value;
    static FASTLOOP_FORCE Channel channel(IntLanes w) { return reinterpret_cast<Lanes>(w); }
    static FASTLOOP_FORCE Value value(int32_t x) { return reinterpret_cast<Lanes>(x - IntLanes{}); }
    static FASTLOOP_FORCE void add(Sum& sum, Channel w, Value x) { sum += w * x; }
};

#if defined(__AVX512BF16__)
struct Bfloat16 {
    typedef Lanes Sum;
    typedef IntLanes Channel;
    typedef IntLanes Value;
    static FASTLOOP_FORCE Channel channel(IntLanes w) { return w; }
    static FASTLOOP_FORCE Value value(int32_t x) { return x - IntLanes{}; }
    static FASTLOOP_FORCE void add(Sum& sum, Channel w, Value x) {
        sum = reinterpret_cast<Lanes>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(w),
                                                       reinterpret_cast<__m512bh>(x)));
    }
};
#else
struct Bfloat16 {
    typedef Lanes Sum;
    struct Channel {
        Lanes even, odd;
    };
    typedef Channel Value;
    static FASTLOOP_FORCE Channel channel(IntLanes w) {
        return {reinterpret_cast<Lanes>(w << 16), reinterpret_cast<Lanes>(w & static_cast<int32_t>(0xffff0000))};
    }
    static FASTLOOP_FORCE Value value(int32_t x) { return channel(x - IntLanes{}); }
    static FASTLOOP_FORCE void add(Sum& sum, const Channel& w, const Value& x) {
        sum += w.even * x.even;
        sum += w.odd * x.odd;
    }
};
#endif

// Unsigned bytes of the weights times signed bytes of the row; exact in every variant, so they agree to the bit.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
struct Bytes {
    typedef IntLanes Sum;
    typedef IntLanes Channel;
    typedef IntLanes Value;
    static FASTLOOP_FORCE Channel channel(IntLanes w) { return w; }
    static FASTLOOP_FORCE Value value(int32_t x) { return x - IntLanes{}; }
    static FASTLOOP_FORCE void add(Sum& sum, Channel w, Value x) {
#if defined(__AVX512VNNI__)
        sum = reinterpret_cast<IntLanes>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(w),
                                                             reinterpret_cast<__m512i>(x)));
#else
        sum = reinterpret_cast<IntLanes>(_mm256_dpbusd_avx_epi32(
            reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(w), reinterpret_cast<__m256i>(x)));
#endif
    }
};
#elif defined(__x86_64__)
// Even and odd bytes as 16 bit numbers: pmaddwd multiplies and adds pairs of them.
FASTLOOP_INLINE IntLanes pairs(IntLanes a, IntLanes b) {
#if defined(__AVX512BW__)
    return reinterpret_cast<IntLanes>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<IntLanes>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
    return reinterpret_cast<IntLanes>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#endif
}
typedef int16_t ShortLanes __attribute__((vector_size(4 * FASTLOOP_LANES)));
struct Bytes {
    typedef IntLanes Sum;
    struct Channel {
        IntLanes even, odd;
    };
    typedef Channel Value;
    static FASTLOOP_FORCE Channel channel(IntLanes w) {
        constexpr int32_t kEven = 0x00ff00ff;
        return {w & kEven, (w >> 8) & kEven};
    }
    static FASTLOOP_FORCE Value value(int32_t x) {
        const ShortLanes both = reinterpret_cast<ShortLanes>(x - IntLanes{});
        return {reinterpret_cast<IntLanes>((both << 8) >> 8), reinterpret_cast<IntLanes>(both >> 8)};
    }
    static FASTLOOP_FORCE void add(Sum& sum, const Channel& w, const Value& x) {
        sum += pairs(w.even, x.even) + pairs(w.odd, x.odd);
    }
};
#else
struct Bytes {
    typedef IntLanes Sum;
    struct Channel {
        IntLanes byte[4];
    };
    struct Value {
        int32_t byte[4];
    };
    static FASTLOOP_FORCE Channel channel(IntLanes w) { return {{w & 255, (w >> 8) & 255, (w >> 16) & 255, (w >> 24) & 255}}; }
    static FASTLOOP_FORCE Value value(int32_t x) {
        const uint32_t u = static_cast<uint32_t>(x);
        return {{static_cast<int8_t>(u), static_cast<int8_t>(u >> 8), static_cast<int8_t>(u >> 16),
                 static_cast<int8_t>(u >> 24)}};
    }
    static FASTLOOP_FORCE void add(Sum& sum, const Channel& w, const Value& x) {
        for (int j = 0; j < 4; ++j) sum += w.byte[j] * x.byte[j];
    }
};
#endif

// ---- a block: the sums of `R` rows x 32 channels -------------------------------------------------------------------

// V vectors of channels.
template <class Kind, size_t V>
struct Channels {
    typename Kind::Channel own;
    Channels<Kind, V - 1> rest;
    FASTLOOP_FORCE void load(const unsigned char* from) {
        own = Kind::channel(raw(from));
        rest.load(from + sizeof(IntLanes));
    }
    // The nibbles of int4 as bytes: shift 0 for the low ones, 4 for the high ones.
    FASTLOOP_FORCE void load_nibbles(const unsigned char* from, int shift) {
        own = Kind::channel((raw(from) >> shift) & 0x0f0f0f0f);
        rest.load_nibbles(from + sizeof(IntLanes), shift);
    }
};
template <class Kind>
struct Channels<Kind, 0> {
    FASTLOOP_FORCE void load(const unsigned char*) {}
    FASTLOOP_FORCE void load_nibbles(const unsigned char*, int) {}
};

// The sums of one row.
template <class Kind, size_t V>
struct Sums {
    typename Kind::Sum own;
    Sums<Kind, V - 1> rest;
    FASTLOOP_FORCE void set(int32_t value) {
        own = reinterpret_cast<typename Kind::Sum>(value - IntLanes{});
        rest.set(value);
    }
    FASTLOOP_FORCE void add(const Channels<Kind, V>& w, const typename Kind::Value& x) {
        Kind::add(own, w.own, x);
        rest.add(w.rest, x);
    }
    FASTLOOP_FORCE void put(void* to) const {
        __builtin_memcpy(to, &own, sizeof own);
        rest.put(static_cast<char*>(to) + sizeof own);
    }
    FASTLOOP_FORCE void add_to(float* to) const {
        store(to, load(to) + own);
        rest.add_to(to + kLanes);
    }
    // to = to x keep + sums: an online softmax moves on.
    FASTLOOP_FORCE void fold(float* to, float keep) const {
        store(to, load(to) * keep + own);
        rest.fold(to + kLanes, keep);
    }
    // to += (float) sums x scale: the scales of a group.
    FASTLOOP_FORCE void scale_to(float* to, const float* scale) const {
        store(to, load(to) + __builtin_convertvector(own, Lanes) * load(scale));
        rest.scale_to(to + kLanes, scale + kLanes);
    }
};
template <class Kind>
struct Sums<Kind, 0> {
    FASTLOOP_FORCE void set(int32_t) {}
    FASTLOOP_FORCE void add(const Channels<Kind, 0>&, const typename Kind::Value&) {}
    FASTLOOP_FORCE void put(void*) const {}
    FASTLOOP_FORCE void add_to(float*) const {}
    FASTLOOP_FORCE void fold(float*, float) const {}
    FASTLOOP_FORCE void scale_to(float*, const float*) const {}
};

// Of R rows. Tiles have one row of floats for each, `stride` apart.
template <class Kind, size_t R>
struct Block {
    Sums<Kind, kVectors> own;
    Block<Kind, R - 1> rest;
    FASTLOOP_FORCE void zero() {
        own.set(0);
        rest.zero();
    }
    FASTLOOP_FORCE void set(const int32_t* values) {
        own.set(-*values);
        rest.set(values + 1);
    }
    FASTLOOP_FORCE void add(const Channels<Kind, kVectors>& w, const int32_t* x) {
        own.add(w, Kind::value(*x));
        rest.add(w, x + 1);
    }
    // Rows that are Stride apart.
    template <size_t Stride>
    FASTLOOP_FORCE void add_apart(const Channels<Kind, kVectors>& w, const AnyUnit* x) {
        own.add(w, Kind::value(*x));
        rest.template add_apart<Stride>(w, x + Stride);
    }
    FASTLOOP_FORCE void put(float* tile, size_t stride) const {
        own.put(tile);
        rest.put(tile + stride, stride);
    }
    FASTLOOP_FORCE void add_to(float* tile, size_t stride) const {
        own.add_to(tile);
        rest.add_to(tile + stride, stride);
    }
    FASTLOOP_FORCE void fold(float* tile, size_t stride, const float* keep) const {
        own.fold(tile, *keep);
        rest.fold(tile + stride, stride, keep + 1);
    }
    FASTLOOP_FORCE void scale_to(float* tile, size_t stride, const float* scale) const {
        own.scale_to(tile, scale);
        rest.scale_to(tile + stride, stride, scale);
    }
};
template <class Kind>
struct Block<Kind, 0> {
    FASTLOOP_FORCE void zero() {}
    FASTLOOP_FORCE void set(const int32_t*) {}
    FASTLOOP_FORCE void add(const Channels<Kind, kVectors>&, const int32_t*) {}
    template <size_t Stride>
    FASTLOOP_FORCE void add_apart(const Channels<Kind, kVectors>&, const AnyUnit*) {}
    FASTLOOP_FORCE void put(float*, size_t) const {}
    FASTLOOP_FORCE void add_to(float*, size_t) const {}
    FASTLOOP_FORCE void fold(float*, size_t, const float*) const {}
    FASTLOOP_FORCE void scale_to(float*, size_t, const float*) const {}
};

// Memory that is needed soon, asked for into L2 a piece at each unit of a walk: the requests of a whole tile at once would hold
// the core up until memory has taken them.
struct Ahead {
    const unsigned char* far = nullptr;
    size_t step = 0;  // bytes for each unit
    FASTLOOP_FORCE void at(size_t unit) const {
        for (size_t line = 0; line < step; line += 64) __builtin_prefetch(far + unit * step + line, 0, 2);
    }
    Ahead behind(size_t units) const { return {far + units * step, step}; }
};

// The sums of a block over `units` units of a panel [units][32] and of rows [units][R].
template <class Kind, size_t R>
FASTLOOP_FORCE void sum_block(Block<Kind, R>& block, const unsigned char* panel, const int32_t* x, size_t units, Ahead ahead) {
    block.zero();
    for (size_t k = 0; k < units; ++k) {
        Channels<Kind, kVectors> channels;
        ahead.at(k);
        channels.load(panel + k * kPanel * fastloop::kUnitBytes);
        block.add(channels, x + k * R);
    }
}

// The same of rows [R][Stride].
template <class Kind, size_t R, size_t Stride>
FASTLOOP_FORCE void sum_block_apart(Block<Kind, R>& block, const unsigned char* panel, const AnyUnit* x, size_t units,
                                    Ahead ahead) {
    block.zero();
    for (size_t k = 0; k < units; ++k) {
        Channels<Kind, kVectors> channels;
        ahead.at(k);
        channels.load(panel + k * kPanel * fastloop::kUnitBytes);
        block.template add_apart<Stride>(channels, x + k);
    }
}

}  // namespace
