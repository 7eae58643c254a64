#include "team.h"

#include <unistd.h>

#include <system_error>

#include "status.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace fastloop {
namespace {

constexpr int kSpins = 4000;  // some 50 us: longer than any gap inside a step, shorter than one between steps

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Returns when `value` is no longer `old`.
void wait(const std::atomic<uint32_t>& value, uint32_t old) {
    for (int spin = 0; spin < kSpins; ++spin) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause();
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

// Puts the calling thread on the `number`-th CPU of those this process may use.
void pin_to(size_t number) {
#if defined(__linux__)
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    size_t left = number % static_cast<size_t>(CPU_COUNT(&allowed));
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
        if (CPU_ISSET(cpu, &allowed) && left-- == 0) {
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            pthread_setaffinity_np(pthread_self(), sizeof one, &one);
            return;
        }
#else
    (void)number;
#endif
}

}  // namespace

Team::Team(size_t threads, bool pin) : process_(getpid()) {
    if (threads < 1 || threads > 256) fail(FASTLOOP_BAD_ARGUMENT, "team: threads is %zu; choose from 1 to 256", threads);
    try {
        workers_.reserve(threads - 1);
        for (size_t thread = 1; thread < threads; ++thread)
            workers_.emplace_back([this, thread, pin] { serve(thread, pin); });
    } catch (const std::system_error& error) {
        const size_t made = workers_.size() + 1;
        dismiss();
        fail(FASTLOOP_UNSUPPORTED, "team: this machine gave %zu of %zu threads (%s)", made, threads, error.what());
    }
}

Team::~Team() {
    if (getpid() != process_) {  // forked: the workers are not here to be joined
        for (std::thread& worker : workers_) worker.detach();
        return;
    }
    dismiss();
}

void Team::dismiss() {
    stop_ = true;
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void Team::run(void (*body)(void*, size_t), void* context) {
    if (getpid() != process_)
        fail(FASTLOOP_BAD_STATE, "team: this process was forked from the one that opened the engine; open another here");
    const std::lock_guard<std::mutex> one(one_run_);
    claims_.clear(size());
    body_ = body;
    context_ = context;
    if (!workers_.empty()) {
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
    }
    body(context, 0);
    if (!workers_.empty()) barrier();
}

void Team::barrier() {
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < size()) return wait(phase_, phase);
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
}

void Team::serve(size_t thread, bool pin) {
    if (pin) pin_to(thread);
    for (uint32_t generation = 0;; ++generation) {
        wait(generation_, generation);
        if (stop_) return;
        body_(context_, thread);
        barrier();
    }
}

}  // namespace fastloop
