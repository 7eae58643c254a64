// rope_append of one row: the bias of q, k and v, the rotation of q and k, and the write of k and v into their page.
//
//   (low, high) -> (low cos - high sin, high cos + low sin) over the two halves of a head
//
// Bytes moved: the row in, q out, k and v into the page. The angles come as a table, made once a step for all layers.
#include "block.h"
#include "rows.h"

using fastloop::Pages;

namespace {

void put(float value, float* to) { *to = value; }
void put(float value, uint16_t* to) { *to = bfloat16(value); }

template <class Element>
void turn_head(const float* x, const float* bias, const float* turn, size_t width, Element* y) {
    const size_t half = width / 2;
    for (size_t i = 0; i < half; ++i) {
        const float low = x[i] + (bias ? bias[i] : 0.0f), high = x[half + i] + (bias ? bias[half + i] : 0.0f);
        const float cosine = turn[2 * i], sine = turn[2 * i + 1];
        put(low * cosine - high * sine, y + i);
        put(high * cosine + low * sine, y + half + i);
    }
}

// The row's keys and values -> slot `slot`; `qkv` and `bias` from the first key on.
template <class Element>
void append(const float* qkv, const float* bias, const float* turn, size_t slot, const Pages& pages) {
    const size_t width = pages.width, row = pages.groups * width;
    Element* const keys = static_cast<Element*>(pages.keys) + slot * row;
    Element* const values = static_cast<Element*>(pages.values) + slot * row;
    for (size_t g = 0; g < pages.groups; ++g)
        turn_head(qkv + g * width, bias ? bias + g * width : nullptr, turn, width, keys + g * width);
    for (size_t i = 0; i < row; ++i) put(qkv[row + i] + (bias ? bias[row + i] : 0.0f), values + i);
}

}  // namespace

namespace FASTLOOP_ISA {

void rope_append(const float* qkv, const float* bias, const float* turn, int64_t slot, size_t heads, const Pages& pages,
                 float* q) {
    const size_t width = pages.width;
    for (size_t h = 0; h < heads; ++h)
        turn_head(qkv + h * width, bias ? bias + h * width : nullptr, turn, width, q + h * width);
    if (slot < 0) return;
    const float* const key_bias = bias ? bias + heads * width : nullptr;
    if (pages.format == FASTLOOP_FLOAT32) append<float>(qkv + heads * width, key_bias, turn, static_cast<size_t>(slot), pages);
    else append<uint16_t>(qkv + heads * width, key_bias, turn, static_cast<size_t>(slot), pages);
}

}  // namespace FASTLOOP_ISA
