// A fixed team of threads: the caller and size() - 1 workers that wait for it, first spinning, then parked.
//
// A run is one function on every thread. Inside it the threads share work item by item (Crew::each): who has done its own takes
// some of the others, so a core that others use too slows the team down by its own share only. Which thread computes an item
// changes nothing of its result.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fastloop {

// Counters from which threads take items: one per thread for every call of Crew::each in a run.
class Claims {
  public:
    // Zero for `threads` threads; those that the last run used.
    void clear(size_t threads) {
        if (threads == 1) return;
        for (size_t i = 0; i < used_; ++i) counters_[i].next.store(0, std::memory_order_relaxed);
        if (counters_.size() < kCalls * threads) counters_ = std::vector<Counter>(kCalls * threads);
        used_ = 0;
    }
    std::atomic<size_t>& at(size_t i) { return counters_[i].next; }
    // By one thread, when a run is over: how many counters it took.
    void used(size_t count) { used_ = count; }

    static constexpr size_t kCalls = 4096;  // of Crew::each in a run: some 400 layers

  private:
    struct Counter {
        alignas(64) std::atomic<size_t> next{0};
    };
    std::vector<Counter> counters_;
    size_t used_ = 0;
};

class Team {
  public:
    // pin: workers stay on one CPU each, of those this process may use.
    Team(size_t threads, bool pin);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    size_t size() const { return workers_.size() + 1; }
    Claims& claims() { return claims_; }  // inside a run

    // body(context, thread) on every thread, the caller as thread 0; returns when all are done. Runs of several callers
    // follow each other. Throws Error in a process that was forked off: its workers do not exist there.
    void run(void (*body)(void*, size_t), void* context);

    // Inside a run, by every thread: returns when all have come.
    void barrier();

  private:
    void serve(size_t thread, bool pin);
    void dismiss();

    std::mutex one_run_;
    std::vector<std::thread> workers_;
    Claims claims_;
    pid_t process_;
    void (*body_)(void*, size_t) = nullptr;
    void* context_ = nullptr;
    bool stop_ = false;
    alignas(64) std::atomic<uint32_t> generation_{0};  // runs begun
    alignas(64) std::atomic<uint32_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};  // barriers passed
};

// One thread of a run.
class Crew {
  public:
    Crew(Team& team, size_t thread) : thread(thread), team_(team) {}
    ~Crew() {
        if (thread == 0) team_.claims().used(calls_ * team_.size());
    }

    // f(item) for every item < items; behind it, all items are done. Each thread walks through a run of its own, so that the
    // memory behind it is one stream that can be fetched ahead; who has finished helps the others with the rest of theirs.
    template <class F>
    void each(size_t items, F&& f) {
        const size_t threads = team_.size(), first = calls_++ * threads;
        if (threads == 1) {
            for (size_t item = 0; item < items; ++item) f(item);
            return;
        }
        for (size_t i = 0; i < threads; ++i) {
            const size_t owner = (thread + i) % threads, begin = items * owner / threads, end = items * (owner + 1) / threads;
            std::atomic<size_t>& next = team_.claims().at(first + owner);
            for (size_t item; (item = begin + next.fetch_add(1, std::memory_order_relaxed)) < end;) f(item);
        }
        team_.barrier();
    }

    const size_t thread;

  private:
    Team& team_;
    size_t calls_ = 0;
};

// f(crew) on every thread of a team.
template <class F>
void run(Team& team, F&& f) {
    struct Context {
        Team& team;
        F& f;
    } context{team, f};
    team.run(
        [](void* raw, size_t thread) {
            Context& c = *static_cast<Context*>(raw);
            Crew crew(c.team, thread);
            c.f(crew);
        },
        &context);
}

}  // namespace fastloop
