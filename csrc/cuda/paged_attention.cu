// paged_attention: softmax(q k^T / sqrt(K)) v of ragged new rows over paged keys, causal, grouped queries, one gap a sequence.
//
//   paged_attention_<q>_<pages>_<head>   grid (blocks, KV heads), 256 threads; the q heads of a KV head are rows of one product
//
// Batches of listeners have kernels of their own on sm_90a: paged_attention_wgmma.cuh.
//
// Who owns what: a block owns an equal share of all steps (64 slots of a tile of rows) of its KV head: see attention_work.cuh.
// In a tall tile each warp owns 16 of up to 128 packed rows (13 rows x 8 heads are 104) and all slots; in a flat one, of up
// to 16 packed rows, each warp owns 16 of 128 slots and the warps add up in shared memory. Keys and values arrive by cp.async
// in a ring of four steps; scores and sums stay in registers (mma.sync m16n8k16, online softmax in base 2).
// Bytes moved: every key and value once per tall tile, q in, the result out; pieces of shared tiles through L2.
// Why this version: one launch for every context and every mix of listeners and speakers, without a second kernel: the
// lengths are read on the device, no block has more steps than another, and the last block of a tile adds its pieces up in
// a fixed order, so equal inputs give equal bits. float32 queries are multiplied as such, without tensor cores.
#include "paged_attention.h"

#include "attention_work.cuh"
#include "paged_attention_wgmma.cuh"

namespace fastloop {
namespace {

constexpr int kRing = 4;  // steps of keys and values in shared memory

// Keys and values: rows of `kHead` elements, whose 16-byte pieces are exchanged so that 8 rows of a column lie in 8 banks.
template <int kBytes> __device__ __forceinline__ int swizzled(int row, int piece) {
    constexpr int kPieces = kBytes / 16;
    if constexpr (kPieces >= 8) return piece ^ (row & 7);
    else return piece ^ (row / (8 / kPieces) & (kPieces - 1));
}

template <class T, class P, int kHead> struct TensorCores {
    static constexpr int kRowBytes = kHead * static_cast<int>(sizeof(P));
    static constexpr int kTileBytes = kStep * kRowBytes;       // keys, or values, of a step as they lie in pages
    static constexpr int kNarrowed = sizeof(P) < sizeof(T);    // pages of 8 bits are widened in shared memory

    const Tensors<T, P>& t;
    unsigned char* const ring;

    __device__ unsigned char* tile(int stage, int values) const { return ring + (2 * stage + values) * kTileBytes; }
    __device__ const unsigned char* product_tile(int stage, int half, int values) const {
        constexpr int kWide = static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(P));  // times as large
        if constexpr (kNarrowed) return ring + (2 * kRing + (2 * half + values) * kWide) * kTileBytes;
        else return tile(stage, values);
    }

    // One step's keys and values into a stage. What nobody may see is zero there, so that weight 0 times it is 0.
    __device__ void load(int stage, int first_slot, const Slots& slots, const int* table, int group) const {
        constexpr int kPieces = kRowBytes / 16, kElements = 16 / static_cast<int>(sizeof(P));
        for (int i = threadIdx.x; i < kStep * kPieces; i += kThreads) {
            const int row = i / kPieces, piece = i % kPieces, slot = first_slot + row;
            const bool real = slots.written(slot) && piece * kElements < t.head;
            long long at = 0;
            if (real) {
                const long long page = table[slot / t.page];
                at = ((page * t.page + slot % t.page) * gridDim.y + group) * t.head + piece * kElements;
            }
            const int to = row * kRowBytes + 16 * (kNarrowed ? piece : swizzled<kRowBytes>(row, piece));
            copy_async_16(tile(stage, 0) + to, t.k_pages + at, real);
            copy_async_16(tile(stage, 1) + to, t.v_pages + at, real);
        }
    }

