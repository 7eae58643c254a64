// sm_90 on the CPU, in the words of csrc/cuda/hopper.cuh: clusters, mbarriers, TMA, wgmma.
//
// TMA writes its 16-byte pieces where the 128-byte swizzle puts them, and wgmma reads through the descriptor it is given,
// bit by bit: a wrong descriptor, offset or swizzle is a wrong product. Products happen as late as they may: until a
// warp has waited for them, its sums are NaN, and what they read may not be overwritten.
#pragma once

#include <map>

#include "intrinsics.h"
#include "tensor_map.h"

namespace cuda_emulation {

// Bits 4 to 6 of an address are those of a piece in its 128 bytes; the swizzle adds the row's number in them.
inline uint64_t swizzled_128(uint64_t address) { return address ^ (address >> 7 & 7) << 4; }

inline uint64_t own_address(const void* at) {
    const auto& block = *fiber().block;
    const auto offset = static_cast<const unsigned char*>(at) - block.shared;
    if (offset < 0 || static_cast<size_t>(offset) >= machine->configuration().shared)
        machine->fail("an address of dynamic shared memory is wanted");
    return static_cast<uint64_t>(offset);
}

inline void tensor_copy(void* to, const void* map, int column, int row, uint64_t* mbarrier) {
    MapFields f;
    memcpy(&f, map, sizeof f);
    if (f.magic != MapFields::kMagic) machine->fail("tensor_copy: no tensor map");
    if (f.swizzle != 0 && f.swizzle != 3) machine->fail("tensor_copy: swizzle %u is not emulated", f.swizzle);
    const unsigned row_bytes = f.box_width * f.itemsize;
    check_shared(to, size_t(row_bytes) * f.box_rows, f.swizzle ? 1024 : 128, "tensor_copy");
    const uint64_t base = own_address(to);
    unsigned char* shared = fiber().block->shared;
    memset(to, kPoison, size_t(row_bytes) * f.box_rows);
    for (unsigned r = 0; r < f.box_rows; ++r)
        for (unsigned b = 0; b < row_bytes; b += 16) {
            const int64_t at_row = int64_t(row) + r, at = int64_t(column) * f.itemsize + b;
            const int64_t width = int64_t(f.width) * f.itemsize;
            size_t read = 0;  // nothing is before the first column here
            if (at_row >= 0 && at_row < int64_t(f.rows) && at >= 0 && at < width) read = size_t(std::min<int64_t>(16, width - at));
            const uint64_t place = base + uint64_t(r) * row_bytes + b;
            fiber().block->bulk.push_back({shared + (f.swizzle ? swizzled_128(place) : place),
                                           read ? f.address + at_row * int64_t(f.stride) + at : f.address, read, 16, mbarrier});
        }
}

// Where the left side of a product comes from: a descriptor, or the fragments of the four lanes that share two rows.
struct Left {
    uint64_t descriptor = 0;
    const uint32_t* fragments[4] = {};
};
struct Product {
    float* sums;
    unsigned columns;
    Left left;
    uint64_t right;
    bool fresh, transposed;
    float (*widen)(uint16_t);
};
struct Products {
    std::vector<Product> open;
    std::deque<std::vector<Product>> groups;
    std::map<float*, std::vector<float>> held;  // sums that are still to come
    std::map<float*, unsigned> pending;
};
inline std::map<const Fiber*, Products> products;

// Element `column` of the depth of row `row` of an operand; transposed: its rows are columns of what is stored.
inline uint16_t element(uint64_t descriptor, unsigned row, unsigned column, bool transposed) {
    if (descriptor >> 62 != 1) machine->fail("wgmma: a descriptor without the 128-byte swizzle");
    if (descriptor >> 49 & 7) machine->fail("wgmma: a descriptor with a base offset");
    const uint64_t start = (descriptor & 0x3fff) << 4, eight = (descriptor >> 32 & 0x3fff) << 4;
    const uint64_t next = (descriptor >> 16 & 0x3fff) << 4;  // 64 columns, where these are the operand's rows
    const uint64_t place = swizzled_128(
        start + (transposed ? column / 8 * eight + column % 8 * 128 + row / 64 * next + row % 64 * 2
                            : row / 8 * eight + row % 8 * 128 + column * 2));
    const auto* at = fiber().block->shared + place;
    check_shared(at, 2, 2, "wgmma");
    uint16_t bits;
    memcpy(&bits, at, 2);
    return bits;
}

inline void wgmma_start(const Product& product) {
    Products& own = products[&fiber()];
    if (own.pending[product.sums]++ == 0) {
        own.held[product.sums].assign(product.sums, product.sums + product.columns / 2);
        for (unsigned i = 0; i < product.columns / 2; ++i) product.sums[i] = std::numeric_limits<float>::quiet_NaN();
    }
    own.open.push_back(product);
}
inline void wgmma_perform(Products& own, const Product& p) {
    auto& sums = own.held[p.sums];
    const unsigned thread = fiber().number % 128, lane = thread % 32;
    double left[2][16];  // rows 16 (thread / 32) + lane / 4, and 8 behind
    for (unsigned j = 0; j < 2; ++j)
        for (unsigned k = 0; k < 16; ++k) {
            const uint32_t* const fragment = p.left.fragments[k % 8 / 2];
            left[j][k] = p.widen(fragment ? static_cast<uint16_t>(fragment[k / 8 * 2 + j] >> 16 * (k % 2))
                                          : element(p.left.descriptor, 16 * (thread / 32) + lane / 4 + 8 * j, k, false));
        }
    for (unsigned i = 0; i < p.columns / 4; ++i) {
        const unsigned column = 8 * (i / 2) + 2 * (thread % 4) + i % 2, at = i / 2 * 4 + i % 2;
        double sum[2] = {p.fresh ? 0 : sums[at], p.fresh ? 0 : sums[at + 2]};
        for (unsigned k = 0; k < 16; ++k) {
            const double right = p.widen(element(p.right, column, k, p.transposed));
            sum[0] += left[0][k] * right;
            sum[1] += left[1][k] * right;
        }
        sums[at] = float(sum[0]);
        sums[at + 2] = float(sum[1]);
    }
    if (--own.pending[p.sums] == 0) std::copy(sums.begin(), sums.end(), p.sums);
}
inline void wgmma_finish(size_t left) {
    Products& own = products[&fiber()];
    while (own.groups.size() > left) {
        for (const Product& p : own.groups.front()) wgmma_perform(own, p);
        own.groups.pop_front();
    }
    if (own.groups.empty() && own.open.empty()) products.erase(&fiber());
}

}  // namespace cuda_emulation

