// What the kernels say in PTX, on the CPU: the functions that csrc/cuda/intrinsics.cuh wraps, in the same words.
//
// Asynchronous copies happen as late as they may: what a copy writes is 0xFF bytes from its start until somebody has
// waited for it. So a missing wait shows, and so does a copy into memory that is still read. mma sums in float64.
#pragma once

#include "language.h"

namespace cuda_emulation {

inline void check_shared(const void* at, size_t bytes, size_t alignment, const char* what) {
    if (reinterpret_cast<uintptr_t>(at) % alignment) machine->fail("%s: %p is not aligned to %zu bytes", what, at, alignment);
    if (!machine->is_shared(at, bytes)) machine->fail("%s: %p is outside shared memory", what, at);
}

inline void perform(const Copy& copy) {
    memcpy(copy.to, copy.from, copy.read);
    memset(static_cast<unsigned char*>(copy.to) + copy.read, 0, copy.written - copy.read);
}

// cp.async of 4, 8 or 16 bytes: `read` of them from `from`, the others zero.
inline void cp_async(void* to, const void* from, size_t bytes, size_t read) {
    check_shared(to, bytes, bytes, "cp.async");
    if (reinterpret_cast<uintptr_t>(from) % bytes && read) machine->fail("cp.async: the source is not aligned to %zu", bytes);
    memset(to, kPoison, bytes);
    fiber().open.push_back({to, from, read, bytes, nullptr});
}
inline void cp_async_commit() {
    fiber().groups.push_back(std::move(fiber().open));
    fiber().open.clear();
}
inline void cp_async_wait(size_t left) {  // all groups but the newest `left`
    auto& groups = fiber().groups;
    while (groups.size() > left) {
        for (const Copy& copy : groups.front()) perform(copy);
        groups.pop_front();
    }
}
inline void cp_async_wait_all() {
    cp_async_commit();
    cp_async_wait(0);
}

// Rows of 16 bytes at the lanes' addresses -> the 8 x 8 matrices' fragments; trans: columns in place of rows.
template <int count> void ldmatrix(uint32_t (&result)[count], const void* row, bool trans) {
    const auto* all = exchange(~0u, &row, sizeof row);
    const unsigned own = lane();
    if (own < 8 * count) check_shared(row, 16, 16, "ldmatrix");
    for (unsigned j = 0; j < count; ++j) {
        const auto element = [&](unsigned r, unsigned c) {
            const uint16_t* at;
            memcpy(&at, all[8 * j + r], sizeof at);
            return uint32_t(at[c]);
        };
        const unsigned g = own / 4, t = own % 4;
        result[j] = trans ? element(2 * t, g) | element(2 * t + 1, g) << 16 : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
    }
}

// d [16, 8] = a [16, 16] b [16, 8] + c of 16-bit floats, float32 sums (mma.sync.aligned.m16n8k16.row.col).
template <float (*widen)(uint16_t)>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const auto* all = exchange(~0u, mine, sizeof mine);
    const auto of = [&](unsigned l, unsigned word, unsigned half) {
        uint16_t bits;
        memcpy(&bits, all[l] + 4 * word + 2 * half, sizeof bits);
        return double(widen(bits));
    };
    const unsigned g = lane() / 4, t = lane() % 4;
    double sum[4] = {c[0], c[1], c[2], c[3]};
    for (unsigned k = 0; k < 16; ++k) {
        const unsigned s = k % 8 / 2, half = k % 2, high = k / 8;
        const double top = of(4 * g + s, 2 * high, half), low = of(4 * g + s, 2 * high + 1, half);
        for (unsigned n = 0; n < 2; ++n) {
            const double right = of(4 * (2 * t + n) + s, 4 + high, half);
            sum[n] += top * right;
            sum[2 + n] += low * right;
        }
    }
    for (int i = 0; i < 4; ++i) d[i] = float(sum[i]);
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
    mma_m16n8k16<widen_bf16>(d, a, b, c);
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
    mma_m16n8k16<widen_f16>(d, a, b, c);
}

