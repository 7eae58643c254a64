// Kernels on single rows: norms, rope_append and decide. Floats unless said.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "tiles.h"

namespace fastloop {

// Where keys and values live: pages of rows [P][Q][G][K] in float32 or bfloat16 (fastloop_format), or of tiles (tiles.h).
struct Pages {
    int32_t format;
    void* keys;
    void* values;
    size_t page_tokens, groups, width;  // Q, G, K
    bool tiled = false;
    const float* key_range = nullptr;  // int8: [G][K], what keys are divided by before they are rounded

    FASTLOOP_EVERYWHERE size_t slot_bytes() const { return groups * width * element_bytes(format); }  // pages of rows
    // Bytes of `pages` pages.
    FASTLOOP_EVERYWHERE size_t bytes(size_t pages) const {
        return pages * page_tokens * (tiled ? groups * tile_bytes(format, width) / kSlotTile : slot_bytes());
    }
    // Where the tile of KV head `group` begins whose first slot is `slot` of page `page`.
    FASTLOOP_EVERYWHERE size_t tile_at(size_t page, size_t slot, size_t group) const {
        return ((page * groups + group) * (page_tokens / kSlotTile) + slot / kSlotTile) * tile_bytes(format, width);
    }
};

// (cos, sin) of position x inv_freq [half] -> turn [half][2]; in float64: at hour-long positions a float32 angle is 0.01 rad off.
inline void turn_of(int64_t position, const double* inv_freq, size_t half, float* turn) {
    for (size_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(position) * inv_freq[i];
        turn[2 * i] = static_cast<float>(std::cos(angle));
        turn[2 * i + 1] = static_cast<float>(std::sin(angle));
    }
}

}  // namespace fastloop

// to += x; [count] each.
FASTLOOP_DECLARE_KERNEL(void add_row(const float* x, size_t count, float* to))
// y = x / sqrt(mean(x^2) + eps) * weight; [count] each.
FASTLOOP_DECLARE_KERNEL(void rms_norm(const float* x, const float* weight, size_t count, float eps, float* y))
// y = (x - mean) / sqrt(var + eps) * weight + bias; [count] each.
FASTLOOP_DECLARE_KERNEL(void layer_norm(const float* x, const float* weight, const float* bias, size_t count, float eps,
                                        float* y))
// One row: qkv [(H + 2G) K] + bias (or NULL), rotated by turn [K / 2][2] = (cos, sin) -> q [H K]; key and value go to slot
// `slot` of the pages, or nowhere where it is negative.
FASTLOOP_DECLARE_KERNEL(void rope_append(const float* qkv, const float* bias, const float* turn, int64_t slot, size_t heads,
                                         const ::fastloop::Pages& pages, float* q))
// Keys and values of KV head `group` of rows first..last - 1 -> the tiles of their slots: qkv rows `stride` apart, turn
// [rows][K / 2][2].
FASTLOOP_DECLARE_KERNEL(void append_tiles(const float* qkv, size_t stride, const float* bias, const float* turn,
                                          const int64_t* slots, size_t first, size_t last, size_t heads, size_t group,
                                          const ::fastloop::Pages& pages))
// The logits of a normed row: rms_norm(x) . head[0] and head[1], head [2][count]; summed alike, so equal heads tie.
FASTLOOP_DECLARE_KERNEL(void decide(const float* x, const float* norm_weight, const float* head, size_t count, double eps,
                                    double* logits))
