// sample: the next token of each row: greedy, or temperature, top-k, nucleus and an inverted CDF in id order.
//
//   sample_<dtype>   grid (rows x blocks of a team), 512 threads
//
// Who owns what: a team of blocks (a cluster of up to 8 on sm_90) owns a row, a block a slice of its logits, in shared memory
// where they fit. Bytes moved: the logits and the bans once, where the slices are held.
//
// No sort: logits are integers of the same order (keys), and what top-k and top-p keep is {key > t} and the first few ids of
// {key == t}. t is found 11 bits at a time: counts (or masses) of the 2,048 values of the next digit, of the keys that begin
// with the digits that are known, are added up over the team; float32 keys have 3 digits, 16-bit ones 2.
// Why this version: masses are whole numbers, e^((x - peak) / T) in units of 2^-44 (for 151,936 tokens), so sums are exact in
// any order: atomics in shared memory are deterministic, a row draws the same token in any batch and with any number of
// blocks, and the one that the definition draws unless u lies within about 1e-11 of a step of the CDF. One kernel for a step
// that took Triton's version 18, each of which read the logits again.
#include "sample.h"

#include "team.cuh"

namespace fastloop {
namespace {

using Mass = unsigned long long;

constexpr int kThreads = SAMPLE_THREADS, kWarps = kThreads / 32;
constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
constexpr int kMostBlocks = 16;  // of a team
constexpr int kBatch = 8;        // logits that a thread reads at once
constexpr unsigned kLeastKey = 0x007fffffu;  // of -Inf

// What a warp, or a block, has for the team.
struct Tally {
    Mass mass;        // above the threshold
    unsigned equals;  // keys at the threshold
};

struct Shared {
    Mass digits[kDigits];      // of this block; counts lie in the lower halves
    Mass all_digits[kDigits];  // of the team
    Mass warp_sums[kWarps];
    Tally warps[kWarps];
    Tally blocks[kMostBlocks];
    unsigned long long best[kWarps];   // largest key, first id
    unsigned long long bests[kMostBlocks];
    int spoilt, spoilts[kMostBlocks];
    unsigned digit;
    Mass over;
};
static_assert(sizeof(Shared) <= SAMPLE_FIXED_BYTES, "the host leaves so much room");

// A uniform number in [0, 1) times 2^53, of (seed, counter): two rounds of SplitMix64's finaliser.
__device__ __forceinline__ unsigned long long uniform(unsigned long long seed, unsigned long long counter) {
    unsigned long long z = seed * 0x9E3779B97F4A7C15ull + counter;
    for (int round = 0; round < 2; ++round) {
        z += 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        z ^= z >> 31;
    }
    return z >> 11;
}

// An integer of the same order; -0 is 0.
__device__ __forceinline__ unsigned key_of(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float logit_of(unsigned key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// One row, as one block of its team sees it. Keys are those of float32; `kShift` low bits of them are the same in all logits
// of a dtype and the same sign, so they are left out.
template <class T, int kShift> struct Row {
    static constexpr int kBits = 32 - kShift;
    static constexpr int kLevels = (kBits + kDigitBits - 1) / kDigitBits;

    const SampleParams& p;
    Shared& s;
    float* const held;
    const T* logits;
    const unsigned char* banned;
    int first, count;  // this block's slice
    double unit;       // of masses: 2^bits
    double peak, heat;  // heat: 1 / temperature
    float least;       // logits below have no mass

    __device__ float legal(int i) const {
        return banned[first + i] ? __int_as_float(0xff800000) : widen(logits[first + i]);
    }
    // Eight in a row, as far as the slice goes.
    __device__ __forceinline__ void legal_batch(int i, float (&x)[kBatch]) const {
        if (p.aligned && i + kBatch <= count) {
            load_8(logits + first + i, x);
            const uint2 bans = *reinterpret_cast<const uint2*>(banned + first + i);
#pragma unroll
            for (int e = 0; e < kBatch; ++e)
                if ((e < 4 ? bans.x : bans.y) >> e % 4 * 8 & 0xff) x[e] = __int_as_float(0xff800000);
        } else {
#pragma unroll
            for (int e = 0; e < kBatch; ++e) x[e] = i + e < count ? legal(i + e) : 0.0f;
        }
    }
    __device__ float logit(int i) const { return p.held ? held[i] : legal(i); }
    __device__ unsigned key(int i) const { return key_of(logit(i)) >> kShift; }
    __device__ float value(unsigned key) const {  // the logit of a key
        const unsigned low = key >> (kBits - 1) ? 0u : (1u << kShift) - 1u;
        return logit_of(kShift ? key << kShift | low : key);
    }
    __device__ Mass mass(float x) const {
        return x < least ? 0 : static_cast<Mass>(exp((static_cast<double>(x) - peak) * heat) * unit + 0.5);
    }

    // The largest legal key and its first id, of the whole row: key << 32 | ~id. spoilt: a legal logit is NaN or +Inf.
    __device__ unsigned long long largest(bool& spoilt) const {
        if (threadIdx.x == 0) s.spoilt = 0;
        __syncthreads();
        unsigned long long best = 0;
        bool odd = false;
        for (int i = threadIdx.x * kBatch; i < count; i += kThreads * kBatch) {
            float x[kBatch];
            legal_batch(i, x);
#pragma unroll
            for (int e = 0; e < kBatch; ++e) {
                if (i + e >= count) break;
                if (p.held) held[i + e] = x[e];
                odd |= !(x[e] < __int_as_float(0x7f800000));
                best = max(best, static_cast<unsigned long long>(key_of(x[e])) << 32 | ~static_cast<unsigned>(first + i + e));
            }
        }
        for (int near = 16; near > 0; near /= 2) best = max(best, __shfl_xor_sync(~0u, best, near));
        if (odd) s.spoilt = 1;
        if (threadIdx.x % 32 == 0) s.best[threadIdx.x / 32] = best;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int w = 1; w < kWarps; ++w) best = max(best, s.best[w]);
            for (int b = 0; b < team_blocks(); ++b) {
                team_map(s.bests, b)[team_rank()] = best;
                team_map(s.spoilts, b)[team_rank()] = s.spoilt;
            }
        }
        team_sync();
        best = 0;
        spoilt = false;
        for (int b = 0; b < team_blocks(); ++b) {
            best = max(best, s.bests[b]);
            spoilt |= s.spoilts[b] != 0;
        }
        return best;
    }

    // One level down: the digit in which the sums from the largest key down reach `goal`, counting `over` in front of this
    // level's. s.digits holds the block's sums; they are zeros again afterwards. over: then what lies above that digit.
    __device__ unsigned descend(double goal, Mass& over) const {
        team_sync();
        const int blocks = team_blocks(), rank = team_rank(), part = (kDigits + blocks - 1) / blocks;
        for (int d = rank * part + threadIdx.x; d < min((rank + 1) * part, kDigits); d += kThreads) {
            Mass sum = 0;
            for (int b = 0; b < blocks; ++b) sum += team_map(s.digits, b)[d];
            for (int b = 0; b < blocks; ++b) team_map(s.all_digits, b)[d] = sum;
        }
        team_sync();
        constexpr int kEach = kDigits / kThreads;  // thread 0 has the largest
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, top = kDigits - 1 - threadIdx.x * kEach;
        Mass own = 0;
        for (int i = 0; i < kEach; ++i) own += s.all_digits[top - i];
        Mass until = own;
        for (int near = 1; near < 32; near *= 2) {
            const Mass other = __shfl_up_sync(~0u, until, near);
            if (lane >= near) until += other;
        }
        if (lane == 31) s.warp_sums[warp] = until;
        for (int d = threadIdx.x; d < kDigits; d += kThreads) s.digits[d] = 0;
        __syncthreads();
        Mass before = over + until - own;
        for (int w = 0; w < warp; ++w) before += s.warp_sums[w];
        for (int i = 0; i < kEach; ++i) {
            const Mass sum = s.all_digits[top - i];
            if (sum > 0 && static_cast<double>(before) < goal && goal <= static_cast<double>(before + sum)) {
                s.digit = static_cast<unsigned>(top - i);
                s.over = before;
            }
            before += sum;
        }
        __syncthreads();
        over = s.over;
        return s.digit;
    }

    static __device__ int shift_of(int level) {
        const int shift = kBits - (level + 1) * kDigitBits;
        return shift > 0 ? shift : 0;
    }
    // The digit of a key at a level, if it begins with `prefix`; else -1.
    static __device__ int digit_of(unsigned key, unsigned prefix, int level) {
        const int shift = shift_of(level), above = level ? shift_of(level - 1) : 32;
        if (above < 32 && key >> above != prefix) return -1;
        return static_cast<int>(key >> shift & ((1u << (above < 32 ? above - shift : kBits - shift)) - 1u));
    }
    static __device__ unsigned joined(unsigned prefix, unsigned digit, int level) {
        return level ? prefix << (shift_of(level - 1) - shift_of(level)) | digit : digit;
    }

    // The k-th largest key; ties: how many of those equal to it are among the k.
    __device__ unsigned ranked(long long k, unsigned& ties) const {
        unsigned prefix = 0;
        Mass over = 0;
        for (int level = 0; level < kLevels; ++level) {
            for (int i = threadIdx.x; i < count; i += kThreads) {
                const int digit = digit_of(key(i), prefix, level);
                if (digit >= 0) atomicAdd(reinterpret_cast<unsigned*>(&s.digits[digit]), 1u);
            }
            prefix = joined(prefix, descend(static_cast<double>(k), over), level);
        }
        ties = static_cast<unsigned>(k - static_cast<long long>(over));
        return prefix;
    }

    // The mass of the keys above `t`, or of all, in the team.
    __device__ Mass mass_above(bool cut, unsigned t) const {
        Mass own = 0;
        for (int i = threadIdx.x; i < count; i += kThreads) {
            const float x = logit(i);
            if (!cut || key_of(x) >> kShift > t) own += mass(x);
        }
        return tally({own, 0}).mass;
    }

    // The sums of a tally over the team, and what the warps and blocks had (s.warps, s.blocks). Between two calls the team
    // must meet; after the last one nobody reads another block's memory, so a block may leave.
    __device__ Tally tally(Tally own) const {
        for (int near = 16; near > 0; near /= 2) {
            own.mass += __shfl_xor_sync(~0u, own.mass, near);
            own.equals += __shfl_xor_sync(~0u, own.equals, near);
        }
        if (threadIdx.x % 32 == 0) s.warps[threadIdx.x / 32] = own;
        __syncthreads();
        if (threadIdx.x == 0) {
            Tally sum{0, 0};
            for (int w = 0; w < kWarps; ++w) sum = {sum.mass + s.warps[w].mass, sum.equals + s.warps[w].equals};
            for (int b = 0; b < team_blocks(); ++b) team_map(s.blocks, b)[team_rank()] = sum;
        }
        team_sync();
        Tally all{0, 0};
        for (int b = 0; b < team_blocks(); ++b) all = {all.mass + s.blocks[b].mass, all.equals + s.blocks[b].equals};
        return all;
    }

    // The smallest key of the nucleus among the keys above t (where cut) and `ties` of those equal to it; ties: of it.
    __device__ unsigned nucleus(double share, bool cut, unsigned t, unsigned& ties) const {
        const Mass tied = cut ? ties * mass(value(t)) : 0;
        const Mass whole = mass_above(cut, t) + tied;
        const double most = share * static_cast<double>(whole), goal = most < 0.5 ? 0.5 : most;  // the first one always stays
        unsigned prefix = 0;
        Mass over = 0;
        for (int level = 0; level < kLevels; ++level) {
            for (int i = threadIdx.x; i < count; i += kThreads) {
                const float x = logit(i);
                const unsigned key = key_of(x) >> kShift;
                const int digit = cut && key <= t ? -1 : digit_of(key, prefix, level);
                if (digit < 0) continue;
                const Mass own = mass(x);
                if (own > 0) atomicAdd(&s.digits[digit], own);
            }
            if (tied > 0 && team_rank() == 0 && threadIdx.x == 0) {
                const int digit = digit_of(t, prefix, level);
                if (digit >= 0) atomicAdd(&s.digits[digit], tied);
            }
            prefix = joined(prefix, descend(goal, over), level);
        }
        const Mass each = mass(value(prefix));
        const double wanted = ceil((goal - static_cast<double>(over)) / static_cast<double>(each));
        const unsigned most_ties = cut && prefix == t ? ties : 0xffffffffu;
        ties = wanted < 1 ? 1u : wanted < static_cast<double>(most_ties) ? static_cast<unsigned>(wanted) : most_ties;
        return prefix;
    }

    // Where the CDF in id order passes u / 2^53 of its end: {key > t} and the first `ties` ids of {key == t}, or (not cut) all.
    __device__ void draw(unsigned long long u, bool cut, unsigned t, unsigned ties, long long* token) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int range = ((count + kWarps - 1) / kWarps + 31) / 32 * 32;  // of a warp
        const int begin = min(warp * range, count), end = min(begin + range, count);
        Tally own{0, 0};
        for (int i = begin + lane; i < end; i += 32) {
            const float x = logit(i);
            const unsigned key = key_of(x) >> kShift;
            if (!cut || key > t) own.mass += mass(x);
            else own.equals += key == t;
        }
        const Tally all = tally(own);
        const Mass each = cut ? mass(value(t)) : 0;
        const auto kept = [&](unsigned before, unsigned equals) {
            return before >= ties ? 0u : min(equals, ties - before);
        };
        const Mass whole = all.mass + kept(0, all.equals) * each;
        const Mass level = __umul64hi(u << 11, whole);  // floor of u / 2^53 of it: below it
        Mass passed = 0;
        unsigned equals = 0;
        const auto pass = [&](const Tally& some) {
            passed += some.mass + kept(equals, some.equals) * each;
            equals += some.equals;
        };
        for (int b = 0; b < team_rank(); ++b) pass(s.blocks[b]);
        for (int w = 0; w < warp; ++w) pass(s.warps[w]);
        const Tally mine = s.warps[warp];
        const Mass inside = mine.mass + kept(equals, mine.equals) * each;
        if (level < passed || level >= passed + inside) return;  // another warp has it
        for (int at = begin; at < end; at += 32) {
            const int i = at + lane;
            const float x = i < end ? logit(i) : 0.0f;
            const unsigned key = key_of(x) >> kShift;
            const bool equal = i < end && cut && key == t;
            const unsigned before = __popc(__ballot_sync(~0u, equal) & ((1u << lane) - 1u));
            const bool chosen = i < end && (!cut || key > t || (equal && equals + before < ties));
            Mass until = chosen ? mass(x) : 0;
            for (int near = 1; near < 32; near *= 2) {
                const Mass other = __shfl_up_sync(~0u, until, near);
                if (lane >= near) until += other;
            }
            const unsigned over = __ballot_sync(~0u, passed + until > level);
            if (over) {
                if (lane == __ffs(static_cast<int>(over)) - 1) *token = first + i;
                return;
            }
            passed += __shfl_sync(~0u, until, 31);
            equals += __popc(__ballot_sync(~0u, equal));
        }
    }
};

template <class T, int kShift> __device__ void sample_row(const SampleParams& p, unsigned char* memory) {
    Shared& s = *reinterpret_cast<Shared*>(memory);
    for (int d = threadIdx.x; d < kDigits; d += kThreads) s.digits[d] = 0;
    team_sync();  // every block has begun, and may be written to
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int row = static_cast<int>(blockIdx.x) / team_blocks();
    const int first = min(team_rank() * p.slice, p.vocab), bits = 62 - (32 - __clz(p.vocab));
    Row<T, kShift> r{p, s, reinterpret_cast<float*>(memory + SAMPLE_FIXED_BYTES),
                     static_cast<const T*>(p.logits) + row * p.logits_stride, p.banned + p.phase[row] * p.vocab, first,
                     min(p.slice, p.vocab - first), static_cast<double>(1ull << (bits > 52 ? 52 : bits)), 0, 0, 0};
    const double temperature = p.temperature[row];
    bool spoilt;
    const unsigned long long best = r.largest(spoilt);
    const unsigned best_key = static_cast<unsigned>(best >> 32);
    const bool first_thread = team_rank() == 0 && threadIdx.x == 0;
    if (spoilt || best_key <= kLeastKey) {  // nothing is legal, or has a chance
        if (first_thread) p.tokens[row] = -1;
    } else if (!(temperature > 0)) {
        if (first_thread) p.tokens[row] = static_cast<long long>(~static_cast<unsigned>(best));
    } else {
        r.peak = logit_of(best_key);
        r.heat = 1 / temperature;
        r.least = static_cast<float>(r.peak - 45 * temperature);  // e^-45 is less than half of 2^-52
        const long long k = p.top_k[row];
        unsigned t = 0, ties = 0;
        bool cut = k > 0 && k < p.vocab;
        if (cut) t = r.ranked(k, ties);
        if (p.top_p[row] < 1) {
            t = r.nucleus(static_cast<double>(p.top_p[row]), cut, t, ties);
            cut = true;
        }
        const auto seed = static_cast<unsigned long long>(p.seed[row]), counter = static_cast<unsigned long long>(p.counter[row]);
        r.draw(uniform(seed, counter), cut, t, ties, p.tokens + row);
    }
}

}  // namespace
}  // namespace fastloop

#define FASTLOOP_SAMPLE(name, T, kShift)                                                                             \
    extern "C" __global__ void __launch_bounds__(512, 2) name(const __grid_constant__ fastloop::SampleParams params) { \
        FASTLOOP_SHARED(unsigned char, memory);                                                                      \
        fastloop::sample_row<T, kShift>(params, memory);                                                             \
    }

FASTLOOP_SAMPLE(sample_f32, float, 0)
FASTLOOP_SAMPLE(sample_bf16, fastloop::bf16, 16)
FASTLOOP_SAMPLE(sample_f16, fastloop::f16, 13)
