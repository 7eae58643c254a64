// paged_attention: one job (some queries of a sequence, one KV head, one span of slots); see csrc/cpu/attention.h.
//
// Who owns what: a job reads each key and value of its span once for all of its rows (13 queries x 8 heads of a listening step
// are one matrix), through tiles that stay in L1: pages of tiles as they are, rows of other pages placed into a tile, bytes as
// bfloat16. Bytes moved: 2 K of the pages a slot, queries in, results out.
#include "attend.h"

using fastloop::AttentionJob;
using fastloop::PagedAttention;
using fastloop::Pages;

namespace {

// The slots of a tile from `first` on, page by page.
template <class Element>
void gather(const PagedAttention& call, const AttentionJob& job, size_t first, size_t last, Slots<Element>& to) {
    const Pages& p = call.pages;
    const size_t each = p.groups * p.width;
    size_t page = first / p.page_tokens, offset = first % p.page_tokens;
    for (size_t i = 0; i < kSlotTile; ++i, ++offset) {
        const size_t slot = first + i;
        if (offset == p.page_tokens) {
            offset = 0;
            ++page;
        }
        to.keys[i] = to.values[i] = nullptr;
        if (slot >= last || (slot >= job.gap_first && slot < job.gap_last)) continue;
        const size_t at = (static_cast<size_t>(job.table[page]) * p.page_tokens + offset) * each + job.group * p.width;
        to.keys[i] = static_cast<const Element*>(p.keys) + at;
        to.values[i] = static_cast<const Element*>(p.values) + at;
    }
}

// Where a job's tiles come from: source(first, last) is the tile of slots first..last - 1; source.ahead(next, block,
// blocks) is what the blocks of this one ask for: their shares of the one whose first slot is `next`, or of the first one of
// the job that follows.

// Pages of rows.
template <class Kind, class Element>
struct FromRows {
    const PagedAttention& call;
    const AttentionJob& job;
    const AttentionJob* following;
    Attend<Kind>& state;
    Slots<Element> next = {};

    size_t end_of(size_t first) const { return first + kSlotTile < job.last_slot ? first + kSlotTile : job.last_slot; }
    void begin() { gather(call, job, job.first_slot, end_of(job.first_slot), next); }
    Tile operator()(size_t first, size_t last) {
        const Slots<Element> slots = next;
        if (first + kSlotTile < job.last_slot) {
            gather(call, job, first + kSlotTile, end_of(first + kSlotTile), next);
            if (job.group == 0) fetch();  // the jobs of the other groups come next
        }
        return state.placed(slots, last - first);
    }
    Next ahead(size_t, size_t, size_t) const { return {}; }
    void fetch() const {
        const size_t bytes = call.pages.slot_bytes();
        for (size_t s = 0; s < kSlotTile; ++s) {
            if (next.keys[s] == nullptr) continue;
            for (size_t byte = 0; byte < bytes; byte += 64) {
                __builtin_prefetch(reinterpret_cast<const char*>(next.keys[s]) + byte, 0, 2);
                __builtin_prefetch(reinterpret_cast<const char*>(next.values[s]) + byte, 0, 2);
            }
        }
    }
};

// Pages of tiles.
template <class Kind>
struct FromTiles {
    const PagedAttention& call;
    const AttentionJob& job;
    const AttentionJob* following;
    Attend<Kind>& state;

    void begin() const {}
    size_t at(const AttentionJob& of, size_t slot) const {
        const Pages& p = call.pages;
        return p.tile_at(static_cast<size_t>(of.table[slot / p.page_tokens]), slot % p.page_tokens, of.group);
    }
    bool unseen(size_t slot, size_t last) const { return slot >= last || (slot >= job.gap_first && slot < job.gap_last); }
    bool some_unseen(size_t first, size_t last) const {
        return last - first < kSlotTile || (first < job.gap_last && last > job.gap_first);
    }

