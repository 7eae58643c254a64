// decide, one row: the final norm and two logits, never the whole vocabulary. Bytes moved: the row, the norm's weight, two rows.
#include "rows.h"
#include "simd.h"

namespace FASTLOOP_ISA {

void decide(const float* x, const float* norm_weight, const float* head, size_t count, float eps, float* logits) {
    const size_t whole = count / kLanes * kLanes, rest = count - whole;
    const Lanes end = load_some(x + whole, rest);
    Lanes squares = end * end;
    for (size_t k = 0; k < whole; k += kLanes) squares += load(x + k) * load(x + k);
    const float gain = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(count) + eps);
    const Lanes last = end * gain * load_some(norm_weight + whole, rest);
    Lanes total[2] = {last * load_some(head + whole, rest), last * load_some(head + count + whole, rest)};
    for (size_t k = 0; k < whole; k += kLanes) {
        const Lanes y = load(x + k) * gain * load(norm_weight + k);
        total[0] += y * load(head + k);
        total[1] += y * load(head + count + k);
    }
    logits[0] = sum(total[0]);
    logits[1] = sum(total[1]);
}

}  // namespace FASTLOOP_ISA
