// How pages hold keys and values for the native decoder: in tiles of 64 slots of one KV head, as attention multiplies them.
//
//   pages    [P][G][Q / 64] tiles; a tile of keys, or of values:
//   float32  keys [2 panels][K][32 slots]            values [K / 32 panels][64 slots][32 channels]
//   bfloat16 keys [2][K / 2][32 slots][2 channels]   values [K / 32][32 pairs of slots][32 channels][2 slots]
//   int8     keys [2][K / 2][2 channels][32 slots]   values [K / 32][32 pairs of slots][2 slots][32 channels], bytes;
//            behind them a float32 scale for each of the 64 slots
//
// An int8 key is q x scale x range, value q x scale: scales are numbers of bfloat16 and ranges powers of two, so what is read
// from a tile is exact in float32 and comes back as the same bytes when it is stored again. The scale of a slot that is not finite
// is NaN. fastloop/engine/kv_layout.py is the readable twin.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace fastloop {

// The code of these is made anew in every kernel file: a shared copy could be one for another instruction set.
#define FASTLOOP_EVERYWHERE __attribute__((always_inline)) inline

constexpr size_t kSlotTile = 64;  // slots that are scored at a time

FASTLOOP_EVERYWHERE constexpr size_t element_bytes(int32_t format) {
    return format == FASTLOOP_FLOAT32 ? 4 : format == FASTLOOP_BFLOAT16 ? 2 : 1;
}

// Of the keys, or the values, of 64 slots of one KV head of `width` channels.
FASTLOOP_EVERYWHERE constexpr size_t tile_bytes(int32_t format, size_t width) {
    return kSlotTile * (width * element_bytes(format) + (format == FASTLOOP_INT8 ? sizeof(float) : 0));
}

}  // namespace fastloop
