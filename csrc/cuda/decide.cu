// decide: final norm, two logits, p(respond), policy and next state of each session, all on the device.
//
//   p = 1 / (1 + e^(h0 . n - h1 . n)),  n = x / sqrt(mean(x^2) + eps) norm_weight
//
//   decide_<dtype>   grid (blocks of one team), 512 threads
//
// Who owns what: a warp owns a row at a time and puts its chance into the first block's shared memory; there the thread of a
// slot's first row takes the slot's rows in turn, as the definition does, while their chances lie next to each other.
// Bytes moved: each row once; the norm's weight and two rows of the head once for each warp, from L1 and L2.
// Why this version: one kernel and no scratch in memory: the policy needs the rows of one slot in one place, and a cluster of 8
// blocks reads 1,024 rows (4 MB of bf16) as fast as this op ever needs. All sums are in float64, as next to nothing is
// computed and all depends on it; p is float64, too: argmax is p > 1/2, and float32 has no p near 1/2.
#include "decide.h"

#include "team.cuh"

namespace fastloop {
namespace {

constexpr int kSilent = 0, kRespond = 1, kNonfinite = -1, kVoid = -2;
constexpr int kMostChunks = 1 << 30;  // the count since the last response ends, and begins, here
constexpr int kBatch = 8;             // elements that a lane reads at once

// Elements first..first + 7 of a row of `width`; zeros behind its end.
template <class T> __device__ __forceinline__ void read(const T* row, int first, int width, bool aligned, float (&to)[kBatch]) {
    if (aligned && first + kBatch <= width) {
        load_8(row + first, to);
    } else {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) to[i] = first + i < width ? widen(row[first + i]) : 0.0f;
    }
}

// A row's chance to respond by one warp; finite: whether both logits are.
template <class T> __device__ double chance_of(const DecideParams& p, int row, bool& finite) {
    const T* const x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* const weight = static_cast<const T*>(p.norm_weight);
    const T* const head = static_cast<const T*>(p.head);
    const bool aligned = p.aligned != 0;
    double squares = 0, silent = 0, respond = 0;
    for (int first = threadIdx.x % 32 * kBatch; first < p.width; first += 32 * kBatch) {
        float value[kBatch], gain[kBatch], silence[kBatch], response[kBatch];
        read(x, first, p.width, aligned, value);
        read(weight, first, p.width, aligned, gain);
        read(head, first, p.width, aligned, silence);
        read(head + p.width, first, p.width, aligned, response);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const double wide = value[i], scaled = wide * gain[i];
            squares += wide * wide;
            silent += scaled * silence[i];
            respond += scaled * response[i];
        }
    }
    for (int near = 16; near > 0; near /= 2) {
        squares += __shfl_xor_sync(~0u, squares, near);
        silent += __shfl_xor_sync(~0u, silent, near);
        respond += __shfl_xor_sync(~0u, respond, near);
    }
    const double gain = 1.0 / sqrt(squares / p.width + p.eps);
    silent *= gain;
    respond *= gain;
    finite = fabs(silent) <= 1.7976931348623157e308 && fabs(respond) <= 1.7976931348623157e308;
    return 1.0 / (1.0 + exp(silent - respond));
}

// Which of the rows first..first + 7 are of a slot, one bit each; rows from `end` on are not.
__device__ __forceinline__ unsigned rows_of_slot(const int* slots, int slot, int first, int end) {
    unsigned found = 0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) found |= static_cast<unsigned>(first + i < end && slots[first + i] == slot) << i;
    return found;
}

// All rows of one slot, from its first one on.
__device__ void decide_slot(const DecideParams& p, const double* chances, const int* slots, int first) {
    const int slot = slots[first];
    const double threshold = p.policy[3LL * slot], rearm = p.policy[3LL * slot + 1], min_gap = p.policy[3LL * slot + 2];
    int since = p.state[2LL * slot], armed = p.state[2LL * slot + 1] != 0;
    bool ended = false;
    for (int batch = first; batch < p.rows; batch += kBatch)
        for (unsigned left = rows_of_slot(slots, slot, batch, p.rows); left; left &= left - 1) {
            const int row = batch + __ffs(static_cast<int>(left)) - 1;
            const double chance = chances[row];
            int decision = kVoid;
            if (!ended && chance != chance) {
                decision = kNonfinite;
            } else if (!ended) {
                armed |= chance <= rearm;
                const bool responds = chance > threshold && armed && since >= min_gap;
                decision = responds ? kRespond : kSilent;
                since = responds ? 0 : min(since, kMostChunks - 1) + 1;
                if (responds) armed = rearm >= 1;
            }
            p.decision[row] = decision;
            ended |= decision != kSilent;
        }
    p.state[2LL * slot] = since;
    p.state[2LL * slot + 1] = armed;
}

template <class T> __device__ void decide_rows(const DecideParams& p, double* chances) {
    int* const slots = reinterpret_cast<int*>(chances + p.rows);
    team_sync();  // every block has begun, and may be written to
    let_next_kernel_start();
    wait_for_previous_kernel();
    constexpr int kWarps = DECIDE_THREADS / 32;
    double* const first_chances = team_map(chances, 0);
    for (int row = threadIdx.x / 32 * team_blocks() + team_rank(); row < p.rows; row += kWarps * team_blocks()) {
        bool finite;
        const double chance = chance_of<T>(p, row, finite);
        if (threadIdx.x % 32 == 0) {
            p.p_respond[row] = static_cast<float>(chance);
            first_chances[row] = finite ? chance : __longlong_as_double(0x7ff8000000000000LL);
        }
    }
    if (team_rank() == 0)
        for (int row = threadIdx.x; row < p.rows; row += DECIDE_THREADS) slots[row] = static_cast<int>(p.slots[row]);
    team_sync();
    if (team_rank() != 0) return;
    for (int row = threadIdx.x; row < p.rows; row += DECIDE_THREADS) {
        bool is_first = row == 0 || slots[row - 1] != slots[row];  // padded rows stand next to each other
        for (int batch = 0; is_first && batch < row; batch += kBatch) is_first = !rows_of_slot(slots, slots[row], batch, row);
        if (is_first) decide_slot(p, chances, slots, row);
    }
}

}  // namespace
}  // namespace fastloop

#define FASTLOOP_DECIDE(name, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(512) name(const __grid_constant__ fastloop::DecideParams params) {  \
        FASTLOOP_SHARED(double, chances);                                                                            \
        fastloop::decide_rows<T>(params, chances);                                                                   \
    }

FASTLOOP_DECIDE(decide_f32, float)
FASTLOOP_DECIDE(decide_bf16, fastloop::bf16)
FASTLOOP_DECIDE(decide_f16, fastloop::f16)
