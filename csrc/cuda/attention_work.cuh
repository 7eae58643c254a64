// paged_attention: how the work of a launch is shared, computed on the device by every block from row_starts and kv_lens.
//
// A tile is up to 16 (flat) or 128 (tall) packed rows of one sequence: packed row p is head p % R of row p / R, for the R
// query heads of a KV head. Its work is the steps of 64 slots of the sequence. All tiles one behind the other are one line
// of steps, and block p of a KV head takes steps [p share, (p + 1) share) of it: no block has more than another, and padding
// has no work. A tile that several blocks have pieces of is combined by the last of them.
#pragma once

#include "intrinsics.cuh"
#include "paged_attention.h"

namespace fastloop {

constexpr int kThreads = ATTENTION_THREADS, kStep = ATTENTION_STEP;
constexpr int kTallRows = ATTENTION_TALL_ROWS, kFlatRows = ATTENTION_FLAT_ROWS;
constexpr int kLeastFlatSteps = 2;  // what one round of copies holds (the ring of TensorCores)
constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The launch's tensors, by their types.
template <class T, class P> struct Tensors {
    __device__ explicit Tensors(const AttentionParams& p)
        : q(static_cast<const T*>(p.q)), k_pages(static_cast<const P*>(p.k_pages)), v_pages(static_cast<const P*>(p.v_pages)),
          block_table(p.block_table), row_starts(p.row_starts), kv_lens(p.kv_lens), gaps(p.gaps), out(static_cast<T*>(p.out)),
          sums(p.sums), scales(p.scales), arrived(p.arrived), sequences(p.sequences), heads(p.heads), head(p.head),
          page(p.page), table_stride(p.table_stride), scale(p.scale * kLog2E) {}

    const T* q;
    const P* k_pages;
    const P* v_pages;
    const int* block_table;
    const int* row_starts;
    const int* kv_lens;
    const int* gaps;
    T* out;
    float* sums;
    float* scales;
    unsigned* arrived;
    int sequences, heads, head, page, table_stride;
    float scale;  // of scores, log2 e included
};

// What a sequence's slots are: written, or skipped.
struct Slots {
    int end, gap_begin, gap_end;
    __device__ bool written(int slot) const { return slot < end && (slot < gap_begin || slot >= gap_end); }
};

// One piece of one tile.
struct Piece {
    int sequence, rows, length;     // of the whole sequence
    int first_packed, packed_rows;  // of the tile
    int begin_step, end_step;
    bool whole, tall;
    int first_block, last_block;    // that have pieces of the tile
    int part;                       // where the result of a piece goes
};

struct Work {
    int begins[kThreads + 1];  // steps in front of each thread's range of sequences
    int2 sums[kThreads / 32];
    int total, share, range;
    bool spread;  // tiles of few rows only
};

// What a sequence has to do, in steps.
__device__ __forceinline__ int steps_of(int rows, int length, int repeat, bool spread) {
    const int packed = rows * repeat;
    const int tile = !spread && packed > kFlatRows ? kTallRows : kFlatRows;
    return ceil_div(packed, tile) * ceil_div(length, kStep);
}

// Which tiles there are: flat ones only; tall ones wherever a sequence has more rows; or that where it pays.
enum class Tiles { FLAT, TALL, BY_WORK };

// For all threads of the block, kThreads or more.
//
// Tall tiles read every key once, but a piece leaves up to 64 KB to be combined, at about 100 GB/s of one processor: with
// no more than a step for each block, that would take longer than reading every key seven times (13 rows of 8 heads) from L2.
__device__ inline void share_work(Work& work, const int* row_starts, const int* kv_lens, int sequences, int repeat,
                                  Tiles tiles) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int range = ceil_div(sequences, kThreads);
    const bool flat = tiles == Tiles::FLAT;
    int2 own = make_int2(0, 0);  // with tall tiles, and without
    for (int b = thread * range; b < min((thread + 1) * range, sequences); ++b) {
        const int rows = row_starts[b + 1] - row_starts[b], length = kv_lens[b];
        own.x += steps_of(rows, length, repeat, flat);
        own.y += steps_of(rows, length, repeat, true);
    }
    int2 until = own;
    for (int near = 1; near < 32; near *= 2) {
        const int2 other = make_int2(__shfl_up_sync(~0u, until.x, near), __shfl_up_sync(~0u, until.y, near));
        if (lane >= near) until = make_int2(until.x + other.x, until.y + other.y);
    }
    if (lane == 31 && warp < kThreads / 32) work.sums[warp] = until;
    __syncthreads();
    int2 before = make_int2(0, 0), total = make_int2(0, 0);
    for (int w = 0; w < kThreads / 32; ++w) {
        if (w < warp) before = make_int2(before.x + work.sums[w].x, before.y + work.sums[w].y);
        total = make_int2(total.x + work.sums[w].x, total.y + work.sums[w].y);
    }
    const int blocks = gridDim.x;
    const bool spread = flat || (tiles == Tiles::BY_WORK && total.x <= blocks);
    if (thread < kThreads)
        work.begins[thread] = spread ? before.y + until.y - own.y : before.x + until.x - own.x;
    if (thread == 0) {
        const int all = spread ? total.y : total.x;
        work.begins[kThreads] = all;
        work.total = all;
        work.share = max(ceil_div(all, blocks), kLeastFlatSteps);
        work.range = range;
        work.spread = spread;
    }
    __syncthreads();
}

