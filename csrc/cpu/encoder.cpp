// One pass of the audio tower: mel frames of B chunks -> audio tokens (fastloop/encoder.py is its readable twin).
//
//   frames -> conv stem -> layers (LayerNorm, qkv, block attention, out, LayerNorm, fc1 GELU, fc2) -> pool -> LayerNorm -> proj
#include <cstring>
#include <mutex>
#include <vector>

#include "attention.h"
#include "conv_stem.h"
#include "stage.h"
#include "status.h"

using namespace fastloop;

namespace {

constexpr const char* kWhere = "encoder";

struct Buffers {
    StemBuffers stem;
    float *x, *wide, *attended;
    unsigned char *packed, *scratch;
    size_t scratch_each;
};

}  // namespace

struct fastloop_encoder {
    fastloop_encoder_params p;
    std::vector<fastloop_encoder_layer> layers;
    Isa isa;
    std::mutex one_call;
    Buffer memory;

    const Weight& weight(const fastloop_weight* w) const { return w->own.weight; }
    Buffers place(size_t chunks, size_t frames, size_t threads);
    void encode(Stage& s, const fastloop_encode_params& c, const Buffers& b) const;
    ConvStem stem() const {
        return {p.bins, p.width, &weight(p.conv1), p.conv1_bias, &weight(p.conv2), p.conv2_bias, p.positions};
    }
    void layer(Stage& s, const fastloop_encoder_layer& l, size_t chunks, size_t positions, const Buffers& b) const;
    void head(Stage& s, const fastloop_encode_params& c, const Buffers& b) const;
    size_t widest() const;
};

size_t fastloop_encoder::widest() const {
    size_t most = 3 * p.width;
    for (const fastloop_encoder_layer& l : layers) most = std::max(most, weight(l.fc1).out);
    return most;
}

Buffers fastloop_encoder::place(size_t chunks, size_t frames, size_t threads) {
    const size_t positions = frames / 2, e = p.width;
    Buffers b{};
    const auto lay_out = [&](unsigned char* base) {
        Arena arena(base);
        b.stem.frames = arena.take<float>(chunks * (frames + 2) * p.bins);
        b.stem.padded = arena.take<float>(chunks * (frames + 2) * e);
        b.x = arena.take<float>(chunks * positions * e);
        b.wide = arena.take<float>(chunks * positions * widest());
        b.attended = arena.take<float>(chunks * positions * e);
        size_t packed = std::max(stem_packed(stem(), chunks, frames), rows_scratch(weight(p.proj), chunks * positions));
        for (const fastloop_encoder_layer& l : layers)
            for (const fastloop_weight* w : {l.qkv, l.out, l.fc1, l.fc2})
                packed = std::max(packed, rows_scratch(weight(w), chunks * positions));
        b.packed = arena.take<unsigned char>(packed);
        b.stem.hidden = b.wide;  // [B, F, E] fits [B, F / 2, 3 E]
        b.stem.packed = b.packed;
        b.scratch_each = Arena::padded(std::max(attention_scratch(positions, e / p.heads), widest() * sizeof(float)));
        b.scratch = arena.take<unsigned char>(b.scratch_each * threads);
        return arena.used();
    };
    memory.reserve(lay_out(nullptr));
    lay_out(memory.as<unsigned char>());
    return b;
}

void fastloop_encoder::layer(Stage& s, const fastloop_encoder_layer& l, size_t chunks, size_t positions,
                             const Buffers& b) const {
    const size_t e = p.width, rows = chunks * positions, ffn = weight(l.fc1).out;
    const auto normed = [&](const float* weight, const float* bias) {
        return [&, weight, bias](size_t row, float* scratch) {
            FASTLOOP_KERNEL(s.isa, layer_norm)(b.x + row * e, weight, bias, e, p.norm_eps, scratch);
            return scratch;
        };
    };
    Rows packed = rows_in(weight(l.qkv), rows, b.packed);
    pack_rows(s, weight(l.qkv), packed, normed(l.norm1_weight, l.norm1_bias));
    multiply(s, weight(l.qkv), packed, {l.qkv_bias, FASTLOOP_NONE, nullptr, 0, b.wide, 3 * e});
    s.crew.each(chunks * p.heads, [&](size_t item) {
        const size_t chunk = item / p.heads;
        const BlockAttention call{b.wide + chunk * positions * 3 * e, positions, p.heads, e / p.heads,
                                  b.attended + chunk * positions * e};
        FASTLOOP_KERNEL(s.isa, block_attention)(call, item % p.heads, s.scratch);
    });
    packed = rows_in(weight(l.out), rows, b.packed);
    pack_rows(s, weight(l.out), packed, [&](size_t row, float*) { return b.attended + row * e; });
    multiply(s, weight(l.out), packed, {l.out_bias, FASTLOOP_NONE, b.x, e, b.x, e});
    packed = rows_in(weight(l.fc1), rows, b.packed);
    pack_rows(s, weight(l.fc1), packed, normed(l.norm2_weight, l.norm2_bias));
    multiply(s, weight(l.fc1), packed, {l.fc1_bias, FASTLOOP_GELU, nullptr, 0, b.wide, ffn});
    packed = rows_in(weight(l.fc2), rows, b.packed);
    pack_rows(s, weight(l.fc2), packed, [&](size_t row, float*) { return b.wide + row * ffn; });
    multiply(s, weight(l.fc2), packed, {l.fc2_bias, FASTLOOP_NONE, b.x, e, b.x, e});
}

