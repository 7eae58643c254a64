// The plans: chunks and sessions give the same bits alone and in any company, on any number of threads, again and again.
#include "models.h"

namespace {

constexpr int32_t kFormats[] = {FASTLOOP_FLOAT32, FASTLOOP_BFLOAT16, FASTLOOP_INT8, FASTLOOP_INT4};

void encode(const char* isa) {
    constexpr size_t kChunks = 3, kFrames = 16, kEach = kFrames * Encoder::kBins;
    for (int32_t format : {FASTLOOP_FLOAT32, FASTLOOP_BFLOAT16, FASTLOOP_INT8}) {
        const Encoder encoder(format, isa);
        Random random(3);
        const Floats mel = random.numbers(kChunks * kEach);
        const Team one(1);
        const Floats together = encoder.encode(one.handle, mel, kChunks, kFrames);
        for (float token : together) CHECK(std::isfinite(token));
        for (size_t threads : {2, 3}) {
            const Team team(threads);
            for (int again = 0; again < 3; ++again)
                CHECK(same_bits(encoder.encode(team.handle, mel, kChunks, kFrames), together));
        }
        Floats alone;
        for (size_t c = 0; c < kChunks; ++c) {
            const Floats chunk(mel.begin() + static_cast<ptrdiff_t>(c * kEach), mel.begin() + static_cast<ptrdiff_t>((c + 1) * kEach));
            const Floats tokens = encoder.encode(one.handle, chunk, 1, kFrames);
            alone.insert(alone.end(), tokens.begin(), tokens.end());
        }
        CHECK(same_bits(alone, together));
    }
}

struct Pages {
    int32_t format, layout;
};
constexpr Pages kPages[] = {{FASTLOOP_FLOAT32, FASTLOOP_ROWS}, {FASTLOOP_BFLOAT16, FASTLOOP_ROWS}, {FASTLOOP_FLOAT32, FASTLOOP_TILES},
                            {FASTLOOP_BFLOAT16, FASTLOOP_TILES}, {FASTLOOP_INT8, FASTLOOP_TILES}};

// Four sessions of 13, 1, 13 and 2 rows a step, six steps: into the second tile of 64.
void decode(const char* isa) {
    constexpr size_t kSessions = 4, kRows[kSessions] = {13, 1, 13, 2}, kSteps = 6;
    for (int32_t format : kFormats)
        for (const Pages& pages : kPages) {
            const Decoder decoder(format, isa);
            Random random(5);
            std::vector<std::vector<Floats>> fed(kSteps);
            for (auto& rows : fed)
                for (size_t count : kRows) rows.push_back(random.numbers(count * Decoder::kWidth));
            std::vector<Stepped> together;
            for (size_t threads : {1, 2, 3}) {
                const Team team(threads);
                Cache cache(pages.format, pages.layout, kSessions, pages.layout == FASTLOOP_TILES ? 2 : 10);
                std::vector<size_t> lengths(kSessions);
                for (size_t s = 0; s < kSteps; ++s) {
                    const Stepped made = step(decoder, team.handle, cache, lengths, {0, 1, 2, 3}, fed[s]);
                    for (float y : made.logits) CHECK(std::isfinite(y));
                    if (threads == 1) together.push_back(made);
                    CHECK(same_bits(made.hidden, together[s].hidden) && same_bits(made.logits, together[s].logits));
                }
            }
            const Team team(2);
            for (size_t session = 0, first = 0; session < kSessions; first += kRows[session++] * Decoder::kWidth) {
                Cache cache(pages.format, pages.layout, kSessions, pages.layout == FASTLOOP_TILES ? 2 : 10);
                std::vector<size_t> lengths(kSessions);
                for (size_t s = 0; s < kSteps; ++s) {
                    const Stepped made = step(decoder, team.handle, cache, lengths, {session}, {fed[s][session]});
                    const float* const hidden = together[s].hidden.data() + first;
                    const float* const logits = together[s].logits.data() + session * Decoder::kVocab;
                    CHECK(std::memcmp(made.hidden.data(), hidden, made.hidden.size() * sizeof(float)) == 0);
                    CHECK(std::memcmp(made.logits.data(), logits, made.logits.size() * sizeof(float)) == 0);
                }
            }
        }
}

}  // namespace

int main() {
    for (const std::string& isa : isas()) {
        encode(isa.c_str());
        decode(isa.c_str());
    }
    return 0;
}