    // A step that has arrived, widened for the product.
    __device__ void widen_step(int stage, int half) const {
        if constexpr (kNarrowed) {
            constexpr int kPieces = kRowBytes / 16, kBytes = kHead * static_cast<int>(sizeof(T));
            for (int i = threadIdx.x; i < 2 * kStep * kPieces; i += kThreads) {
                const int values = i / (kStep * kPieces), row = i / kPieces % kStep, piece = i % kPieces;
                const P* const from = reinterpret_cast<const P*>(tile(stage, values) + row * kRowBytes + 16 * piece);
                unsigned char* const to = const_cast<unsigned char*>(product_tile(stage, half, values)) + row * kBytes;
#pragma unroll
                for (int part = 0; part < 2; ++part) {
                    unsigned wide[4];
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        wide[e] = pair<T>(widen(from[8 * part + 2 * e]), widen(from[8 * part + 2 * e + 1]));
                    *reinterpret_cast<uint4*>(to + 16 * swizzled<kBytes>(row, 2 * piece + part)) =
                        make_uint4(wide[0], wide[1], wide[2], wide[3]);
                }
            }
        }
    }

    // One warp's 16 rows: q fragments, and what has been summed. Lane 4 g + t has rows g and g + 8, columns 2 t and 2 t + 1.
    struct Rows {
        unsigned q[kHead / 16][4];
        float sum[kHead / 8][4];
        float most[2], total[2];
        int own[2];  // the last slot of the piece that a row sees; -1 where there is no row
    };

    __device__ void begin(Rows& r, const Piece& piece, int group, int first_row, int first_packed) const {
        const int lane = threadIdx.x % 32, g = lane / 4, column = lane % 4 * 2, repeat = t.heads / gridDim.y;
        const T* from[2];
        for (int i = 0; i < 2; ++i) {
            const int packed = first_packed + g + 8 * i;
            const bool real = packed < piece.packed_rows;
            const int at = piece.first_packed + (real ? packed : 0), row = at / repeat;
            const int head = group * repeat + at % repeat;
            from[i] = t.q + (static_cast<long long>(first_row + row) * t.heads + head) * t.head;
            r.own[i] = real ? piece.length - piece.rows + row : -1;
            r.most[i] = __int_as_float(0xff800000);
            r.total[i] = 0;
        }
#pragma unroll
        for (int k = 0; k < kHead / 16; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = 16 * k + column + i / 2 * 8;
                r.q[k][i] = r.own[i % 2] >= 0 && at < t.head ? *reinterpret_cast<const unsigned*>(from[i % 2] + at) : 0;
            }
#pragma unroll
        for (int n = 0; n < kHead / 8; ++n)
            for (int i = 0; i < 4; ++i) r.sum[n][i] = 0;
    }

    // 8 kTiles slots from `row` of the tiles on, the first of them `first_slot` of the sequence.
    template <int kTiles>
    __device__ void attend(Rows& r, const unsigned char* keys, const unsigned char* values, int row, int first_slot,
                           const Slots& slots) const {
        constexpr int kBytes = kHead * static_cast<int>(sizeof(T));
        const int lane = threadIdx.x % 32, t2 = lane % 4 * 2;
        float s[kTiles][4];
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
            for (int i = 0; i < 4; ++i) s[n][i] = 0;
#pragma unroll
        for (int k = 0; k < kHead / 16; ++k)
#pragma unroll
            for (int n = 0; n < kTiles; n += 2) {  // 16 slots: two tiles, for both halves of the depth
                const int at = row + 8 * n + lane % 8 + lane / 16 * 8;
                unsigned b[4];
                load_matrices<4>(b, keys + at * kBytes + 16 * swizzled<kBytes>(at, 2 * k + lane / 8 % 2));
                const unsigned low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
                multiply(s[n], r.q[k], low, T{});
                multiply(s[n + 1], r.q[k], high, T{});
            }

        float peak[2] = {r.most[0], r.most[1]};
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int slot = first_slot + 8 * n + t2 + i % 2;
                const bool seen = slot <= r.own[i / 2] && (slot < slots.gap_begin || slot >= slots.gap_end);
                s[n][i] = seen ? s[n][i] * t.scale : __int_as_float(0xff800000);
                peak[i / 2] = fmaxf(peak[i / 2], s[n][i]);
            }
        float shrink[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            peak[i] = fmaxf(peak[i], __shfl_xor_sync(~0u, peak[i], 1));
            peak[i] = fmaxf(peak[i], __shfl_xor_sync(~0u, peak[i], 2));
            const float finite = peak[i] == __int_as_float(0xff800000) ? 0.0f : peak[i];  // a row that has seen nothing yet
            shrink[i] = exp2_fast(r.most[i] - finite);
            r.most[i] = peak[i];
            r.total[i] *= shrink[i];
            peak[i] = finite;
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[n][i] = exp2_fast(s[n][i] - peak[i / 2]);
                r.total[i / 2] += s[n][i];
            }
#pragma unroll
        for (int n = 0; n < kHead / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) r.sum[n][i] *= shrink[i / 2];

#pragma unroll
        for (int k = 0; k < kTiles; k += 2) {  // 16 slots of weights are the left side
            const unsigned a[4] = {pair<T>(s[k][0], s[k][1]), pair<T>(s[k][2], s[k][3]), pair<T>(s[k + 1][0], s[k + 1][1]),
                                   pair<T>(s[k + 1][2], s[k + 1][3])};
            const int at = row + 8 * k + lane % 16;
#pragma unroll
            for (int n = 0; n < kHead / 8; n += 2) {
                unsigned b[4];
                load_matrices_transposed<4>(b, values + at * kBytes + 16 * swizzled<kBytes>(at, n + lane / 16));
                const unsigned low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
                multiply(r.sum[n], a, low, T{});
                multiply(r.sum[n + 1], a, high, T{});
            }
        }
    }

