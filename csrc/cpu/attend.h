// The heart of both attentions: some query rows against a run of slots, tile by tile, with an online softmax.
//
//   score = q k scale log2(e),  m = max,  p = 2^(score - m),  out = sum p v / sum p
//
// A tile is 64 slots. Its keys are two panels [units][32 slots], so that the scores of up to 14 rows x 32 slots are one
// block of block.h; its values are panels [slots][32 channels], so that their weighted sums are another. Pages of tiles
// (tiles.h) are read as they are; rows of other pages are placed into a tile first. Slots that no row of a sequence may see can
// hold anything: their scores are replaced, their values are read as zeros.
// Source: online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867), as in FlashAttention (Dao et al. 2022).
#pragma once

#include "attention.h"
#include "block.h"

namespace {

using fastloop::kSlotTile;
using fastloop::kUnitBytes;

// Units are one float or two bfloat16 (Kind of block.h).
template <class Kind>
constexpr size_t kInUnit = 1;
template <>
constexpr size_t kInUnit<Bfloat16> = 2;

// ---- units out of rows in memory -----------------------------------------------------------------------------------

FASTLOOP_INLINE int32_t unit_at(const float* from) {
    int32_t bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return bits;
}
FASTLOOP_INLINE int32_t unit_of(const Float32*, const float* x) { return unit_at(x); }
FASTLOOP_INLINE int32_t unit_of(const Bfloat16*, const float* x) {
    return static_cast<int32_t>(static_cast<uint32_t>(bfloat16(x[1])) << 16 | bfloat16(x[0]));
}

typedef uint16_t HalfLanes __attribute__((vector_size(2 * FASTLOOP_LANES)));
typedef uint32_t UnsignedLanes __attribute__((vector_size(4 * FASTLOOP_LANES)));

// kLanes numbers >= 0, or NaN -> bfloat16.
FASTLOOP_INLINE HalfLanes halves_of(Lanes v) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<HalfLanes>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#else
    const IntLanes bits = reinterpret_cast<IntLanes>(v);
    const IntLanes rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(v == v ? rounded : ((bits >> 16) | 0x40), HalfLanes);
#endif
}

// One tile's keys and values, gathered; NULL stands for a slot that holds nothing.
template <class Element>
struct Slots {
    const Element* keys[kSlotTile];
    const Element* values[kSlotTile];
};

// Unit `u` of a key, and the four from `u` on.
FASTLOOP_INLINE Quad four_units(const Float32*, const float* key, size_t u) { return load4(key + u); }
FASTLOOP_INLINE Quad four_units(const Float32*, const uint16_t* key, size_t u) {
    uint32_t bits[4];
    for (size_t i = 0; i < 4; ++i) bits[i] = static_cast<uint32_t>(key[u + i]) << 16;
    Quad v;
    __builtin_memcpy(&v, bits, sizeof v);
    return v;
}
FASTLOOP_INLINE Quad four_units(const Bfloat16*, const uint16_t* key, size_t u) {
    Quad v;
    __builtin_memcpy(&v, key + 2 * u, sizeof v);
    return v;
}
FASTLOOP_INLINE int32_t one_unit(const Float32*, const float* key, size_t u) { return unit_at(key + u); }
FASTLOOP_INLINE int32_t one_unit(const Float32*, const uint16_t* key, size_t u) {
    return static_cast<int32_t>(static_cast<uint32_t>(key[u]) << 16);
}
FASTLOOP_INLINE int32_t one_unit(const Bfloat16*, const uint16_t* key, size_t u) {
    return static_cast<int32_t>(static_cast<uint32_t>(key[2 * u + 1]) << 16 | key[2 * u]);
}

// Channels first..first + count - 1 of the value in one slot, or of the values in two -> a unit of a panel.
FASTLOOP_INLINE void place_unit(const Float32*, const float* const* value, size_t first, size_t count, unsigned char* to) {
    if (*value == nullptr) __builtin_memset(to, 0, count * 4);
    else if (count == kPanel) __builtin_memcpy(to, *value + first, kPanel * 4);
    else __builtin_memcpy(to, *value + first, count * 4);
}
FASTLOOP_INLINE void place_unit(const Float32*, const uint16_t* const* value, size_t first, size_t count, unsigned char* to) {
    uint32_t wide[kPanel] = {};
    if (*value != nullptr)
        for (size_t c = 0; c < count; ++c) wide[c] = static_cast<uint32_t>((*value)[first + c]) << 16;
    __builtin_memcpy(to, wide, count * 4);
}
FASTLOOP_INLINE void place_unit(const Bfloat16*, const uint16_t* const* value, size_t first, size_t count,
                                unsigned char* to) {
    static const uint16_t kNone[kPanel] = {};
    const uint16_t* const a = value[0] == nullptr ? kNone : value[0] + first;
    const uint16_t* const b = value[1] == nullptr ? kNone : value[1] + first;
    if (count == kPanel) {
        for (size_t c = 0; c < kPanel; c += kLanes) {
            HalfLanes low, high;
            __builtin_memcpy(&low, a + c, sizeof low);
            __builtin_memcpy(&high, b + c, sizeof high);
            const IntLanes both = __builtin_convertvector(low, IntLanes) | (__builtin_convertvector(high, IntLanes) << 16);
            __builtin_memcpy(to + 4 * c, &both, sizeof both);
        }
        return;
    }
    for (size_t c = 0; c < count; ++c) {
        const uint32_t both = static_cast<uint32_t>(b[c]) << 16 | a[c];
        __builtin_memcpy(to + 4 * c, &both, 4);
    }
}

