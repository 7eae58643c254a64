// A small random encoder and decoder, with all that they borrow.
#pragma once

#include <memory>

#include "check.h"

struct Encoder {
    static constexpr size_t kBins = 16, kWidth = 32, kHeads = 2, kLayers = 2, kOut = 24, kPositions = 8;
    Random random;
    std::vector<std::unique_ptr<Matrix>> matrices;
    std::vector<std::unique_ptr<Floats>> vectors;
    fastloop_encoder* handle = nullptr;

    Encoder(int32_t format, const char* isa) : random(11) {
        const auto matrix = [&](size_t out, size_t in) {
            matrices.push_back(std::make_unique<Matrix>(random, format, out, in));
            return matrices.back()->handle;
        };
        const auto vector = [&](size_t count) {
            vectors.push_back(std::make_unique<Floats>(random.numbers(count)));
            return vectors.back()->data();
        };
        std::vector<fastloop_encoder_layer> layers;
        for (size_t i = 0; i < kLayers; ++i)
            layers.push_back({vector(kWidth), vector(kWidth), matrix(3 * kWidth, kWidth), vector(3 * kWidth),
                              matrix(kWidth, kWidth), vector(kWidth), vector(kWidth), vector(kWidth),
                              matrix(64, kWidth), vector(64), matrix(kWidth, 64), vector(kWidth)});
        auto p = params<fastloop_encoder_params>();
        p.bins = kBins;
        p.width = kWidth;
        p.heads = kHeads;
        p.layers = kLayers;
        p.conv1 = matrix(kWidth, 3 * kBins);
        p.conv1_bias = vector(kWidth);
        p.conv2 = matrix(kWidth, 3 * kWidth);
        p.conv2_bias = vector(kWidth);
        p.positions = vector(kPositions * kWidth);
        p.most_positions = kPositions;
        p.layer = layers.data();
        p.norm_weight = vector(kWidth);
        p.norm_bias = vector(kWidth);
        p.proj = matrix(kOut, kWidth);
        p.proj_bias = vector(kOut);
        p.norm_eps = 1e-5f;
        p.isa = isa;
        CHECK_OK(fastloop_encoder_create(&p, &handle));
    }
    ~Encoder() { fastloop_encoder_destroy(handle); }

    // mel [chunks, frames, bins] -> tokens [chunks, frames / 4, out]
    Floats encode(fastloop_team* team, const Floats& mel, size_t chunks, size_t frames) const {
        Floats tokens(chunks * (frames / 4) * kOut);
        auto p = params<fastloop_encode_params>();
        p.team = team;
        p.chunks = chunks;
        p.frames = frames;
        p.mel = mel.data();
        p.tokens = tokens.data();
        CHECK_OK(fastloop_encode(handle, &p));
        return tokens;
    }
};

struct Decoder {
    static constexpr size_t kWidth = 32, kHeads = 4, kGroups = 2, kHead = 32, kLayers = 2, kFfn = 64, kVocab = 50;
    Random random;
    std::vector<std::unique_ptr<Matrix>> matrices;
    std::vector<std::unique_ptr<Floats>> vectors;
    std::vector<double> inv_freq;
    fastloop_decoder* handle = nullptr;

    Decoder(int32_t format, const char* isa) : random(13) {
        const auto matrix = [&](size_t out, size_t in, bool gated = false) {
            matrices.push_back(std::make_unique<Matrix>(random, format, out, in, gated));
            return matrices.back()->handle;
        };
        const auto vector = [&](size_t count) {
            vectors.push_back(std::make_unique<Floats>(random.numbers(count)));
            return vectors.back()->data();
        };
        constexpr size_t kQkv = (kHeads + 2 * kGroups) * kHead;
        std::vector<fastloop_decoder_layer> layers;
        for (size_t i = 0; i < kLayers; ++i)
            layers.push_back({vector(kWidth), matrix(kQkv, kWidth), vector(kQkv), matrix(kWidth, kHeads * kHead), vector(kWidth),
                              matrix(2 * kFfn, kWidth, true), matrix(kWidth, kFfn)});
        for (size_t i = 0; i < kHead / 2; ++i) inv_freq.push_back(std::pow(1e4, -2.0 * static_cast<double>(i) / kHead));
        auto p = params<fastloop_decoder_params>();
        p.width = kWidth;
        p.heads = kHeads;
        p.kv_heads = kGroups;
        p.head_width = kHead;
        p.layers = kLayers;
        p.layer = layers.data();
        p.norm_weight = vector(kWidth);
        p.head = matrix(kVocab, kWidth);
        p.inv_freq = inv_freq.data();
        p.norm_eps = 1e-6f;
        p.isa = isa;
        CHECK_OK(fastloop_decoder_create(&p, &handle));
    }
    ~Decoder() { fastloop_decoder_destroy(handle); }
};


