// paged_attention: one job (some queries of a sequence, one KV head, one span of slots); see csrc/cpu/attention.h.
//
// Who owns what: a job reads each key and value of its span once for all of its rows (13 queries x 8 heads of a listening step
// are one matrix), through tiles that stay in L2. Bytes moved: 2 K of the pages a slot, queries in, results out.
#include "attend.h"

using fastloop::AttentionJob;
using fastloop::PagedAttention;

namespace {

// The slots of a tile from `first` on, page by page.
template <class Element>
void gather(const PagedAttention& call, const AttentionJob& job, size_t first, size_t last, Slots<Element>& to) {
    const fastloop::Pages& p = call.pages;
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

template <class Kind, class Element>
void attend(const PagedAttention& call, const AttentionJob& job, unsigned char* scratch) {
    const size_t width = call.pages.width, repeat = call.heads / call.pages.groups;
    Attend<Kind, Element> state(job.rows * repeat, width, scratch);
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(width));
    for (size_t r = 0; r < job.rows; ++r)
        for (size_t h = 0; h < repeat; ++h)
            state.query(r * repeat + h, call.q + ((job.first_row + r) * call.heads + job.group * repeat + h) * width, scale);
    Slots<Element> slots, next;
    const auto end_of = [&](size_t first) { return first + kSlotTile < job.last_slot ? first + kSlotTile : job.last_slot; };
    gather(call, job, job.first_slot, end_of(job.first_slot), next);
    for (size_t first = job.first_slot; first < job.last_slot; first += kSlotTile) {
        const size_t behind = first + kSlotTile, last = end_of(first);
        slots = next;
        if (behind < job.last_slot) {
            gather(call, job, behind, end_of(behind), next);
            if (job.group == 0) state.fetch(next, width * call.pages.groups);  // the jobs of the other groups come next
        }
        if (first >= job.gap_first && last <= job.gap_last) continue;
        const bool touches_gap = first < job.gap_last && behind > job.gap_first;
        const bool whole = behind <= last && !touches_gap && last - 1 <= job.own_slot;
        state.tile(slots, last - first, [&](size_t row, float* score, size_t span) {
            if (whole) return;
            const size_t own = job.own_slot + row / repeat, end = own + 1 < last ? own + 1 : last;
            for (size_t s = 0; s < span; ++s) {
                const size_t slot = first + s;
                if (slot >= end || (slot >= job.gap_first && slot < job.gap_last)) score[s] = -__builtin_inff();
            }
        });
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

void paged_attention(const PagedAttention& call, const AttentionJob& job, unsigned char* scratch) {
    if (call.pages.format == FASTLOOP_FLOAT32) attend<Float32, float>(call, job, scratch);
    else if (call.format == FASTLOOP_FLOAT32) attend<Float32, uint16_t>(call, job, scratch);
    else attend<Bfloat16, uint16_t>(call, job, scratch);
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
                store(factor, exp(splat(one[0] - top)));
                total += one[1] * factor[0];
                for (size_t i = 0; i < width; ++i) out[i] += one[2 + i] * factor[0];
            }
            const float inverse = 1.0f / total;
            for (size_t i = 0; i < width; ++i) out[i] *= inverse;
        }
}

}  // namespace FASTLOOP_ISA
