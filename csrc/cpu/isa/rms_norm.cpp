// rms_norm of one row: y = x / sqrt(mean(x^2) + eps) * weight. Bytes moved: the row in and out, the weight.
#include "rows.h"
#include "simd.h"

namespace FASTLOOP_ISA {

void add_row(const float* x, size_t count, float* to) {
    const size_t whole = count / kLanes * kLanes;
    for (size_t k = 0; k < whole; k += kLanes) store(to + k, load(to + k) + load(x + k));
    for (size_t k = whole; k < count; ++k) to[k] += x[k];
}

void rms_norm(const float* x, const float* weight, size_t count, float eps, float* y) {
    Lanes squares = {};
    const size_t whole = count / kLanes * kLanes, rest = count - whole;
    for (size_t k = 0; k < whole; k += kLanes) squares += load(x + k) * load(x + k);
    const Lanes end = load_some(x + whole, rest);
    squares += end * end;
    const float gain = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(count) + eps);
    for (size_t k = 0; k < whole; k += kLanes) store(y + k, load(x + k) * gain * load(weight + k));
    store_some(y + whole, end * gain * load_some(weight + whole, rest), rest);
}

}  // namespace FASTLOOP_ISA
