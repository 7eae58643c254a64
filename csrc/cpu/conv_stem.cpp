// The host side of `conv_stem`: conv k3 p1, GELU, conv k3 stride 2 p1, GELU, + positions.
//
// A convolution over three frames is a `linear` whose rows overlap: row t begins at frame t of the padded frames.
#include "conv_stem.h"

#include <algorithm>
#include <cstring>

#include "memory.h"
#include "status.h"

namespace fastloop {

size_t stem_packed(const ConvStem& stem, size_t blocks, size_t frames) {
    return std::max(rows_scratch(*stem.conv1, blocks * frames), rows_scratch(*stem.conv2, blocks * ((frames + 1) / 2)));
}

void check_stem(const char* where, size_t bins, size_t width, const fastloop_weight* conv1, const fastloop_weight* conv2) {
    const struct {
        const char* name;
        const fastloop_weight* weight;
        size_t inputs;
    } convolutions[] = {{"conv1", conv1, bins}, {"conv2", conv2, width}};
    for (const auto& c : convolutions) {
        need(where, c.name, c.weight);
        const Weight& own = c.weight->own.weight;
        if (own.out != width || own.in != 3 * c.inputs || own.gated)
            fail(FASTLOOP_BAD_ARGUMENT, "%s: %s is [%zu, %zu], must be [%zu, 3 x %zu] and not gated", where, c.name, own.out,
                 own.in, width, c.inputs);
    }
}

void run_stem(Stage& s, const ConvStem& stem, size_t blocks, size_t frames, const float* mel, const StemBuffers& b, float* out) {
    const size_t e = stem.width, bins = stem.bins, positions = (frames + 1) / 2;
    s.crew.each(blocks, [&](size_t block) {
        float* const to = b.frames + block * (frames + 2) * bins;
        std::memset(to, 0, bins * sizeof(float));
        std::memcpy(to + bins, mel + block * frames * bins, frames * bins * sizeof(float));
        std::memset(to + (frames + 1) * bins, 0, bins * sizeof(float));
    });
    const Rows rows1 = rows_in(*stem.conv1, blocks * frames, b.packed);
    pack_rows(s, *stem.conv1, rows1,
              [&](size_t row, float*) { return b.frames + (row / frames * (frames + 2) + row % frames) * bins; });
    multiply(s, *stem.conv1, rows1, {stem.bias1, FASTLOOP_GELU, nullptr, 0, b.hidden, e});
    s.crew.each(blocks, [&](size_t block) {
        float* const to = b.padded + block * (frames + 2) * e;
        std::memset(to, 0, e * sizeof(float));
        std::memcpy(to + e, b.hidden + block * frames * e, frames * e * sizeof(float));
        std::memset(to + (frames + 1) * e, 0, e * sizeof(float));
        for (size_t t = 0; t < positions; ++t)  // what the second convolution is added to
            std::memcpy(out + (block * positions + t) * e, stem.positions + t * e, e * sizeof(float));
    });
    const Rows rows2 = rows_in(*stem.conv2, blocks * positions, b.packed);
    pack_rows(s, *stem.conv2, rows2, [&](size_t row, float*) {
        return b.padded + (row / positions * (frames + 2) + 2 * (row % positions)) * e;
    });
    multiply(s, *stem.conv2, rows2, {stem.bias2, FASTLOOP_GELU, out, e, out, e});
}

}  // namespace fastloop

extern "C" fastloop_status fastloop_conv_stem(const fastloop_conv_stem_params* params) {
    using namespace fastloop;
    constexpr const char* kWhere = "conv_stem";
    return guarded(kWhere, [params] {
        const fastloop_conv_stem_params p = adopt(kWhere, params);
        const Isa isa = choose_isa(kWhere, p.isa);
        check_stem(kWhere, p.bins, p.width, p.conv1, p.conv2);
        if (p.blocks == 0 || p.frames == 0) return;
        const struct {
            const char* name;
            const float* pointer;
        } arrays[] = {{"mel", p.mel}, {"conv1_bias", p.conv1_bias}, {"conv2_bias", p.conv2_bias},
                      {"positions", p.positions}, {"out", p.out}};
        for (const auto& each : arrays) need(kWhere, each.name, each.pointer);
        addressable(kWhere, "mel", p.blocks, (p.frames + 2) * (3 * std::max(p.bins, p.width) + 64), 16);
        const ConvStem stem{p.bins, p.width, &p.conv1->own.weight, p.conv1_bias, &p.conv2->own.weight, p.conv2_bias, p.positions};
        StemBuffers buffers{};
        const auto lay_out = [&](unsigned char* base) {
            Arena arena(base);
            buffers.frames = arena.take<float>(p.blocks * (p.frames + 2) * p.bins);
            buffers.hidden = arena.take<float>(p.blocks * p.frames * p.width);
            buffers.padded = arena.take<float>(p.blocks * (p.frames + 2) * p.width);
            buffers.packed = arena.take<unsigned char>(stem_packed(stem, p.blocks, p.frames));
            return arena.used();
        };
        const Scratch scratch(lay_out(nullptr));
        lay_out(scratch.data);
        const size_t work = p.blocks * p.frames * 3 * p.bins * p.width + p.blocks * ((p.frames + 1) / 2) * 3 * p.width * p.width;
        staged(worth(p.team, work), isa, nullptr, 0, [&](Stage& s) { run_stem(s, stem, p.blocks, p.frames, p.mel, buffers, p.out); });
    });
}
