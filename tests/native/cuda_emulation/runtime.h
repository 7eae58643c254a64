// CUDA blocks on a CPU: every thread is a fiber, and one of those that can go on is chosen at a time.
//
// A fiber runs until it waits (barrier, warp exchange, poll), so between two waits nothing interleaves. Which fiber goes on
// depends on a seed: 0, the one that has waited longest; odd, any; even, the one of the highest priority, drawn at its start
// (for its block, too, where 4 divides the seed) and now and then anew, so that some lag behind all others. A missing barrier
// is a wrong result under some seed, a barrier that not all threads reach is reported as a deadlock. Shared memory begins as 0xFF bytes: NaN, or -1.
// Blocks run `resident` clusters at a time, in an order drawn from the seed.
#pragma once

#include <algorithm>
#include <csetjmp>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

namespace cuda_emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kMostShared = 232448;  // bytes a block may have on sm_90
constexpr size_t kSharedAlignment = 1024;
constexpr size_t kCanary = 256;  // bytes behind the dynamic shared memory that nobody may touch
constexpr int kPoison = 0xFF;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 512 << 10;
#else
constexpr size_t kStack = 256 << 10;
#endif
constexpr uint64_t kMostPolls = 20'000'000;  // without any other progress: a livelock

struct Fiber;

// Threads that wait for each other. arrive() may be apart from wait().
struct Barrier {
    unsigned arrived = 0;
    uint64_t phase = 0;
    std::vector<Fiber*> waiting;
};

// What the lanes of one mask hand each other; two turns, so that the next one never overwrites what is still read.
struct Exchange {
    unsigned mask = 0;
    Barrier barrier;
    alignas(16) unsigned char value[2][kWarp][64];
};

struct Warp {
    unsigned live = 0;  // lanes that exist and have not returned
    std::deque<Exchange> exchanges;
};

struct Copy {
    void* to;
    const void* from;
    size_t read, written;     // bytes; the rest is zero
    uint64_t* mbarrier;       // of a bulk copy, or nullptr
};

struct Cluster;

struct Block {
    Cluster* cluster;
    uint3 index;
    unsigned rank;     // in its cluster
    unsigned threads, live;
    Barrier barriers[16];
    unsigned named_count[16] = {};  // threads of a named barrier, while some wait
    std::vector<Warp> warps;
    std::vector<Copy> bulk;  // copies that nobody has waited for yet
    unsigned char* shared = nullptr;
    std::vector<unsigned char> statics;  // its __shared__ variables, while another block runs
    int votes = 0, voted[2] = {};
};

struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    unsigned threads = 0, live = 0;
    Barrier barrier;
};

struct Fiber {
    Block* block = nullptr;
    uint3 thread{};
    unsigned number = 0;  // in its block
    bool started = false, done = false;
    uint64_t priority = 0;
    uint64_t cluster_token = 0;
    std::vector<Copy> open;               // cp.async not yet committed
    std::deque<std::vector<Copy>> groups;  // committed, oldest first
    unsigned char* stack = nullptr;
    jmp_buf jump;
    ucontext_t context;
    void* fake_stack = nullptr;
};

struct Configuration {
    dim3 grid, block;
    unsigned cluster = 1;  // blocks of a cluster, along x
    size_t shared = 0;     // bytes
    uint64_t seed = 0;
    unsigned resident = 1;  // clusters that run at the same time
};

class Machine;
inline Machine* machine = nullptr;
inline thread_local volatile char statics_exist;  // touched, so that the variables of this thread are there

inline int find_statics(dl_phdr_info* info, size_t, void* found) {
    auto& range = *static_cast<std::pair<unsigned char*, size_t>*>(found);
    const auto here = reinterpret_cast<uintptr_t>(&find_statics);
    bool ours = false;
    size_t size = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& part = info->dlpi_phdr[i];
        const uintptr_t begin = info->dlpi_addr + part.p_vaddr;
        if (part.p_type == PT_LOAD && here >= begin && here < begin + part.p_memsz) ours = true;
        if (part.p_type == PT_TLS) size = part.p_memsz;
    }
    if (!ours) return 0;
    range = {static_cast<unsigned char*>(info->dlpi_tls_data), info->dlpi_tls_data ? size : 0};
    return 1;
}

class Machine {
  public:
    Machine(const Configuration& c, void (*kernel)(void**), void** arguments)
        : now(nullptr), config_(c), kernel_(kernel), arguments_(arguments), random_(c.seed * 2 + 1) {}

    ~Machine() {
        for (auto* stack : stacks_) munmap(stack, kStack);
    }

