// decide, one row: the final norm and two logits, never the whole vocabulary. Bytes moved: the row, the norm's weight, two rows.
//
// In float64, as next to nothing is computed and all depends on it.
#include "rows.h"
#include "simd.h"

namespace {

struct Totals {
    DoubleLanes squares, silent, respond;
    inline __attribute__((always_inline)) void add(DoubleLanes x, DoubleLanes weight, DoubleLanes silence, DoubleLanes response) {
        squares += x * x;
        silent += x * weight * silence;
        respond += x * weight * response;
    }
};

}  // namespace

namespace FASTLOOP_ISA {

void decide(const float* x, const float* norm_weight, const float* head, size_t count, double eps, double* logits) {
    const size_t whole = count / kDoubles * kDoubles, rest = count - whole;
    Totals total{};
    for (size_t k = 0; k < whole; k += kDoubles)
        total.add(load_doubles(x + k), load_doubles(norm_weight + k), load_doubles(head + k), load_doubles(head + count + k));
    total.add(load_doubles(x + whole, rest), load_doubles(norm_weight + whole, rest), load_doubles(head + whole, rest),
              load_doubles(head + count + whole, rest));
    const double gain = 1.0 / __builtin_sqrt(sum(total.squares) / static_cast<double>(count) + eps);
    logits[0] = sum(total.silent) * gain;
    logits[1] = sum(total.respond) * gain;
}

}  // namespace FASTLOOP_ISA
