// The host side of `decide`: p(respond) of every row, then the policies, row by row in time order.
#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "isa.h"
#include "rows.h"
#include "status.h"

using namespace fastloop;

namespace {

constexpr const char* kWhere = "decide";
constexpr int32_t kMostChunks = 1 << 30;  // the count since the last response ends, and begins, here

void check_decide(const fastloop_decide_params& p) {
    need(kWhere, "x", p.x);
    need(kWhere, "norm_weight", p.norm_weight);
    need(kWhere, "head", p.head);
    need(kWhere, "slots", p.slots);
    need(kWhere, "policy", p.policy);
    need(kWhere, "state", p.state);
    need(kWhere, "p_respond", p.p_respond);
    need(kWhere, "decision", p.decision);
    apart(kWhere, "x", p.rows, p.width, p.x_stride);
    for (size_t row = 0; row < p.rows; ++row)
        if (p.slots[row] < 0 || static_cast<uint64_t>(p.slots[row]) >= p.slot_count)
            fail(FASTLOOP_BAD_STATE, "decide: slot %lld of row %zu is outside the %zu slots of the state",
                 static_cast<long long>(p.slots[row]), row, p.slot_count);
}

// One step of a policy (threshold, rearm, min_gap): the decision; state (chunks since the last response, armed) moves on.
int32_t advance(double chance, const float* policy, int32_t* state) {
    const double threshold = policy[0], rearm = policy[1], min_gap = policy[2];
    const bool armed = state[1] != 0 || chance <= rearm;
    if (chance > threshold && armed && state[0] >= min_gap) {
        state[0] = 0;
        state[1] = rearm >= 1;
        return FASTLOOP_RESPOND;
    }
    state[0] = std::min(state[0], kMostChunks - 1) + 1;
    state[1] = armed;
    return FASTLOOP_SILENT;
}

}  // namespace

extern "C" fastloop_status fastloop_decide(const fastloop_decide_params* params) {
    return guarded(kWhere, [params] {
        const fastloop_decide_params p = adopt(kWhere, params);
        const Isa isa = choose_isa(kWhere, p.isa);
        if (p.rows == 0) return;
        check_decide(p);
        std::unordered_set<int64_t> ended;  // slots that have responded, or were not finite, in this call
        for (size_t row = 0; row < p.rows; ++row) {
            double logits[2];
            FASTLOOP_KERNEL(isa, decide)(p.x + row * p.x_stride, p.norm_weight, p.head, p.width, p.eps, logits);
            const double chance = 1 / (1 + std::exp(logits[0] - logits[1]));
            p.p_respond[row] = static_cast<float>(chance);
            const int64_t slot = p.slots[row];
            if (!ended.empty() && ended.count(slot) != 0) {
                p.decision[row] = FASTLOOP_VOID;
                continue;
            }
            const bool finite = std::isfinite(logits[0]) && std::isfinite(logits[1]);
            p.decision[row] = finite ? advance(chance, p.policy + 3 * slot, p.state + 2 * slot) : FASTLOOP_NONFINITE;
            if (p.decision[row] != FASTLOOP_SILENT) ended.insert(slot);
        }
    });
}
