// linear: a few rows against weights that are read once.
//
//   y[r][c] = finish(sum_k x[r][k] w[c][k]),   finish = bias, GELU or SiLU gate, residual
//
// Who owns what: a call owns a run of panels of 32 channels; it takes the rows in blocks of up to 14, whose 2 x 14 sums fill the
// registers, and walks down the panel once per block (the second block finds it in L2). Bytes moved: the panel once, the rows
// once per panel (from L1).
// Why this way: for each 4 bytes of a row one broadcast serves two products of 16 channels, so 14 rows take 28 products and
// 16 loads: the multipliers are the limit, not the loads. The blocks are structs of structs because a compiler keeps
// those in registers, and arrays on the stack. Prefetches run ahead of the stream into L2 and L1; without them two cores
// reach three quarters of the rate.
#include "linear.h"

#include <cstring>

#include "block.h"

using fastloop::Blocks;
using fastloop::Finish;
using fastloop::kUnitBytes;
using fastloop::Rows;
using fastloop::Weight;

namespace {

constexpr size_t kFarAhead = 16384, kNearAhead = 4096;  // bytes
// Units: sums of floats are cut into runs, as rounding errors grow with a run's length; with bfloat16, less than its own.
constexpr size_t kFloatRun = 64, kBfloat16Run = 256;

// A little further down a walk's own panel, into L1. From memory into L2 (Ahead), one block of rows needs it as fast as it
// walks, and of several blocks each fetches its share of the next panel.
FASTLOOP_FORCE void ask_near(const unsigned char* panel) {
    for (size_t line = 0; line < kPanel * kUnitBytes; line += 64) __builtin_prefetch(panel + kNearAhead + line, 0, 3);
}

// Block `block` of `blocks` over a panel of `bytes`, `steps` steps long. Behind the last panel nothing is read, only asked for.
Ahead ahead_of(const unsigned char* panel, size_t bytes, size_t steps, size_t block, size_t blocks) {
    if (blocks == 1) return {panel + kFarAhead, kPanel * kUnitBytes};
    const size_t step = kPanel * kUnitBytes / blocks;
    return {panel + bytes + block * step * steps, step};
}

// R rows against one panel -> tile [R][32], float sums, or int32 ones for int8.
template <class Kind, size_t R>
void walk(const unsigned char* w, const int32_t* x, size_t units, size_t run, const Ahead& ahead, float* tile) {
    for (size_t first = 0; first < units; first += run) {
        const size_t last = first + run < units ? first + run : units;
        Block<Kind, R> block;
        block.zero();
        for (size_t k = first; k < last; ++k) {
            Channels<Kind, kVectors> channels;
            channels.load(w + k * kPanel * kUnitBytes);
            ask_near(w + k * kPanel * kUnitBytes);
            ahead.at(k);
            block.add(channels, x + k * R);
        }
        if (first == 0) block.put(tile, kPanel);
        else if constexpr (sizeof(typename Kind::Sum) == sizeof(Lanes) && !__is_same(typename Kind::Sum, IntLanes))
            block.add_to(tile, kPanel);
    }
}

// The same for int4: whole sums of a group, then its scales.
template <size_t R>
void walk_groups(const Weight& w, size_t panel, const int32_t* x, const int32_t* group_sum, const Ahead& ahead,
                 float* tile) {
    const unsigned char* data = w.data + panel * w.panel_bytes();
    const uint16_t* scales = w.group_scale + panel * w.groups * kPanel;
    const size_t pairs_of_units = w.group / 8;
    std::memset(tile, 0, R * kPanel * sizeof(float));
    for (size_t g = 0; g < w.groups; ++g, scales += kPanel, group_sum += R) {
        alignas(64) float scale[kPanel];
        for (size_t c = 0; c < kPanel; ++c) {
            const uint32_t bits = static_cast<uint32_t>(scales[c]) << 16;
            __builtin_memcpy(scale + c, &bits, sizeof bits);
        }
        __builtin_prefetch(scales + 16 * kPanel, 0, 3);
        Block<Bytes, R> block;
        block.set(group_sum);
        for (size_t k = 0; k < pairs_of_units; ++k, data += kPanel * kUnitBytes, x += 2 * R) {
            Channels<Bytes, kVectors> channels;
            ask_near(data);
            ahead.at(g * pairs_of_units + k);
            channels.load_nibbles(data, 0);
            block.add(channels, x);
            channels.load_nibbles(data, 4);
            block.add(channels, x + R);
        }
        block.scale_to(tile, kPanel, scale);
    }
}

template <size_t R>
void tile_of(const Weight& w, size_t panel, const Rows& rows, size_t first, const Ahead& ahead, float* tile) {
    const unsigned char* data = w.data + panel * w.panel_bytes();
    const int32_t* x = reinterpret_cast<const int32_t*>(rows.data + fastloop::rows_bytes(first, w.units));
    switch (w.format) {
        case FASTLOOP_FLOAT32: return walk<Float32, R>(data, x, w.units, kFloatRun, ahead, tile);
        case FASTLOOP_BFLOAT16: return walk<Bfloat16, R>(data, x, w.units, kBfloat16Run, ahead, tile);
        case FASTLOOP_INT8: return walk<Bytes, R>(data, x, w.units, w.units, ahead, tile);
        default: return walk_groups<R>(w, panel, x, rows.group_sum + first * w.groups, ahead, tile);
    }
}

template <size_t R>
void choose(size_t count, const Weight& w, size_t panel, const Rows& rows, size_t first, const Ahead& ahead, float* tile) {
    if (count == R) tile_of<R>(w, panel, rows, first, ahead, tile);
    else if constexpr (R > 1) choose<R - 1>(count, w, panel, rows, first, ahead, tile);
}

// ---- the end of a row ----------------------------------------------------------------------------------------------

// Numbers c.. of a row's sums with their scales.
FASTLOOP_INLINE Lanes scaled(const Weight& w, size_t panel, const Rows& rows, size_t row, const float* v, size_t c) {
    if (w.format == FASTLOOP_INT8) {
        const IntLanes sum = raw(reinterpret_cast<const unsigned char*>(v + c)) - 128 * rows.sum[row];  // weights are shifted by 128
        return unfused(__builtin_convertvector(sum, Lanes) * (rows.scale[row] * load(w.scale + panel * kPanel + c)));
    }
    if (w.format == FASTLOOP_INT4) return unfused(load(v + c) * rows.scale[row]);
    return load(v + c);
}

// A row of a whole panel: scales, bias, GELU or gate, residual.
FASTLOOP_INLINE void finish_whole(const Weight& w, size_t panel, const Rows& rows, size_t row, const float* v, const Finish& f,
                                  size_t first, size_t per_panel) {
    float* const out = f.out + row * f.out_stride + first;
    const float* const bias = f.bias == nullptr ? nullptr : f.bias + first;
    const float* const residual = f.residual == nullptr ? nullptr : f.residual + row * f.residual_stride + first;
    for (size_t c = 0; c < per_panel; c += kLanes) {
        Lanes y = scaled(w, panel, rows, row, v, c);
        if (bias != nullptr) y += load(bias + c);
        if (w.gated) {
            Lanes up = scaled(w, panel, rows, row, v, kPanel / 2 + c);
            if (bias != nullptr) up += load(bias + w.width() + c);
            y = unfused(silu(y) * up);
        } else if (f.epilogue == FASTLOOP_GELU) {
            y = unfused(gelu(y));
        }
        if (residual != nullptr) y += load(residual + c);
        store(out + c, y);
    }
}

// The same of the last panel, some of whose channels are fillers.
void finish_some(const Weight& w, size_t panel, const Rows& rows, size_t row, float* v, const Finish& f, size_t first,
                 size_t count) {
    for (size_t c = 0; c < kPanel; c += kLanes) store(v + c, scaled(w, panel, rows, row, v, c));
    if (f.bias != nullptr)
        for (size_t c = 0; c < count; ++c) v[c] += f.bias[first + c];
    if (f.bias != nullptr && w.gated)
        for (size_t c = 0; c < count; ++c) v[kPanel / 2 + c] += f.bias[w.width() + first + c];
    if (w.gated)
        for (size_t c = 0; c < kPanel / 2; c += kLanes) store(v + c, silu(load(v + c)) * load(v + kPanel / 2 + c));
    else if (f.epilogue == FASTLOOP_GELU)
        for (size_t c = 0; c < kPanel; c += kLanes) store(v + c, gelu(load(v + c)));
    float* out = f.out + row * f.out_stride + first;
    const float* const residual = f.residual == nullptr ? nullptr : f.residual + row * f.residual_stride + first;
    for (size_t c = 0; c < count; ++c) out[c] = residual == nullptr ? v[c] : v[c] + residual[c];
}

// Rows begin..end - 1 of a tile [rows][32].
void finish_rows(const Weight& w, size_t panel, const Rows& rows, size_t begin, size_t end, float* tile, const Finish& f) {
    const size_t per_panel = w.gated ? kPanel / 2 : kPanel, first = panel * per_panel, left = w.width() - first;
    for (size_t row = begin; row < end; ++row, tile += kPanel)
        if (left >= per_panel) finish_whole(w, panel, rows, row, tile, f, first, per_panel);
        else finish_some(w, panel, rows, row, tile, f, first, left);
}

// ---- the rows ------------------------------------------------------------------------------------------------------

// The largest magnitude of a row; NaN where the row is not finite.
float magnitude(const float* x, size_t count) {
    Lanes top = {}, odd = {};  // odd: x - x, which is not zero where x is not finite
    size_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
        const Lanes v = load(x + k);
        top = larger(top, v < 0.0f ? -v : v);
        odd += v - v;
    }
    const Lanes v = load_some(x + k, count - k);
    top = larger(top, v < 0.0f ? -v : v);
    odd += v - v;
    return maximum(top) + sum(odd);
}

