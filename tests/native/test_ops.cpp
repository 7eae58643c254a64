// Every other op on every instruction set, against a few lines of float64; memory that may not be read holds NaN.
#include <algorithm>

#include "check.h"

namespace {

using Doubles = std::vector<double>;

void norms(const char* isa, size_t rows, size_t width) {
    Random random(rows * 1000 + width);
    const Floats x = random.numbers(rows * width), weight = random.numbers(width), bias = random.numbers(width);
    const Floats before = random.numbers(rows * width);
    Floats residual = before, rms(rows * width), layer(rows * width);
    auto p = params<fastloop_rms_norm_params>();
    p.rows = rows;
    p.width = p.x_stride = p.residual_stride = p.out_stride = width;
    p.x = x.data();
    p.weight = weight.data();
    p.eps = 1e-6f;
    p.residual = residual.data();
    p.out = rms.data();
    p.isa = isa;
    CHECK_OK(fastloop_rms_norm(&p));
    auto q = params<fastloop_layer_norm_params>();
    q.rows = rows;
    q.width = q.x_stride = q.out_stride = width;
    q.x = x.data();
    q.weight = weight.data();
    q.bias = bias.data();
    q.eps = 1e-5f;
    q.out = layer.data();
    q.isa = isa;
    CHECK_OK(fastloop_layer_norm(&q));
    Doubles rms_truth, layer_truth;
    for (size_t r = 0; r < rows; ++r) {
        double squares = 0, mean = 0, variance = 0;
        for (size_t k = 0; k < width; ++k) {
            const float sum = x[r * width + k] + before[r * width + k];
            CHECK(residual[r * width + k] == sum);
            squares += static_cast<double>(sum) * sum / static_cast<double>(width);
            mean += x[r * width + k] / static_cast<double>(width);
        }
        for (size_t k = 0; k < width; ++k) variance += std::pow(x[r * width + k] - mean, 2) / static_cast<double>(width);
        for (size_t k = 0; k < width; ++k) {
            rms_truth.push_back(residual[r * width + k] / std::sqrt(squares + 1e-6) * weight[k]);
            layer_truth.push_back((x[r * width + k] - mean) / std::sqrt(variance + 1e-5) * weight[k] + bias[k]);
        }
    }
    CHECK(relative_error(rms, rms_truth) <= kFloatBound);
    CHECK(relative_error(layer, layer_truth) <= kFloatBound);
}

void softmax_rows(Doubles& scores) {
    const double top = *std::max_element(scores.begin(), scores.end());
    double total = 0;
    for (double& s : scores) total += s = std::exp(s - top);
    for (double& s : scores) s /= total;
}

void block_attention(const char* isa, size_t blocks, size_t positions, size_t heads, size_t width) {
    Random random(positions * 100 + width);
    const size_t e = heads * width;
    const Floats qkv = random.numbers(blocks * positions * 3 * e);
    Floats out(blocks * positions * e);
    auto p = params<fastloop_block_attention_params>();
    p.blocks = blocks;
    p.positions = positions;
    p.heads = heads;
    p.head_width = width;
    p.qkv = qkv.data();
    p.out = out.data();
    p.isa = isa;
    CHECK_OK(fastloop_block_attention(&p));
    Doubles truth(out.size());
    for (size_t b = 0; b < blocks; ++b)
        for (size_t h = 0; h < heads; ++h)
            for (size_t t = 0; t < positions; ++t) {
                const auto at = [&](size_t row, size_t part, size_t i) {
                    return static_cast<double>(qkv[((b * positions + row) * 3 + part) * e + h * width + i]);
                };
                Doubles weights(positions);
                for (size_t s = 0; s < positions; ++s) {
                    for (size_t i = 0; i < width; ++i) weights[s] += at(t, 0, i) * at(s, 1, i);
                    weights[s] /= std::sqrt(static_cast<double>(width));
                }
                softmax_rows(weights);
                for (size_t i = 0; i < width; ++i)
                    for (size_t s = 0; s < positions; ++s)
                        truth[(b * positions + t) * e + h * width + i] += weights[s] * at(s, 2, i);
            }
    CHECK(relative_error(out, truth) <= kFloatBound);
}

// Keys and values of one KV pool in either format, NaN until they are written.
struct Pool {
    int32_t format;
    Floats floats;
    std::vector<uint16_t> halves;

