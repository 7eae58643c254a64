// The host side of `paged_attention`: checks the sequences and cuts their attention into jobs for the threads.
#include <algorithm>

#include "attention_plan.h"
#include "memory.h"
#include "status.h"

namespace fastloop {
namespace {

void check_sequence(const char* where, const Sequences& s, size_t b, size_t rows, size_t pages, size_t page_tokens) {
    const int64_t begin = s.row_starts[b], end = s.row_starts[b + 1], length = s.kv_lens[b];
    const int64_t room = static_cast<int64_t>(s.table_width * page_tokens), fresh = length - (end - begin);
    if (begin < 0 || end < begin || end > static_cast<int64_t>(rows) || fresh < 0 || length > room)
        fail(FASTLOOP_BAD_ARGUMENT, "%s: sequence %zu has rows [%lld, %lld) of %zu and %lld of %lld slots", where, b,
             static_cast<long long>(begin), static_cast<long long>(end), rows, static_cast<long long>(length),
             static_cast<long long>(room));
    const int64_t gap = s.gaps[2 * b], gap_end = s.gaps[2 * b + 1];
    if (gap < 0 || gap_end < gap || (gap < length && gap_end > std::max(gap, fresh)))
        fail(FASTLOOP_BAD_ARGUMENT, "%s: the gap [%lld, %lld) of sequence %zu must leave out its new slots [%lld, %lld)", where,
             static_cast<long long>(gap), static_cast<long long>(gap_end), b, static_cast<long long>(fresh),
             static_cast<long long>(length));
    const size_t used = (static_cast<size_t>(length) + page_tokens - 1) / page_tokens;
    for (size_t i = 0; i < used; ++i) {
        const int32_t page = s.block_table[b * s.table_width + i];
        if (page < 0 || static_cast<size_t>(page) >= pages)
            fail(FASTLOOP_BAD_ARGUMENT, "%s: block_table holds %d as page %zu of sequence %zu, the pool has %zu", where, page, i, b,
                 pages);
    }
}

}  // namespace

void check_sequences(const char* where, const Sequences& s, size_t rows, size_t pages, size_t page_tokens) {
    need(where, "row_starts", s.row_starts);
    need(where, "kv_lens", s.kv_lens);
    need(where, "gaps", s.gaps);
    if (s.table_width > 0) need(where, "block_table", s.block_table);
    if (s.count < 1 || page_tokens < 1 || s.row_starts[0] != 0 || s.row_starts[s.count] != static_cast<int64_t>(rows))
        fail(FASTLOOP_BAD_ARGUMENT, "%s: row_starts must go from 0 to the %zu rows", where, rows);
    for (size_t b = 0; b < s.count; ++b) check_sequence(where, s, b, rows, pages, page_tokens);
}

// Queries in runs, KV heads, spans of slots: from each sequence alone.
void AttentionPlan::cut(const Sequences& s, size_t heads, size_t groups, size_t width) {
    repeat_ = heads / groups;
    groups_ = groups;
    width_ = width;
    jobs_.clear();
    merges_.clear();
    parts_.clear();
    part_floats_ = most_rows_ = work_ = 0;
    const size_t run = std::max<size_t>(1, kJobRows / repeat_);
    for (size_t b = 0; b < s.count; ++b) {
        const size_t begin = static_cast<size_t>(s.row_starts[b]), end = static_cast<size_t>(s.row_starts[b + 1]);
        const size_t start = static_cast<size_t>(s.kv_lens[b]) - (end - begin);
        for (size_t row = begin; row < end; row += run) cut_run(s, b, row, std::min(run, end - row), start + (row - begin));
    }
    // The longest jobs first: what is left at the end is short.
    std::stable_sort(jobs_.begin(), jobs_.end(), [](const AttentionJob& a, const AttentionJob& b) {
        return a.rows * (a.last_slot - a.first_slot) > b.rows * (b.last_slot - b.first_slot);
    });
}

void AttentionPlan::cut_run(const Sequences& s, size_t b, size_t row, size_t rows, size_t own) {
    const size_t last = own + rows, spans = (last + kSpan - 1) / kSpan, first_part = parts_.size();
    for (size_t span = 0; span < spans; ++span)
        for (size_t g = 0; g < groups_; ++g) {
            ptrdiff_t part = -1;
            if (spans > 1) {
                part = static_cast<ptrdiff_t>(part_floats_);
                parts_.push_back(part_floats_);
                part_floats_ += rows * repeat_ * (2 + width_);
            }
            jobs_.push_back({row, rows, g, span * kSpan, std::min(last, (span + 1) * kSpan), own,
                             static_cast<size_t>(s.gaps[2 * b]), static_cast<size_t>(s.gaps[2 * b + 1]),
                             s.block_table + b * s.table_width, part});
        }
    for (size_t r = 0; r < rows; ++r) merges_.push_back({spans > 1 ? spans : 0, first_part, r});
    most_rows_ = std::max(most_rows_, rows * repeat_);
    work_ += 2 * rows * repeat_ * groups_ * last * width_;
}

void AttentionPlan::run(Stage& s, const PagedAttention& call) const {
    s.crew.each(jobs_.size(), [&](size_t i) {
        FASTLOOP_KERNEL(s.isa, paged_attention)(call, jobs_[i], i + 1 < jobs_.size() ? &jobs_[i + 1] : nullptr, s.scratch);
    });
}

void AttentionPlan::merge(Isa isa, const PagedAttention& call, size_t row) const {
    const Merge& m = merges_[row];
    if (m.spans == 0) return;
    FASTLOOP_KERNEL(isa, merge_attention)
    (call, parts_.data() + m.part, m.spans, m.row_in_part, call.out + row * call.heads * width_);
}

}  // namespace fastloop

