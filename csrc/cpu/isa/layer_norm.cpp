// layer_norm of one row: y = (x - mean) / sqrt(var + eps) * weight + bias. Bytes moved: the row in and out, weight, bias.
//
// Two passes before the result, as the variance of a row far from zero would drown in one; the second also finds what the
// first mean was rounded by.
#include "rows.h"
#include "simd.h"

namespace FASTLOOP_ISA {

void layer_norm(const float* x, const float* weight, const float* bias, size_t count, float eps, float* y) {
    const size_t whole = count / kLanes * kLanes, rest = count - whole;
    const float each = 1.0f / static_cast<float>(count);
    Lanes total = load_some(x + whole, rest);
    for (size_t k = 0; k < whole; k += kLanes) total += load(x + k);
    const float mean = sum(total) * each;
    Lanes off = {}, squares = {};
    for (size_t k = 0; k < whole; k += kLanes) {
        const Lanes d = load(x + k) - mean;
        off += d;
        squares += d * d;
    }
    float last_off = 0.0f, last_squares = 0.0f;
    for (size_t k = whole; k < count; ++k) {
        last_off += x[k] - mean;
        last_squares += (x[k] - mean) * (x[k] - mean);
    }
    const float shift = (sum(off) + last_off) * each, variance = (sum(squares) + last_squares) * each - shift * shift;
    const float gain = 1.0f / __builtin_sqrtf(variance + eps);
    for (size_t k = 0; k < whole; k += kLanes)
        store(y + k, (load(x + k) - mean - shift) * gain * load(weight + k) + load(bias + k));
    for (size_t k = whole; k < count; ++k) y[k] = (x[k] - mean - shift) * gain * weight[k] + bias[k];
}

}  // namespace FASTLOOP_ISA
