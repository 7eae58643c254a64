// Calls from many threads at once: on one team, on teams of their own, on one model; teams that come and go.
#include <thread>

#include "models.h"

namespace {

constexpr size_t kCallers = 3, kCalls = 10;

template <class Body>
void at_once(Body&& body) {
    std::vector<std::thread> callers;
    for (size_t i = 0; i < kCallers; ++i) callers.emplace_back([&body, i] { body(i); });
    for (std::thread& caller : callers) caller.join();
}

// Encoder and decoder share a team, as perceive and decode of an engine do; sessions share the decoder and its pool.
void one_team() {
    const Encoder encoder(FASTLOOP_INT8, nullptr);
    const Decoder decoder(FASTLOOP_INT8, nullptr);
    Random random(1);
    const Floats mel = random.numbers(2 * 16 * Encoder::kBins), rows = random.numbers(5 * Decoder::kWidth);
    Floats tokens, logits;
    {
        const Team alone(1);
        tokens = encoder.encode(alone.handle, mel, 2, 16);
        Cache cache(FASTLOOP_BFLOAT16, FASTLOOP_TILES, 1, 2);
        std::vector<size_t> lengths(1);
        for (size_t s = 0; s < kCalls; ++s) logits = step(decoder, alone.handle, cache, lengths, {0}, {rows}).logits;
    }
    const Team team(3);
    Cache cache(FASTLOOP_BFLOAT16, FASTLOOP_TILES, kCallers, 2);
    at_once([&](size_t caller) {
        std::vector<size_t> lengths(kCallers);
        Floats last;
        for (size_t s = 0; s < kCalls; ++s) {
            if (caller == 0) CHECK(same_bits(encoder.encode(team.handle, mel, 2, 16), tokens));
            last = step(decoder, team.handle, cache, lengths, {caller}, {rows}).logits;
        }
        CHECK(same_bits(last, logits));
    });
}

// Large enough for the team to be used.
void products() {
    constexpr size_t kRows = 70, kIn = 512, kOut = 512;
    Random random(2);
    const Matrix weight(random, FASTLOOP_FLOAT32, kOut, kIn);
    const Floats x = random.numbers(kRows * kIn);
    const auto product = [&](fastloop_team* team) {
        Floats out(kRows * kOut);
        auto p = params<fastloop_linear_params>();
        p.weight = weight.handle;
        p.team = team;
        p.rows = kRows;
        p.x = x.data();
        p.x_stride = kIn;
        p.out = out.data();
        p.out_stride = kOut;
        CHECK_OK(fastloop_linear(&p));
        return out;
    };
    const Floats alone = product(nullptr);
    const Team shared(2);
    at_once([&](size_t caller) {
        for (size_t i = 0; i < 3; ++i) {
            const Team own(caller + 1, true);
            CHECK(same_bits(product(i % 2 ? own.handle : shared.handle), alone));
        }
    });
}

// Messages are of the thread whose call failed.
void messages() {
    at_once([](size_t caller) {
        fastloop_team* team = nullptr;
        for (size_t i = 0; i < kCalls; ++i) {
            const size_t threads = 300 + caller;
            CHECK_FAILS(fastloop_team_create(threads, 0, &team), FASTLOOP_BAD_ARGUMENT, std::to_string(threads).c_str());
        }
    });
}

}  // namespace

int main() {
    for (size_t i = 0; i < kCalls; ++i) const Team unused(1 + i % 4);
    one_team();
    products();
    messages();
    return 0;
}
