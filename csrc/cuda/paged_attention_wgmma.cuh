// paged_attention on sm_90a for batches of listeners: the same contract and the same sharing of the work as the kernels of
// paged_attention.cu, by products of four warps.
//
//   paged_attention_wgmma_<q and pages>_<head>   grid (blocks, KV heads), 384 threads, one block a processor
//
// Who owns what: a block owns an equal share of the steps of its KV head (attention_work.cuh), in tiles of up to 128 packed
// rows; the first two groups of four warps own 64 rows each of every tile. One warp of the third group brings keys and values
// by TMA (128-byte swizzle) into a ring of steps of 64 slots; keys and values of a step have barriers of their own, so that
// either is free as soon as it has been used. Another warp of it zeroes the values of slots that nobody may see, in the
// few steps that have such (TMA cannot leave out rows), before they are told to be there.
//
// A group's turn, step i: S(i) = q k^T is issued, behind it the product of step i - 1 with the values; the softmax of S(i) is
// computed beside that product and beside those of the other group: the two take turns in issuing (FlashAttention-3, Shah
// et al. 2024, arXiv 2407.08608). Weights and queries are left operands in registers: at 64 slots a left operand in shared
// memory would double what S reads, to the 128 bytes a cycle that there are.
//
// Bytes moved: every key and value once for each tile; q in, the result out; pieces of shared tiles through L2.
// Why this version: at 13 rows of 8 heads mma.sync and the softmax after it take twice as long as the bytes.
#pragma once

#include "attention_work.cuh"
#include "hopper.cuh"

