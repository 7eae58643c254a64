// mel: kLanes frames side by side, each lane one frame from its samples to its 128 logarithms.
//
//   power[k] = |DFT400(hann * x)[k]|^2,  y[c] = log10(max(sum_k filters[c][k] power[k], 1e-10)),
//   frame[c] = (max(y[c], top - 8) + 4) / 4
//
// Who owns what: the frames of all streams of the call, in order, fill the lanes; a lane does the same instructions
// whatever its neighbours hold, so a stream's frames are the same to the bit alone and in any batch. After a stream's last
// frame its maximum is known: its frames are clamped and its state written, while they are still in L2.
// Bytes moved per stream: S + 2 x 360 samples, S / 160 x C results, all else lives in 64 KB of stack.
// Why this way: across lanes a DFT of 400 needs no shuffles and no library; the scalar formula is the code.
#include "mel.h"

#include <cstring>

#include "dft200.h"
#include "simd.h"

using fastloop::MelTables;
using fastloop::kColumns;
using fastloop::kFft;
using fastloop::kHop;
using fastloop::kLookahead;
using fastloop::kTail;

namespace {

// Where a call stands in one stream. Sample i of the stream is tail[360 + i - begin] before `begin`, pcm[i - begin] behind.
struct Stream {
    const float* pcm;
    float* tail;
    float* peak;
    int64_t* seen;
    int64_t begin, end;  // samples before and after this call
    float final_peak;    // loudest of the final frames
    float last;          // the provisional last frame's loudest (edge reflect)
};

// One group of lanes: the frames they hold and where the results go.
struct Group {
    const float* frame[kLanes];  // 400 samples each
    float* out[kLanes];          // C results; lanes without a result share `sink`
    size_t step[kLanes];         // 1, or 0 to stay in the sink
    float loudest[kLanes];
    alignas(64) float edges[kLanes][kFft];  // frames that reach over the ends of pcm
    float sink[4];
};

// NaN wins, as in torch.maximum.
float louder(float a, float b) { return (a > b || a != a) ? a : b; }

// The mirror at both ends: x[-j] = x[j], x[end + j] = x[end - 2 - j], as often as needed.
float mirrored(const Stream& s, int64_t i) {
    const int64_t period = 2 * (s.end - 1);
    i = ((i % period) + period) % period;
    if (i >= s.end) i = period - i;
    return i < s.begin ? s.tail[static_cast<int64_t>(kTail) + i - s.begin] : s.pcm[i - s.begin];
}

// The 400 samples from `first` on, where they are not all in pcm.
void assemble(const Stream& s, int64_t first, float* to) {
    const int64_t stop = first + static_cast<int64_t>(kFft);
    int64_t i = first;
    for (; i < 0; ++i) *to++ = mirrored(s, i);
    for (; i < s.begin && i < stop; ++i) *to++ = s.tail[static_cast<int64_t>(kTail) + i - s.begin];
    for (; i < s.end && i < stop; ++i) *to++ = s.pcm[i - s.begin];
    for (; i < stop; ++i) *to++ = mirrored(s, i);
}

// Lane l takes the 400 samples from `offset` behind the call's first sample on.
void place_frame(const Stream& s, int64_t offset, Group& g, size_t l, float* out, bool keep) {
    const int64_t samples = s.end - s.begin;
    g.out[l] = out;
    g.step[l] = keep;
    if (offset >= 0 && offset + static_cast<int64_t>(kFft) <= samples) {
        g.frame[l] = s.pcm + offset;
    } else {
        g.frame[l] = g.edges[l];
        assemble(s, s.begin + offset, g.edges[l]);
    }
}

// Window, and samples into lanes: z[m] = x[2 m] + i x[2 m + 1] at place[m].
void load_frames(const Group& g, const MelTables& t, Complex* z) {
    for (size_t n = 0; n < kFft; n += 4) {
        const Quad window = load4(t.window + n);
        Complex& even = z[t.place[n / 2]];
        Complex& odd = z[t.place[n / 2 + 1]];
        for (size_t l = 0; l < kLanes; l += 4) {
            Quad a = load4(g.frame[l] + n) * window, b = load4(g.frame[l + 1] + n) * window;
            Quad c = load4(g.frame[l + 2] + n) * window, d = load4(g.frame[l + 3] + n) * window;
            transpose4(a, b, c, d);
            store4(reinterpret_cast<float*>(&even.re) + l, a);
            store4(reinterpret_cast<float*>(&even.im) + l, b);
            store4(reinterpret_cast<float*>(&odd.re) + l, c);
            store4(reinterpret_cast<float*>(&odd.im) + l, d);
        }
    }
}

// Z[k] of the halved samples -> power[0 .. 200] of the real DFT: X[k] = E + W^k O, X[200 - k] = conj(E - W^k O).
void split_powers(const Complex* z, const MelTables& t, Lanes* power) {
    const Complex first = z[t.found[0]], middle = z[t.found[100]];
    const Lanes sum = 2.0f * (first.re + first.im), difference = 2.0f * (first.re - first.im);
    power[0] = sum * sum;
    power[200] = difference * difference;
    power[100] = 4.0f * (middle.re * middle.re + middle.im * middle.im);
    for (size_t k = 1; k < 100; ++k) {
        const Complex a = z[t.found[k]], b = z[t.found[200 - k]];
        const float re = t.half_turn[k][0], im = t.half_turn[k][1];
        const Complex even = {a.re + b.re, a.im - b.im}, odd = {a.im + b.im, b.re - a.re};
        const Complex turned = {odd.re * re - odd.im * im, odd.re * im + odd.im * re};
        const Complex low = even + turned, high = even - turned;
        power[k] = low.re * low.re + low.im * low.im;
        power[200 - k] = high.re * high.re + high.im * high.im;
    }
}

// Filterbank, logarithm, and bins out of lanes; the loudest bin of each lane, NaN where a power is not finite.
void store_bins(const fastloop_mel_params& p, const Lanes* power, Group& g) {
    Lanes loudest = splat(-__builtin_inff()), not_finite = {};
    for (size_t c = 0; c < p.bins; c += 4) {
        const size_t count = p.bins - c < 4 ? p.bins - c : 4;
        Lanes y[4] = {};
        for (size_t i = 0; i < count; ++i) {
            const float* filter = p.filters + (c + i) * kColumns;
            Lanes sum = {};
            for (int32_t k = p.bands[2 * (c + i)]; k < p.bands[2 * (c + i) + 1]; ++k) sum += filter[k] * power[k];
            not_finite += sum * 0.0f;
            y[i] = log10(sum < 1e-10f ? splat(1e-10f) : sum);
            loudest = y[i] > loudest ? y[i] : loudest;
        }
        for (size_t l = 0; l < kLanes; l += 4) {
            Quad block[4];
            for (size_t i = 0; i < 4; ++i) block[i] = load4(reinterpret_cast<const float*>(&y[i]) + l);
            transpose4(block[0], block[1], block[2], block[3]);
            for (size_t i = 0; i < 4; ++i) {
                if (count == 4) store4(g.out[l + i], block[i]);
                else std::memcpy(g.out[l + i], &block[i], count * sizeof(float));
                g.out[l + i] += count * g.step[l + i];
            }
        }
    }
    loudest += not_finite;
    std::memcpy(g.loudest, &loudest, sizeof loudest);
}

Stream open(const fastloop_mel_params& p, size_t b) {
    const size_t slot = static_cast<size_t>(p.slots[b]);
    const int64_t begin = p.seen[slot];
    return {p.pcm + b * p.pcm_stride, p.tail + slot * kTail, p.peak + slot, p.seen + slot, begin,
            begin + static_cast<int64_t>(p.samples), p.peak[slot], -__builtin_inff()};
}

// All frames of the stream are there: clamp them, and let the state move on.
void close(const fastloop_mel_params& p, const Stream& s, float* frames) {
    const bool running = p.clamp == FASTLOOP_CLAMP_RUNNING;
    const float floor = (running ? louder(s.final_peak, s.last) : *s.peak) - 8.0f;
    for (size_t i = 0; i < p.samples / kHop * p.bins; ++i) {
        const float y = frames[i] > floor ? frames[i] : floor;
        frames[i] = (y + 4.0f) * 0.25f;
    }
    if (running) *s.peak = s.final_peak;
    *s.seen = s.end;
    const size_t kept = p.samples < kTail ? kTail - p.samples : 0;
    std::memmove(s.tail, s.tail + kTail - kept, kept * sizeof(float));
    std::memcpy(s.tail + kept, s.pcm + p.samples - (kTail - kept), (kTail - kept) * sizeof(float));
}

}  // namespace

