// One ragged step of the language model: rows of many sequences -> hidden rows, and logits (fastloop/decoder.py is its
// readable twin).
//
//   x -> layers (RMSNorm, qkv, RoPE + append, paged attention, out, RMSNorm, gate and up, down) -> RMSNorm -> head
#include <cmath>
#include <cstring>
#include <mutex>
#include <vector>

#include "attention_plan.h"
#include "stage.h"
#include "status.h"

using namespace fastloop;

namespace {

constexpr const char* kWhere = "decoder";
constexpr size_t kAppendRows = 16;  // rows whose keys and values one thread writes into tiles: those of a listening step

struct Buffers {
    float *turn, *qkv, *q, *attended, *wide, *parts;
    unsigned char *packed, *scratch;
    size_t scratch_each;
};

}  // namespace

struct fastloop_decoder {
    fastloop_decoder_params p;
    std::vector<fastloop_decoder_layer> layers;
    std::vector<double> inv_freq;
    Isa isa;
    std::mutex one_call;
    Buffer memory;
    AttentionPlan plan;

    const Weight& weight(const fastloop_weight* w) const { return w->own.weight; }
    size_t ffn() const { return layers.empty() ? 0 : weight(layers[0].down).in; }
    size_t attended() const { return p.heads * p.head_width; }
    size_t qkv_rows() const { return (p.heads + 2 * p.kv_heads) * p.head_width; }
    Buffers place(const fastloop_decode_params& c, size_t threads);
    Pages pages_of(size_t layer, const fastloop_decode_params& c) const;
    void angles(Stage& s, const fastloop_decode_params& c, const Buffers& b) const;
    void attention(Stage& s, size_t layer, const fastloop_decode_params& c, const Buffers& b) const;
    void layer(Stage& s, size_t layer, const fastloop_decode_params& c, const Buffers& b) const;
    void logits(Stage& s, const fastloop_decode_params& c, const Buffers& b) const;
};

Buffers fastloop_decoder::place(const fastloop_decode_params& c, size_t threads) {
    const size_t n = c.rows;
    Buffers b{};
    const auto lay_out = [&](unsigned char* base) {
        Arena arena(base);
        b.turn = arena.take<float>(n * p.head_width);
        b.qkv = arena.take<float>(n * qkv_rows());
        b.q = arena.take<float>(n * attended());
        b.attended = arena.take<float>(n * attended());
        b.wide = arena.take<float>(n * ffn());
        b.parts = arena.take<float>(plan.part_floats());
        size_t packed = rows_scratch(weight(p.head), c.logit_rows);
        for (const fastloop_decoder_layer& l : layers)
            for (const fastloop_weight* w : {l.qkv, l.out, l.gate_up, l.down})
                packed = std::max(packed, rows_scratch(weight(w), n));
        b.packed = arena.take<unsigned char>(packed);
        b.scratch_each = Arena::padded(std::max(plan.scratch_bytes(p.head_width), p.width * sizeof(float)));
        b.scratch = arena.take<unsigned char>(b.scratch_each * threads);
        return arena.used();
    };
    memory.reserve(lay_out(nullptr));
    lay_out(memory.as<unsigned char>());
    return b;
}

// The pages of a layer.
Pages fastloop_decoder::pages_of(size_t layer, const fastloop_decode_params& c) const {
    Pages pages{c.page_format, c.k_pages, c.v_pages, c.page_tokens, p.kv_heads, p.head_width, c.page_layout == FASTLOOP_TILES,
                c.page_format == FASTLOOP_INT8 ? c.key_range + layer * p.kv_heads * p.head_width : nullptr};
    const size_t before = layer * pages.bytes(c.pages);
    pages.keys = static_cast<char*>(c.k_pages) + before;
    pages.values = static_cast<char*>(c.v_pages) + before;
    return pages;
}

// (cos, sin) of every row, once for all layers.
void fastloop_decoder::angles(Stage& s, const fastloop_decode_params& c, const Buffers& b) const {
    s.crew.each(c.rows, [&](size_t row) {
        turn_of(c.positions[row], inv_freq.data(), p.head_width / 2, b.turn + row * p.head_width);
    });
}

