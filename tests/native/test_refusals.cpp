// Calls that cannot be served: each says what is wrong, by name, and changes nothing.
#include "models.h"

namespace {

void weights() {
    const Floats data(8 * 8, 1.0f);
    fastloop_weight* made = nullptr;
    auto p = params<fastloop_weight_params>();
    p.out = p.in = 8;
    p.data = data.data();
    CHECK_FAILS(fastloop_weight_create(&p, nullptr), FASTLOOP_BAD_ARGUMENT, "weight is NULL");
    CHECK_FAILS(fastloop_weight_create(nullptr, &made), FASTLOOP_BAD_ARGUMENT, "params is NULL");
    p.struct_size = sizeof p + 8;
    CHECK_FAILS(fastloop_weight_create(&p, &made), FASTLOOP_UNSUPPORTED, "struct_size");
    p.struct_size = sizeof p;
    p.in = 0;
    CHECK_FAILS(fastloop_weight_create(&p, &made), FASTLOOP_BAD_ARGUMENT, "[8, 0]");
    p.in = 8;
    p.format = 9;
    CHECK_FAILS(fastloop_weight_create(&p, &made), FASTLOOP_BAD_ARGUMENT, "format is 9");
    p.format = FASTLOOP_INT8;
    CHECK_FAILS(fastloop_weight_create(&p, &made), FASTLOOP_BAD_ARGUMENT, "quantise it first");
    p.source = FASTLOOP_INT8;
    CHECK_FAILS(fastloop_weight_create(&p, &made), FASTLOOP_BAD_ARGUMENT, "scale is NULL");
    p.in = 65537;
    CHECK_FAILS(fastloop_weight_create(&p, &made), FASTLOOP_BAD_ARGUMENT, "65537 inputs");
    p.in = 8;
    p.format = p.source = FASTLOOP_INT4;
    p.group = 32;
    CHECK_FAILS(fastloop_weight_create(&p, &made), FASTLOOP_BAD_ARGUMENT, "group is 32, inputs 8");
    p.format = p.source = FASTLOOP_FLOAT32;
    p.gated = 1;
    p.out = 7;
    CHECK_FAILS(fastloop_weight_create(&p, &made), FASTLOOP_BAD_ARGUMENT, "even number of rows, got 7");
    p.gated = 0;
    p.out = SIZE_MAX / 4;
    CHECK_FAILS(fastloop_weight_create(&p, &made), FASTLOOP_BAD_ARGUMENT, "larger than memory");
    p.out = 7;
    p.data = reinterpret_cast<const char*>(data.data()) + 1;
    CHECK_FAILS(fastloop_weight_create(&p, &made), FASTLOOP_BAD_ARGUMENT, "data is not aligned to 4 bytes");
    CHECK(made == nullptr);
    fastloop_weight_destroy(nullptr);
    CHECK(fastloop_weight_bytes(nullptr) == 0);
}

void linears() {
    Random random(1);
    const Matrix weight(random, FASTLOOP_FLOAT32, 8, 8);
    const Floats x(3 * 8, 1.0f);
    Floats out(3 * 8, 77.0f);
    auto p = params<fastloop_linear_params>();
    p.rows = 3;
    p.x = x.data();
    p.x_stride = p.out_stride = 8;
    p.out = out.data();
    CHECK_FAILS(fastloop_linear(&p), FASTLOOP_BAD_ARGUMENT, "linear: weight is NULL");
    p.weight = weight.handle;
    p.isa = "neon9";
    CHECK_FAILS(fastloop_linear(&p), FASTLOOP_UNSUPPORTED, "instruction set \"neon9\"");
    p.isa = nullptr;
    p.x_stride = 7;
    CHECK_FAILS(fastloop_linear(&p), FASTLOOP_BAD_ARGUMENT, "rows of x are 7 apart and 8 wide");
    p.x_stride = 8;
    p.out_stride = 0;
    CHECK_FAILS(fastloop_linear(&p), FASTLOOP_BAD_ARGUMENT, "rows of out are 0 apart");
    p.out_stride = 8;
    p.epilogue = 5;
    CHECK_FAILS(fastloop_linear(&p), FASTLOOP_BAD_ARGUMENT, "epilogue is 5");
    p.epilogue = FASTLOOP_NONE;
    p.out = reinterpret_cast<float*>(reinterpret_cast<char*>(out.data()) + 2);
    CHECK_FAILS(fastloop_linear(&p), FASTLOOP_BAD_ARGUMENT, "out is not aligned to 4 bytes");
    p.out = out.data();
    p.x = nullptr;
    CHECK_FAILS(fastloop_linear(&p), FASTLOOP_BAD_ARGUMENT, "x is NULL");
    for (float y : out) CHECK(y == 77.0f);
    p.rows = 0;
    CHECK_OK(fastloop_linear(&p));
}

void attentions() {
    auto b = params<fastloop_block_attention_params>();
    b.blocks = b.positions = b.head_width = 1;
    CHECK_FAILS(fastloop_block_attention(&b), FASTLOOP_BAD_ARGUMENT, "0 heads");
    b.heads = 1;
    CHECK_FAILS(fastloop_block_attention(&b), FASTLOOP_BAD_ARGUMENT, "qkv is NULL");

    const Floats q(4 * 4);
    Floats pages(3 * 2 * 4), out(4 * 4);
    std::vector<int32_t> starts = {0, 2, 4}, table = {0, 1, 2, 2}, lens = {3, 4}, gaps = {0, 0, 1, 2};
    auto p = params<fastloop_paged_attention_params>();
    p.rows = 4;
    p.sequences = 2;
    p.heads = p.kv_heads = 1;
    p.head_width = 4;
    p.q = q.data();
    p.k_pages = p.v_pages = pages.data();
    p.pages = 3;
    p.page_tokens = 2;
    p.row_starts = starts.data();
    p.block_table = table.data();
    p.table_width = 2;
    p.kv_lens = lens.data();
    p.gaps = gaps.data();
    p.out = out.data();
    CHECK_OK(fastloop_paged_attention(&p));
    const auto spoilt = [&](int32_t& value, int32_t bad, const char* told) {
        const int32_t kept = value;
        value = bad;
        CHECK_FAILS(fastloop_paged_attention(&p), FASTLOOP_BAD_ARGUMENT, told);
        value = kept;
    };
    spoilt(starts[0], 1, "row_starts must go from 0 to the 4 rows");
    spoilt(starts[1], 5, "sequence 0 has rows [0, 5)");
    spoilt(starts[2], 3, "row_starts");
    spoilt(table[1], 3, "block_table holds 3 as page 1 of sequence 0");
    spoilt(table[2], -1, "block_table holds -1");
    spoilt(lens[0], 1, "sequence 0 has rows [0, 2) of 4 and 1 of 4 slots");
    spoilt(lens[1], 5, "5 of 4 slots");
    spoilt(gaps[0], -1, "the gap [-1, 0) of sequence 0");
    spoilt(gaps[3], 3, "the gap [1, 3) of sequence 1 must leave out its new slots [2, 4)");
    p.kv_heads = 3;
    CHECK_FAILS(fastloop_paged_attention(&p), FASTLOOP_BAD_ARGUMENT, "1 heads over 3 KV heads");
    p.kv_heads = 1;
    p.page_format = FASTLOOP_INT8;
    CHECK_FAILS(fastloop_paged_attention(&p), FASTLOOP_BAD_ARGUMENT, "page_format is 2");
}

void rows() {
    const Floats x(16);
    Floats out(16, 77.0f);
    auto n = params<fastloop_rms_norm_params>();
    n.rows = 2;
    n.width = n.x_stride = n.out_stride = 8;
    n.x = x.data();
    n.out = out.data();
    CHECK_FAILS(fastloop_rms_norm(&n), FASTLOOP_BAD_ARGUMENT, "weight is NULL");
    auto l = params<fastloop_layer_norm_params>();
    l.rows = 2;
    l.width = l.x_stride = 8;
    l.x = l.weight = l.bias = x.data();
    l.out = out.data();
    CHECK_FAILS(fastloop_layer_norm(&l), FASTLOOP_BAD_ARGUMENT, "rows of out are 0 apart and 8 wide");
    for (float y : out) CHECK(y == 77.0f);

    const int64_t zeros[2] = {0, 0}, far[2] = {0, 6};
    const double freq[1] = {1.0};
    Floats pages(6 * 2, 77.0f), q(4);
    auto r = params<fastloop_rope_append_params>();
    r.rows = 2;
    r.heads = r.kv_heads = 1;
    r.head_width = 2;
    r.qkv = x.data();
    r.qkv_stride = 6;
    r.positions = zeros;
    r.slots = far;
    r.inv_freq = freq;
    r.k_pages = r.v_pages = pages.data();
    r.pages = 3;
    r.page_tokens = 2;
    r.q = q.data();
    CHECK_FAILS(fastloop_rope_append(&r), FASTLOOP_BAD_ARGUMENT, "slot of row 1 is 6, the pool has 6");
    r.head_width = 3;
    CHECK_FAILS(fastloop_rope_append(&r), FASTLOOP_BAD_ARGUMENT, "of even width");
    for (float y : pages) CHECK(y == 77.0f);
}

void choices() {
    const Floats x(8);
    Floats chance(1);
    const int64_t slot = 2;
    std::vector<int32_t> state(4, 5), decision(1);
    auto d = params<fastloop_decide_params>();
    d.rows = 1;
    d.width = 4;
    d.x = d.norm_weight = d.head = d.policy = x.data();
    d.slots = &slot;
    d.slot_count = 2;
    d.state = state.data();
    d.p_respond = chance.data();
    d.decision = decision.data();
    CHECK_FAILS(fastloop_decide(&d), FASTLOOP_BAD_STATE, "slot 2 of row 0 is outside the 2 slots");
    CHECK(state == std::vector<int32_t>(4, 5));
    const uint8_t banned[4] = {};
    const int64_t phase = 1, zero = 0;
    const float one = 1;
    int64_t token = 77;
    auto s = params<fastloop_sample_params>();
    s.rows = s.phases = 1;
    s.vocab = 4;
    s.logits = x.data();
    s.banned = banned;
    s.phase = &phase;
    s.temperature = s.top_p = &one;
    s.top_k = s.seed = s.counter = &zero;
    s.tokens = &token;
    CHECK_FAILS(fastloop_sample(&s), FASTLOOP_BAD_ARGUMENT, "phase 1 of row 0 is outside the 1 rows");
    s.vocab = 0;
    CHECK_FAILS(fastloop_sample(&s), FASTLOOP_BAD_ARGUMENT, "vocab is 0");
    CHECK(token == 77);
}

// Pages that the decoder cannot have.
void pages() {
    const Decoder decoder(FASTLOOP_FLOAT32, nullptr);
    const Team team(1);
    Floats x(Decoder::kWidth);
    const int64_t zero = 0;
    const int32_t starts[] = {0, 1}, table = 0, length = 1, gap[] = {0, 0};
    Floats memory(64 * Decoder::kGroups * Decoder::kHead * Decoder::kLayers, 77.0f);
    auto p = params<fastloop_decode_params>();
    p.team = team.handle;
    p.rows = p.sequences = p.table_width = p.pages = 1;
    p.page_tokens = 64;
    p.x = x.data();
    p.positions = p.slots = &zero;
    p.row_starts = starts;
    p.block_table = &table;
    p.kv_lens = &length;
    p.gaps = gap;
    p.k_pages = p.v_pages = memory.data();
    const auto refused = [&](const char* told) { CHECK_FAILS(fastloop_decode(decoder.handle, &p), FASTLOOP_BAD_ARGUMENT, told); };
    p.page_layout = 2;
    refused("page_layout is 2");
    p.page_layout = FASTLOOP_ROWS;
    p.page_format = FASTLOOP_INT8;
    refused("page_format is 2");
    p.page_layout = FASTLOOP_TILES;
    refused("key_range is NULL");
    p.page_format = FASTLOOP_INT4;
    refused("page_format is 3");
    p.page_format = FASTLOOP_FLOAT32;
    p.page_tokens = 32;
    refused("pages of 32 slots, heads of 32 channels; tiles take multiples of 64 and 32");
    for (float y : memory) CHECK(y == 77.0f);
}

}  // namespace

int main() {
    fastloop_team* team = nullptr;
    CHECK_FAILS(fastloop_team_create(0, 0, &team), FASTLOOP_BAD_ARGUMENT, "threads is 0");
    CHECK_FAILS(fastloop_team_create(257, 0, &team), FASTLOOP_BAD_ARGUMENT, "threads is 257");
    CHECK(team == nullptr);
    fastloop_team_destroy(nullptr);
    weights();
    linears();
    attentions();
    rows();
    choices();
    pages();
    return 0;
}
