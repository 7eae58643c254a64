// The host side of `rope_append`: checks where the rows go, makes their angles, and lets the kernel turn and store them.
#include "isa.h"
#include "memory.h"
#include "rows.h"
#include "status.h"

using namespace fastloop;

namespace {

constexpr const char* kWhere = "rope_append";

void check_sizes(const fastloop_rope_append_params& p) {
    if (p.heads < 1 || p.kv_heads < 1 || p.head_width < 2 || p.head_width % 2)
        fail(FASTLOOP_BAD_ARGUMENT, "rope_append: %zu heads, %zu KV heads of width %zu; there must be some, of even width",
             p.heads, p.kv_heads, p.head_width);
    if (p.page_format != FASTLOOP_FLOAT32 && p.page_format != FASTLOOP_BFLOAT16)
        fail(FASTLOOP_BAD_ARGUMENT, "rope_append: page_format is %d; pages are float32 or bfloat16", p.page_format);
    addressable(kWhere, "qkv", p.rows, (p.heads + 2 * p.kv_heads) * p.head_width, sizeof(float));
    addressable(kWhere, "k_pages", p.pages, p.page_tokens * p.kv_heads * p.head_width, sizeof(float));
    apart(kWhere, "qkv", p.rows, (p.heads + 2 * p.kv_heads) * p.head_width, p.qkv_stride);
}

void check_values(const fastloop_rope_append_params& p) {
    const size_t align = p.page_format == FASTLOOP_FLOAT32 ? alignof(float) : alignof(uint16_t);
    need(kWhere, "qkv", p.qkv);
    aligned(kWhere, "bias", p.bias);
    need(kWhere, "positions", p.positions);
    need(kWhere, "slots", p.slots);
    need(kWhere, "inv_freq", p.inv_freq);
    need(kWhere, "q", p.q);
    const int64_t slots = static_cast<int64_t>(p.pages * p.page_tokens);
    for (size_t row = 0; row < p.rows; ++row) {
        if (p.slots[row] < -1 || p.slots[row] >= slots)
            fail(FASTLOOP_BAD_ARGUMENT, "rope_append: slot of row %zu is %lld, the pool has %lld", row,
                 static_cast<long long>(p.slots[row]), static_cast<long long>(slots));
        if (p.slots[row] < 0) continue;
        need(kWhere, "k_pages", p.k_pages, align);
        need(kWhere, "v_pages", p.v_pages, align);
    }
}

}  // namespace

extern "C" fastloop_status fastloop_rope_append(const fastloop_rope_append_params* params) {
    return guarded(kWhere, [params] {
        const fastloop_rope_append_params p = adopt(kWhere, params);
        const Isa isa = choose_isa(kWhere, p.isa);
        check_sizes(p);
        if (p.rows == 0) return;
        check_values(p);
        const Pages pages{p.page_format, p.k_pages, p.v_pages, p.page_tokens, p.kv_heads, p.head_width};
        const Scratch scratch(p.head_width * sizeof(float));
        float* const turn = reinterpret_cast<float*>(scratch.data);
        for (size_t row = 0; row < p.rows; ++row) {
            turn_of(p.positions[row], p.inv_freq, p.head_width / 2, turn);
            FASTLOOP_KERNEL(isa, rope_append)
            (p.qkv + row * p.qkv_stride, p.bias, turn, p.slots[row], p.heads, pages, p.q + row * p.heads * p.head_width);
        }
    });
}
