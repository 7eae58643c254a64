// The host side of `block_attention`: heads of blocks are shared out among the threads.
#include "attention.h"
#include "memory.h"
#include "stage.h"
#include "status.h"

using namespace fastloop;

extern "C" fastloop_status fastloop_block_attention(const fastloop_block_attention_params* params) {
    constexpr const char* kWhere = "block_attention";
    return guarded(kWhere, [params] {
        const fastloop_block_attention_params p = adopt(kWhere, params);
        const Isa isa = choose_isa(kWhere, p.isa);
        if (p.heads < 1 || p.head_width < 1)
            fail(FASTLOOP_BAD_ARGUMENT, "block_attention: %zu heads of width %zu; there must be some", p.heads, p.head_width);
        if (p.blocks == 0 || p.positions == 0) return;
        need(kWhere, "qkv", p.qkv);
        need(kWhere, "out", p.out);
        const size_t width = p.heads * p.head_width;
        addressable(kWhere, "qkv", p.blocks * p.positions, 3 * width, sizeof(float));
        addressable(kWhere, "a block", p.positions + 64, p.head_width + 64, 64);
        fastloop_team* const team = worth(p.team, 2 * p.blocks * p.positions * p.positions * width);
        const size_t each = Arena::padded(attention_scratch(p.positions, p.head_width));
        const Scratch scratch(each * threads_of(team));
        staged(team, isa, scratch.data, each, [&](Stage& s) {
            s.crew.each(p.blocks * p.heads, [&](size_t item) {
                const size_t row = item / p.heads * p.positions;
                const BlockAttention call{p.qkv + row * 3 * width, p.positions, p.heads, p.head_width, p.out + row * width};
                FASTLOOP_KERNEL(s.isa, block_attention)(call, item % p.heads, s.scratch);
            });
        });
    });
}