// Sessions over one pool of pages, rows of 8 slots or tiles of 64; session b owns pages b * each .. (b + 1) * each - 1, the last
// ones first. Nothing is written yet: bytes of 0xff are NaN in every float.
struct Cache {
    int32_t format, layout;
    size_t sessions, each, page_tokens;
    std::vector<unsigned char> keys, values;
    Floats key_range;

    Cache(int32_t format, int32_t layout, size_t sessions, size_t each)
        : format(format), layout(layout), sessions(sessions), each(each), page_tokens(layout == FASTLOOP_TILES ? 64 : 8) {
        const size_t slot = Decoder::kHead * (format == FASTLOOP_FLOAT32 ? 4 : format == FASTLOOP_BFLOAT16 ? 2 : 1) +
                            (format == FASTLOOP_INT8 ? sizeof(float) : 0);
        keys.assign(Decoder::kLayers * sessions * each * page_tokens * Decoder::kGroups * slot, 0xff);
        values = keys;
        for (size_t i = 0; i < Decoder::kLayers * Decoder::kGroups * Decoder::kHead; ++i)
            key_range.push_back(i % 3 == 0 ? 1.0f : 0.25f);
    }
    int32_t page(size_t session, size_t number) const { return static_cast<int32_t>((session + 1) * each - 1 - number); }
};

// One step: rows[i] more rows for sessions of[i], whose lengths move on; hidden rows and the last row's logits of each.
struct Stepped {
    Floats hidden, logits;
};
inline Stepped step(const Decoder& d, fastloop_team* team, Cache& cache, std::vector<size_t>& lengths,
                    const std::vector<size_t>& of, const std::vector<Floats>& rows) {
    constexpr size_t kWidth = Decoder::kWidth;
    const size_t page = cache.page_tokens;
    Stepped made;
    std::vector<int64_t> positions, slots, logit_row;
    std::vector<int32_t> starts{0}, table, lens, gaps;
    for (size_t i = 0; i < of.size(); ++i) {
        const size_t count = rows[i].size() / kWidth, session = of[i];
        made.hidden.insert(made.hidden.end(), rows[i].begin(), rows[i].end());
        for (size_t r = 0; r < count; ++r) {
            const size_t at = lengths[session]++;
            positions.push_back(static_cast<int64_t>(at));
            slots.push_back(cache.page(session, at / page) * static_cast<int64_t>(page) + static_cast<int64_t>(at % page));
        }
        starts.push_back(starts.back() + static_cast<int32_t>(count));
        for (size_t n = 0; n < cache.each; ++n) table.push_back(n * page < lengths[session] ? cache.page(session, n) : -1);
        lens.push_back(static_cast<int32_t>(lengths[session]));
        gaps.insert(gaps.end(), {0, 0});
        logit_row.push_back(starts.back() - 1);
    }
    made.logits.resize(of.size() * Decoder::kVocab);
    auto p = params<fastloop_decode_params>();
    p.team = team;
    p.rows = positions.size();
    p.sequences = of.size();
    p.x = made.hidden.data();
    p.positions = positions.data();
    p.slots = slots.data();
    p.row_starts = starts.data();
    p.block_table = table.data();
    p.table_width = cache.each;
    p.kv_lens = lens.data();
    p.gaps = gaps.data();
    p.page_format = cache.format;
    p.page_layout = cache.layout;
    p.key_range = cache.key_range.data();
    p.k_pages = cache.keys.data();
    p.v_pages = cache.values.data();
    p.pages = cache.sessions * cache.each;
    p.page_tokens = page;
    p.logit_rows = logit_row.size();
    p.logit_row = logit_row.data();
    p.logits = made.logits.data();
    CHECK_OK(fastloop_decode(d.handle, &p));
    return made;
}
