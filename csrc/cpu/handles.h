// What the opaque handles of the C ABI are.
#pragma once

#include "linear.h"
#include "memory.h"
#include "team.h"

namespace fastloop {

// A packed weight with its memory.
struct OwnedWeight {
    Weight weight{};
    Buffer data, scale;
};

OwnedWeight pack(const fastloop_weight_params& params);

// Scratch bytes for the packed rows of a call, and the rows laid out in it (aligned to 64).
size_t rows_scratch(const Weight& w, size_t rows);
Rows rows_in(const Weight& w, size_t rows, unsigned char* scratch);

// Panels that a thread takes at a time.
size_t panels_per_claim(const Weight& w, size_t threads);

}  // namespace fastloop

struct fastloop_weight {
    fastloop::OwnedWeight own;
};

struct fastloop_team {
    explicit fastloop_team(size_t threads, bool pin) : team(threads, pin) {}
    fastloop::Team team;
};