    // Runs the whole grid. The problem, or "".
    const std::string& run() {
        if (!check()) return problem_;
        machine = this;
        statics_exist = 1;
        dl_iterate_phdr(find_statics, &statics_);
        const unsigned count = config_.grid.x * config_.grid.y * config_.grid.z / config_.cluster;
        std::vector<unsigned> order(count);
        for (unsigned i = 0; i < count; ++i) order[i] = i;
        if (config_.seed)
            for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
        unsigned next = 0;
        while (problem_.empty() && (next < count || !clusters_.empty())) {
            while (next < count && clusters_.size() < config_.resident) start(order[next++]);
            step();
        }
        for (auto& cluster : clusters_) release(*cluster);
        machine = nullptr;
        return problem_;
    }

    Fiber* now;
    const Configuration& configuration() const { return config_; }
    // The fiber that runs stops until somebody wakes it.
    void block(std::vector<Fiber*>& waiting) {
        waiting.push_back(now);
        to_machine();
    }
    void wake(std::vector<Fiber*>& waiting) {
        for (Fiber* fiber : waiting) {
            if (by_priority() && draw(32) == 0) fiber->priority = (1ull << 61) + draw(1ull << 31);  // now it lags
            push(fiber);
        }
        waiting.clear();
        polls_ = 0;
    }
    // Others may go on. A fiber that polls is the last one whose turn it is.
    void poll() {
        if (++polls_ > kMostPolls) fail("a loop polls what never comes (block %u)", now->block->index.x);
        now->priority = --least_;
        yield();
    }
    void yield() {
        push(now);
        to_machine();
    }
    // Others go on; in every fourth case for a while, those that poll among them.
    void lag() {
        if (!config_.seed) return;
        if (by_priority() && draw(4) == 0) now->priority = least_ - 1000;
        yield();
    }
    void progress() { polls_ = 0; }

    uint64_t arrive(Barrier& barrier, unsigned expected) {
        const uint64_t token = barrier.phase;
        if (++barrier.arrived >= expected) complete(barrier);
        return token;
    }
    void wait(Barrier& barrier, uint64_t token) {
        if (barrier.phase == token) block(barrier.waiting);
        else yield();
    }
    void complete(Barrier& barrier) {
        barrier.arrived = 0;
        ++barrier.phase;
        wake(barrier.waiting);
    }

