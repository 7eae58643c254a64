// The heart of both attentions: some query rows against a run of slots, tile by tile, with an online softmax.
//
//   score = q k scale,  m = max,  p = e^(score - m),  out = sum p v / sum p
//
// A tile is 64 slots. Its keys become two panels [units][32 slots], so that the scores of up to 14 rows x 32 slots are one
// block of block.h; its values become panels [slots][32 channels], so that their weighted sums are another. Slots that no row
// of a sequence may see can hold anything: their scores are replaced, their values are read as zeros.
// Source: online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867), as in FlashAttention (Dao et al. 2022).
#pragma once

#include "attention.h"
#include "block.h"

namespace {

using fastloop::kSlotTile;

// Units are one float or two bfloat16 (Kind of block.h); Stored is what a key's element is in memory, unless said: products of
// floats take keys and values of bfloat16 as well.
template <class Kind>
struct Stored {
    typedef float Type;
    static constexpr size_t kInUnit = 1;
};
template <>
struct Stored<Bfloat16> {
    typedef uint16_t Type;
    static constexpr size_t kInUnit = 2;
};

FASTLOOP_INLINE int32_t unit_at(const float* from) {
    int32_t bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return bits;
}
FASTLOOP_INLINE int32_t unit_of(const Float32*, const float* x) { return unit_at(x); }
FASTLOOP_INLINE int32_t unit_of(const Bfloat16*, const float* x) {
    return static_cast<int32_t>(static_cast<uint32_t>(bfloat16(x[1])) << 16 | bfloat16(x[0]));
}

// `span` numbers -> units in a row.
FASTLOOP_INLINE void units_of(const Float32*, const float* x, size_t span, int32_t* to) {
    __builtin_memcpy(to, x, span * sizeof(float));
}
FASTLOOP_INLINE void units_of(const Bfloat16*, const float* x, size_t span, int32_t* to) {
    typedef uint16_t HalfLanes __attribute__((vector_size(2 * FASTLOOP_LANES)));
    for (size_t s = 0; s < span; s += kLanes) {
        const Lanes v = load(x + s);
        const IntLanes bits = reinterpret_cast<IntLanes>(v);
        const IntLanes rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const HalfLanes half = __builtin_convertvector(v == v ? rounded : ((bits >> 16) | 0x40), HalfLanes);
        __builtin_memcpy(reinterpret_cast<char*>(to) + 2 * s, &half, sizeof half);
    }
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

template <class Kind, class Element = typename Stored<Kind>::Type>
struct Attend {
    static constexpr size_t kInUnit = Stored<Kind>::kInUnit;
    static constexpr size_t kTileUnits = kSlotTile / kInUnit;

    size_t rows, width;     // query rows (x heads), K
    size_t units, panels;   // of a key; of a value
    int32_t* q;             // blocks of rows, each [units][rows]
    unsigned char* keys;    // 2 panels [units][32]
    unsigned char* values;  // [panels][kTileUnits][32]
    int32_t* weights;       // blocks of rows, each [kTileUnits][rows]
    float* sums;            // [rows][32 panels]
    float* top;             // [rows]
    float* total;           // [rows]
    float* keep;            // [rows]

    Attend(size_t rows, size_t width, unsigned char* scratch)
        : rows(rows), width(width), units(width / kInUnit), panels((width + kPanel - 1) / kPanel) {
        const size_t padded = panels * kPanel;
        q = reinterpret_cast<int32_t*>(scratch);
        keys = reinterpret_cast<unsigned char*>(q + rows * padded);
        keys += (64 - reinterpret_cast<uintptr_t>(keys) % 64) % 64;
        values = keys + kSlotTile * padded * 4;
        weights = reinterpret_cast<int32_t*>(values + kSlotTile * padded * 4);
        sums = reinterpret_cast<float*>(weights + rows * kSlotTile);
        top = sums + rows * padded;
        total = top + rows;
        keep = total + rows;
        for (size_t i = 0; i < rows * padded; ++i) sums[i] = 0.0f;
        for (size_t r = 0; r < rows; ++r) {
            top[r] = -__builtin_inff();
            total[r] = 0.0f;
        }
    }

    // Row `row` of the queries: x [K], scaled and packed.
    void query(size_t row, const float* x, float scale) {
        const fastloop::Blocks blocks(rows, kBlock);
        size_t block = 0;
        while (blocks.begin(block + 1) <= row) ++block;
        const size_t begin = blocks.begin(block), count = blocks.begin(block + 1) - begin;
        int32_t* const to = q + begin * units + (row - begin);
        for (size_t u = 0; u < units; ++u) {
            float scaled[kInUnit];
            for (size_t j = 0; j < kInUnit; ++j) scaled[j] = x[u * kInUnit + j] * scale;
            to[u * count] = unit_of(static_cast<const Kind*>(nullptr), scaled);
        }
    }

    // Keys [slot][unit] -> [unit][slot], four by four; `count` slots, whole panels of them.
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

    void place_values(const Slots<Element>& slots, size_t tile_units) {
        for (size_t panel = 0; panel < panels; ++panel) {
            const size_t first = panel * kPanel, count = width - first < kPanel ? width - first : kPanel;
            for (size_t u = 0; u < tile_units; ++u) {
                unsigned char* const to = values + (panel * kTileUnits + u) * kPanel * 4;
                if (count < kPanel) __builtin_memset(to, 0, kPanel * 4);
                place_unit(static_cast<const Kind*>(nullptr), slots.values + u * kInUnit, first, count, to);
            }
        }
    }

    static void place_unit(const Float32*, const float* const* value, size_t first, size_t count, unsigned char* to) {
        if (*value == nullptr) __builtin_memset(to, 0, count * 4);
        else if (count == kPanel) __builtin_memcpy(to, *value + first, kPanel * 4);
        else __builtin_memcpy(to, *value + first, count * 4);
    }
    static void place_unit(const Float32*, const uint16_t* const* value, size_t first, size_t count, unsigned char* to) {
        uint32_t wide[kPanel] = {};
        if (*value != nullptr)
            for (size_t c = 0; c < count; ++c) wide[c] = static_cast<uint32_t>((*value)[first + c]) << 16;
        __builtin_memcpy(to, wide, count * 4);
    }
    static void place_unit(const Bfloat16*, const uint16_t* const* value, size_t first, size_t count, unsigned char* to) {
        static const uint16_t kNone[kPanel] = {};
        const uint16_t* const a = value[0] == nullptr ? kNone : value[0] + first;
        const uint16_t* const b = value[1] == nullptr ? kNone : value[1] + first;
        if (count == kPanel) {
            for (size_t c = 0; c < kPanel; c += kLanes) {
                typedef uint16_t HalfLanes __attribute__((vector_size(2 * FASTLOOP_LANES)));
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

    // Asks for the keys and values of a tile that comes next.
    static void fetch(const Slots<Element>& slots, size_t width) {
        for (size_t s = 0; s < kSlotTile; ++s) {
            if (slots.keys[s] == nullptr) continue;
            for (size_t byte = 0; byte < width * sizeof(Element); byte += 64) {
                __builtin_prefetch(reinterpret_cast<const char*>(slots.keys[s]) + byte, 0, 2);
                __builtin_prefetch(reinterpret_cast<const char*>(slots.values[s]) + byte, 0, 2);
            }
        }
    }

    // One tile of `count` slots; hide(row, scores, span) puts -inf where the row may not look, of `span` >= count scores.
    template <class Hide>
    void tile(const Slots<Element>& slots, size_t count, Hide&& hide) {
        place_keys(slots, count);
        place_values(slots, (count + kInUnit - 1) / kInUnit);
        const fastloop::Blocks blocks(rows, kBlock);
        for (size_t block = 0; block < blocks.count; ++block) {
            const size_t begin = blocks.begin(block);
            choose<kBlock>(blocks.begin(block + 1) - begin, begin, count, hide);
        }
    }

    template <size_t R, class Hide>
    void choose(size_t rows_here, size_t begin, size_t count, Hide& hide) {
        if (rows_here == R) rows_of<R>(begin, count, hide);
        else if constexpr (R > 1) choose<R - 1>(rows_here, begin, count, hide);
    }

    template <size_t R, class Hide>
    void rows_of(size_t begin, size_t count, Hide& hide) {
        alignas(64) float scores[R * kSlotTile];
        const size_t tile_units = (count + kInUnit - 1) / kInUnit;
        for (size_t half = 0; half < (count + kPanel - 1) / kPanel; ++half) {
            Block<Kind, R> block;
            sum_block<Kind, R>(block, keys + half * units * kPanel * 4, q + begin * units, units);
            block.put(scores + half * kPanel, kSlotTile);
        }
        const size_t span = (count + kPanel - 1) / kPanel * kPanel;
        for (size_t r = 0; r < R; ++r) hide(begin + r, scores + r * kSlotTile, span);
        soften<R>(begin, scores, span);
        int32_t* const packed = weights + begin * kTileUnits;
        for (size_t r = 0; r < R; ++r) {
            alignas(64) int32_t unit[kTileUnits];
            units_of(static_cast<const Kind*>(nullptr), scores + r * kSlotTile, span, unit);
            for (size_t u = 0; u < tile_units; ++u) packed[u * R + r] = unit[u];
        }
        for (size_t panel = 0; panel < panels; ++panel) {
            Block<Kind, R> block;
            sum_block<Kind, R>(block, values + panel * kTileUnits * kPanel * 4, packed, tile_units);
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
        for (size_t r = 0; r < R; r += kLanes) store(step + r, exp_below(load(step + r)));
        for (size_t r = 0; r < R; ++r) {
            float* const score = scores + r * kSlotTile;
            const float now = top[begin + r], from = now == -__builtin_inff() ? 0.0f : now;
            Lanes added = {};
            for (size_t s = 0; s < span; s += kLanes) {
                const Lanes p = exp_below(load(score + s) - from);
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