namespace fastloop {

using Word = uint64_t;
struct alignas(128) TensorMap {
    Word opaque[16];
};

using cuda_emulation::cluster_arrive;
using cuda_emulation::cluster_blocks;
using cuda_emulation::cluster_map;
using cuda_emulation::cluster_rank;
using cuda_emulation::cluster_wait;
using cuda_emulation::bulk_copy;
using cuda_emulation::mbarrier_arrive;
using cuda_emulation::mbarrier_arrive_expect_bytes;
using cuda_emulation::mbarrier_init;
using cuda_emulation::mbarrier_passed;
using cuda_emulation::mbarrier_wait;

inline unsigned shared_address(const void* at) { return static_cast<unsigned>(cuda_emulation::own_address(at)); }
inline void mbarrier_init_fence() {}
inline void async_proxy_fence() {}
inline void named_barrier_wait(int id, int threads) {
    cuda_emulation::named_barrier(static_cast<unsigned>(id), static_cast<unsigned>(threads));
}
inline void named_barrier_arrive(int id, int threads) {
    cuda_emulation::named_barrier_arrive(static_cast<unsigned>(id), static_cast<unsigned>(threads));
}
template <int> void registers_down() { __syncwarp(); }
template <int> void registers_up() { __syncwarp(); }
inline Word evict_first() { return 0; }
inline Word evict_last() { return 0; }
inline void prefetch_tensor_map(const TensorMap*) {}
inline void tensor_copy(void* to, const TensorMap* map, int column, int row, Word* mbarrier, Word) {
    cuda_emulation::tensor_copy(to, map, column, row, mbarrier);
}
// These are instructions of whole warps: no lane is past one before all have come to it.
inline void wgmma_fence() { __syncwarp(); }
template <int count> void wgmma_bf16(float (&d)[count], Word a, Word b) {
    cuda_emulation::wgmma_start({d, 2 * count, {a, {}}, b, false, false, cuda_emulation::widen_bf16});
}
inline float (*wgmma_widen(bf16))(uint16_t) { return cuda_emulation::widen_bf16; }
inline float (*wgmma_widen(f16))(uint16_t) { return cuda_emulation::widen_f16; }
// What `a` holds is read when the product happens: it may not have changed until then.
template <bool kFresh, bool kTransposed, int count, class T>
void wgmma(float (&d)[count], const unsigned (&a)[4], Word b, T type) {
    const unsigned* own = a;
    const auto* all = cuda_emulation::exchange(~0u, &own, sizeof own);
    cuda_emulation::Left left;
    for (unsigned t = 0; t < 4; ++t)
        memcpy(&left.fragments[t], all[cuda_emulation::lane() / 4 * 4 + t], sizeof own);
    cuda_emulation::wgmma_start({d, 2 * count, left, b, kFresh, kTransposed, wgmma_widen(type)});
}
template <int count> void wgmma_done(float (&)[count]) {}
inline void wgmma_commit() {
    __syncwarp();
    auto& own = cuda_emulation::products[&cuda_emulation::fiber()];
    own.groups.push_back(std::move(own.open));
    own.open.clear();
}
template <int left> void wgmma_wait() {
    cuda_emulation::wgmma_finish(left);
    __syncwarp();
}

}  // namespace fastloop