extern "C" fastloop_status fastloop_paged_attention(const fastloop_paged_attention_params* params) {
    using namespace fastloop;
    constexpr const char* kWhere = "paged_attention";
    return guarded(kWhere, [params] {
        const fastloop_paged_attention_params p = adopt(kWhere, params);
        const Isa isa = choose_isa(kWhere, p.isa);
        if (p.kv_heads < 1 || p.heads < 1 || p.heads % p.kv_heads || p.head_width < 1)
            fail(FASTLOOP_BAD_ARGUMENT, "paged_attention: %zu heads over %zu KV heads of width %zu do not go together", p.heads,
                 p.kv_heads, p.head_width);
        if (p.page_format != FASTLOOP_FLOAT32 && p.page_format != FASTLOOP_BFLOAT16)
            fail(FASTLOOP_BAD_ARGUMENT, "paged_attention: page_format is %d; pages are float32 or bfloat16", p.page_format);
        if (p.rows == 0) return;
        need(kWhere, "q", p.q);
        need(kWhere, "out", p.out);
        const size_t align = p.page_format == FASTLOOP_FLOAT32 ? alignof(float) : alignof(uint16_t);
        need(kWhere, "k_pages", p.k_pages, align);
        need(kWhere, "v_pages", p.v_pages, align);
        addressable(kWhere, "q", p.rows, p.heads * p.head_width, sizeof(float));
        addressable(kWhere, "k_pages", p.pages, p.page_tokens * p.kv_heads * p.head_width, sizeof(float));
        const Sequences sequences{p.sequences, p.row_starts, p.block_table, p.table_width, p.kv_lens, p.gaps};
        check_sequences(kWhere, sequences, p.rows, p.pages, p.page_tokens);
        AttentionPlan plan;
        plan.cut(sequences, p.heads, p.kv_heads, p.head_width);
        fastloop_team* const team = worth(p.team, plan.work());
        const size_t parts = Arena::padded(plan.part_floats() * sizeof(float));
        const size_t each = Arena::padded(plan.scratch_bytes(p.head_width));
        const Scratch scratch(parts + each * threads_of(team));
        const Pages pages{p.page_format, p.k_pages, p.v_pages, p.page_tokens, p.kv_heads, p.head_width};
        const PagedAttention call{p.q, p.heads, pages, FASTLOOP_FLOAT32, p.out, reinterpret_cast<float*>(scratch.data)};
        staged(team, isa, scratch.data + parts, each, [&](Stage& s) {
            plan.run(s, call);
            s.crew.each(p.rows, [&](size_t row) { plan.merge(isa, call, row); });
        });
    });
}