// Named barriers: threads of the block, a multiple of 32.
inline void named_barrier(unsigned id, unsigned threads) { cuda_emulation_barrier(id, threads); }
// Counts as a thread that has come to it, and goes on.
inline void named_barrier_arrive(unsigned id, unsigned threads) {
    auto& block = *fiber().block;
    if (id == 0 || id >= 16 || threads % 32 || threads > block.threads) machine->fail("barrier %u of %u threads", id, threads);
    machine->arrive(block.barriers[id], threads);
}

// Clusters.
inline unsigned cluster_rank() { return fiber().block->rank; }
inline unsigned cluster_blocks() { return machine->configuration().cluster; }
inline void cluster_arrive() {
    auto& cluster = *fiber().block->cluster;
    fiber().cluster_token = machine->arrive(cluster.barrier, cluster.live);
}
inline void cluster_wait() { machine->wait(fiber().block->cluster->barrier, fiber().cluster_token); }
// The same place of dynamic shared memory in another block of the cluster.
template <class T> T* cluster_map(T* own, unsigned rank) {
    auto& block = *fiber().block;
    if (rank >= block.cluster->blocks.size()) machine->fail("a cluster has no block %u", rank);
    const auto offset = reinterpret_cast<const unsigned char*>(own) - block.shared;
    if (offset < 0 || size_t(offset) >= machine->configuration().shared)
        machine->fail("only dynamic shared memory is reached from other blocks");
    return reinterpret_cast<T*>(block.cluster->blocks[rank]->shared + offset);
}

// mbarrier, in its word of shared memory: phase, threads expected, threads still to come, bytes still to come.
struct Mbarrier {
    uint64_t phase : 1, expected : 20, pending : 20;
    int64_t bytes : 23;
};
static_assert(sizeof(Mbarrier) == 8);
template <class F> void mbarrier_change(uint64_t* at, F&& change) {
    check_shared(at, 8, 8, "mbarrier");
    auto state = std::bit_cast<Mbarrier>(*at);
    change(state);
    if (state.pending == 0 && state.bytes == 0) {
        state.phase = !state.phase;
        state.pending = state.expected;
        machine->progress();
    }
    *at = std::bit_cast<uint64_t>(state);
}
inline void mbarrier_init(uint64_t* at, unsigned count) {
    check_shared(at, 8, 8, "mbarrier");
    *at = std::bit_cast<uint64_t>(Mbarrier{0, count, count, 0});
}
inline void mbarrier_arrive(uint64_t* at) {
    mbarrier_change(at, [](Mbarrier& s) { s.pending -= 1; });
    machine->lag();  // what follows may come late: should it have been in front?
}
inline void mbarrier_arrive_expect_bytes(uint64_t* at, unsigned bytes) {
    mbarrier_change(at, [=](Mbarrier& s) { s.bytes += bytes, s.pending -= 1; });
}
// Bulk copies that somebody waits for are done when he asks.
inline bool mbarrier_passed(uint64_t* at, unsigned phase) {
    for (auto& block : fiber().block->cluster->blocks) {
        auto bulk = std::exchange(block->bulk, {});
        for (const Copy& copy : bulk) {
            if (copy.mbarrier != at) {
                block->bulk.push_back(copy);
                continue;
            }
            perform(copy);
            mbarrier_change(at, [&](Mbarrier& s) { s.bytes -= int64_t(copy.written); });
        }
    }
    const bool passed = std::bit_cast<Mbarrier>(*at).phase != (phase & 1);
    if (!passed) machine->poll();
    return passed;
}
inline void mbarrier_wait(uint64_t* at, unsigned phase) {
    while (!mbarrier_passed(at, phase)) {
    }
}
// cp.async.bulk.shared::cluster.global.mbarrier of a multiple of 16 bytes.
inline void bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* mbarrier) {
    check_shared(to, bytes, 16, "cp.async.bulk");
    if (bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) machine->fail("cp.async.bulk: not a multiple of 16 bytes");
    memset(to, kPoison, bytes);
    fiber().block->bulk.push_back({to, from, bytes, bytes, mbarrier});
}

}  // namespace cuda_emulation