// Quarter of a unit, in lanes: round(x * inverse) of 4 * kLanes values as bytes.
void bytes_of(const float* x, size_t count, float inverse, int8_t* to) {
    for (size_t k = 0; k < count; k += kLanes) {
        const size_t some = count - k < kLanes ? count - k : kLanes;
        const Lanes v = unfused((some == kLanes ? load(x + k) : load_some(x + k, some)) * inverse);
        const IntLanes q = __builtin_convertvector(nearest(v), IntLanes);
        typedef int8_t ByteLanes __attribute__((vector_size(FASTLOOP_LANES)));
        const ByteLanes b = __builtin_convertvector(q, ByteLanes);
        __builtin_memcpy(to + k, &b, sizeof b);
    }
}

constexpr size_t kPiece = 512;  // inputs converted at a time

void pack_bytes(const Weight& w, const float* x, size_t row, size_t place, size_t block_rows, const Rows& to,
                int32_t* data, int32_t* group_sum) {
    const float top = magnitude(x, w.in);
    const bool zero = top < 1e-30f;
    const float scale = zero ? 0.0f : top / 127.0f, inverse = zero || top != top ? 0.0f : 127.0f / top;
    alignas(64) int8_t piece[kPiece + 64];
    int32_t total = 0;
    for (size_t first = 0; first < w.units * 4; first += kPiece) {
        const size_t span = w.units * 4 - first < kPiece ? w.units * 4 - first : kPiece;
        const size_t real = first >= w.in ? 0 : w.in - first < span ? w.in - first : span;
        bytes_of(x + first, real, inverse, piece);
        std::memset(piece + real, 0, span - real);
        for (size_t u = 0; u < span / 4; ++u) {
            int32_t unit;
            __builtin_memcpy(&unit, piece + 4 * u, 4);
            data[(first / 4 + u) * block_rows + place] = unit;
        }
        if (w.format == FASTLOOP_INT8) {
            for (size_t k = 0; k < span; ++k) total += piece[k];
            continue;
        }
        for (size_t g = 0; g < span / w.group; ++g) {
            int32_t part = 0;
            for (size_t k = 0; k < w.group; ++k) part += piece[g * w.group + k];
            group_sum[(first / w.group + g) * block_rows + place] = 8 * part;
        }
    }
    to.scale[row] = top != top ? top : scale;
    if (w.format == FASTLOOP_INT8) to.sum[row] = total;
}

