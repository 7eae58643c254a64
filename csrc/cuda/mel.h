// What the host (mel.cpp) hands the kernel of `mel` (mel.cu): plain C++ for both, and for NVRTC.
#pragma once

namespace fastloop {

constexpr int MEL_THREADS = 448;
constexpr int MEL_SHARED_BYTES = 100 * 1024;
constexpr int MEL_BINS = 256;  // the most there may be

struct MelParams {
    const float* pcm;        // [streams, samples]
    const long long* slots;  // [streams]
    float* tail;             // [slots of the state, 360]
    float* peak;             // [slots of the state]
    long long* seen;         // [slots of the state]
    const float* filters;    // [bins, 201]
    const int* bands;        // [bins, 2]
    float* frames;           // [streams, samples / 160, bins]
    long long pcm_stride;    // elements
    int samples, bins;
    int wait;                // the edge: every frame is true; else the last one's end is mirrored
    int running;             // the clamp: by the loudest so far; else by `peak` as given
};

}  // namespace fastloop
