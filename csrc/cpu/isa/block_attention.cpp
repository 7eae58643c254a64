// block_attention: one head of one block of positions, every position seeing all of them. Bytes moved: q, k, v in, out.
#include "attend.h"

using fastloop::BlockAttention;

namespace FASTLOOP_ISA {

void block_attention(const BlockAttention& call, size_t head, unsigned char* scratch) {
    const size_t row = 3 * call.heads * call.width, embedding = call.heads * call.width;
    const float* const q = call.qkv + head * call.width;
    Attend<Float32> state(call.positions, call.width, scratch);
    for (size_t t = 0; t < call.positions; ++t) state.query(t, q + t * row, state.scale());
    for (size_t first = 0; first < call.positions; first += kSlotTile) {
        Slots<float> slots;
        for (size_t i = 0; i < kSlotTile; ++i) {
            const bool real = first + i < call.positions;
            slots.keys[i] = real ? q + (first + i) * row + embedding : nullptr;
            slots.values[i] = real ? q + (first + i) * row + 2 * embedding : nullptr;
        }
        const size_t left = call.positions - first, count = left < kSlotTile ? left : kSlotTile;
        const auto hide = [&](size_t, float* score, size_t span) {
            for (size_t s = count; s < span; ++s) score[s] = -__builtin_inff();
        };
        state.tile(state.placed(slots, count), count, hide, [](size_t, size_t) { return Next{}; });
    }
    for (size_t t = 0; t < call.positions; ++t) state.result(t, call.out + t * embedding + head * call.width);
}

}  // namespace FASTLOOP_ISA