void fastloop_decoder::attention(Stage& s, size_t layer, const fastloop_decode_params& c, const Buffers& b) const {
    const Pages pages = pages_of(layer, c);
    const size_t appends = pages.tiled ? (c.rows + kAppendRows - 1) / kAppendRows * p.kv_heads : 0;
    s.crew.each(c.rows + appends, [&](size_t item) {
        if (item < c.rows) {
            FASTLOOP_KERNEL(s.isa, rope_append)
            (b.qkv + item * qkv_rows(), layers[layer].qkv_bias, b.turn + item * p.head_width, pages.tiled ? -1 : c.slots[item],
             p.heads, pages, b.q + item * attended());
            return;
        }
        const size_t first = (item - c.rows) / p.kv_heads * kAppendRows;
        FASTLOOP_KERNEL(s.isa, append_tiles)
        (b.qkv, qkv_rows(), layers[layer].qkv_bias, b.turn, c.slots, first, std::min(c.rows, first + kAppendRows), p.heads,
         (item - c.rows) % p.kv_heads, pages);
    });
    const int32_t products = c.page_format == FASTLOOP_FLOAT32 ? FASTLOOP_FLOAT32 : FASTLOOP_BFLOAT16;
    const PagedAttention call{b.q, p.heads, pages, products, b.attended, b.parts};
    plan.run(s, call);
    const Weight& out = weight(layers[layer].out);
    const Rows packed = rows_in(out, c.rows, b.packed);
    pack_rows(s, out, packed, [&](size_t row, float*) {
        plan.merge(s.isa, call, row);
        return b.attended + row * attended();
    });
    multiply(s, out, packed, {nullptr, FASTLOOP_NONE, c.x, p.width, c.x, p.width});
}

void fastloop_decoder::layer(Stage& s, size_t layer, const fastloop_decode_params& c, const Buffers& b) const {
    const fastloop_decoder_layer& l = layers[layer];
    const size_t d = p.width;
    const auto normed = [&](const float* weight) {
        return [&, weight](size_t row, float* scratch) {
            FASTLOOP_KERNEL(s.isa, rms_norm)(c.x + row * d, weight, d, p.norm_eps, scratch);
            return scratch;
        };
    };
    Rows packed = rows_in(weight(l.qkv), c.rows, b.packed);
    pack_rows(s, weight(l.qkv), packed, normed(l.norm1_weight));
    multiply(s, weight(l.qkv), packed, {nullptr, FASTLOOP_NONE, nullptr, 0, b.qkv, qkv_rows()});
    attention(s, layer, c, b);
    packed = rows_in(weight(l.gate_up), c.rows, b.packed);
    pack_rows(s, weight(l.gate_up), packed, normed(l.norm2_weight));
    multiply(s, weight(l.gate_up), packed, {nullptr, FASTLOOP_NONE, nullptr, 0, b.wide, ffn()});
    packed = rows_in(weight(l.down), c.rows, b.packed);
    pack_rows(s, weight(l.down), packed, [&](size_t row, float*) { return b.wide + row * ffn(); });
    multiply(s, weight(l.down), packed, {nullptr, FASTLOOP_NONE, c.x, d, c.x, d});
}

void fastloop_decoder::logits(Stage& s, const fastloop_decode_params& c, const Buffers& b) const {
    const Weight& head = weight(p.head);
    const Rows packed = rows_in(head, c.logit_rows, b.packed);
    pack_rows(s, head, packed, [&](size_t row, float* scratch) {
        const size_t from = static_cast<size_t>(c.logit_row[row]);
        FASTLOOP_KERNEL(s.isa, rms_norm)(c.x + from * p.width, p.norm_weight, p.width, p.norm_eps, scratch);
        return scratch;
    });
    multiply(s, head, packed, {nullptr, FASTLOOP_NONE, nullptr, 0, c.logits, head.out});
}

