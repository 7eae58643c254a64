// The host side of `sample`: greedy rows take the likeliest token; the others are cut to the top k and the nucleus and drawn.
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "memory.h"
#include "status.h"

using namespace fastloop;

namespace {

constexpr const char* kWhere = "sample";
constexpr int64_t kNonfinite = -1;

// A uniform number in [0, 1) from (seed, counter): two rounds of SplitMix64's finaliser (Steele et al. 2014).
double uniform(uint64_t seed, uint64_t counter) {
    uint64_t z = seed * 0x9E3779B97F4A7C15u + counter;
    for (int round = 0; round < 2; ++round) {
        z += 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        z ^= z >> 31;
    }
    return static_cast<double>(z >> 11) * 0x1p-53;
}

// Sorts by falling logit, equal ones by rising id; -0 equals 0.
uint64_t rank_key(float logit, size_t token) {
    logit += 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &logit, sizeof bits);
    const uint32_t rising = bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(~rising) << 32 | token;
}
size_t token_of(uint64_t key) { return key & 0xffffffffu; }

// Memory of a row, from call to call.
struct Drawing {
    std::vector<double> weights, sums;
    std::vector<float> tops;
    std::vector<uint64_t> keys;
};

// One row that is cut.
struct Row {
    const float* logits;
    const uint8_t* banned;
    size_t vocab, top_k;  // top_k: of tokens that have a chance, V where it is off
    double top_p;
};

// A logit that at least `count` tokens reach, by the largest ones of as many blocks; -Inf where there are too few blocks to tell.
float reached_by(size_t count, Drawing& d) {
    if (count > d.tops.size() / 2) return -INFINITY;
    const auto place = d.tops.begin() + static_cast<ptrdiff_t>(count - 1);
    std::nth_element(d.tops.begin(), place, d.tops.end(), [](float a, float b) { return a > b; });
    return *place;
}

// The keys of all tokens that have a chance and reach a logit; whether these are all that have one.
bool collect(const Row& row, float least, Drawing& d) {
    d.keys.clear();
    bool all = true;
    for (size_t i = 0; i < row.vocab; ++i) {
        if (!(d.weights[i] > 0)) continue;
        if (row.logits[i] >= least) d.keys.push_back(rank_key(row.logits[i], i));
        else all = false;
    }
    return all;
}

// How many of the first `count` keys, sorted so far as that takes, are the nucleus: those before which less than top_p of the
// total weight stands, and always the first. 0 where it does not end among them.
size_t nucleus(size_t count, double limit, Drawing& d) {
    double before = 0;
    size_t sorted = 0;
    for (size_t step = 64; sorted < count; step *= 8) {  // nuclei are small, most of the time
        const auto begin = d.keys.begin() + static_cast<ptrdiff_t>(sorted), end = d.keys.begin() + static_cast<ptrdiff_t>(count);
        const auto until = begin + static_cast<ptrdiff_t>(std::min(step, count - sorted));
        std::nth_element(begin, until, end);
        std::sort(begin, until);
        for (auto key = begin; key != until; ++key, ++sorted) {
            const double weight = d.weights[token_of(*key)];
            before += weight;
            if (sorted > 0 && !(before - weight < limit)) return sorted;
        }
    }
    return 0;
}

// The tokens that top_k and top_p leave -> d.keys, in order of their ids.
void cut(const Row& row, Isa isa, Drawing& d) {
    constexpr size_t kGuess = 512;  // tokens of a nucleus
    const bool ranked = row.top_k < row.vocab;
    d.tops.resize((row.vocab + kTopBlock - 1) / kTopBlock);
    FASTLOOP_KERNEL(isa, sample_tops)(row.logits, row.banned, row.vocab, d.tops.data());
    bool all = collect(row, reached_by(ranked ? row.top_k : kGuess, d), d);
    size_t count = d.keys.size();
    if (row.top_k < count) {
        count = row.top_k;
        std::nth_element(d.keys.begin(), d.keys.begin() + static_cast<ptrdiff_t>(count), d.keys.end());
    }
    if (row.top_p < 1) {
        double total = 0;
        if (ranked)
            for (size_t i = 0; i < count; ++i) total += d.weights[token_of(d.keys[i])];
        else
            for (size_t i = 0; i < row.vocab; ++i) total += d.weights[i];
        size_t kept = nucleus(count, row.top_p * total, d);
        if (kept == 0 && !ranked && !all) {  // it is larger than was guessed
            collect(row, -INFINITY, d);
            count = d.keys.size();
            kept = nucleus(count, row.top_p * total, d);
        }
        count = kept == 0 ? count : kept;
    }
    d.keys.resize(count);
    std::sort(d.keys.begin(), d.keys.end(), [](uint64_t a, uint64_t b) { return token_of(a) < token_of(b); });
}