void pack_row(const Weight& w, const float* x, size_t row, size_t begin, size_t block_rows, const Rows& to) {
    int32_t* const data = reinterpret_cast<int32_t*>(to.data + fastloop::rows_bytes(begin, w.units));
    const size_t place = row - begin;
    if (w.format == FASTLOOP_FLOAT32) {
        for (size_t k = 0; k < w.in; ++k) __builtin_memcpy(&data[k * block_rows + place], x + k, 4);
    } else if (w.format == FASTLOOP_BFLOAT16) {
        for (size_t u = 0; u < w.units; ++u) {
            const uint32_t low = bfloat16(x[2 * u]), high = 2 * u + 1 < w.in ? bfloat16(x[2 * u + 1]) : 0u;
            data[u * block_rows + place] = static_cast<int32_t>(high << 16 | low);
        }
    } else {
        int32_t* const sums = w.format == FASTLOOP_INT4 ? to.group_sum + begin * w.groups : nullptr;
        pack_bytes(w, x, row, place, block_rows, to, data, sums);
    }
}

}  // namespace

namespace FASTLOOP_ISA {

void linear_rows(const Weight& w, const float* x, size_t stride, size_t first, size_t last, const Rows& to) {
    const Blocks blocks(to.count, kBlock);
    for (size_t block = 0; block < blocks.count; ++block) {
        const size_t begin = blocks.begin(block), end = blocks.begin(block + 1);
        for (size_t row = begin > first ? begin : first; row < end && row < last; ++row)
            pack_row(w, x + row * stride, row, begin, end - begin, to);
    }
}

void linear_panels(const Weight& w, const Rows& rows, const Finish& finish, size_t first, size_t last) {
    const Blocks blocks(rows.count, kBlock);
    alignas(64) float tile[kBlock * kPanel];
    const size_t bytes = w.panel_bytes();
    for (size_t panel = first; panel < last; ++panel)
        for (size_t block = 0; block < blocks.count; ++block) {
            const size_t begin = blocks.begin(block), end = blocks.begin(block + 1);
            const Ahead ahead = ahead_of(w.data + panel * bytes, bytes, bytes / (kPanel * kUnitBytes), block, blocks.count);
            choose<kBlock>(end - begin, w, panel, rows, begin, ahead, tile);
            finish_rows(w, panel, rows, begin, end, tile, finish);
        }
}

}  // namespace FASTLOOP_ISA
