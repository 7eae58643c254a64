// What the host (decide.cpp) hands the kernels of `decide` (decide.cu): plain C++ for both, and for NVRTC.
#pragma once

namespace fastloop {

constexpr int DECIDE_THREADS = 512;
constexpr int DECIDE_ROW_BYTES = 12;  // of shared memory: its chance and its slot

struct DecideParams {
    const void* x;            // [rows, width]
    const void* norm_weight;  // [width]
    const void* head;         // [2, width]: silent, respond
    const long long* slots;   // [rows]
    const float* policy;      // [slots of the state, 3]: threshold, rearm, min_gap
    int* state;               // [slots of the state, 2]: chunks since the last response, armed
    float* p_respond;         // [rows]
    int* decision;            // [rows]
    long long x_stride;       // elements
    double eps;
    int rows, width;
    int aligned;              // rows of x, norm_weight and head begin at multiples of 16 bytes, and end at one
};

}  // namespace fastloop