    // The sums of a piece, row by row: part of the result, or all of it.
    __device__ void put(const Parts& parts, const Piece& piece, int row, int column, float a, float b, float total,
                        int first_row) const {
        if (row >= piece.packed_rows || column >= t.head) return;
        if (piece.whole) {
            const int repeat = t.heads / gridDim.y, packed = piece.first_packed + row;
            const int head = parts.group * repeat + packed % repeat;
            T* const to = t.out + (static_cast<long long>(first_row + packed / repeat) * t.heads + head) * t.head + column;
            *reinterpret_cast<unsigned*>(to) = pair<T>(a / total, b / total);
        } else {
            *reinterpret_cast<float2*>(parts.row(piece.part, row) + column) = make_float2(a, b);
        }
    }

    template <bool kTall> __device__ void run(const Piece& piece, const Parts& parts, int* flag) const {
        constexpr int kSteps = kTall ? 1 : 2;        // of a round
        constexpr int kRounds = kRing / kSteps;      // in the ring
        const int first_row = t.row_starts[piece.sequence], warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int* const table = t.block_table + static_cast<long long>(piece.sequence) * t.table_stride;
        const int repeat = t.heads / gridDim.y;
        const int last = piece.length - piece.rows + (piece.first_packed + piece.packed_rows - 1) / repeat;
        const Slots slots{min(last + 1, piece.end_step * kStep), t.gaps[2 * piece.sequence], t.gaps[2 * piece.sequence + 1]};
        const int begin_slot = piece.begin_step * kStep;
        const int rounds = ceil_div(piece.end_step - piece.begin_step, kSteps);
        const bool busy = !kTall || 16 * warp < piece.packed_rows;

        const auto load_round = [&](int round) {
            if (round < rounds)
                for (int i = 0; i < kSteps; ++i)
                    load(round % kRounds * kSteps + i, begin_slot + (round * kSteps + i) * kStep, slots, table, parts.group);
            commit_copies();
        };
        for (int round = 0; round < kRounds - 1; ++round) load_round(round);
        Rows r;
        begin(r, piece, parts.group, first_row, kTall ? 16 * warp : 0);
        for (int i = 0; i < 2; ++i) r.own[i] = min(r.own[i], slots.end - 1);  // the last round may reach behind the piece
        for (int round = 0; round < rounds; ++round) {
            wait_for_copies<kRounds - 2>();
            __syncthreads();  // the round is there, and the one before has been used
            load_round(round + kRounds - 1);
            const int stage = round % kRounds * kSteps + (kTall ? 0 : warp / 4);
            if constexpr (kNarrowed) {
                for (int i = 0; i < kSteps; ++i) widen_step(round % kRounds * kSteps + i, i);
                __syncthreads();
            }
            const int half = kTall ? 0 : warp / 4, row = kTall ? 0 : warp % 4 * 16;
            if (busy)
                attend<kTall ? 8 : 2>(r, product_tile(stage, half, 0), product_tile(stage, half, 1), row,
                                      begin_slot + (round * kSteps + half) * kStep + row, slots);
        }
        for (int i = 0; i < 2; ++i) {
            r.total[i] += __shfl_xor_sync(~0u, r.total[i], 1);
            r.total[i] += __shfl_xor_sync(~0u, r.total[i], 2);
        }
        wait_for_copies<0>();
        __syncthreads();  // the ring is free

        if constexpr (kTall) {
            if (busy) {
#pragma unroll
                for (int n = 0; n < kHead / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        put(parts, piece, 16 * warp + lane / 4 + 8 * i, 8 * n + lane % 4 * 2, r.sum[n][2 * i],
                            r.sum[n][2 * i + 1], r.total[i], first_row);
                for (int i = 0; i < 2; ++i)
                    put_scale(parts, piece, 16 * warp + lane / 4 + 8 * i, r.most[i], r.total[i], lane % 4 == 0);
            }
        } else {
            merge(r, piece, parts, first_row);
        }
        if (!piece.whole && is_last(parts, piece, flag, [] { __syncthreads(); }))
            combine<T>(parts, piece, reinterpret_cast<float*>(ring), t.out, t.heads, repeat, first_row);
        __syncthreads();
    }

    __device__ void put_scale(const Parts& parts, const Piece& piece, int row, float most, float total, bool mine) const {
        if (!mine || piece.whole || row >= piece.packed_rows) return;
        *reinterpret_cast<float2*>(parts.scale(piece.part, row)) = make_float2(most, total);
    }

    // A flat tile: the sums of 8 warps over their slots, added up in shared memory.
    __device__ void merge(const Rows& r, const Piece& piece, const Parts& parts, int first_row) const {
        constexpr int kPitch = kHead + 8;
        float* const sums = reinterpret_cast<float*>(ring);              // [warp][row][column]
        float* const scales = sums + kThreads / 32 * kFlatRows * kPitch;  // [warp][row][maximum, sum]
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        for (int i = 0; i < 2; ++i) {
            const int row = kFlatRows * warp + lane / 4 + 8 * i;
#pragma unroll
            for (int n = 0; n < kHead / 8; ++n)
                *reinterpret_cast<float2*>(sums + row * kPitch + 8 * n + lane % 4 * 2) =
                    make_float2(r.sum[n][2 * i], r.sum[n][2 * i + 1]);
            if (lane % 4 == 0) *reinterpret_cast<float2*>(scales + 2 * row) = make_float2(r.most[i], r.total[i]);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < kFlatRows * kHead / 2; i += kThreads) {
            const int row = i / (kHead / 2), column = i % (kHead / 2) * 2;
            float most = __int_as_float(0xff800000);
            for (int w = 0; w < kThreads / 32; ++w) most = fmaxf(most, scales[2 * (kFlatRows * w + row)]);
            const float finite = most == __int_as_float(0xff800000) ? 0.0f : most;
            float a = 0, b = 0, total = 0;
            for (int w = 0; w < kThreads / 32; ++w) {
                const float2 scale = *reinterpret_cast<const float2*>(scales + 2 * (kFlatRows * w + row));
                const float2 sum = *reinterpret_cast<const float2*>(sums + (kFlatRows * w + row) * kPitch + column);
                const float weight = exp2_fast(scale.x - finite);
                a += weight * sum.x;
                b += weight * sum.y;
                total += weight * scale.y;
            }
            put(parts, piece, row, column, a, b, total, first_row);
            put_scale(parts, piece, row, most, total, column == 0);
        }
    }
};

// float32 queries: every product in float32. 16 packed rows, 16 threads each; a thread has 4 slots of a step, then kHead / 16
// columns of the sum.
template <class P, int kHead> struct Scalar {
    static constexpr int kPitch = kHead + 4;

    const Tensors<float, P>& t;
    unsigned char* const ring;

    __device__ void run(const Piece& piece, const Parts& parts, int* flag) const {
        float* const keys = reinterpret_cast<float*>(ring);
        float* const values = keys + kStep * kPitch;
        float* const queries = values + kStep * kPitch;
        float* const weights = queries + kFlatRows * kPitch;
        const int first_row = t.row_starts[piece.sequence], repeat = t.heads / gridDim.y;
        const int* const table = t.block_table + static_cast<long long>(piece.sequence) * t.table_stride;
        const int row = threadIdx.x / 16, j = threadIdx.x % 16, group = parts.group;
        const int own = piece.length - piece.rows + (piece.first_packed + row) / repeat;
        const int last = piece.length - piece.rows + (piece.first_packed + piece.packed_rows - 1) / repeat;
        const Slots slots{min(last + 1, piece.end_step * kStep), t.gaps[2 * piece.sequence], t.gaps[2 * piece.sequence + 1]};
        for (int i = threadIdx.x; i < kFlatRows * kHead; i += kThreads) {
            const int packed = piece.first_packed + i / kHead, column = i % kHead;
            const bool real = i / kHead < piece.packed_rows && column < t.head;
            const long long at = static_cast<long long>(first_row + packed / repeat) * t.heads + group * repeat + packed % repeat;
            queries[i / kHead * kPitch + column] = real ? t.q[at * t.head + column] : 0.0f;
        }
        float most = __int_as_float(0xff800000), total = 0, sum[kHead / 16] = {};
        for (int step = piece.begin_step; step < piece.end_step; ++step) {
            __syncthreads();  // the step before has been used
            for (int i = threadIdx.x; i < kStep * kHead; i += kThreads) {
                const int slot = step * kStep + i / kHead, column = i % kHead;
                const bool real = slots.written(slot) && column < t.head;
                long long at = 0;
                if (real) {
                    const long long page = table[slot / t.page];
                    at = ((page * t.page + slot % t.page) * gridDim.y + group) * t.head + column;
                }
                keys[i / kHead * kPitch + column] = real ? widen(t.k_pages[at]) : 0.0f;
                values[i / kHead * kPitch + column] = real ? widen(t.v_pages[at]) : 0.0f;
            }
            __syncthreads();
            float s[4] = {};
            for (int column = 0; column < kHead; column += 4) {
                const float4 a = *reinterpret_cast<const float4*>(queries + row * kPitch + column);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float4 b = *reinterpret_cast<const float4*>(keys + (j + 16 * i) * kPitch + column);
                    s[i] += a.x * b.x + a.y * b.y + (a.z * b.z + a.w * b.w);
                }
            }
            float peak = most;
            for (int i = 0; i < 4; ++i) {
                const int slot = step * kStep + j + 16 * i;
                const bool seen = slot <= own && (slot < slots.gap_begin || slot >= slots.gap_end);
                s[i] = seen ? s[i] * t.scale : __int_as_float(0xff800000);
                peak = fmaxf(peak, s[i]);
            }
            for (int near = 8; near > 0; near /= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, near));
            const float finite = peak == __int_as_float(0xff800000) ? 0.0f : peak;
            const float shrink = exp2f(most - finite);
            most = peak;
            total *= shrink;
            for (int i = 0; i < 4; ++i) {
                s[i] = exp2f(s[i] - finite);
                total += s[i];
                weights[row * kStep + j + 16 * i] = s[i];
            }
            __syncwarp();  // a row's threads are of one warp
#pragma unroll
            for (int c = 0; c < kHead / 16; ++c) sum[c] *= shrink;
            for (int slot = 0; slot < kStep; ++slot) {
                const float weight = weights[row * kStep + slot];
#pragma unroll
                for (int c = 0; c < kHead / 16; ++c) sum[c] += weight * values[slot * kPitch + j + 16 * c];
            }
            __syncwarp();
        }
        for (int near = 8; near > 0; near /= 2) total += __shfl_xor_sync(~0u, total, near);
        if (row < piece.packed_rows) {
            const int packed = piece.first_packed + row;
            const long long at = static_cast<long long>(first_row + packed / repeat) * t.heads + group * repeat + packed % repeat;
            float* const to = piece.whole ? t.out + at * t.head : parts.row(piece.part, row);
#pragma unroll
            for (int c = 0; c < kHead / 16; ++c)
                if (j + 16 * c < t.head) to[j + 16 * c] = piece.whole ? sum[c] / total : sum[c];
            if (!piece.whole && j == 0) *reinterpret_cast<float2*>(parts.scale(piece.part, row)) = make_float2(most, total);
        }
        __syncthreads();
        if (!piece.whole && is_last(parts, piece, flag, [] { __syncthreads(); }))
            combine<float>(parts, piece, reinterpret_cast<float*>(ring), t.out, t.heads, repeat, first_row);
        __syncthreads();
    }
};