// ---- the rows ------------------------------------------------------------------------------------------------------

// Keys and values as they are multiplied; scales of each slot where they are bytes, else NULL.
struct Tile {
    const unsigned char* keys;    // [2 panels][units][32]
    const unsigned char* values;  // [panels][kSlotTile / kInUnit][32]
    const float* key_scale = nullptr;
    const float* value_scale = nullptr;
};

// The keys and values that come next: a block's share of them for each unit of its walk over this tile's.
struct Next {
    Ahead keys, values;
};

template <class Kind>
struct Attend {
    static constexpr size_t kTileUnits = kSlotTile / kInUnit<Kind>;
    static constexpr size_t kRun = kInUnit<Kind> == 1 ? 64 : 256;  // units of a score in one chain: as in isa/linear.cpp

    size_t rows, width;     // query rows (x heads), K
    size_t units, panels;   // of a key; of a value
    int32_t* q;             // blocks of rows, each [units][rows]
    unsigned char* keys;    // room for the keys of a tile
    unsigned char* values;  // and for its values
    float* scales;          // and for the scales of the values
    float* sums;            // [rows][32 panels]
    float* top;             // [rows]
    float* total;           // [rows]
    float* keep;            // [rows]

    Attend(size_t rows, size_t width, unsigned char* scratch)
        : rows(rows), width(width), units(width / kInUnit<Kind>), panels((width + kPanel - 1) / kPanel) {
        const size_t padded = panels * kPanel;
        q = reinterpret_cast<int32_t*>(scratch);
        keys = reinterpret_cast<unsigned char*>(q + rows * padded);
        keys += (64 - reinterpret_cast<uintptr_t>(keys) % 64) % 64;
        values = keys + kSlotTile * padded * 4;
        scales = reinterpret_cast<float*>(values + kSlotTile * padded * 4);
        sums = scales + kSlotTile;
        top = sums + rows * padded;
        total = top + rows;
        keep = total + rows;
        for (size_t i = 0; i < rows * padded; ++i) sums[i] = 0.0f;
        for (size_t r = 0; r < rows; ++r) {
            top[r] = -__builtin_inff();
            total[r] = 0.0f;
        }
    }

    // Row `row` of the queries: x [K], scaled (channel by channel where there is a range) and packed.
    void query(size_t row, const float* x, float scale, const float* range = nullptr) {
        const fastloop::Blocks blocks(rows, kBlock);
        size_t block = 0;
        while (blocks.begin(block + 1) <= row) ++block;
        const size_t begin = blocks.begin(block), count = blocks.begin(block + 1) - begin;
        int32_t* const to = q + begin * units + (row - begin);
        for (size_t u = 0; u < units; ++u) {
            float scaled[kInUnit<Kind>];
            for (size_t j = 0; j < kInUnit<Kind>; ++j) {
                const size_t k = u * kInUnit<Kind> + j;
                scaled[j] = range == nullptr ? x[k] * scale : x[k] * scale * range[k];
            }
            to[u * count] = unit_of(static_cast<const Kind*>(nullptr), scaled);
        }
    }
    // What scores are multiplied by: exponents are of 2.
    float scale() const { return 1.44269504f / __builtin_sqrtf(static_cast<float>(width)); }