// Pairs of positions are averaged, so a chunk gives half as many tokens as it has positions.
void fastloop_encoder::head(Stage& s, const fastloop_encode_params& c, const Buffers& b) const {
    const size_t e = p.width, tokens = c.frames / 4, out = weight(p.proj).out;
    const Rows packed = rows_in(weight(p.proj), c.chunks * tokens, b.packed);
    pack_rows(s, weight(p.proj), packed, [&](size_t row, float* scratch) {
        const float* const pair = b.x + (row / tokens * (c.frames / 2) + 2 * (row % tokens)) * e;
        for (size_t i = 0; i < e; ++i) scratch[i] = 0.5f * (pair[i] + pair[e + i]);
        FASTLOOP_KERNEL(s.isa, layer_norm)(scratch, p.norm_weight, p.norm_bias, e, p.norm_eps, scratch);
        return scratch;
    });
    multiply(s, weight(p.proj), packed, {p.proj_bias, FASTLOOP_NONE, nullptr, 0, c.tokens, out});
}

void fastloop_encoder::encode(Stage& s, const fastloop_encode_params& c, const Buffers& b) const {
    run_stem(s, stem(), c.chunks, c.frames, c.mel, b.stem, b.x);
    for (const fastloop_encoder_layer& l : layers) layer(s, l, c.chunks, c.frames / 2, b);
    head(s, c, b);
}

namespace {

void shape(const char* name, const fastloop_weight* w, size_t out, size_t in) {
    need(kWhere, name, w);
    const Weight& own = w->own.weight;
    if (own.out != out || own.in != in || own.gated)
        fail(FASTLOOP_BAD_ARGUMENT, "encoder: %s is [%zu, %zu], must be [%zu, %zu] and not gated", name, own.out, own.in,
             out, in);
}

void check_encoder(const fastloop_encoder_params& p) {
    const size_t e = p.width;
    if (e < 1 || p.heads < 1 || e % p.heads || p.bins < 1)
        fail(FASTLOOP_BAD_ARGUMENT, "encoder: width %zu, heads %zu, bins %zu do not go together", e, p.heads, p.bins);
    check_stem(kWhere, p.bins, e, p.conv1, p.conv2);
    need(kWhere, "proj", p.proj);
    shape("proj", p.proj, p.proj->own.weight.out, e);
    for (const float* vector : {p.conv1_bias, p.conv2_bias, p.positions, p.norm_weight, p.norm_bias, p.proj_bias})
        need(kWhere, "a bias, a norm or the positions", vector);
    if (p.layers > 0) need(kWhere, "layer", p.layer);
    for (size_t i = 0; i < p.layers; ++i) {
        const fastloop_encoder_layer& l = p.layer[i];
        shape("qkv", l.qkv, 3 * e, e);
        shape("out", l.out, e, e);
        need(kWhere, "fc1", l.fc1);
        shape("fc1", l.fc1, l.fc1->own.weight.out, e);
        shape("fc2", l.fc2, e, l.fc1->own.weight.out);
        for (const float* vector : {l.norm1_weight, l.norm1_bias, l.norm2_weight, l.norm2_bias, l.qkv_bias, l.out_bias,
                                    l.fc1_bias, l.fc2_bias})
            need(kWhere, "a bias or a norm of a layer", vector);
    }
}

}  // namespace

extern "C" fastloop_status fastloop_encoder_create(const fastloop_encoder_params* params, fastloop_encoder** encoder) {
    return guarded(kWhere, [&] {
        need(kWhere, "encoder", encoder);
        *encoder = nullptr;
        const fastloop_encoder_params p = adopt(kWhere, params);
        check_encoder(p);
        auto made = std::make_unique<fastloop_encoder>();
        made->p = p;
        made->layers.assign(p.layer, p.layer + p.layers);
        made->isa = choose_isa(kWhere, p.isa);
        *encoder = made.release();
    });
}

extern "C" void fastloop_encoder_destroy(fastloop_encoder* encoder) { delete encoder; }

extern "C" fastloop_status fastloop_encode(fastloop_encoder* encoder, const fastloop_encode_params* params) {
    return guarded(kWhere, [&] {
        need(kWhere, "encoder", encoder);
        const fastloop_encode_params c = adopt(kWhere, params);
        need(kWhere, "team", c.team);
        if (c.frames < 4 || c.frames % 4 || c.frames / 2 > encoder->p.most_positions)
            fail(FASTLOOP_BAD_ARGUMENT, "encoder: %zu frames a chunk; choose a multiple of 4 up to %zu", c.frames,
                 2 * encoder->p.most_positions);
        if (c.chunks == 0) return;
        need(kWhere, "mel", c.mel);
        need(kWhere, "tokens", c.tokens);
        addressable(kWhere, "mel", c.chunks, (c.frames + 2) * (encoder->widest() + 64), 16);
        const std::lock_guard<std::mutex> one(encoder->one_call);
        Team& team = c.team->team;
        const Buffers b = encoder->place(c.chunks, c.frames, team.size());
        run(team, [&](Crew& crew) {
            Stage s{crew, encoder->isa, team.size(), b.scratch + crew.thread * b.scratch_each};
            encoder->encode(s, c, b);
        });
    });
}
