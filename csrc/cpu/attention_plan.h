// How the attention of one ragged step is cut into jobs, and the jobs run by a crew (csrc/cpu/paged_attention.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "stage.h"

namespace fastloop {

// The sequences of a step and where their slots lie, as the caller gives them.
struct Sequences {
    size_t count;                // B
    const int32_t* row_starts;   // [B + 1]
    const int32_t* block_table;  // [B, M]
    size_t table_width;          // M
    const int32_t* kv_lens;      // [B]
    const int32_t* gaps;         // [B, 2]
};

// Pointers, and values that say where to read: fails with `where` and what is wrong.
void check_sequences(const char* where, const Sequences& s, size_t rows, size_t pages, size_t page_tokens);

class AttentionPlan {
  public:
    // The jobs of `heads` query heads over pages of `groups` KV heads of `width`, for any layer of the step.
    void cut(const Sequences& s, size_t heads, size_t groups, size_t width);
    size_t part_floats() const { return part_floats_; }  // of PagedAttention::parts
    size_t work() const { return work_; }                  // multiply-adds
    size_t scratch_bytes(size_t width) const { return attention_scratch(most_rows_, width); }  // of each thread
    // All jobs; rows whose context has several spans are complete behind `merge`, which each row takes on its own.
    void run(Stage& s, const PagedAttention& call) const;
    void merge(Isa isa, const PagedAttention& call, size_t row) const;

  private:
    // What a row is made of where its context has several spans, else none.
    struct Merge {
        size_t spans;
        size_t part;  // index of its first part: [spans][groups]
        size_t row_in_part;
    };
    void cut_run(const Sequences& s, size_t b, size_t row, size_t rows, size_t own);

    size_t repeat_ = 1, groups_ = 0, width_ = 0;
    std::vector<AttentionJob> jobs_;
    std::vector<Merge> merges_;  // of every row
    std::vector<size_t> parts_;  // where each begins, in floats
    size_t part_floats_ = 0;
    size_t work_ = 0;
    size_t most_rows_ = 0;  // query rows x heads of the largest job
};

}  // namespace fastloop
