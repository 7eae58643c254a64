// The loops whose rates are the ceilings: a full block of sums on operands in registers and L1, and a stream of reads.
#include "ceiling.h"

#include "block.h"

namespace {

template <class Kind>
double rounds_of(size_t rounds) {
    alignas(64) unsigned char panel[kPanel * fastloop::kUnitBytes];
    __builtin_memset(panel, 1, sizeof panel);
    int32_t x[kBlock];
    for (size_t r = 0; r < kBlock; ++r) x[r] = 0;
    Block<Kind, kBlock> block;
    block.zero();
    Channels<Kind, kVectors> channels;
    channels.load(panel);
    for (size_t i = 0; i < rounds; ++i) {
        asm volatile("" : : "r"(x) : "memory");  // x may have changed: nothing is taken out of the loop
        block.add(channels, x);
    }
    alignas(64) float tile[kBlock * kPanel];
    block.put(tile, kPanel);
    asm volatile("" : : "r"(tile) : "memory");
    return 2.0 * static_cast<double>(kBlock * kPanel) * static_cast<double>(rounds);
}

}  // namespace

namespace FASTLOOP_ISA {

double ceiling_arithmetic(int32_t format, size_t rounds) {
    const double each = static_cast<double>(fastloop::unit_inputs(format));
    switch (format) {
        case FASTLOOP_FLOAT32: return each * rounds_of<Float32>(rounds);
        case FASTLOOP_BFLOAT16: return each * rounds_of<Bfloat16>(rounds);
        default: return each * rounds_of<Bytes>(rounds);
    }
}

float ceiling_read(const unsigned char* from, size_t bytes) {
    constexpr size_t kFar = 16384, kNear = 4096;
    IntLanes total[8] = {};
    for (size_t at = 0; at < bytes; at += 128) {
        for (size_t line = 0; line < 128; line += 64) {
            __builtin_prefetch(from + at + kFar + line, 0, 2);
            __builtin_prefetch(from + at + kNear + line, 0, 3);
        }
        for (size_t v = 0; v < 128 / sizeof(IntLanes); ++v) total[v % 8] ^= raw(from + at + v * sizeof(IntLanes));
    }
    for (size_t v = 1; v < 8; ++v) total[0] ^= total[v];
    int32_t lane[kLanes], all = 0;
    __builtin_memcpy(lane, &total[0], sizeof lane);
    for (size_t i = 0; i < kLanes; ++i) all ^= lane[i];
    return static_cast<float>(all);
}

}  // namespace FASTLOOP_ISA
