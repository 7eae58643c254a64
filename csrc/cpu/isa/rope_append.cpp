// rope_append of one row: the bias of q, k and v, the rotation of q and k, and the write of k and v into their page.
//
//   (low, high) -> (low cos - high sin, high cos + low sin) over the two halves of a head
//
// Bytes moved: the row in, q out, k and v into the page. The angles come as a table, made once a step for all layers.
#include "block.h"
#include "rows.h"

using fastloop::Pages;

namespace {

void turn_head(const float* x, const float* bias, const float* turn, size_t width, float* y) {
    const size_t half = width / 2;
    for (size_t i = 0; i < half; ++i) {
        const float low = x[i] + (bias ? bias[i] : 0.0f), high = x[half + i] + (bias ? bias[half + i] : 0.0f);
        const float cosine = turn[2 * i], sine = turn[2 * i + 1];
        y[i] = low * cosine - high * sine;
        y[half + i] = high * cosine + low * sine;
    }
}

void put(const Pages& pages, void* pool, size_t index, const float* x, size_t count) {
    if (pages.format == FASTLOOP_FLOAT32) {
        __builtin_memcpy(static_cast<float*>(pool) + index, x, count * sizeof(float));
        return;
    }
    uint16_t* const to = static_cast<uint16_t*>(pool) + index;
    for (size_t i = 0; i < count; ++i) to[i] = bfloat16(x[i]);
}

constexpr size_t kWidest = 1024;  // checked by the front

}  // namespace

namespace FASTLOOP_ISA {

void rope_append(const float* qkv, const float* bias, const float* turn, int64_t slot, size_t heads, const Pages& pages,
                 float* q) {
    const size_t width = pages.width, at = static_cast<size_t>(slot) * pages.groups * width;
    for (size_t h = 0; h < heads; ++h)
        turn_head(qkv + h * width, bias ? bias + h * width : nullptr, turn, width, q + h * width);
    if (slot < 0) return;
    alignas(64) float row[kWidest];
    for (size_t g = 0; g < pages.groups; ++g) {
        const size_t key = (heads + g) * width, value = key + pages.groups * width;
        turn_head(qkv + key, bias ? bias + key : nullptr, turn, width, row);
        put(pages, pages.keys, at + g * width, row, width);
        for (size_t i = 0; i < width; ++i) row[i] = qkv[value + i] + (bias ? bias[value + i] : 0.0f);
        put(pages, pages.values, at + g * width, row, width);
    }
}

}  // namespace FASTLOOP_ISA
