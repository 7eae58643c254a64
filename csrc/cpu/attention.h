// What the plan hands to the attention kernels (csrc/cpu/isa/paged_attention.cpp, csrc/cpu/isa/block_attention.cpp).
//
// Attention is cut into jobs: some queries of one sequence, the heads that share one KV head, and one span of kSpan slots. The
// cuts depend on the sequence alone, never on the batch or on the number of threads, so neither do the results.
#pragma once

#include <cstddef>
#include <cstdint>

#include "linear.h"
#include "rows.h"

namespace fastloop {

constexpr size_t kSpan = 1024;      // slots of a job: a long context is shared by several threads
constexpr size_t kJobRows = 112;    // query rows x heads of a job, or one query row's heads where those are more

// Queries of a job.
struct AttentionJob {
    size_t first_row, rows;  // of the call
    size_t group;            // KV head
    size_t first_slot, last_slot;
    size_t own_slot;               // of first_row; row first_row + i sees slots <= own_slot + i
    size_t gap_first, gap_last;    // slots that hold nothing
    const int32_t* table;          // pages of the sequence
    ptrdiff_t partial;             // < 0: the job sees all there is and writes the result; else where its part begins
};

struct PagedAttention {
    const float* q;  // [N, H, K]
    size_t heads;    // H
    Pages pages;
    int32_t format;  // of the products: float32 or bfloat16
    float* out;      // [N, H, K]
    float* parts;    // each [rows][repeat][2 + K] = (maximum, total, sums)
};

// Full attention inside a block of T positions: qkv [T, 3E] as [q | k | v] -> out [T, E].
struct BlockAttention {
    const float* qkv;
    size_t positions, heads, width;  // T, H, E / H
    float* out;
};

// Scratch bytes of a job with `rows` query rows x heads of `width`.
FASTLOOP_EVERYWHERE constexpr size_t attention_scratch(size_t rows, size_t width) {
    const size_t padded = (width + 31) / 32 * 32;
    return 4 * (rows * padded            // packed queries
                + 2 * kSlotTile * padded  // keys and values of a tile
                + kSlotTile               // scales of its values
                + rows * padded           // sums
                + 4 * rows + 64 * 8);     // maxima, totals, factors
}

}  // namespace fastloop

// following: the job that this thread is likely to take next, or NULL; its first keys and values are asked for.
FASTLOOP_DECLARE_KERNEL(void paged_attention(const ::fastloop::PagedAttention& call, const ::fastloop::AttentionJob& job,
                                             const ::fastloop::AttentionJob* following, unsigned char* scratch))
// Merges the parts of one query row, in order of their spans -> out [H, K] of that row. part[span * G + g] says where a part
// begins, `row` is the query row's number in it.
FASTLOOP_DECLARE_KERNEL(void merge_attention(const ::fastloop::PagedAttention& call, const size_t* part, size_t spans,
                                             size_t row, float* out))
// One head of one block.
FASTLOOP_DECLARE_KERNEL(void block_attention(const ::fastloop::BlockAttention& call, size_t head, unsigned char* scratch))
