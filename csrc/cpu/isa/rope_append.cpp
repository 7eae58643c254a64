// rope_append of one row: the bias of q, k and v, the rotation of q and k, and the write of k and v into their page.
//
//   (low, high) -> (low cos - high sin, high cos + low sin) over the two halves of a head
//
// append_tiles writes into pages of tiles (csrc/cpu/tiles.h), one KV head of some rows at a time: rows of a sequence share the
// lines of a tile, so one thread writes them. Bytes moved: the row in, q out, k and v into the page. The angles come as a table,
// made once a step for all layers.
#include "block.h"
#include "rows.h"

using fastloop::kSlotTile;
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

// ---- slot `s` of a tile; key and value are float32 [K] -----------------------------------------------------------------

void put_floats(const float* key, const float* value, size_t width, size_t s, float* keys, float* values) {
    keys += s / kPanel * width * kPanel + s % kPanel;
    for (size_t k = 0; k < width; ++k) keys[k * kPanel] = key[k];
    for (size_t k = 0; k < width; k += kPanel)
        __builtin_memcpy(values + (k * kSlotTile + s * kPanel), value + k, kPanel * sizeof(float));
}

void put_halves(const float* key, const float* value, size_t width, size_t s, uint16_t* keys, uint16_t* values) {
    keys += s / kPanel * width * kPanel + s % kPanel * 2;
    for (size_t k = 0; k < width; ++k) keys[k / 2 * 2 * kPanel + k % 2] = bfloat16(key[k]);
    values += s / 2 * 2 * kPanel + s % 2;
    for (size_t k = 0; k < width; ++k) values[k / kPanel * kSlotTile * kPanel + k % kPanel * 2] = bfloat16(value[k]);
}

// x [K] -> bytes, `scale` such that the largest is 127: a number of bfloat16, NaN where x is not finite.
void bytes_of(const float* x, size_t width, int8_t* bytes, float* scale) {
    float top = 0.0f, odd = 0.0f;
    for (size_t k = 0; k < width; ++k) {
        const float size = x[k] < 0.0f ? -x[k] : x[k];
        top = size > top ? size : top;
        odd += x[k] - x[k];
    }
    const uint32_t bits = static_cast<uint32_t>(bfloat16(top * (1.0f / 127.0f))) << 16;
    float step;
    __builtin_memcpy(&step, &bits, sizeof step);
    const bool none = step < 1e-30f || odd != 0.0f;  // odd is NaN where x is not finite
    const float inverse = none ? 0.0f : 1.0f / step;
    for (size_t k = 0; k < width; ++k) {
        const float whole = none ? 0.0f : (x[k] * inverse + 12582912.0f) - 12582912.0f;
        bytes[k] = static_cast<int8_t>(static_cast<int32_t>(whole));
    }
    *scale = odd != 0.0f ? __builtin_nanf("") : none ? 0.0f : step;
}

void put_bytes(const float* key, const float* value, const float* range, size_t width, size_t s, unsigned char* keys,
               unsigned char* values) {
    float narrow[1024];
    int8_t bytes[1024];
    for (size_t k = 0; k < width; ++k) narrow[k] = key[k] / range[k];
    bytes_of(narrow, width, bytes, reinterpret_cast<float*>(keys + kSlotTile * width) + s);
    keys += s / kPanel * width * kPanel + s % kPanel;
    for (size_t k = 0; k < width; ++k) keys[k * kPanel] = static_cast<unsigned char>(bytes[k]);
    bytes_of(value, width, bytes, reinterpret_cast<float*>(values + kSlotTile * width) + s);
    for (size_t k = 0; k < width; k += kPanel) __builtin_memcpy(values + k * kSlotTile + s * kPanel, bytes + k, kPanel);
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

void append_tiles(const float* qkv, size_t stride, const float* bias, const float* turn, const int64_t* slots, size_t first,
                  size_t last, size_t heads, size_t group, const Pages& pages) {
    const size_t width = pages.width, key_at = (heads + group) * width, value_at = key_at + pages.groups * width;
    float key[1024], value[1024];  // decoders have heads of up to 1024 channels
    for (size_t row = first; row < last; ++row) {
        if (slots[row] < 0) continue;
        const float* const from = qkv + row * stride;
        turn_head(from + key_at, bias ? bias + key_at : nullptr, turn + row * width, width, key);
        for (size_t k = 0; k < width; ++k) value[k] = from[value_at + k] + (bias ? bias[value_at + k] : 0.0f);
        const size_t slot = static_cast<size_t>(slots[row]), s = slot % kSlotTile;
        const size_t at = pages.tile_at(slot / pages.page_tokens, slot % pages.page_tokens, group);
        unsigned char* const keys = static_cast<unsigned char*>(pages.keys) + at;
        unsigned char* const values = static_cast<unsigned char*>(pages.values) + at;
        if (pages.format == FASTLOOP_FLOAT32)
            put_floats(key, value, width, s, reinterpret_cast<float*>(keys), reinterpret_cast<float*>(values));
        else if (pages.format == FASTLOOP_BFLOAT16)
            put_halves(key, value, width, s, reinterpret_cast<uint16_t*>(keys), reinterpret_cast<uint16_t*>(values));
        else put_bytes(key, value, pages.key_range + group * width, width, s, keys, values);
    }
}

}  // namespace FASTLOOP_ISA