template <class T, class P, int kHead> __device__ void attend_all(const Tensors<T, P>& t, unsigned char* ring) {
    __shared__ Work work;
    __shared__ int flag;
    constexpr bool kFlat = sizeof(T) == 4;
    const int repeat = t.heads / static_cast<int>(gridDim.y);
    let_next_kernel_start();
    wait_for_previous_kernel();
    share_work(work, t.row_starts, t.kv_lens, t.sequences, repeat, kFlat ? Tiles::FLAT : Tiles::BY_WORK);
    const int end = min((static_cast<int>(blockIdx.x) + 1) * work.share, work.total);
    const Parts parts{t.sums, t.scales, t.arrived, static_cast<int>(gridDim.y), static_cast<int>(blockIdx.y), t.head};
    for (int at = blockIdx.x * work.share; at < end;) {
        const Piece piece = piece_at(work, t.row_starts, t.kv_lens, repeat, at, end);
        if constexpr (kFlat) {
            Scalar<P, kHead>{t, ring}.run(piece, parts, &flag);
        } else {
            const TensorCores<T, P, kHead> block{t, ring};
            if (piece.tall) block.template run<true>(piece, parts, &flag);
            else block.template run<false>(piece, parts, &flag);
        }
        at += piece.end_step - piece.begin_step;
    }
}

}  // namespace
}  // namespace fastloop

