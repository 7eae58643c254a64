// What the front of `linear` (csrc/cpu/linear.cpp) and the plan share with its kernels (csrc/cpu/isa/linear.cpp).
//
// Weights are packed once into panels of 32 output channels, so that a panel is one contiguous stream that is read once for
// all rows. A *unit* is what an activation row holds in 4 bytes: one float, two bfloat16, four int8.
//
//   float32, bfloat16   panel [units][32 channels] x 4 bytes
//   int8                the same, weight + 128 as an unsigned byte (vpdpbusd takes one operand unsigned)
//   int4                panel [units / 2][32 channels] x 4 bytes: the unit of the low nibbles, then that of the high ones;
//                       weight + 8, one bfloat16 scale for each channel and group of 32 or 64 inputs
//
// The rows of a call are packed as well: blocks of at most kBlock rows, each [units][rows], so that a block is one contiguous
// stream, too. Every result is summed in the order of its inputs, whatever the rows beside it: rows do not depend on the batch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastloop.h"
#include "isa.h"
#include "tiles.h"

namespace fastloop {

constexpr size_t kPanel = 32;
constexpr size_t kUnitBytes = 4;

// Inputs in a unit.
FASTLOOP_EVERYWHERE constexpr size_t unit_inputs(int32_t format) {
    return format == FASTLOOP_FLOAT32 ? 1 : format == FASTLOOP_BFLOAT16 ? 2 : 4;
}

// A packed weight matrix [out, in].
struct Weight {
    int32_t format;             // fastloop_format
    size_t out, in;             // O, D as the caller sees them
    size_t panels;              // of kPanel channels, the last one filled up with zeros
    size_t units;               // of one row, filled up with zeros
    size_t group, groups;       // int4: inputs that share a scale, and how many such groups
    bool gated;                 // rows [gate; up]: a panel holds 16 gate channels, then the 16 up channels of the same numbers
    const unsigned char* data;  // [panels][panel_bytes]
    const float* scale;         // int8: [panels][kPanel]
    const uint16_t* group_scale;  // int4: bfloat16 [panels][groups][kPanel]

    FASTLOOP_EVERYWHERE size_t panel_bytes() const { return units * kPanel * kUnitBytes / (format == FASTLOOP_INT4 ? 2 : 1); }
    FASTLOOP_EVERYWHERE size_t width() const { return gated ? out / 2 : out; }  // of a result row
};

// The packed rows of a call.
struct Rows {
    size_t count;
    unsigned char* data;  // blocks one after the other, each [units][rows] x 4 bytes
    float* scale;         // int8, int4: [count], of each row; NaN where the row is not finite
    int32_t* sum;         // int8: [count], sum of the row's bytes
    int32_t* group_sum;   // int4: blocks one after the other, each [groups][rows], 8 x the sums of the groups' bytes
};

// Bytes of Rows::data, and of Rows::group_sum.
FASTLOOP_EVERYWHERE constexpr size_t rows_bytes(size_t rows, size_t units) { return rows * units * kUnitBytes; }

// What is done with a sum before it is stored.
struct Finish {
    const float* bias;      // [O] or NULL
    int32_t epilogue;       // fastloop_epilogue
    const float* residual;  // [rows, width] or NULL, may be `out`
    size_t residual_stride;
    float* out;  // [rows, width]
    size_t out_stride;
};

// Rows go in blocks of nearly equal size, at most `most` each.
struct Blocks {
    size_t rows, count;
    FASTLOOP_EVERYWHERE Blocks(size_t rows, size_t most) : rows(rows), count((rows + most - 1) / most) {}
    FASTLOOP_EVERYWHERE size_t begin(size_t block) const { return rows * block / count; }
};

}  // namespace fastloop

// Packs rows first..last - 1 of x [count, in]; each row's data is its own.
FASTLOOP_DECLARE_KERNEL(void linear_rows(const ::fastloop::Weight& w, const float* x, size_t stride, size_t first,
                                         size_t last, const ::fastloop::Rows& to))
// All rows against panels first..last - 1.
FASTLOOP_DECLARE_KERNEL(void linear_panels(const ::fastloop::Weight& w, const ::fastloop::Rows& rows,
                                           const ::fastloop::Finish& finish, size_t first, size_t last))
