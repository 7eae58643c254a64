// What the front of `mel` (csrc/cpu/mel.cpp) hands to its kernel (csrc/cpu/isa/mel.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastloop.h"

namespace fastloop {

constexpr size_t kHop = 160, kFft = 400, kTail = 360, kColumns = kFft / 2 + 1;
constexpr int64_t kLookahead = 40;

// The real DFT of 400 points is a complex one of 200 over z[m] = x[2 m] + i x[2 m + 1]. 200 = 8 x 25 with no common
// factor, so with n = 25 n1 + 8 n2 and k = 25 k1 + 176 k2 (mod 200) it is 25 DFTs of 8 and 8 of 25 with no twiddles
// between them (Good 1958, Thomas 1963); each DFT of 25 is 5 x 5 (Cooley and Tukey 1965).
struct MelTables {
    float window[kFft];       // half of the periodic Hann window: the half belongs to the split of the real DFT
    uint16_t place[200];      // z[m] is kept at place[m] = 25 n1 + n2
    uint16_t found[200];      // Z[k] is found at found[k] = 25 k1 + 5 c + d with k2 = c + 5 d
    float twiddle[5][5][2];   // e^(-2 pi i b c / 25) at [c][b]: re, im
    float half_turn[100][2];  // e^(-2 pi i k / 400): re, im
};

}  // namespace fastloop