#if defined(FASTLOOP_CUDA_EMULATION) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace fastloop {
namespace {

constexpr int kGroup = 128;  // threads that make a product together
constexpr int kGroupRows = 64;
constexpr int kGroups = 2;   // that multiply
// For 384 threads the compiler may use 168 registers; what loads needs few of them: 128 x 40 + 256 x 232 = 384 x 168.
constexpr int kLoadRegisters = 40, kMultiplyRegisters = 232;
constexpr int kTurnBarrier = 1, kGroupsBarrier = 3;  // of each group; of both

// A step's place in the ring, and how often the ring has turned: even or odd.
template <int kStages> struct Place {
    int stage = 0;
    unsigned phase = 0;
    __device__ void next() {
        if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// What a piece's steps are to the rows of its tile.
struct Sight {
    Slots slots;
    int begin_slot, steps;
    int first_own;  // the last slot that the first row sees

    __device__ Sight(const Piece& piece, const int* gaps, int repeat)
        : slots{0, gaps[2 * piece.sequence], gaps[2 * piece.sequence + 1]}, begin_slot(piece.begin_step * kStep),
          steps(piece.end_step - piece.begin_step) {
        const int first = piece.length - piece.rows;
        first_own = first + piece.first_packed / repeat;
        slots.end = min(first + (piece.first_packed + piece.packed_rows - 1) / repeat + 1, piece.end_step * kStep);
    }
    __device__ int slot(int step) const { return begin_slot + step * kStep; }
    __device__ bool in_gap(int step) const { return slot(step) < slots.gap_end && slot(step) + kStep > slots.gap_begin; }
    // Some row does not see some slot.
    __device__ bool masked(int step) const { return slot(step) + kStep - 1 > first_own || in_gap(step); }
    // No row sees some slot: what is there may be NaN, and weight 0 times it must be 0.
    __device__ bool holed(int step) const { return slot(step) + kStep > slots.end || in_gap(step); }
};

template <class T, int kHead> struct Warpgroups {
    static constexpr int kHalves = kHead / 64;               // a row of 128 bytes is 64 columns
    static constexpr int kHalfBytes = kStep * 128;
    static constexpr int kTileBytes = kHalves * kHalfBytes;  // keys, or values, of a step
    static constexpr int kStages = ATTENTION_WGMMA_RING_BYTES / (2 * kTileBytes);
    static_assert(kStages <= 14 && kTileBytes % 1024 == 0);
    using RingPlace = Place<kStages>;

    const Tensors<T, T>& t;
    const Work& work;
    unsigned char* const ring;
    Word* const barriers;

    __device__ unsigned char* keys(int stage) const { return ring + 2 * stage * kTileBytes; }
    __device__ unsigned char* values(int stage) const { return ring + (2 * stage + 1) * kTileBytes; }
    // Keys, values are there; values are there, holes not zeroed; keys, values have been used.
    __device__ Word* keys_full(int stage) const { return barriers + stage; }
    __device__ Word* values_full(int stage) const { return barriers + kStages + stage; }
    __device__ Word* values_raw(int stage) const { return barriers + 2 * kStages + stage; }
    __device__ Word* keys_free(int stage) const { return barriers + 3 * kStages + stage; }
    __device__ Word* values_free(int stage) const { return barriers + 4 * kStages + stage; }

    __device__ void init_barriers() const {
        for (int s = 0; s < kStages; ++s) {
            mbarrier_init(keys_full(s), 1);
            mbarrier_init(values_full(s), 1);
            mbarrier_init(values_raw(s), 1);
            mbarrier_init(keys_free(s), kGroups * kGroup / 32);
            mbarrier_init(values_free(s), kGroups * kGroup / 32);
        }
        mbarrier_init_fence();
    }

    // f(piece) for every piece of the block, in order: the same ones for all warps.
    template <class F> __device__ void each_piece(F&& f) const {
        const int end = min((static_cast<int>(blockIdx.x) + 1) * work.share, work.total);
        for (int at = static_cast<int>(blockIdx.x) * work.share; at < end;) {
            const Piece piece = piece_at(work, t.row_starts, t.kv_lens, repeat(), at, end);
            f(piece);
            at += piece.end_step - piece.begin_step;
        }
    }
    __device__ int repeat() const { return t.heads / static_cast<int>(gridDim.y); }

    // ---- the warp that loads -----------------------------------------------------------------------------------------

    // A box is what TMA copies at once: up to 64 slots of one page, 64 columns wide. Slots of the pages are rows of a matrix.
    __device__ void load(const TensorMap& k_map, const TensorMap& v_map) const {
        const int lane = threadIdx.x % 32, box = min(t.page, kStep), boxes = kStep / box;
        const int column = static_cast<int>(blockIdx.y) * kHead;
        const Word once = evict_first();
        if (lane == 0) {
            prefetch_tensor_map(&k_map);
            prefetch_tensor_map(&v_map);
        }
        RingPlace place;
        each_piece([&](const Piece& piece) {
            const Sight sight(piece, t.gaps, repeat());
            const Slots& slots = sight.slots;
            const int* const table = t.block_table + static_cast<long long>(piece.sequence) * t.table_stride;
            int row = -1;  // of each of the next 32 boxes, one a lane; -1: nobody sees it, and its page may be none
            for (int i = 0; i < sight.steps; ++i) {
                const int first = i * boxes % 32;
                if (first == 0) {
                    const int slot = sight.slot(i) + lane * box;
                    const int page = slot < slots.end ? table[slot / t.page] : 0;
                    const bool seen = slot < slots.end && (slot < slots.gap_begin || slot + box > slots.gap_end);
                    row = seen ? page * t.page + slot % t.page : -1;
                }
                const int own = lane - first;
                const bool mine = own >= 0 && own < boxes && row >= 0;
                const unsigned bytes = __popc(__ballot_sync(~0u, mine)) * box * 128 * kHalves;
                const auto fill = [&](const TensorMap& map, unsigned char* to, Word* full) {
                    __syncwarp();  // all lanes have passed their wait: a late one would find the phase behind
                    if (lane == 0) {
                        if (bytes != 0) mbarrier_arrive_expect_bytes(full, bytes);
                        else mbarrier_arrive(full);
                    }
                    __syncwarp();
                    if (mine)
                        for (int half = 0; half < kHalves; ++half)
                            tensor_copy(to + half * kHalfBytes + own * box * 128, &map, column + 64 * half, row, full, once);
                };
                mbarrier_wait(keys_free(place.stage), place.phase ^ 1);  // the first time round they are
                fill(k_map, keys(place.stage), keys_full(place.stage));
                mbarrier_wait(values_free(place.stage), place.phase ^ 1);
                fill(v_map, values(place.stage), sight.holed(i) ? values_raw(place.stage) : values_full(place.stage));
                place.next();
            }
        });
    }

    // ---- the warp that zeroes ----------------------------------------------------------------------------------------

    __device__ void fill_holes() const {
        const int lane = threadIdx.x % 32;
        RingPlace place;
        unsigned phases = 0;  // of values_raw, a bit a stage
        each_piece([&](const Piece& piece) {
            const Sight sight(piece, t.gaps, repeat());
            for (int i = 0; i < sight.steps; ++i, place.next()) {
                if (!sight.holed(i)) continue;
                mbarrier_wait(values_raw(place.stage), phases >> place.stage & 1);
                phases ^= 1u << place.stage;
                __syncwarp();
                for (int p = lane; p < kTileBytes / 16; p += 32)  // 8 pieces a row; the swizzle stays within a row
                    if (!sight.slots.written(sight.slot(i) + p / 8 % kStep))
                        reinterpret_cast<uint4*>(values(place.stage))[p] = make_uint4(0, 0, 0, 0);
                async_proxy_fence();
                __syncwarp();
                if (lane == 0) mbarrier_arrive(values_full(place.stage));
            }
        });
    }

    // ---- the warps that multiply -------------------------------------------------------------------------------------

    // A thread's part of its group's 64 rows: rows 16 (warp of the group) + lane / 4 and 8 behind.
    struct Rows {
        unsigned q[kHead / 16][4];
        float sum[kHead / 2];
        unsigned weights[kStep / 16][4];
        float most[2], total[4];  // of scores; of weights, of columns of one kind, as scores lie in registers
        int own[2];               // the last slot that a row sees; -1 where there is no row
    };

    __device__ static int row_of(int i) {  // packed, of the tile
        return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
    }

    __device__ void begin(Rows& r, const Piece& piece, int first_row) const {
        const int column = threadIdx.x % 4 * 2, group = static_cast<int>(blockIdx.y);
        const T* from[2];
        for (int i = 0; i < 2; ++i) {
            const bool real = row_of(i) < piece.packed_rows;
            const int at = piece.first_packed + (real ? row_of(i) : 0), row = at / repeat();
            from[i] = t.q + (static_cast<long long>(first_row + row) * t.heads + group * repeat() + at % repeat()) * kHead;
            r.own[i] = real ? piece.length - piece.rows + row : -1;
            r.most[i] = __int_as_float(0xff800000);
        }
#pragma unroll
        for (int k = 0; k < kHead / 16; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                r.q[k][i] = r.own[i % 2] >= 0
                                ? *reinterpret_cast<const unsigned*>(from[i % 2] + 16 * k + column + i / 2 * 8) : 0;
#pragma unroll
        for (int i = 0; i < kHead / 2; ++i) r.sum[i] = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) r.total[i] = 0;
    }

    // s [64 rows, 64 slots] = q k^T, issued.
    __device__ void multiply_keys(float (&s)[kStep / 2], const Rows& r, int stage) const {
        wgmma<true, false>(s, r.q[0], wgmma_tile(keys(stage), 0), T{});
#pragma unroll
        for (int k = 1; k < kHead / 16; ++k)
            wgmma<false, false>(s, r.q[k], wgmma_tile(keys(stage) + k / 4 * kHalfBytes, k % 4 * 32), T{});
    }
    // sum [64 rows, kHead] += weights v, issued.
    __device__ void multiply_values(Rows& r, int stage) const {
#pragma unroll
        for (int k = 0; k < kStep / 16; ++k)
            wgmma<false, true>(r.sum, r.weights[k], wgmma_tile_transposed(values(stage), 16 * k, kHalfBytes), T{});
    }

    // s = 2 ^ (scale s - maximum so far), what is not seen 0; by how much earlier sums shrink.
    __device__ void soften(float (&s)[kStep / 2], Rows& r, const Sight& sight, int step, float (&shrink)[2]) const {
        const float nothing = __int_as_float(0xff800000);
        if (sight.masked(step)) {
            const Slots& slots = sight.slots;
#pragma unroll
            for (int i = 0; i < kStep / 2; ++i) {
                const int slot = sight.slot(step) + i / 4 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
                const bool seen = slot <= r.own[i / 2 % 2] && (slot < slots.gap_begin || slot >= slots.gap_end);
                s[i] = seen ? s[i] : nothing;
            }
        }
        float peak[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
        for (int i = 4; i < kStep / 2; ++i) peak[i % 4] = fmaxf(peak[i % 4], s[i]);
        float base[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float most = fmaxf(r.most[i], fmaxf(peak[2 * i], peak[2 * i + 1]));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            base[i] = most == nothing ? 0.0f : most * t.scale;  // a row that has seen nothing yet
            shrink[i] = exp2_fast(__fmaf_rn(r.most[i], t.scale, -base[i]));
            r.most[i] = most;
            r.total[2 * i] *= shrink[i];
            r.total[2 * i + 1] *= shrink[i];
        }
#pragma unroll
        for (int i = 0; i < kStep / 2; ++i) {
            s[i] = exp2_fast(__fmaf_rn(s[i], t.scale, -base[i / 2 % 2]));
            r.total[i % 4] += s[i];
        }
    }

    // The weights as left operands.
    __device__ void pack(const float (&s)[kStep / 2], Rows& r) const {
#pragma unroll
        for (int i = 0; i < kStep / 4; ++i) r.weights[i / 4][i % 4] = pair<T>(s[2 * i], s[2 * i + 1]);
    }

    // The group's rows over the steps of a piece.
    __device__ void attend(Rows& r, const Sight& sight, RingPlace& place, int group, bool paired) const {
        const bool lead = threadIdx.x % 32 == 0;
        const auto take_turn = [&] {
            if (paired) named_barrier_wait(kTurnBarrier + group, kGroups * kGroup);
            __syncwarp();
            wgmma_fence();
        };
        const auto end_turn = [&] {
            if (paired) named_barrier_arrive(kTurnBarrier + 1 - group, kGroups * kGroup);
        };
        float s[kStep / 2], shrink[2];
        mbarrier_wait(keys_full(place.stage), place.phase);
        take_turn();
        multiply_keys(s, r, place.stage);
        wgmma_commit();
        end_turn();
        wgmma_wait<0>();
        wgmma_done(s);
        if (lead) mbarrier_arrive(keys_free(place.stage));
        soften(s, r, sight, 0, shrink);
        pack(s, r);
        mbarrier_wait(values_full(place.stage), place.phase);
        for (int step = 1; step < sight.steps; ++step) {
            RingPlace ahead = place;
            ahead.next();
            mbarrier_wait(keys_full(ahead.stage), ahead.phase);
            take_turn();
            multiply_keys(s, r, ahead.stage);
            wgmma_commit();
            multiply_values(r, place.stage);
            wgmma_commit();
            end_turn();
            wgmma_wait<1>();
            wgmma_done(s);
            if (lead) mbarrier_arrive(keys_free(ahead.stage));
            soften(s, r, sight, step, shrink);
            wgmma_done(s);  // the softmax stays in front of the next wait; for ptxas only because of this one in between
            mbarrier_wait(values_full(ahead.stage), ahead.phase);
            wgmma_wait<0>();
            wgmma_done(r.sum);
            if (lead) mbarrier_arrive(values_free(place.stage));
            place = ahead;
#pragma unroll
            for (int i = 0; i < kHead / 2; ++i) r.sum[i] *= shrink[i / 2 % 2];
            pack(s, r);
        }
        take_turn();
        multiply_values(r, place.stage);
        wgmma_commit();
        end_turn();
        wgmma_wait<0>();
        wgmma_done(r.sum);
        if (lead) mbarrier_arrive(values_free(place.stage));
        place.next();
    }

    // A group that has no rows in the tile lets go of what the other one uses, no sooner than it is there.
    __device__ void let_go(const Sight& sight, RingPlace& place) const {
        const bool lead = threadIdx.x % 32 == 0;
        for (int i = 0; i < sight.steps; ++i, place.next()) {
            mbarrier_wait(keys_full(place.stage), place.phase);
            __syncwarp();
            if (lead) mbarrier_arrive(keys_free(place.stage));
            mbarrier_wait(values_full(place.stage), place.phase);
            __syncwarp();
            if (lead) mbarrier_arrive(values_free(place.stage));
        }
    }

    // The sums of a piece: the result, or a part of it.
    __device__ void put(Rows& r, const Piece& piece, const Parts& parts, int first_row) const {
        const int column = threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float total = r.total[2 * i] + r.total[2 * i + 1];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            const int row = row_of(i);
            if (row >= piece.packed_rows) continue;
            if (piece.whole) {
                T* const to = out_of(piece, parts, row, first_row) + column;
                const float one = 1 / total;
#pragma unroll
                for (int n = 0; n < kHead / 8; ++n)
                    *reinterpret_cast<unsigned*>(to + 8 * n) =
                        pair<T>(r.sum[4 * n + 2 * i] * one, r.sum[4 * n + 2 * i + 1] * one);
            } else {
                float* const to = parts.row(piece.part, row) + column;
#pragma unroll
                for (int n = 0; n < kHead / 8; ++n)
                    *reinterpret_cast<float2*>(to + 8 * n) = make_float2(r.sum[4 * n + 2 * i], r.sum[4 * n + 2 * i + 1]);
                if (column == 0)
                    *reinterpret_cast<float2*>(parts.scale(piece.part, row)) = make_float2(r.most[i] * t.scale, total);
            }
        }
    }
    __device__ T* out_of(const Piece& piece, const Parts& parts, int row, int first_row) const {
        const int packed = piece.first_packed + row, head = parts.group * repeat() + packed % repeat();
        return t.out + (static_cast<long long>(first_row + packed / repeat()) * t.heads + head) * kHead;
    }

    // The last block of a tile adds its parts up, in the order of the blocks that made them. The ring is already full of
    // the next piece, so nothing is kept there: a warp takes eight rows at a time, so that their parts come together.
    __device__ void merge(const Piece& piece, const Parts& parts, int first_row) const {
        constexpr int kAtOnce = 8, kWarps = kGroups * kGroup / 32, kWide = kHead / 32;
        const float nothing = __int_as_float(0xff800000);
        const int warp = threadIdx.x / 32, column = threadIdx.x % 32 * kWide;
        for (int first = warp; first < piece.packed_rows; first += kWarps * kAtOnce) {
            float most[kAtOnce], total[kAtOnce], sum[kAtOnce][kWide];
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
                most[k] = nothing;
                total[k] = 0;
                for (int c = 0; c < kWide; ++c) sum[k][c] = 0;
            }
            for (int block = piece.first_block; block <= piece.last_block; ++block) {
                const int part = Parts::of(piece, block);
                float2 scale[kAtOnce];
                float columns[kAtOnce][kWide];
#pragma unroll
                for (int k = 0; k < kAtOnce; ++k) {
                    const int row = min(first + k * kWarps, piece.packed_rows - 1);
                    scale[k] = __ldcg(reinterpret_cast<const float2*>(parts.scale(part, row)));
                    load_columns(columns[k], parts.row(part, row) + column);
                }
#pragma unroll
                for (int k = 0; k < kAtOnce; ++k) {
                    const float peak = fmaxf(most[k], scale[k].x), base = peak == nothing ? 0.0f : peak;
                    const float shrink = exp2f(most[k] - base), weight = exp2f(scale[k].x - base);
                    most[k] = peak;
                    total[k] = total[k] * shrink + weight * scale[k].y;
#pragma unroll
                    for (int c = 0; c < kWide; ++c) sum[k][c] = sum[k][c] * shrink + weight * columns[k][c];
                }
            }
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
                const int row = first + k * kWarps;
                if (row >= piece.packed_rows) break;
                unsigned* const to = reinterpret_cast<unsigned*>(out_of(piece, parts, row, first_row) + column);
                const float one = 1 / total[k];
#pragma unroll
                for (int c = 0; c < kWide; c += 2) to[c / 2] = pair<T>(sum[k][c] * one, sum[k][c + 1] * one);
            }
        }
    }
    __device__ static void load_columns(float (&to)[2], const float* from) {
        const float2 both = __ldcg(reinterpret_cast<const float2*>(from));
        to[0] = both.x, to[1] = both.y;
    }
    __device__ static void load_columns(float (&to)[4], const float* from) {
        const float4 all = __ldcg(reinterpret_cast<const float4*>(from));
        to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
    }

    __device__ void multiply(int group, int* flag) const {
        const Parts parts{t.sums, t.scales, t.arrived, static_cast<int>(gridDim.y), static_cast<int>(blockIdx.y), t.head};
        const auto both = [] { named_barrier_wait(kGroupsBarrier, kGroups * kGroup); };
        if (group == 1) named_barrier_arrive(kTurnBarrier, kGroups * kGroup);  // the first turn is the other one's
        RingPlace place;
        each_piece([&](const Piece& piece) {
            const Sight sight(piece, t.gaps, repeat());
            const int first_row = t.row_starts[piece.sequence];
            if (group * kGroupRows < piece.packed_rows) {
                Rows r;
                begin(r, piece, first_row);
                attend(r, sight, place, group, piece.packed_rows > kGroupRows);
                put(r, piece, parts, first_row);
            } else {
                let_go(sight, place);
            }
            if (!piece.whole && is_last(parts, piece, flag, both)) merge(piece, parts, first_row);
        });
        if (group == 0) named_barrier_wait(kTurnBarrier, kGroups * kGroup);  // nobody waits there any more
    }
};

template <class T, int kHead>
__device__ void attend_by_warpgroups(const TensorMap& k_map, const TensorMap& v_map, const Tensors<T, T>& t, unsigned char* ring) {
    __shared__ Work work;
    __shared__ int flag;
    const Warpgroups<T, kHead> block{t, work, ring, reinterpret_cast<Word*>(ring + ATTENTION_WGMMA_RING_BYTES)};
    if (threadIdx.x == 0) {
        if (shared_address(ring) % 1024 != 0) __trap();  // the swizzle counts from there
        block.init_barriers();
    }
    let_next_kernel_start();
    wait_for_previous_kernel();
    share_work(work, t.row_starts, t.kv_lens, t.sequences, block.repeat(), Tiles::TALL);  // a barrier for all
    const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);  // so that the compiler knows it is one for all
    if (warp < kGroups * kGroup / 32) {
        registers_up<kMultiplyRegisters>();
        block.multiply(warp / (kGroup / 32), &flag);
    } else {
        registers_down<kLoadRegisters>();
        if (warp == kGroups * kGroup / 32) block.load(k_map, v_map);
        if (warp == kGroups * kGroup / 32 + 1) block.fill_holes();
    }
}

}  // namespace
}  // namespace fastloop

#define FASTLOOP_PAGED_ATTENTION_WGMMA(name, T, kHead)                                                                        \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                                      \
        name(const __grid_constant__ fastloop::TensorMap k_map, const __grid_constant__ fastloop::TensorMap v_map,            \
             const __grid_constant__ fastloop::AttentionParams params) {                                                      \
        FASTLOOP_SHARED(unsigned char, ring);                                                                                 \
        fastloop::attend_by_warpgroups<T, kHead>(k_map, v_map, fastloop::Tensors<T, T>(params), ring);                        \
    }

FASTLOOP_PAGED_ATTENTION_WGMMA(paged_attention_wgmma_bf16_64, fastloop::bf16, 64)
FASTLOOP_PAGED_ATTENTION_WGMMA(paged_attention_wgmma_bf16_128, fastloop::bf16, 128)
FASTLOOP_PAGED_ATTENTION_WGMMA(paged_attention_wgmma_f16_64, fastloop::f16, 64)
FASTLOOP_PAGED_ATTENTION_WGMMA(paged_attention_wgmma_f16_128, fastloop::f16, 128)
#undef FASTLOOP_PAGED_ATTENTION_WGMMA

#endif  // sm_90a