// The piece that begins at step `at` of the line, which ends at `end` at the latest.
__device__ inline Piece piece_at(const Work& work, const int* row_starts, const int* kv_lens, int repeat, int at, int end) {
    int low = 0, high = kThreads;  // begins[low] <= at < begins[high]
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (work.begins[middle] <= at) low = middle;
        else high = middle;
    }
    Piece piece;
    int b = low * work.range, before = work.begins[low], steps;
    for (;; ++b) {
        piece.rows = row_starts[b + 1] - row_starts[b];
        piece.length = kv_lens[b];
        steps = steps_of(piece.rows, piece.length, repeat, work.spread);
        if (before + steps > at) break;
        before += steps;
    }
    const int packed = piece.rows * repeat, each = ceil_div(piece.length, kStep);
    const int tile = (at - before) / each, begin = before + tile * each;
    piece.sequence = b;
    piece.tall = !work.spread && packed > kFlatRows;
    const int most = piece.tall ? kTallRows : kFlatRows;
    piece.first_packed = tile * most;
    piece.packed_rows = min(packed - tile * most, most);
    piece.begin_step = at - begin;
    piece.end_step = min(each, end - begin);
    piece.whole = piece.begin_step == 0 && piece.end_step == each;
    piece.first_block = begin / work.share;
    piece.last_block = (begin + each - 1) / work.share;
    // A block has at most two pieces that are not whole: one that does not begin its tile, one that begins it only.
    piece.part = 2 * static_cast<int>(blockIdx.x) + (piece.begin_step == 0 ? 1 : 0);
    return piece;
}

// Sums of a tile's pieces, [part][KV head]: 128 rows of `head` floats each, then for each row its maximum and its sum.
struct Parts {
    float* sums;
    float* scales;
    unsigned* arrived;  // [block][KV head]: pieces that are there; 0 between launches
    int groups, group, head;

    __device__ float* row(int part, int row) const {
        return sums + ((static_cast<long long>(part) * groups + group) * kTallRows + row) * head;
    }
    __device__ float* scale(int part, int row) const {
        return scales + ((static_cast<long long>(part) * groups + group) * kTallRows + row) * 2;
    }
    __device__ static int of(const Piece& piece, int block) { return 2 * block + (block == piece.first_block ? 1 : 0); }
};

// After a block has written its part: whether it is the last one of the tile. The count is 0 again then. `sync` is for all
// threads that have written, thread 0 among them.
template <class Sync> __device__ bool is_last(const Parts& parts, const Piece& piece, int* flag, Sync&& sync) {
    __threadfence();
    sync();
    if (threadIdx.x == 0) {
        const unsigned pieces = piece.last_block - piece.first_block;
        *flag = atomicInc(parts.arrived + piece.first_block * parts.groups + parts.group, pieces) == pieces;
    }
    sync();
    if (*flag) __threadfence();
    return *flag;
}

// The last block adds the parts up, in the order of the blocks that made them. weights: [blocks of the tile][rows], shared.
template <class T>
__device__ void combine(const Parts& parts, const Piece& piece, float* weights, T* out, int heads, int repeat, int first_row) {
    const int blocks = piece.last_block - piece.first_block + 1, rows = piece.packed_rows;
    for (int row = threadIdx.x; row < rows; row += kThreads) {
        float most = __int_as_float(0xff800000), total = 0;
        for (int c = 0; c < blocks; ++c)
            most = fmaxf(most, __ldcg(parts.scale(Parts::of(piece, piece.first_block + c), row)));
        if (most == __int_as_float(0xff800000)) most = 0;  // every score is NaN
        for (int c = 0; c < blocks; ++c) {
            const float* const scale = parts.scale(Parts::of(piece, piece.first_block + c), row);
            const float weight = exp2f(__ldcg(scale) - most);
            weights[c * rows + row] = weight;
            total += weight * __ldcg(scale + 1);
        }
        for (int c = 0; c < blocks; ++c) weights[c * rows + row] /= total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * (parts.head / 4); i += kThreads) {
        const int row = i / (parts.head / 4), column = i % (parts.head / 4) * 4;
        float4 sum = make_float4(0, 0, 0, 0);
        for (int c = 0; c < blocks; ++c) {
            const float weight = weights[c * rows + row];
            const float4 part =
                __ldcg(reinterpret_cast<const float4*>(parts.row(Parts::of(piece, piece.first_block + c), row) + column));
            sum.x += weight * part.x;
            sum.y += weight * part.y;
            sum.z += weight * part.z;
            sum.w += weight * part.w;
        }
        const int packed = piece.first_packed + row;
        const int head = parts.group * repeat + packed % repeat;
        T* const to = out + (static_cast<long long>(first_row + packed / repeat) * heads + head) * parts.head + column;
        to[0] = narrow<T>(sum.x);
        to[1] = narrow<T>(sum.y);
        to[2] = narrow<T>(sum.z);
        to[3] = narrow<T>(sum.w);
    }
    __syncthreads();
}

}  // namespace fastloop