namespace FASTLOOP_ISA {

void mel(const fastloop_mel_params& p, const MelTables& t) {
    const FlushDenormals flush;
    const bool reflect = p.edge == FASTLOOP_EDGE_REFLECT;
    const size_t fresh = p.samples / kHop, columns = reflect ? fresh + 1 : fresh;
    const int64_t reach = reflect ? kTail : kTail - kHop + kLookahead;  // the first column begins so far back
    Complex z[200];
    Lanes power[kColumns];
    Group g;
    Stream opened[kLanes];  // stream b at b % kLanes: a group holds frames of at most kLanes streams, one after the other
    for (size_t next = 0, total = p.batch * columns; next < total; next += kLanes) {
        const size_t count = total - next < kLanes ? total - next : kLanes;
        for (size_t l = 0; l < count; ++l) {
            const size_t b = (next + l) / columns, f = (next + l) % columns;
            if (f == 0) opened[b % kLanes] = open(p, b);
            const bool again = reflect && f == 0;  // the previous call's last frame: no result, only its loudness
            float* const result = again ? g.sink : p.frames + (b * fresh + f - reflect) * p.bins;
            place_frame(opened[b % kLanes], static_cast<int64_t>(f * kHop) - reach, g, l, result, !again);
        }
        for (size_t l = count; l < kLanes; ++l) {
            g.frame[l] = g.frame[0];
            g.out[l] = g.sink;
            g.step[l] = 0;
        }
        load_frames(g, t, z);
        dft200(z, t);
        split_powers(z, t, power);
        store_bins(p, power, g);
        for (size_t l = 0; l < count; ++l) {
            const size_t b = (next + l) / columns, f = (next + l) % columns;
            Stream& s = opened[b % kLanes];
            const bool last = f + 1 == columns;
            if (reflect && last) s.last = g.loudest[l];
            else if (!reflect || f > 0 || s.begin > 0) s.final_peak = louder(s.final_peak, g.loudest[l]);
            if (last) close(p, s, p.frames + b * fresh * p.bins);
        }
    }
}

}  // namespace FASTLOOP_ISA
