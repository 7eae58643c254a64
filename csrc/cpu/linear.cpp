// The host side of `linear`: packs weights, checks calls, shares the panels out among the threads.
#include "linear.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "handles.h"
#include "memory.h"
#include "stage.h"
#include "status.h"

namespace fastloop {
namespace {

constexpr const char* kWhere = "linear";
constexpr size_t kClaimBytes = 64 << 10;  // of weights: what a thread takes at a time

// Row of the caller's matrix that channel `channel` of the panels holds, or O for a filler.
size_t source_row(const Weight& w, size_t channel) {
    if (!w.gated) return std::min(channel, w.out);
    const size_t half = w.out / 2, number = channel / kPanel * (kPanel / 2) + channel % (kPanel / 2);
    if (number >= half) return w.out;
    return channel % kPanel < kPanel / 2 ? number : half + number;
}

float to_float(uint16_t bfloat16) {
    const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Input k of a row, as the four-byte unit it goes into wants it.
float input(const fastloop_weight_params& p, size_t row, size_t k) {
    const size_t at = row * p.in + k;
    return p.source == FASTLOOP_FLOAT32 ? static_cast<const float*>(p.data)[at]
                                        : to_float(static_cast<const uint16_t*>(p.data)[at]);
}

uint32_t unit_of(const fastloop_weight_params& p, const Weight& w, size_t row, size_t unit) {
    const bool real = row < w.out;
    uint32_t bits = 0;
    switch (w.format) {
        case FASTLOOP_FLOAT32: {
            const float value = real ? input(p, row, unit) : 0.0f;
            std::memcpy(&bits, &value, sizeof bits);
            return bits;
        }
        case FASTLOOP_BFLOAT16:
            for (size_t j = 0; real && j < 2 && 2 * unit + j < w.in; ++j)
                bits |= static_cast<uint32_t>(to_bfloat16(input(p, row, 2 * unit + j))) << (16 * j);
            return bits;
        case FASTLOOP_INT8:
            for (size_t j = 0; j < 4; ++j) {
                const size_t k = 4 * unit + j;
                const int value = real && k < w.in ? static_cast<const int8_t*>(p.data)[row * p.in + k] : 0;
                bits |= static_cast<uint32_t>(value + 128) << (8 * j);
            }
            return bits;
        default:  // int4: byte j holds input j of the unit 2 i in its low nibble, of the unit 2 i + 1 in its high one
            for (size_t j = 0; j < 8; ++j) {
                const size_t k = 8 * unit + j;
                uint32_t nibble = 8;
                if (real) nibble = static_cast<const uint8_t*>(p.data)[(row * p.in + k) / 2] >> (k % 2 * 4) & 15;
                bits |= nibble << (j % 4 * 8 + j / 4 * 4);
            }
            return bits;
    }
}

void pack_panel(const fastloop_weight_params& p, const Weight& w, size_t panel, unsigned char* to) {
    size_t rows[kPanel];
    for (size_t c = 0; c < kPanel; ++c) rows[c] = source_row(w, panel * kPanel + c);
    const size_t units = w.panel_bytes() / (kPanel * kUnitBytes);
    for (size_t c = 0; c < kPanel; ++c)  // along the source's rows
        for (size_t u = 0; u < units; ++u) {
            const uint32_t bits = unit_of(p, w, rows[c], u);
            std::memcpy(to + (u * kPanel + c) * kUnitBytes, &bits, kUnitBytes);
        }
}

void check_weight(const fastloop_weight_params& p) {
    if (p.out < 1 || p.in < 1) fail(FASTLOOP_BAD_ARGUMENT, "weight: is [%zu, %zu]; both must be positive", p.out, p.in);
    if (p.format < FASTLOOP_FLOAT32 || p.format > FASTLOOP_INT4)
        fail(FASTLOOP_BAD_ARGUMENT, "weight: format is %d; choose from fastloop_format", p.format);
    const bool floats = p.format <= FASTLOOP_BFLOAT16;
    if (floats ? p.source != FASTLOOP_FLOAT32 && p.source != FASTLOOP_BFLOAT16 : p.source != p.format)
        fail(FASTLOOP_BAD_ARGUMENT, "weight: source %d cannot be packed as format %d; quantise it first", p.source, p.format);
    if (p.gated && p.out % 2) fail(FASTLOOP_BAD_ARGUMENT, "weight: [gate; up] needs an even number of rows, got %zu", p.out);
    if (p.format == FASTLOOP_INT4 && ((p.group != 32 && p.group != 64) || p.in % p.group))
        fail(FASTLOOP_BAD_ARGUMENT, "weight: group is %zu, inputs %zu; int4 takes groups of 32 or 64 that divide the inputs",
             p.group, p.in);
    if (p.format == FASTLOOP_INT8 && p.in > 65536)  // sums of 255 x 127 fit 32 bits so far
        fail(FASTLOOP_BAD_ARGUMENT, "weight: %zu inputs; int8 takes up to 65536", p.in);
    need("weight", "data", p.data, p.source == FASTLOOP_FLOAT32 ? sizeof(float) : p.source == FASTLOOP_BFLOAT16 ? 2 : 1);
    if (!floats) need("weight", "scale", p.scale, p.format == FASTLOOP_INT8 ? sizeof(float) : 2);
    addressable("weight", "data", p.out + kPanel, p.in + 64, sizeof(float));
}

}  // namespace

OwnedWeight pack(const fastloop_weight_params& p) {
    check_weight(p);
    OwnedWeight own;
    Weight& w = own.weight;
    w = {};
    w.format = p.format;
    w.out = p.out;
    w.in = p.in;
    w.gated = p.gated != 0;
    const size_t channels = w.gated ? 2 * ((w.out / 2 + kPanel / 2 - 1) / (kPanel / 2)) * (kPanel / 2) : w.out;
    w.panels = (channels + kPanel - 1) / kPanel;
    w.units = (w.in + unit_inputs(w.format) - 1) / unit_inputs(w.format);
    w.group = p.format == FASTLOOP_INT4 ? p.group : 0;
    w.groups = w.group ? w.in / w.group : 0;
    own.data.reserve(w.panels * w.panel_bytes());
    w.data = own.data.as<unsigned char>();
    for (size_t panel = 0; panel < w.panels; ++panel)
        pack_panel(p, w, panel, own.data.as<unsigned char>() + panel * w.panel_bytes());
    if (w.format == FASTLOOP_INT8) {
        own.scale.reserve(w.panels * kPanel * sizeof(float));
        for (size_t c = 0; c < w.panels * kPanel; ++c) {
            const size_t row = source_row(w, c);
            own.scale.as<float>()[c] = row < w.out ? static_cast<const float*>(p.scale)[row] : 0.0f;
        }
        w.scale = own.scale.as<float>();
    } else if (w.format == FASTLOOP_INT4) {
        own.scale.reserve(w.panels * w.groups * kPanel * sizeof(uint16_t));
        for (size_t panel = 0; panel < w.panels; ++panel)
            for (size_t c = 0; c < kPanel; ++c) {
                const size_t row = source_row(w, panel * kPanel + c);
                for (size_t g = 0; g < w.groups; ++g)
                    own.scale.as<uint16_t>()[(panel * w.groups + g) * kPanel + c] =
                        row < w.out ? static_cast<const uint16_t*>(p.scale)[row * w.groups + g] : 0;
            }
        w.group_scale = own.scale.as<uint16_t>();
    }
    return own;
}

size_t rows_scratch(const Weight& w, size_t rows) {
    const size_t most_units = w.units, groups = w.groups;
    return (rows_bytes(rows, most_units) + 63) / 64 * 64 + rows * (sizeof(float) + sizeof(int32_t)) +
           rows * groups * sizeof(int32_t) + 64;
}

Rows rows_in(const Weight& w, size_t rows, unsigned char* scratch) {
    Rows to;
    to.count = rows;
    to.data = scratch;
    to.scale = reinterpret_cast<float*>(scratch + (rows_bytes(rows, w.units) + 63) / 64 * 64);
    to.sum = reinterpret_cast<int32_t*>(to.scale + rows);
    to.group_sum = to.sum + rows;
    return to;
}

size_t panels_per_claim(const Weight& w, size_t threads) {
    const size_t by_size = std::max<size_t>(1, kClaimBytes / w.panel_bytes());
    return std::max<size_t>(1, std::min(by_size, w.panels / (threads * 4)));
}

}  // namespace fastloop

using namespace fastloop;

extern "C" fastloop_status fastloop_team_create(size_t threads, int pin, fastloop_team** team) {
    return guarded("team", [&] {
        need("team", "team", team);
        *team = nullptr;
        *team = new fastloop_team(threads, pin != 0);
    });
}

extern "C" void fastloop_team_destroy(fastloop_team* team) { delete team; }

extern "C" fastloop_status fastloop_weight_create(const fastloop_weight_params* params, fastloop_weight** weight) {
    return guarded("weight", [&] {
        need("weight", "weight", weight);
        *weight = nullptr;
        const fastloop_weight_params p = adopt("weight", params);
        auto made = std::make_unique<fastloop_weight>();
        made->own = pack(p);
        *weight = made.release();
    });
}

extern "C" void fastloop_weight_destroy(fastloop_weight* weight) { delete weight; }

extern "C" size_t fastloop_weight_bytes(const fastloop_weight* weight) {
    return weight == nullptr ? 0 : weight->own.data.bytes() + weight->own.scale.bytes();
}

extern "C" fastloop_status fastloop_linear(const fastloop_linear_params* params) {
    return guarded(kWhere, [params] {
        const fastloop_linear_params p = adopt(kWhere, params);
        need(kWhere, "weight", p.weight);
        const Weight& w = p.weight->own.weight;
        if (w.gated && p.epilogue != FASTLOOP_NONE)
            fail(FASTLOOP_BAD_ARGUMENT, "linear: gated weights have their epilogue and take no other");
        if (p.epilogue != FASTLOOP_NONE && p.epilogue != FASTLOOP_GELU)
            fail(FASTLOOP_BAD_ARGUMENT, "linear: epilogue is %d; choose from fastloop_epilogue", p.epilogue);
        if (p.rows == 0) return;
        need(kWhere, "x", p.x);
        need(kWhere, "out", p.out);
        aligned(kWhere, "bias", p.bias);
        aligned(kWhere, "residual", p.residual);
        apart(kWhere, "x", p.rows, w.in, p.x_stride);
        apart(kWhere, "out", p.rows, w.width(), p.out_stride);
        if (p.residual != nullptr) apart(kWhere, "residual", p.rows, w.width(), p.residual_stride);
        addressable(kWhere, "x", p.rows, w.in + w.groups + 16, sizeof(float));
        const Isa isa = choose_isa(kWhere, p.isa);
        const Scratch scratch(rows_scratch(w, p.rows));
        const Rows rows = rows_in(w, p.rows, scratch.data);
        const Finish finish{p.bias, p.epilogue, p.residual, p.residual_stride, p.out, p.out_stride};
        // A few rows take as long as reading the weights does.
        fastloop_team* const team = worth(p.team, std::max<size_t>(p.rows, 4) * w.out * w.in);
        if (team == nullptr) {
            FASTLOOP_KERNEL(isa, linear_rows)(w, p.x, p.x_stride, 0, p.rows, rows);
            FASTLOOP_KERNEL(isa, linear_panels)(w, rows, finish, 0, w.panels);
            return;
        }
        const size_t claim = panels_per_claim(w, team->team.size());
        run(team->team, [&](Crew& crew) {
            crew.each(p.rows, [&](size_t row) { FASTLOOP_KERNEL(isa, linear_rows)(w, p.x, p.x_stride, row, row + 1, rows); });
            crew.each((w.panels + claim - 1) / claim, [&](size_t i) {
                FASTLOOP_KERNEL(isa, linear_panels)
                (w, rows, finish, i * claim, std::min(w.panels, (i + 1) * claim));
            });
        });
    });
}
