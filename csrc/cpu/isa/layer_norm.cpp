// layer_norm of one row: y = (x - mean) / sqrt(var + eps) * weight + bias. Bytes moved: the row in and out, weight, bias.
#include "rows.h"
#include "simd.h"

namespace FASTLOOP_ISA {

void layer_norm(const float* x, const float* weight, const float* bias, size_t count, float eps, float* y) {
    const size_t whole = count / kLanes * kLanes, rest = count - whole;
    Lanes total = load_some(x + whole, rest), squares = {};
    for (size_t k = 0; k < whole; k += kLanes) total += load(x + k);
    const float mean = sum(total) / static_cast<float>(count);
    for (size_t k = 0; k < whole; k += kLanes) squares += (load(x + k) - mean) * (load(x + k) - mean);
    float end = 0.0f;  // two passes: the variance of a row far from zero would drown in one
    for (size_t k = whole; k < count; ++k) end += (x[k] - mean) * (x[k] - mean);
    const float gain = 1.0f / __builtin_sqrtf((sum(squares) + end) / static_cast<float>(count) + eps);
    for (size_t k = 0; k < whole; k += kLanes)
        store(y + k, (load(x + k) - mean) * gain * load(weight + k) + load(bias + k));
    for (size_t k = whole; k < count; ++k) y[k] = (x[k] - mean) * gain * weight[k] + bias[k];
}

}  // namespace FASTLOOP_ISA
