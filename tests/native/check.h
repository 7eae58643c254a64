// What the native tests share: a check that ends the program, random numbers, and memory of exactly the size that is used.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "fastloop.h"

#define CHECK(condition)                                                                            \
    do {                                                                                            \
        if (!(condition)) {                                                                         \
            std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);     \
            std::exit(1);                                                                           \
        }                                                                                           \
    } while (0)

#define CHECK_OK(call)                                                                              \
    do {                                                                                            \
        if ((call) != FASTLOOP_OK) {                                                                \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, fastloop_last_error());         \
            std::exit(1);                                                                           \
        }                                                                                           \
    } while (0)

// The call fails with this status, and its message holds `told`.
#define CHECK_FAILS(call, wanted, told)                                                             \
    do {                                                                                            \
        const fastloop_status status_ = (call);                                                     \
        if (status_ != (wanted) || std::strstr(fastloop_last_error(), told) == nullptr) {           \
            std::fprintf(stderr, "%s:%d: status %d: %s\n", __FILE__, __LINE__, status_, fastloop_last_error()); \
            std::exit(1);                                                                           \
        }                                                                                           \
    } while (0)

using Floats = std::vector<float>;

// A parameter struct of zeros with its size.
template <class Params>
Params params() {
    Params p;
    std::memset(&p, 0, sizeof p);
    p.struct_size = sizeof p;
    return p;
}

inline std::vector<std::string> isas() {
    std::istringstream names(fastloop_isas());
    std::vector<std::string> all;
    for (std::string name; names >> name;) all.push_back(name);
    return all;
}

// xorshift64*: the same numbers on every machine.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
    uint64_t bits() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return state_ * 0x2545F4914F6CDD1Du;
    }
    size_t below(size_t bound) { return static_cast<size_t>(bits() >> 33) % bound; }
    float number() { return static_cast<float>(static_cast<double>(bits() >> 11) * 0x1p-52 - 1.0); }  // [-1, 1)
    Floats numbers(size_t count, float scale = 1.0f) {
        Floats all(count);
        for (float& each : all) each = scale * number();
        return all;
    }

  private:
    uint64_t state_;
};

inline bool same_bits(const Floats& a, const Floats& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// ||a - truth|| / ||truth||
inline double relative_error(const Floats& a, const std::vector<double>& truth) {
    CHECK(a.size() == truth.size());
    double off = 0, scale = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        off += (a[i] - truth[i]) * (a[i] - truth[i]);
        scale += truth[i] * truth[i];
    }
    CHECK(std::isfinite(off));
    return scale > 0 ? std::sqrt(off / scale) : std::sqrt(off);
}

// Sums of n rounded products err by a few roundings times sqrt(n): for any n here, with room for exp and erf.
constexpr double kFloatBound = 2e-6;

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bfloat16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Handles that go when their owner goes.
struct Team {
    fastloop_team* handle = nullptr;
    explicit Team(size_t threads, bool pin = false) { CHECK_OK(fastloop_team_create(threads, pin, &handle)); }
    ~Team() { fastloop_team_destroy(handle); }
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;
};

// Random weights [out, in] in a format, packed, and what they stand for.
struct Matrix {
    fastloop_weight* handle = nullptr;
    size_t out, in;
    std::vector<double> values;  // [out, in]

    Matrix(Random& random, int32_t format, size_t out, size_t in, bool gated = false) : out(out), in(in), values(out * in) {
        auto p = params<fastloop_weight_params>();
        p.format = p.source = format;
        p.out = out;
        p.in = in;
        p.gated = gated;
        Floats floats;
        std::vector<uint16_t> halves, scales16;
        std::vector<uint8_t> nibbles;
        std::vector<int8_t> bytes;
        Floats scales;
        const float gain = 1.0f / std::sqrt(static_cast<float>(in));
        if (format == FASTLOOP_FLOAT32) {
            floats = random.numbers(out * in, gain);
            for (size_t i = 0; i < values.size(); ++i) values[i] = floats[i];
            p.data = floats.data();
        } else if (format == FASTLOOP_BFLOAT16) {
            for (size_t i = 0; i < values.size(); ++i) {
                halves.push_back(to_bfloat16(gain * random.number()));
                values[i] = from_bfloat16(halves[i]);
            }
            p.data = halves.data();
        } else if (format == FASTLOOP_INT8) {
            for (size_t o = 0; o < out; ++o) scales.push_back(gain * (1.5f + random.number()) / 127);
            for (size_t i = 0; i < values.size(); ++i) {
                bytes.push_back(static_cast<int8_t>(static_cast<int>(random.below(255)) - 127));
                values[i] = static_cast<double>(scales[i / in]) * bytes[i];
            }
            p.data = bytes.data();
            p.scale = scales.data();
        } else {
            p.group = 32;
            for (size_t g = 0; g < out * (in / 32); ++g) scales16.push_back(to_bfloat16(gain * random.number() / 8));
            nibbles.resize(out * in / 2);
            for (size_t i = 0; i < values.size(); ++i) {
                const uint8_t nibble = static_cast<uint8_t>(random.below(16));
                nibbles[i / 2] = static_cast<uint8_t>(nibbles[i / 2] | nibble << (i % 2 * 4));
                values[i] = static_cast<double>(from_bfloat16(scales16[i / 32])) * (nibble - 8);
            }
            p.data = nibbles.data();
            p.scale = scales16.data();
        }
        CHECK_OK(fastloop_weight_create(&p, &handle));
        CHECK(fastloop_weight_bytes(handle) > 0);
    }
    ~Matrix() { fastloop_weight_destroy(handle); }
    Matrix(const Matrix&) = delete;
    Matrix& operator=(const Matrix&) = delete;
};
