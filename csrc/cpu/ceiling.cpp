// Measures the ceilings of this machine with all threads of a team at once.
#include "ceiling.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "handles.h"
#include "status.h"

using namespace fastloop;

namespace {

constexpr size_t kReadBytes = size_t{256} << 20;  // far beyond any cache of a few cores
constexpr size_t kRounds = 200000;
constexpr int kTries = 12;

// The best rate of kTries runs of work(thread), which returns how much it did.
template <class Work>
double best_rate(fastloop_team& team, Work&& work) {
    double best = 0;
    std::vector<double> done(team.team.size());
    for (int t = 0; t < kTries; ++t) {
        const auto begin = std::chrono::steady_clock::now();
        run(team.team, [&](Crew& crew) { done[crew.thread] = work(crew.thread); });
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
        double all = 0;
        for (double each : done) all += each;
        best = std::max(best, all / took.count());
    }
    return best;
}

}  // namespace

extern "C" fastloop_status fastloop_ceiling(int32_t kind, fastloop_team* team, const char* isa, double* per_second) {
    return guarded("ceiling", [&] {
        need("ceiling", "team", team);
        need("ceiling", "per_second", per_second);
        if (kind < FASTLOOP_CEILING_FLOAT32 || kind > FASTLOOP_CEILING_READ)
            fail(FASTLOOP_BAD_ARGUMENT, "ceiling: kind is %d; choose from fastloop_ceiling_kind", kind);
        const Isa chosen = choose_isa("ceiling", isa);
        if (kind != FASTLOOP_CEILING_READ) {
            *per_second = best_rate(*team, [&](size_t) { return FASTLOOP_KERNEL(chosen, ceiling_arithmetic)(kind, kRounds); });
            return;
        }
        Buffer memory(kReadBytes);
        std::memset(memory.as<unsigned char>(), 1, kReadBytes);
        const size_t each = kReadBytes / team->team.size() / 128 * 128;
        *per_second = best_rate(*team, [&](size_t thread) {
            const volatile float sum = FASTLOOP_KERNEL(chosen, ceiling_read)(memory.as<unsigned char>() + thread * each, each);
            (void)sum;
            return static_cast<double>(each);
        });
    });
}