    // Ends the launch; the first problem is the one reported.
    [[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char* format, ...) {
        char text[512];
        va_list list;
        va_start(list, format);
        vsnprintf(text, sizeof text, format, list);
        va_end(list);
        report(text);
        now->done = true;
        to_machine();
        abort();  // nobody switches to it again
    }

    uint64_t draw(uint64_t below) {  // xorshift64*
        random_ ^= random_ >> 12, random_ ^= random_ << 25, random_ ^= random_ >> 27;
        return (random_ * 0x2545F4914F6CDD1Dull >> 11) % below;
    }

    bool is_shared(const void* at, size_t bytes) const {
        const auto* p = static_cast<const unsigned char*>(at);
        const auto within = [&](const unsigned char* begin, size_t size) { return p >= begin && p + bytes <= begin + size; };
        if (statics_.second && within(statics_.first, statics_.second)) return true;
        for (const auto& block : now->block->cluster->blocks)
            if (config_.shared && within(block->shared, config_.shared)) return true;
        return false;
    }

  private:
    bool by_priority() const { return config_.seed && config_.seed % 2 == 0; }
    static bool lower(const Fiber* a, const Fiber* b) { return a->priority < b->priority; }
    void push(Fiber* fiber) {
        ready_.push_back(fiber);
        if (by_priority()) std::push_heap(ready_.begin(), ready_.end(), lower);
    }

    bool check() {
        const auto& c = config_;
        const unsigned threads = c.block.x * c.block.y * c.block.z;
        if (threads < 1 || threads > 1024) report("a block of " + std::to_string(threads) + " threads");
        if (c.grid.x < 1 || c.grid.y < 1 || c.grid.z < 1) report("a grid of no blocks");
        if (c.grid.y > 65535 || c.grid.z > 65535) report("a grid of more than 65535 blocks along y or z");
        if (c.cluster < 1 || c.cluster > 16 || c.grid.x % c.cluster) report("the grid is no multiple of the cluster");
        if (c.shared > kMostShared) report(std::to_string(c.shared) + " bytes of shared memory");
        return problem_.empty();
    }

    void report(const std::string& problem) {
        if (problem_.empty()) problem_ = problem;
    }

    void start(unsigned number) {
        auto cluster = std::make_unique<Cluster>();
        const auto& c = config_;
        const unsigned threads = c.block.x * c.block.y * c.block.z;
        cluster->threads = cluster->live = threads * c.cluster;
        for (unsigned rank = 0; rank < c.cluster; ++rank) {
            auto block = std::make_unique<Block>();
            const unsigned at = number * c.cluster + rank;
            block->cluster = cluster.get();
            block->index = {at % c.grid.x, at / c.grid.x % c.grid.y, at / c.grid.x / c.grid.y};
            block->rank = rank;
            block->threads = block->live = threads;
            block->warps.resize((threads + kWarp - 1) / kWarp);
            void* shared = nullptr;
            if (posix_memalign(&shared, kSharedAlignment, c.shared + kCanary)) abort();
            block->shared = static_cast<unsigned char*>(shared);
            memset(shared, kPoison, c.shared);
            memset(block->shared + c.shared, 0xA5, kCanary);
            block->statics.assign(statics_.second, kPoison);
            const uint64_t rank_of_block = draw(1 << 20);
            for (unsigned t = 0; t < threads; ++t) {
                auto fiber = std::make_unique<Fiber>();
                fiber->block = block.get();
                fiber->number = t;
                fiber->thread = {t % c.block.x, t / c.block.x % c.block.y, t / c.block.x / c.block.y};
                block->warps[t / kWarp].live |= 1u << t % kWarp;
                fiber->stack = take_stack();
                fiber->priority = (1ull << 62) + (config_.seed % 4 ? 0 : rank_of_block << 32) + draw(1ull << 31);
                push(fiber.get());
                fibers_.push_back(std::move(fiber));
            }
            cluster->blocks.push_back(std::move(block));
        }
        clusters_.push_back(std::move(cluster));
    }

    // One fiber runs until it waits.
    void step() {
        if (ready_.empty()) return report(deadlock());
        Fiber* fiber;
        if (by_priority()) {
            std::pop_heap(ready_.begin(), ready_.end(), lower);
            fiber = ready_.back();
            ready_.pop_back();
        } else if (config_.seed) {
            const size_t i = draw(ready_.size());
            std::swap(ready_[i], ready_.back());
            fiber = ready_.back();
            ready_.pop_back();
        } else {
            fiber = ready_.front();
            ready_.pop_front();
        }
        if (fiber->block != installed_) install(fiber->block);
        now = fiber;
        switch_to(fiber);
        if (fiber->done && problem_.empty()) finish(fiber);
    }

    void install(Block* block) {
        if (statics_.second) {
            if (installed_) memcpy(installed_->statics.data(), statics_.first, statics_.second);
            memcpy(statics_.first, block->statics.data(), statics_.second);
        }
        installed_ = block;
    }

    // A thread has returned: those that waited for it alone go on.
    void finish(Fiber* fiber) {
        Block& block = *fiber->block;
        Cluster& cluster = *block.cluster;
        stacks_.push_back(fiber->stack);
        fiber->stack = nullptr;
        Warp& warp = block.warps[fiber->number / kWarp];
        warp.live &= ~(1u << fiber->number % kWarp);
        for (auto& exchange : warp.exchanges)
            if (exchange.barrier.arrived && exchange.barrier.arrived >= popcount(exchange.mask & warp.live))
                complete(exchange.barrier);
        --block.live;
        if (!block.live) memset(block.shared, kPoison, config_.shared);  // others of its cluster may read it no more
        if (block.barriers[0].arrived && block.barriers[0].arrived >= block.live) complete(block.barriers[0]);
        progress();
        if (--cluster.live) {
            if (cluster.barrier.arrived && cluster.barrier.arrived >= cluster.live) complete(cluster.barrier);
            return;
        }
        for (size_t i = 0; i < clusters_.size(); ++i)
            if (clusters_[i].get() == &cluster) {
                release(cluster);
                std::erase_if(fibers_, [&](const auto& f) { return f->block->cluster == &cluster; });
                clusters_.erase(clusters_.begin() + static_cast<ptrdiff_t>(i));
                return;
            }
    }

    static unsigned popcount(unsigned x) { return static_cast<unsigned>(__builtin_popcount(x)); }

    void release(Cluster& cluster) {
        for (auto& block : cluster.blocks) {
            for (size_t i = 0; i < kCanary; ++i)
                if (block->shared[config_.shared + i] != 0xA5) {
                    report("shared memory was written behind its end, in block " + std::to_string(block->index.x));
                    break;
                }
            free(block->shared);
            if (installed_ == block.get()) installed_ = nullptr;
        }
    }

    std::string deadlock() const {
        std::string text = "deadlock:";
        for (const auto& cluster : clusters_)
            for (const auto& block : cluster->blocks) {
                text += " block " + std::to_string(block->index.x) + " has " + std::to_string(block->live) + " threads;";
                for (int i = 0; i < 16; ++i)
                    if (block->barriers[i].arrived)
                        text += " " + std::to_string(block->barriers[i].arrived) + " wait at barrier " + std::to_string(i) + ";";
                for (size_t w = 0; w < block->warps.size(); ++w)
                    for (const auto& e : block->warps[w].exchanges)
                        if (e.barrier.arrived)
                            text += " " + std::to_string(e.barrier.arrived) + " lanes of warp " + std::to_string(w) + " wait;";
            }
        return text;
    }

    unsigned char* take_stack() {
        if (!stacks_.empty()) {
            auto* stack = stacks_.back();
            stacks_.pop_back();
            return stack;
        }
        void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) abort();
        mprotect(stack, 4096, PROT_NONE);  // an overflow ends here
        return static_cast<unsigned char*>(stack);
    }