    Pool(int32_t format, size_t count) : format(format) {
        if (format == FASTLOOP_FLOAT32) floats.assign(count, NAN);
        else halves.assign(count, uint16_t{0x7fff});
    }
    void* data() { return format == FASTLOOP_FLOAT32 ? static_cast<void*>(floats.data()) : halves.data(); }
    double at(size_t i) const { return format == FASTLOOP_FLOAT32 ? floats[i] : from_bfloat16(halves[i]); }
};

// rope_append writes a context into scattered pages, row by row; paged_attention of the last rows reads it.
void rope_and_attention(const char* isa, int32_t format, size_t length, size_t fresh, size_t gap, size_t gap_end) {
    constexpr size_t kHeads = 6, kGroups = 2, kWidth = 14, kPage = 5, kTurns = kWidth / 2;
    constexpr double kPageBound = 0x1p-8;  // a rounding to bfloat16
    Random random(length * 7 + fresh);
    const size_t count = (length + kPage - 1) / kPage, pages = count + 2, row_width = (kHeads + 2 * kGroups) * kWidth;
    std::vector<int32_t> table(count + 1, INT32_MAX), starts{0, static_cast<int32_t>(fresh)};
    for (size_t i = 0; i < count; ++i) table[i] = static_cast<int32_t>(pages - 1 - i);
    Pool keys(format, pages * kPage * kGroups * kWidth), values(format, pages * kPage * kGroups * kWidth);
    const Floats qkv = random.numbers(length * row_width), bias = random.numbers(row_width);
    std::vector<int64_t> positions(length), slots(length);
    std::vector<double> inv_freq(kTurns);
    for (size_t i = 0; i < kTurns; ++i) inv_freq[i] = std::pow(1e4, -static_cast<double>(i) / kTurns);
    for (size_t s = 0; s < length; ++s) {
        positions[s] = static_cast<int64_t>(3 * s + 1000000);
        const bool empty = s >= gap && s < gap_end;
        slots[s] = empty ? -1 : static_cast<int64_t>(static_cast<size_t>(table[s / kPage]) * kPage + s % kPage);
    }
    Floats q(length * kHeads * kWidth);
    auto p = params<fastloop_rope_append_params>();
    p.rows = length;
    p.heads = kHeads;
    p.kv_heads = kGroups;
    p.head_width = kWidth;
    p.qkv = qkv.data();
    p.qkv_stride = row_width;
    p.bias = bias.data();
    p.positions = positions.data();
    p.slots = slots.data();
    p.inv_freq = inv_freq.data();
    p.page_format = format;
    p.k_pages = keys.data();
    p.v_pages = values.data();
    p.pages = pages;
    p.page_tokens = kPage;
    p.q = q.data();
    p.isa = isa;
    CHECK_OK(fastloop_rope_append(&p));
    const auto turned = [&](size_t row, size_t head, size_t i) {
        const auto x = [&](size_t j) { return static_cast<double>(qkv[row * row_width + head * kWidth + j] + bias[head * kWidth + j]); };
        const double angle = static_cast<double>(positions[row]) * inv_freq[i % kTurns];
        return i < kTurns ? x(i) * std::cos(angle) - x(i + kTurns) * std::sin(angle)
                          : x(i) * std::cos(angle) + x(i - kTurns) * std::sin(angle);
    };
    const double page_bound = format == FASTLOOP_FLOAT32 ? kFloatBound : kPageBound;
    Doubles q_truth, stored;
    Floats found;
    for (size_t s = 0; s < length; ++s) {
        for (size_t h = 0; h < kHeads; ++h)
            for (size_t i = 0; i < kWidth; ++i) q_truth.push_back(turned(s, h, i));
        if (slots[s] < 0) continue;
        for (size_t i = 0; i < kGroups * kWidth; ++i) {
            const size_t at = static_cast<size_t>(slots[s]) * kGroups * kWidth + i, value = (kHeads + kGroups) * kWidth + i;
            found.push_back(static_cast<float>(keys.at(at)));
            stored.push_back(turned(s, kHeads + i / kWidth, i % kWidth));
            found.push_back(static_cast<float>(values.at(at)));
            stored.push_back(qkv[s * row_width + value] + bias[value]);
        }
    }
    CHECK(relative_error(q, q_truth) <= kFloatBound);
    CHECK(relative_error(found, stored) <= page_bound);

    const int32_t lens[] = {static_cast<int32_t>(length)};
    const int32_t gaps[] = {static_cast<int32_t>(gap), static_cast<int32_t>(gap_end)};
    const Floats queries(q.end() - static_cast<ptrdiff_t>(fresh * kHeads * kWidth), q.end());
    Floats out(queries.size());
    auto a = params<fastloop_paged_attention_params>();
    a.rows = fresh;
    a.sequences = 1;
    a.heads = kHeads;
    a.q = queries.data();
    a.page_format = format;
    a.k_pages = keys.data();
    a.v_pages = values.data();
    a.pages = pages;
    a.page_tokens = kPage;
    a.kv_heads = kGroups;
    a.head_width = kWidth;
    a.row_starts = starts.data();
    a.block_table = table.data();
    a.table_width = table.size();
    a.kv_lens = lens;
    a.gaps = gaps;
    a.out = out.data();
    a.isa = isa;
    CHECK_OK(fastloop_paged_attention(&a));
    Doubles truth(out.size());
    for (size_t r = 0; r < fresh; ++r)
        for (size_t h = 0; h < kHeads; ++h) {
            std::vector<size_t> seen;
            Doubles weights;
            const size_t group = h / (kHeads / kGroups);
            const auto place = [&](size_t s, size_t i) { return (static_cast<size_t>(slots[s]) * kGroups + group) * kWidth + i; };
            for (size_t s = 0; s <= length - fresh + r; ++s) {
                if (slots[s] < 0) continue;
                double score = 0;
                for (size_t i = 0; i < kWidth; ++i) score += queries[(r * kHeads + h) * kWidth + i] * keys.at(place(s, i));
                seen.push_back(s);
                weights.push_back(score / std::sqrt(static_cast<double>(kWidth)));
            }
            softmax_rows(weights);
            for (size_t i = 0; i < kWidth; ++i)
                for (size_t n = 0; n < seen.size(); ++n)
                    truth[(r * kHeads + h) * kWidth + i] += weights[n] * values.at(place(seen[n], i));
        }
    CHECK(relative_error(out, truth) <= kFloatBound);
}

void decide(const char* isa) {
    constexpr size_t kWidth = 37, kRows = 6, kSlots = 3;
    Random random(5);
    Floats x = random.numbers(kRows * kWidth);
    const Floats norm(kWidth, 1.0f);
    Floats head(2 * kWidth, 0.0f);
    for (size_t k = 0; k < kWidth; ++k) head[kWidth + k] = 1.0f;  // the margin is the sum of the normed row
    for (size_t r = 0; r < kRows; ++r)
        for (size_t k = 0; k < kWidth; ++k) x[r * kWidth + k] = r == 1 || r == 3 ? 1.0f : -1.0f;
    x[4 * kWidth + kWidth - 1] = NAN;
    const int64_t slots[kRows] = {0, 0, 0, 2, 2, 2};
    const Floats policy = {0.5f, 1.0f, 0.0f, NAN, NAN, NAN, 0.5f, 0.0f, 9.0f};
    std::vector<int32_t> state = {1 << 30, 1, -77, -77, 3, 1};
    Floats chance(kRows);
    std::vector<int32_t> decision(kRows);
    auto p = params<fastloop_decide_params>();
    p.rows = kRows;
    p.width = p.x_stride = kWidth;
    p.x = x.data();
    p.norm_weight = norm.data();
    p.eps = 1e-6f;
    p.head = head.data();
    p.slots = slots;
    p.slot_count = kSlots;
    p.policy = policy.data();
    p.state = state.data();
    p.p_respond = chance.data();
    p.decision = decision.data();
    p.isa = isa;
    CHECK_OK(fastloop_decide(&p));
    // Session 0 answers row 1; session 2 may not yet (9 chunks apart), then is not finite.
    const std::vector<int32_t> wanted = {FASTLOOP_SILENT, FASTLOOP_RESPOND, FASTLOOP_VOID,
                                         FASTLOOP_SILENT, FASTLOOP_NONFINITE, FASTLOOP_VOID};
    CHECK(decision == wanted);
    CHECK((state == std::vector<int32_t>{0, 1, -77, -77, 4, 1}));
    CHECK(chance[0] < 1e-6f && chance[1] > 1 - 1e-6f && std::isnan(chance[4]));
}

void sample(const char* isa, size_t vocab) {
    Random random(vocab);
    constexpr size_t kRows = 6;
    Floats logits = random.numbers(kRows * vocab, 4.0f);
    std::vector<uint8_t> banned(2 * vocab);
    for (size_t i = 0; i < banned.size(); ++i) {
        banned[i] = random.below(4) == 0;
        if (banned[i] && i >= vocab) logits[i - vocab] = NAN;  // row 0 is in phase 1: it may not look there
    }
    banned[0] = banned[vocab + vocab - 1] = 0;
    logits[vocab - 1] = 0;
    const int64_t phase[kRows] = {1, 0, 0, 0, 0, 0}, top_k[kRows] = {0, 0, 1, 3, 0, 0};
    const int64_t seed[kRows] = {1, 2, 3, 4, -5, 6}, counter[kRows] = {1, 2, 3, 4, 5, 6};
    const Floats temperature = {0, 1, 1, 0.7f, 1, 1}, top_p = {1, 1, 1, 0.9f, 1e-6f, 0.9f};
    logits[1 * vocab] = 50;  // row 1 draws what has all the weight
    std::vector<int64_t> tokens(kRows, 77);
    auto p = params<fastloop_sample_params>();
    p.rows = kRows;
    p.vocab = p.logits_stride = vocab;
    p.logits = logits.data();
    p.phases = 2;
    p.banned = banned.data();
    p.phase = phase;
    p.temperature = temperature.data();
    p.top_k = top_k;
    p.top_p = top_p.data();
    p.seed = seed;
    p.counter = counter;
    p.tokens = tokens.data();
    p.isa = isa;
    CHECK_OK(fastloop_sample(&p));
    const auto first_of_largest = [&](size_t row, int64_t in) {
        size_t best = vocab;
        for (size_t i = 0; i < vocab; ++i)
            if (!banned[static_cast<size_t>(in) * vocab + i] && (best == vocab || logits[row * vocab + i] > logits[row * vocab + best]))
                best = i;
        return static_cast<int64_t>(best);
    };
    for (size_t row : {0, 2, 4}) CHECK(tokens[row] == first_of_largest(row, phase[row]));  // greedy, top 1, no nucleus
    CHECK(tokens[1] == 0);
    for (size_t row : {3, 5})
        CHECK(tokens[row] >= 0 && tokens[row] < static_cast<int64_t>(vocab) && !banned[static_cast<size_t>(tokens[row])]);
    logits[2 * vocab] = INFINITY;
    CHECK_OK(fastloop_sample(&p));
    CHECK(tokens[2] == -1 && tokens[0] == first_of_largest(0, 1));
}

void conv_stem(const char* isa, fastloop_team* team, size_t frames) {
    constexpr size_t kBins = 9, kWidth = 21, kBlocks = 3;
    Random random(frames);
    const Matrix conv1(random, FASTLOOP_FLOAT32, kWidth, 3 * kBins), conv2(random, FASTLOOP_FLOAT32, kWidth, 3 * kWidth);
    const size_t length = (frames + 1) / 2;
    const Floats mel = random.numbers(kBlocks * frames * kBins), bias1 = random.numbers(kWidth), bias2 = random.numbers(kWidth);
    const Floats positions = random.numbers(length * kWidth);
    Floats out(kBlocks * length * kWidth);
    auto p = params<fastloop_conv_stem_params>();
    p.team = team;
    p.blocks = kBlocks;
    p.frames = frames;
    p.bins = kBins;
    p.width = kWidth;
    p.mel = mel.data();
    p.conv1 = conv1.handle;
    p.conv1_bias = bias1.data();
    p.conv2 = conv2.handle;
    p.conv2_bias = bias2.data();
    p.positions = positions.data();
    p.out = out.data();
    p.isa = isa;
    CHECK_OK(fastloop_conv_stem(&p));
    const auto convolved = [](const Doubles& x, size_t count, size_t inputs, const Matrix& w, const Floats& bias, size_t stride) {
        Doubles y;
        for (size_t t = 0; t < count; t += stride)
            for (size_t o = 0; o < w.out; ++o) {
                double sum = bias[o];
                for (size_t tap = 0; tap < 3; ++tap)
                    for (size_t c = 0; c < inputs && t + tap >= 1 && t + tap <= count; ++c)
                        sum += w.values[o * w.in + tap * inputs + c] * x[(t + tap - 1) * inputs + c];
                y.push_back(0.5 * sum * (1 + std::erf(sum / std::sqrt(2.0))));
            }
        return y;
    };
    Doubles truth;
    for (size_t b = 0; b < kBlocks; ++b) {
        const auto begin = mel.begin() + static_cast<ptrdiff_t>(b * frames * kBins);
        const Doubles x(begin, begin + static_cast<ptrdiff_t>(frames * kBins));
        const Doubles hidden = convolved(x, frames, kBins, conv1, bias1, 1);
        const Doubles y = convolved(hidden, frames, kWidth, conv2, bias2, 2);
        for (size_t i = 0; i < y.size(); ++i) truth.push_back(y[i] + positions[i]);
    }
    CHECK(relative_error(out, truth) <= kFloatBound);
}

void mel(const char* isa, size_t streams, size_t samples, int32_t edge) {
    constexpr size_t kBins = 7;
    Random random(streams + samples);
    const Floats pcm = random.numbers(streams * samples);
    Floats filters(kBins * 201), tail(streams * 360), peak(streams, -INFINITY), frames(streams * (samples / 160) * kBins, NAN);
    std::vector<int32_t> bands;
    for (size_t c = 0; c < kBins; ++c) {
        for (size_t j = 20 * c; j < 20 * c + 30; ++j) filters[c * 201 + j] = 0.02f;
        bands.insert(bands.end(), {static_cast<int32_t>(20 * c), static_cast<int32_t>(20 * c + 30)});
    }
    std::vector<int64_t> slots(streams), seen(streams, edge == FASTLOOP_EDGE_WAIT ? 40 : 0);
    for (size_t b = 0; b < streams; ++b) slots[b] = static_cast<int64_t>(streams - 1 - b);
    auto p = params<fastloop_mel_params>();
    p.batch = streams;
    p.samples = p.pcm_stride = samples;
    p.pcm = pcm.data();
    p.slots = slots.data();
    p.slot_count = streams;
    p.tail = tail.data();
    p.peak = peak.data();
    p.seen = seen.data();
    p.bins = kBins;
    p.filters = filters.data();
    p.bands = bands.data();
    p.edge = edge;
    p.clamp = FASTLOOP_CLAMP_RUNNING;
    p.frames = frames.data();
    p.isa = isa;
    for (int call = 0; call < 2; ++call) {
        CHECK_OK(fastloop_mel(&p));
        for (float y : frames) CHECK(std::isfinite(y));
        if (samples % 160 != 0) return;  // the last call of its streams
    }
    if (samples < 360) return;
    CHECK(std::memcmp(tail.data(), pcm.data() + streams * samples - 360, 360 * sizeof(float)) == 0);  // slot 0: the last stream
}

}  // namespace