    // Keys [slot][unit] -> [unit][slot], four by four; `count` slots, whole panels of them.
    template <class Element>
    void place_keys(const Slots<Element>& slots, size_t count) {
        for (size_t s = 0; s < (count + kPanel - 1) / kPanel * kPanel; s += 4) {
            unsigned char* const to = keys + (s / kPanel * units * kPanel + s % kPanel) * 4;
            constexpr const Kind* kKind = nullptr;
            const Element* const* const from = slots.keys + s;
            const bool all = from[0] != nullptr && from[1] != nullptr && from[2] != nullptr && from[3] != nullptr;
            size_t u = 0;
            for (; all && u + 4 <= units; u += 4) {
                Quad a = four_units(kKind, from[0], u), b = four_units(kKind, from[1], u);
                Quad c = four_units(kKind, from[2], u), d = four_units(kKind, from[3], u);
                transpose4(a, b, c, d);
                const Quad column[4] = {a, b, c, d};
                for (size_t j = 0; j < 4; ++j) __builtin_memcpy(to + (u + j) * kPanel * 4, &column[j], 16);
            }
            for (; u < units; ++u)
                for (size_t i = 0; i < 4; ++i) {
                    const int32_t bits = from[i] == nullptr ? 0 : one_unit(kKind, from[i], u);
                    __builtin_memcpy(to + (u * kPanel + i) * 4, &bits, 4);
                }
        }
    }

    template <class Element>
    void place_values(const Slots<Element>& slots, size_t tile_units) {
        for (size_t panel = 0; panel < panels; ++panel) {
            const size_t first = panel * kPanel, count = width - first < kPanel ? width - first : kPanel;
            for (size_t u = 0; u < tile_units; ++u) {
                unsigned char* const to = values + (panel * kTileUnits + u) * kPanel * 4;
                if (count < kPanel) __builtin_memset(to, 0, kPanel * 4);
                place_unit(static_cast<const Kind*>(nullptr), slots.values + u * kInUnit<Kind>, first, count, to);
            }
        }
    }

    // Rows of keys and values as a tile of `count` slots.
    template <class Element>
    Tile placed(const Slots<Element>& slots, size_t count) {
        place_keys(slots, count);
        place_values(slots, (count + kInUnit<Kind> - 1) / kInUnit<Kind>);
        return {keys, values};
    }

    // The values of a tile with zeros for slots that nobody sees.
    template <class Unseen>
    const unsigned char* cleaned(const unsigned char* from, Unseen&& unseen) {
        int32_t mask[kTileUnits];
        for (size_t u = 0; u < kTileUnits; ++u) {
            mask[u] = 0;
            for (size_t j = 0; j < kInUnit<Kind>; ++j)
                if (!unseen(u * kInUnit<Kind> + j)) mask[u] |= kInUnit<Kind> == 1 ? -1 : static_cast<int32_t>(0xffffu << (16 * j));
        }
        for (size_t i = 0; i < panels * kTileUnits; ++i)
            for (size_t c = 0; c < kPanel; c += kLanes) {
                const size_t at = (i * kPanel + c) * kUnitBytes;
                const IntLanes kept = raw(from + at) & mask[i % kTileUnits];
                __builtin_memcpy(values + at, &kept, sizeof kept);
            }
        return values;
    }

    // Units of two bytes, [units][2][32], of keys or of values -> units of two bfloat16. Whole numbers up to 127 are exact.
    static void expand(const unsigned char* from, size_t units, unsigned char* to) {
        for (size_t i = 0; i < units; ++i, from += 2 * kPanel)
            for (size_t c = 0; c < kPanel; c += kLanes, to += sizeof(IntLanes)) {
                ByteLanes low, high;
                __builtin_memcpy(&low, from + c, sizeof low);
                __builtin_memcpy(&high, from + kPanel + c, sizeof high);
                const Lanes a = __builtin_convertvector(wide(low), Lanes), b = __builtin_convertvector(wide(high), Lanes);
                const UnsignedLanes both = reinterpret_cast<UnsignedLanes>(a) >> 16 | reinterpret_cast<UnsignedLanes>(b);
                __builtin_memcpy(to, &both, sizeof both);
            }
    }

    // One tile of `count` slots; hide(row, scores, span) puts -inf where the row may not look, of `span` >= count scores;
    // ahead(block, blocks) is what each block asks for.
    template <class Hide, class Ask>
    void tile(const Tile& t, size_t count, Hide&& hide, Ask&& ahead) {
        const fastloop::Blocks blocks(rows, kBlock);
        for (size_t block = 0; block < blocks.count; ++block) {
            const size_t begin = blocks.begin(block);
            choose<kBlock>(blocks.begin(block + 1) - begin, t, begin, count, hide, ahead(block, blocks.count));
        }
    }

    template <size_t R, class Hide>
    void choose(size_t rows_here, const Tile& t, size_t begin, size_t count, Hide& hide, const Next& next) {
        if (rows_here == R) rows_of<R>(t, begin, count, hide, next);
        else if constexpr (R > 1) choose<R - 1>(rows_here, t, begin, count, hide, next);
    }