namespace {

void shape(const char* name, const fastloop_weight* w, size_t out, size_t in, bool gated) {
    need(kWhere, name, w);
    const Weight& own = w->own.weight;
    if (own.out != out || own.in != in || own.gated != gated)
        fail(FASTLOOP_BAD_ARGUMENT, "decoder: %s is [%zu, %zu]%s, must be [%zu, %zu]%s", name, own.out, own.in,
             own.gated ? " gated" : "", out, in, gated ? " gated" : "");
}

void check_decoder(const fastloop_decoder_params& p) {
    if (p.heads < 1 || p.kv_heads < 1 || p.heads % p.kv_heads || p.head_width < 2 || p.head_width % 2 ||
        p.head_width > 1024 || p.width < 1 || p.layers < 1)
        fail(FASTLOOP_BAD_ARGUMENT, "decoder: width %zu, heads %zu, kv_heads %zu, head_width %zu, layers %zu do not go together",
             p.width, p.heads, p.kv_heads, p.head_width, p.layers);
    need(kWhere, "head", p.head);
    shape("head", p.head, p.head->own.weight.out, p.width, false);
    need(kWhere, "norm_weight", p.norm_weight);
    need(kWhere, "inv_freq", p.inv_freq);
    need(kWhere, "layer", p.layer);
    for (size_t i = 0; i < p.layers; ++i) {
        const fastloop_decoder_layer& l = p.layer[i];
        need(kWhere, "down", l.down);
        const size_t ffn = p.layer[0].down->own.weight.in;
        shape("qkv", l.qkv, (p.heads + 2 * p.kv_heads) * p.head_width, p.width, false);
        shape("out", l.out, p.width, p.heads * p.head_width, false);
        shape("gate_up", l.gate_up, 2 * ffn, p.width, true);
        shape("down", l.down, p.width, ffn, false);
        need(kWhere, "norm1_weight", l.norm1_weight);
        need(kWhere, "norm2_weight", l.norm2_weight);
    }
}

Sequences sequences_of(const fastloop_decode_params& c) {
    return {c.sequences, c.row_starts, c.block_table, c.table_width, c.kv_lens, c.gaps};
}

void check_pages(const fastloop_decoder_params& p, const fastloop_decode_params& c) {
    if (c.page_layout != FASTLOOP_ROWS && c.page_layout != FASTLOOP_TILES)
        fail(FASTLOOP_BAD_ARGUMENT, "decoder: page_layout is %d; choose from fastloop_page_layout", c.page_layout);
    const bool tiled = c.page_layout == FASTLOOP_TILES;
    if (c.page_format < FASTLOOP_FLOAT32 || c.page_format > (tiled ? FASTLOOP_INT8 : FASTLOOP_BFLOAT16))
        fail(FASTLOOP_BAD_ARGUMENT, "decoder: page_format is %d; pages are float32 or bfloat16, tiles int8 as well", c.page_format);
    if (tiled && (c.page_tokens % kSlotTile || p.head_width % kPanel))
        fail(FASTLOOP_BAD_ARGUMENT, "decoder: pages of %zu slots, heads of %zu channels; tiles take multiples of %zu and %zu",
             c.page_tokens, p.head_width, kSlotTile, kPanel);
    if (c.page_format == FASTLOOP_INT8) need(kWhere, "key_range", c.key_range);
    const size_t align = tiled ? 4 : c.page_format == FASTLOOP_FLOAT32 ? alignof(float) : alignof(uint16_t);
    need(kWhere, "k_pages", c.k_pages, align);
    need(kWhere, "v_pages", c.v_pages, align);
}

void check_step(const fastloop_decoder_params& p, const fastloop_decode_params& c) {
    need(kWhere, "team", c.team);
    if (c.rows == 0) return;
    need(kWhere, "x", c.x);
    need(kWhere, "positions", c.positions);
    need(kWhere, "slots", c.slots);
    check_pages(p, c);
    check_sequences(kWhere, sequences_of(c), c.rows, c.pages, c.page_tokens);
    const int64_t slots = static_cast<int64_t>(c.pages * c.page_tokens);
    for (size_t row = 0; row < c.rows; ++row)
        if (c.slots[row] < -1 || c.slots[row] >= slots)
            fail(FASTLOOP_BAD_ARGUMENT, "decoder: slot of row %zu is %lld, the pool has %lld", row,
                 static_cast<long long>(c.slots[row]), static_cast<long long>(slots));
    if (c.logit_rows == 0) return;
    need(kWhere, "logit_row", c.logit_row);
    need(kWhere, "logits", c.logits);
    for (size_t i = 0; i < c.logit_rows; ++i)
        if (c.logit_row[i] < 0 || static_cast<size_t>(c.logit_row[i]) >= c.rows)
            fail(FASTLOOP_BAD_ARGUMENT, "decoder: logit_row %zu is %lld, there are %zu rows", i,
                 static_cast<long long>(c.logit_row[i]), c.rows);
}

}  // namespace

extern "C" fastloop_status fastloop_decoder_create(const fastloop_decoder_params* params, fastloop_decoder** decoder) {
    return guarded(kWhere, [&] {
        need(kWhere, "decoder", decoder);
        *decoder = nullptr;
        const fastloop_decoder_params p = adopt(kWhere, params);
        check_decoder(p);
        auto made = std::make_unique<fastloop_decoder>();
        made->p = p;
        made->layers.assign(p.layer, p.layer + p.layers);
        made->inv_freq.assign(p.inv_freq, p.inv_freq + p.head_width / 2);
        made->isa = choose_isa(kWhere, p.isa);
        *decoder = made.release();
    });
}

extern "C" void fastloop_decoder_destroy(fastloop_decoder* decoder) { delete decoder; }

extern "C" fastloop_status fastloop_decode(fastloop_decoder* decoder, const fastloop_decode_params* params) {
    return guarded(kWhere, [&] {
        need(kWhere, "decoder", decoder);
        const fastloop_decode_params c = adopt(kWhere, params);
        check_step(decoder->p, c);
        if (c.rows == 0) return;
        const std::lock_guard<std::mutex> one(decoder->one_call);
        Team& team = c.team->team;
        decoder->plan.cut(sequences_of(c), decoder->p.heads, decoder->p.kv_heads, decoder->p.head_width);
        const Buffers b = decoder->place(c, team.size());
        run(team, [&](Crew& crew) {
            Stage s{crew, decoder->isa, team.size(), b.scratch + crew.thread * b.scratch_each};
            decoder->angles(s, c, b);
            for (size_t layer = 0; layer < decoder->layers.size(); ++layer) decoder->layer(s, layer, c, b);
            if (c.logit_rows > 0) decoder->logits(s, c, b);
        });
    });
}