int main() {
    const Team team(2);
    for (const std::string& name : isas()) {
        const char* const isa = name.c_str();
        for (size_t width : {1, 3, 4, 16, 33, 100})
            for (size_t rows : {1, 5}) norms(isa, rows, width);
        for (size_t positions : {1, 20, 33, 64, 100})
            for (size_t width : {5, 32, 40}) block_attention(isa, 2, positions, 2, width);
        for (int32_t format : {FASTLOOP_FLOAT32, FASTLOOP_BFLOAT16}) {
            rope_and_attention(isa, format, 13, 13, 13, 13);
            rope_and_attention(isa, format, 70, 1, 3, 9);
            rope_and_attention(isa, format, 131, 40, 7, 77);
            rope_and_attention(isa, format, 2100, 3, 11, 12);  // three spans
        }
        decide(isa);
        for (size_t vocab : {1, 2, 15, 16, 17, 100, 1000, 70000}) sample(isa, vocab);
        for (size_t frames : {1, 2, 7, 40}) conv_stem(isa, frames % 2 ? team.handle : nullptr, frames);
        for (size_t samples : {160, 170, 480, 6400})
            for (size_t streams : {1, 3})
                for (int32_t edge : {FASTLOOP_EDGE_REFLECT, FASTLOOP_EDGE_WAIT}) mel(isa, streams, samples, edge);
    }
    return 0;
}