    Tile operator()(size_t first, size_t last) {
        const size_t from = at(job, first);
        Tile t{static_cast<const unsigned char*>(call.pages.keys) + from,
               static_cast<const unsigned char*>(call.pages.values) + from};
        if constexpr (kInUnit<Kind> == 2)
            if (call.pages.format == FASTLOOP_INT8) return of_bytes(t, first, last);
        if (some_unseen(first, last))
            t.values = state.cleaned(t.values, [&](size_t slot) { return unseen(first + slot, last); });
        return t;
    }
    // Bytes are always numbers: only scales can be what nobody may see.
    Tile of_bytes(const Tile& t, size_t first, size_t last) {
        const size_t units = kSlotTile * call.pages.width / 2 / kPanel;
        state.expand(t.keys, units, state.keys);
        state.expand(t.values, units, state.values);
        Tile made{state.keys, state.values, reinterpret_cast<const float*>(t.keys + units * 2 * kPanel),
                  reinterpret_cast<const float*>(t.values + units * 2 * kPanel)};
        if (some_unseen(first, last)) {
            for (size_t s = 0; s < kSlotTile; ++s) state.scales[s] = unseen(first + s, last) ? 0.0f : made.value_scale[s];
            made.value_scale = state.scales;
        }
        return made;
    }
    Next ahead(size_t next, size_t block, size_t blocks) const {
        const bool more = next < job.last_slot;
        if (!more && following == nullptr) return {};
        const size_t from = more ? at(job, next) : at(*following, following->first_slot);
        const size_t units = kSlotTile * call.pages.width / kInUnit<Kind> / kPanel;  // of this tile's keys, and of its values
        const size_t step = (fastloop::tile_bytes(call.pages.format, call.pages.width) + units * blocks - 1) / (units * blocks);
        const size_t share = from + block * units * step;
        return {{static_cast<const unsigned char*>(call.pages.keys) + share, step},
                {static_cast<const unsigned char*>(call.pages.values) + share, step}};
    }
};

template <class Kind, template <class...> class Source, class... Element>
void attend(const PagedAttention& call, const AttentionJob& job, const AttentionJob* following, unsigned char* scratch) {
    const size_t width = call.pages.width, repeat = call.heads / call.pages.groups;
    Attend<Kind> state(job.rows * repeat, width, scratch);
    const float* const range = call.pages.key_range == nullptr ? nullptr : call.pages.key_range + job.group * width;
    for (size_t r = 0; r < job.rows; ++r)
        for (size_t h = 0; h < repeat; ++h)
            state.query(r * repeat + h, call.q + ((job.first_row + r) * call.heads + job.group * repeat + h) * width,
                        state.scale(), range);
    Source<Kind, Element...> source{call, job, following, state};
    source.begin();
    for (size_t first = job.first_slot; first < job.last_slot; first += kSlotTile) {
        const size_t behind = first + kSlotTile, last = behind < job.last_slot ? behind : job.last_slot;
        const Tile t = source(first, last);
        if (first >= job.gap_first && last <= job.gap_last) continue;
        const bool touches_gap = first < job.gap_last && behind > job.gap_first;
        const bool whole = behind <= last && !touches_gap && last - 1 <= job.own_slot;
        const auto hide = [&](size_t row, float* score, size_t span) {
            if (whole) return;
            const size_t own = job.own_slot + row / repeat, end = own + 1 < last ? own + 1 : last;
            for (size_t s = 0; s < span; ++s) {
                const size_t slot = first + s;
                if (slot >= end || (slot >= job.gap_first && slot < job.gap_last)) score[s] = -__builtin_inff();
            }
        };
        state.tile(t, last - first, hide, [&](size_t block, size_t blocks) { return source.ahead(behind, block, blocks); });
    }
    for (size_t r = 0; r < job.rows; ++r)
        for (size_t h = 0; h < repeat; ++h) {
            const size_t row = r * repeat + h;
            if (job.partial < 0) {
                state.result(row, call.out + ((job.first_row + r) * call.heads + job.group * repeat + h) * width);
                continue;
            }
            float* const to = call.parts + job.partial + row * (2 + width);
            to[0] = state.top[row];
            to[1] = state.total[row];
            __builtin_memcpy(to + 2, state.sums + row * state.panels * kPanel, width * sizeof(float));
        }
}

}  // namespace

namespace FASTLOOP_ISA {

void paged_attention(const PagedAttention& call, const AttentionJob& job, const AttentionJob* following,
                     unsigned char* scratch) {
    const bool floats = call.pages.format == FASTLOOP_FLOAT32;
    if (call.pages.tiled && floats) attend<Float32, FromTiles>(call, job, following, scratch);
    else if (call.pages.tiled) attend<Bfloat16, FromTiles>(call, job, following, scratch);
    else if (floats) attend<Float32, FromRows, float>(call, job, following, scratch);
    else if (call.format == FASTLOOP_FLOAT32) attend<Float32, FromRows, uint16_t>(call, job, following, scratch);
    else attend<Bfloat16, FromRows, uint16_t>(call, job, following, scratch);
}

void merge_attention(const PagedAttention& call, const size_t* part, size_t spans, size_t row, float* out) {
    const size_t groups = call.pages.groups, width = call.pages.width, repeat = call.heads / groups, each = 2 + width;
    for (size_t g = 0; g < groups; ++g)
        for (size_t h = 0; h < repeat; ++h, out += width) {
            const float* const parts = call.parts + (row * repeat + h) * each;
            float top = -__builtin_inff(), total = 0.0f;
            for (size_t s = 0; s < spans; ++s) {
                const float here = parts[part[s * groups + g]];
                top = (here > top) | (here != here) ? here : top;
            }
            for (size_t i = 0; i < width; ++i) out[i] = 0.0f;
            for (size_t s = 0; s < spans; ++s) {
                const float* const one = parts + part[s * groups + g];
                if (one[0] == -__builtin_inff()) continue;  // a span of which this row sees nothing
                float factor[kLanes];
                store(factor, exp2_below(splat(one[0] - top)));
                total += one[1] * factor[0];
                for (size_t i = 0; i < width; ++i) out[i] += one[2 + i] * factor[0];
            }
            const float inverse = 1.0f / total;
            for (size_t i = 0; i < width; ++i) out[i] *= inverse;
        }
}

}  // namespace FASTLOOP_ISA