// Where the sums of the weights, token by token, pass u times their total. next(i) is the i-th token's weight.
template <class Next>
size_t invert(size_t count, double u, double* sums, Next&& next) {
    double total = 0;
    size_t last = 0;  // that has a chance
    for (size_t i = 0; i < count; ++i) {
        const double weight = next(i);
        if (weight > 0) last = i;
        sums[i] = total += weight;
    }
    const size_t found = static_cast<size_t>(std::upper_bound(sums, sums + count, u * total) - sums);
    return std::min(found, last);  // u * total may round up to total
}

size_t draw(const fastloop_sample_params& p, Isa isa, size_t row, const uint8_t* banned, float peak, Drawing& d) {
    const float* const logits = p.logits + row * p.logits_stride;
    const double u = uniform(static_cast<uint64_t>(p.seed[row]), static_cast<uint64_t>(p.counter[row]));
    d.weights.resize(p.vocab);
    d.sums.resize(p.vocab);
    FASTLOOP_KERNEL(isa, sample_weights)(logits, banned, p.vocab, peak, p.temperature[row], d.weights.data());
    const bool ranked = p.top_k[row] > 0 && static_cast<uint64_t>(p.top_k[row]) < p.vocab;
    if (!ranked && !(p.top_p[row] < 1))
        return invert(p.vocab, u, d.sums.data(), [&](size_t i) { return d.weights[i]; });
    cut({logits, banned, p.vocab, ranked ? static_cast<size_t>(p.top_k[row]) : p.vocab, p.top_p[row]}, isa, d);
    const size_t found = invert(d.keys.size(), u, d.sums.data(), [&](size_t i) { return d.weights[token_of(d.keys[i])]; });
    return token_of(d.keys[found]);
}

void check_sample(const fastloop_sample_params& p) {
    if (p.vocab < 1 || p.vocab > INT32_MAX)
        fail(FASTLOOP_BAD_ARGUMENT, "sample: vocab is %zu; there must be from 1 to 2^31 - 1 tokens", p.vocab);
    need(kWhere, "logits", p.logits);
    need(kWhere, "banned", p.banned);
    need(kWhere, "phase", p.phase);
    need(kWhere, "temperature", p.temperature);
    need(kWhere, "top_k", p.top_k);
    need(kWhere, "top_p", p.top_p);
    need(kWhere, "seed", p.seed);
    need(kWhere, "counter", p.counter);
    need(kWhere, "tokens", p.tokens);
    apart(kWhere, "logits", p.rows, p.vocab, p.logits_stride);
    for (size_t row = 0; row < p.rows; ++row)
        if (p.phase[row] < 0 || static_cast<uint64_t>(p.phase[row]) >= p.phases)
            fail(FASTLOOP_BAD_ARGUMENT, "sample: phase %lld of row %zu is outside the %zu rows of banned",
                 static_cast<long long>(p.phase[row]), row, p.phases);
}

}  // namespace

extern "C" fastloop_status fastloop_sample(const fastloop_sample_params* params) {
    return guarded(kWhere, [params] {
        const fastloop_sample_params p = adopt(kWhere, params);
        const Isa isa = choose_isa(kWhere, p.isa);
        if (p.rows == 0) return;
        check_sample(p);
        static thread_local Drawing kept;  // a row's worth, from call to call
        for (size_t row = 0; row < p.rows; ++row) {
            const uint8_t* const banned = p.banned + static_cast<size_t>(p.phase[row]) * p.vocab;
            size_t token = 0;
            const float peak = FASTLOOP_KERNEL(isa, sample_peak)(p.logits + row * p.logits_stride, banned, p.vocab, &token);
            if (!std::isfinite(peak)) {
                p.tokens[row] = kNonfinite;
                continue;
            }
            if (p.temperature[row] > 0) token = draw(p, isa, row, banned, peak, kept);
            p.tokens[row] = static_cast<int64_t>(token);
        }
    });
}
