// What this machine can do at most, for the share of it that a kernel reaches (`fastloop bench cpu`).
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

// Operations of `rounds` rounds of the densest loop of a format (fastloop_format), a product and a sum counting two.
FASTLOOP_DECLARE_KERNEL(double ceiling_arithmetic(int32_t format, size_t rounds))
// Reads `bytes` (a multiple of 128) as `linear` reads weights; the result depends on all of them.
FASTLOOP_DECLARE_KERNEL(float ceiling_read(const unsigned char* from, size_t bytes))
