// A tensor map as the emulation keeps it: what cuTensorMapEncodeTiled was asked, where the driver has bits of its own.
#pragma once

#include <cstdint>
#include <cstring>

namespace cuda_emulation {

struct MapFields {
    static constexpr uint64_t kMagic = 0x7465'6e73'6f72'2121;
    uint64_t magic;
    const unsigned char* address;
    uint64_t width, rows, stride;  // elements, rows, bytes
    uint32_t box_width, box_rows, itemsize, swizzle;
};
static_assert(sizeof(MapFields) <= 128);

}  // namespace cuda_emulation