    static void enter() {
        Machine& m = *machine;
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(nullptr, &m.own_bottom_, &m.own_size_);
#endif
        m.kernel_(m.arguments_);
        m.now->done = true;
        m.to_machine();
    }

#if defined(__SANITIZE_ADDRESS__)
    void switch_to(Fiber* fiber) {
        if (!fiber->started) {
            fiber->started = true;
            prepare(fiber);
        }
        void* fake = nullptr;
        __sanitizer_start_switch_fiber(&fake, fiber->stack + 4096, kStack - 4096);
        swapcontext(&own_, &fiber->context);
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
    }
    void to_machine() {
        Fiber* fiber = now;
        __sanitizer_start_switch_fiber(fiber->done ? nullptr : &fiber->fake_stack, own_bottom_, own_size_);
        swapcontext(&fiber->context, &own_);
        __sanitizer_finish_switch_fiber(fiber->fake_stack, &own_bottom_, &own_size_);
    }
#else
    // swapcontext asks the kernel for the signal mask at every switch; after the first entry a jump does without.
    void switch_to(Fiber* fiber) {
        if (_setjmp(own_jump_)) return;
        if (fiber->started) _longjmp(fiber->jump, 1);
        fiber->started = true;
        prepare(fiber);
        setcontext(&fiber->context);
    }
    void to_machine() {
        Fiber* fiber = now;
        if (!_setjmp(fiber->jump)) _longjmp(own_jump_, 1);
    }
#endif

    void prepare(Fiber* fiber) {
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack + 4096;
        fiber->context.uc_stack.ss_size = kStack - 4096;
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, &Machine::enter, 0);
    }

    const Configuration config_;
    void (*kernel_)(void**);
    void** arguments_;
    uint64_t random_, polls_ = 0;
    uint64_t least_ = 1ull << 60;  // priorities of those that have polled, in turn
    std::string problem_;
    std::deque<Fiber*> ready_;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::vector<std::unique_ptr<Cluster>> clusters_;
    std::vector<unsigned char*> stacks_;
    Block* installed_ = nullptr;
    std::pair<unsigned char*, size_t> statics_{nullptr, 0};
    jmp_buf own_jump_;
    ucontext_t own_;
    const void* own_bottom_ = nullptr;
    size_t own_size_ = 0;
};

inline Fiber& fiber() { return *machine->now; }
inline unsigned lane() { return fiber().number % kWarp; }
inline Warp& warp() { return fiber().block->warps[fiber().number / kWarp]; }

// Every lane of `mask` hands in `bytes` bytes and gets those of all.
inline const unsigned char (*exchange(unsigned mask, const void* value, size_t bytes))[64] {
    Warp& own = warp();
    if (!(mask >> lane() & 1)) machine->fail("lane %u is not in the mask %08x it waits with", lane(), mask);
    if (bytes > 64) machine->fail("an exchange of %zu bytes", bytes);
    Exchange* found = nullptr;
    for (auto& e : own.exchanges)
        if (e.mask == mask) found = &e;
    if (!found) {
        found = &own.exchanges.emplace_back();
        found->mask = mask;
        memset(found->value, kPoison, sizeof found->value);
    }
    auto& turn = found->value[found->barrier.phase % 2];
    memcpy(turn[lane()], value, bytes);
    const unsigned expected = static_cast<unsigned>(__builtin_popcount(mask & own.live));
    machine->wait(found->barrier, machine->arrive(found->barrier, expected));
    return turn;
}

}  // namespace cuda_emulation
