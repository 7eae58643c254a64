// What the host (sample.cpp) hands the kernels of `sample` (sample.cu): plain C++ for both, and for NVRTC.
#pragma once

namespace fastloop {

constexpr int SAMPLE_THREADS = 512;
constexpr int SAMPLE_FIXED_BYTES = 34 * 1024;  // of shared memory, in front of the logits that a block holds

struct SampleParams {
    const void* logits;           // [rows, vocab]
    const unsigned char* banned;  // [phases, vocab]
    const long long* phase;       // [rows], and so all of these
    const float* temperature;
    const long long* top_k;
    const float* top_p;
    const long long* seed;
    const long long* counter;
    long long* tokens;
    long long logits_stride;      // elements
    int vocab;
    int slice;                    // logits of a block; a multiple of 8
    int held;                     // whether they lie in shared memory: 4 bytes each
    int aligned;                  // every 8th logit begins at a multiple of 16 bytes, every 8th ban of 8
};

}  // namespace fastloop