    template <size_t R, class Hide>
    void rows_of(const Tile& t, size_t begin, size_t count, Hide& hide, const Next& next) {
        alignas(64) float scores[R * kSlotTile];
        const size_t span = (count + kPanel - 1) / kPanel * kPanel;
        for (size_t half = 0; half < span / kPanel; ++half)
            for (size_t first = 0; first < units; first += kRun) {
                Block<Kind, R> block;
                sum_block<Kind, R>(block, t.keys + (half * units + first) * kPanel * 4, q + begin * units + first * R,
                                   units - first < kRun ? units - first : kRun, next.keys.behind(half * units + first));
                if (first == 0) block.put(scores + half * kPanel, kSlotTile);
                else block.add_to(scores + half * kPanel, kSlotTile);
            }
        if (t.key_scale != nullptr)
            for (size_t r = 0; r < R; ++r)
                for (size_t s = 0; s < span; s += kLanes) {
                    float* const score = scores + r * kSlotTile + s;
                    store(score, load(score) * load(t.key_scale + s));
                }
        for (size_t r = 0; r < R; ++r) hide(begin + r, scores + r * kSlotTile, span);
        soften<R>(begin, scores, span);
        weigh<R>(static_cast<const Kind*>(nullptr), t, begin, scores, span, (count + kInUnit<Kind> - 1) / kInUnit<Kind>,
                 next.values);
    }

    // sums = sums x keep + weights [R][64] x values.
    template <size_t R>
    void weigh(const Float32*, const Tile& t, size_t begin, const float* weights, size_t, size_t tile_units, Ahead ahead) {
        add_values<R>(t, begin, reinterpret_cast<const AnyUnit*>(weights), tile_units, ahead);
    }
    template <size_t R>
    void weigh(const Bfloat16*, const Tile& t, size_t begin, const float* weights, size_t span, size_t tile_units,
               Ahead ahead) {
        alignas(64) int32_t packed[R * kTileUnits];
        for (size_t r = 0; r < R; ++r)
            for (size_t s = 0; s < span; s += kLanes) {
                Lanes p = load(weights + r * kSlotTile + s);
                if (t.value_scale != nullptr) p = p * load(t.value_scale + s);
                const HalfLanes half = halves_of(p);
                __builtin_memcpy(reinterpret_cast<char*>(packed + r * kTileUnits) + 2 * s, &half, sizeof half);
            }
        add_values<R>(t, begin, packed, tile_units, ahead);
    }
    template <size_t R>
    void add_values(const Tile& t, size_t begin, const AnyUnit* weights, size_t tile_units, Ahead ahead) {
        for (size_t panel = 0; panel < panels; ++panel) {
            Block<Kind, R> block;
            sum_block_apart<Kind, R, kTileUnits>(block, t.values + panel * kTileUnits * kPanel * 4, weights, tile_units,
                                                 ahead.behind(panel * kTileUnits));
            block.fold(sums + begin * panels * kPanel + panel * kPanel, panels * kPanel, keep + begin);
        }
    }

    // Scores of R rows -> weights; their maxima and totals move on.
    template <size_t R>
    void soften(size_t begin, float* scores, size_t span) {
        alignas(64) float step[(R + kLanes - 1) / kLanes * kLanes] = {};  // how far each maximum moves, <= 0
        for (size_t r = 0; r < R; ++r) {
            const float* const score = scores + r * kSlotTile;
            Lanes loudest = load(score);
            for (size_t s = kLanes; s < span; s += kLanes) loudest = larger(loudest, load(score + s));
            const float here = maximum(loudest), before = top[begin + r];
            const float now = here > before ? here : before;  // NaN is no maximum: it comes back through the total
            step[r] = now == before ? 0.0f : before - now;  // -inf - -inf: nothing to see yet
            top[begin + r] = now;
        }
        for (size_t r = 0; r < R; r += kLanes) store(step + r, exp2_below(load(step + r)));
        for (size_t r = 0; r < R; ++r) {
            float* const score = scores + r * kSlotTile;
            const float now = top[begin + r], from = now == -__builtin_inff() ? 0.0f : now;
            Lanes added = {};
            for (size_t s = 0; s < span; s += kLanes) {
                const Lanes below = load(score + s) - from;
                const Lanes p = kInUnit<Kind> == 1 ? exp2_below(below) : exp2_below_short(below);
                store(score + s, p);
                added += p;
            }
            keep[begin + r] = step[r];
            total[begin + r] = total[begin + r] * step[r] + sum(added);
        }
    }

    // out [K] of a row whose slots were all seen.
    void result(size_t row, float* out) const {
        const float inverse = 1.0f / total[row];
        for (size_t i = 0; i < width; ++i) out[i] = sums[row * panels * kPanel + i] * inverse;
    }
};

}  // namespace