#define FASTLOOP_PAGED_ATTENTION(name, T, P, kHead)                                                                 \
    extern "C" __global__ void __launch_bounds__(256, 1) name(const __grid_constant__ fastloop::AttentionParams params) { \
        FASTLOOP_SHARED(unsigned char, ring);                                                                       \
        fastloop::attend_all<T, P, kHead>(fastloop::Tensors<T, P>(params), ring);                                   \
    }

FASTLOOP_PAGED_ATTENTION(paged_attention_bf16_bf16_64, fastloop::bf16, fastloop::bf16, 64)
FASTLOOP_PAGED_ATTENTION(paged_attention_bf16_bf16_128, fastloop::bf16, fastloop::bf16, 128)
FASTLOOP_PAGED_ATTENTION(paged_attention_bf16_e4m3_64, fastloop::bf16, fastloop::e4m3, 64)
FASTLOOP_PAGED_ATTENTION(paged_attention_bf16_e4m3_128, fastloop::bf16, fastloop::e4m3, 128)
FASTLOOP_PAGED_ATTENTION(paged_attention_f16_f16_64, fastloop::f16, fastloop::f16, 64)
FASTLOOP_PAGED_ATTENTION(paged_attention_f16_f16_128, fastloop::f16, fastloop::f16, 128)
FASTLOOP_PAGED_ATTENTION(paged_attention_f32_f32_64, float, float, 64)
FASTLOOP_PAGED_ATTENTION(paged_attention_f32_f32_128, float, float, 128)
FASTLOOP_PAGED_ATTENTION(paged_attention_f32_bf16_64, float, fastloop::bf16, 64)
FASTLOOP_PAGED_ATTENTION(paged_attention_f32_bf16_128, float, fastloop::bf16, 128)
