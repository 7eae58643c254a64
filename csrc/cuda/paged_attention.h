// What the host (paged_attention.cpp) hands the kernels of `paged_attention` (paged_attention.cu): plain C++ for both, and
// for NVRTC.
#pragma once

namespace fastloop {

constexpr int ATTENTION_THREADS = 256;
constexpr int ATTENTION_SHARED_BYTES = 128 * 1024;
constexpr int ATTENTION_BLOCKS = 256;     // of a KV head, at most: their weights of one row fit into shared memory
constexpr int ATTENTION_TALL_ROWS = 128;  // packed rows of a tile
constexpr int ATTENTION_FLAT_ROWS = 16;   // the same, where there are few
constexpr int ATTENTION_STEP = 64;        // slots that work is counted in

// paged_attention_wgmma_*: two groups of four warps that multiply, then one that loads.
constexpr int ATTENTION_WGMMA_THREADS = 384;
constexpr int ATTENTION_WGMMA_RING_BYTES = 224 * 1024;  // of keys and values: 7 steps of heads of 128, 14 of 64
constexpr int ATTENTION_WGMMA_BARRIERS = 5;             // of a step in the ring
constexpr int ATTENTION_WGMMA_SHARED_BYTES = ATTENTION_WGMMA_RING_BYTES + ATTENTION_WGMMA_BARRIERS * 14 * 8;

struct AttentionParams {
    const void* q;          // [rows, heads, head]
    const void* k_pages;    // [pages, page, KV heads, head]
    const void* v_pages;
    const int* block_table;
    const int* row_starts;  // [sequences + 1]
    const int* kv_lens;     // [sequences]
    const int* gaps;        // [sequences, 2]
    void* out;              // [rows, heads, head]
    float* sums;            // [2 blocks, KV heads, 128, head]
    float* scales;          // [2 blocks, KV heads, 128, 2]
    unsigned* arrived;      // [blocks, KV heads]: zeros before and after
    int sequences, heads, head, page, table_stride;
    float scale;            // of scores
};

}  // namespace fastloop
