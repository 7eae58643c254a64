// The host side of `mel`: checks every argument before anything is changed, then runs the kernel.
#include "mel.h"

#include <cmath>

#include "isa.h"
#include "status.h"

FASTLOOP_DECLARE_KERNEL(void mel(const fastloop_mel_params& p, const fastloop::MelTables& t))

namespace fastloop {
namespace {

constexpr const char* kWhere = "mel";

const MelTables& tables() {
    static const MelTables built = [] {
        MelTables t;
        const double turn = 2 * std::acos(-1.0);
        for (size_t n = 0; n < kFft; ++n) t.window[n] = static_cast<float>(0.25 - 0.25 * std::cos(turn * n / kFft));
        for (size_t n1 = 0; n1 < 8; ++n1)
            for (size_t n2 = 0; n2 < 25; ++n2) {
                t.place[(25 * n1 + 8 * n2) % 200] = static_cast<uint16_t>(25 * n1 + n2);
                const size_t c = n2 % 5, d = n2 / 5;
                t.found[(25 * n1 + 176 * n2) % 200] = static_cast<uint16_t>(25 * n1 + 5 * c + d);
            }
        for (size_t c = 0; c < 5; ++c)
            for (size_t b = 0; b < 5; ++b) {
                t.twiddle[c][b][0] = static_cast<float>(std::cos(turn * b * c / 25));
                t.twiddle[c][b][1] = static_cast<float>(-std::sin(turn * b * c / 25));
            }
        for (size_t k = 0; k < 100; ++k) {
            t.half_turn[k][0] = static_cast<float>(std::cos(turn * k / kFft));
            t.half_turn[k][1] = static_cast<float>(-std::sin(turn * k / kFft));
        }
        return t;
    }();
    return built;
}

void check_sizes(const fastloop_mel_params& p) {
    if (p.samples < kHop) fail(FASTLOOP_BAD_ARGUMENT, "mel: samples is %zu; a frame needs %zu", p.samples, kHop);
    if (p.pcm_stride < p.samples && p.batch > 1)
        fail(FASTLOOP_BAD_ARGUMENT, "mel: pcm_stride %zu is smaller than samples %zu", p.pcm_stride, p.samples);
    if (p.edge != FASTLOOP_EDGE_REFLECT && p.edge != FASTLOOP_EDGE_WAIT)
        fail(FASTLOOP_BAD_ARGUMENT, "mel: edge is %d; choose from fastloop_mel_edge", p.edge);
    if (p.clamp != FASTLOOP_CLAMP_RUNNING && p.clamp != FASTLOOP_CLAMP_GLOBAL)
        fail(FASTLOOP_BAD_ARGUMENT, "mel: clamp is %d; choose from fastloop_mel_clamp", p.clamp);
    addressable(kWhere, "pcm", p.batch, p.batch > 1 ? p.pcm_stride : p.samples, sizeof(float));
    addressable(kWhere, "tail", p.slot_count, kTail, sizeof(float));
    addressable(kWhere, "filters", p.bins, kColumns, sizeof(float));
    size_t frames = 0;
    if (__builtin_mul_overflow(p.batch, p.samples / kHop, &frames)) frames = SIZE_MAX;
    addressable(kWhere, "frames", frames, p.bins, sizeof(float));
}

void check_pointers(const fastloop_mel_params& p) {
    if (p.batch > 0) {
        need(kWhere, "pcm", p.pcm);
        need(kWhere, "slots", p.slots);
        need(kWhere, "tail", p.tail);
        need(kWhere, "peak", p.peak);
        need(kWhere, "seen", p.seen);
    }
    if (p.bins > 0) {
        need(kWhere, "filters", p.filters);
        need(kWhere, "bands", p.bands);
        if (p.batch > 0) need(kWhere, "frames", p.frames);
    }
}

void check_values(const fastloop_mel_params& p) {
    for (size_t c = 0; c < p.bins; ++c) {
        const int32_t low = p.bands[2 * c], high = p.bands[2 * c + 1];
        if (low < 0 || high < low || high > static_cast<int32_t>(kColumns))
            fail(FASTLOOP_BAD_ARGUMENT, "mel: band %zu is [%d, %d), outside the %zu columns of the spectrum", c, low,
                 high, kColumns);
    }
    const int64_t ahead = p.edge == FASTLOOP_EDGE_WAIT ? kLookahead : 0;
    for (size_t b = 0; b < p.batch; ++b) {
        const int64_t slot = p.slots[b];
        if (slot < 0 || static_cast<uint64_t>(slot) >= p.slot_count)
            fail(FASTLOOP_BAD_STATE, "mel: slot %lld is outside the %zu slots of the state",
                 static_cast<long long>(slot), p.slot_count);
        for (size_t other = 0; other < b; ++other)
            if (p.slots[other] == slot)
                fail(FASTLOOP_BAD_STATE, "mel: slots must be distinct, slot %lld is there twice",
                     static_cast<long long>(slot));
        const int64_t seen = p.seen[slot];
        if (seen < 0 || seen % static_cast<int64_t>(kHop) != ahead ||
            seen > INT64_MAX / 4 - static_cast<int64_t>(p.samples))
            fail(FASTLOOP_BAD_STATE,
                 "mel: slot %lld has seen %lld samples; edge='%s' continues at a multiple of %zu plus %lld. Prime a "
                 "stream before its first call with edge='wait', keep to one edge, and reset the slot after a call "
                 "whose length was no multiple of the hop.",
                 static_cast<long long>(slot), static_cast<long long>(seen),
                 p.edge == FASTLOOP_EDGE_WAIT ? "wait" : "reflect", kHop, static_cast<long long>(ahead));
    }
}

}  // namespace
}  // namespace fastloop

extern "C" fastloop_status fastloop_mel(const fastloop_mel_params* params) {
    using namespace fastloop;
    return guarded(kWhere, [params] {
        const fastloop_mel_params p = adopt(kWhere, params);
        check_sizes(p);
        check_pointers(p);
        check_values(p);
        const Isa isa = choose_isa(kWhere, p.isa);
        FASTLOOP_KERNEL(isa, mel)(p, tables());
    });
}
