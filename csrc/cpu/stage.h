// The parts that a pass of the encoder and a step of the decoder are made of: each shares its items out among a crew.
#pragma once

#include <algorithm>

#include "handles.h"
#include "isa.h"
#include "rows.h"

namespace fastloop {

// What every stage needs: the instruction set, the threads, and a piece of scratch for each thread.
struct Stage {
    Crew& crew;
    Isa isa;
    size_t threads;
    unsigned char* scratch;  // of this thread
};

// A call of one op takes a team only for work (multiply-adds) of some 150 us: waking a thread costs up to 50.
inline fastloop_team* worth(fastloop_team* team, size_t work) { return work < (size_t{1} << 24) ? nullptr : team; }

// body(stage) on every thread of a team, or on this one alone where there is none. `scratch` has `each` bytes for each thread.
template <class Body>
void staged(fastloop_team* team, Isa isa, unsigned char* scratch, size_t each, Body&& body) {
    const auto on = [&](Crew& crew, size_t threads) {
        Stage stage{crew, isa, threads, scratch + crew.thread * each};
        body(stage);
    };
    if (team != nullptr) {
        run(team->team, [&](Crew& crew) { on(crew, team->team.size()); });
        return;
    }
    Team alone(1, false);
    Crew crew(alone, 0);
    on(crew, 1);
}

inline size_t threads_of(const fastloop_team* team) { return team == nullptr ? 1 : team->team.size(); }

// rows of x -> packed for `w`, each first through prepare(row, x): it returns where the row to pack is.
template <class Prepare>
void pack_rows(Stage& s, const Weight& w, const Rows& to, Prepare&& prepare) {
    s.crew.each(to.count, [&](size_t row) {
        const float* const x = prepare(row, reinterpret_cast<float*>(s.scratch));
        FASTLOOP_KERNEL(s.isa, linear_rows)(w, x, 0, row, row + 1, to);
    });
}

inline void multiply(Stage& s, const Weight& w, const Rows& rows, const Finish& finish) {
    const size_t claim = panels_per_claim(w, s.threads);
    s.crew.each((w.panels + claim - 1) / claim, [&](size_t i) {
        FASTLOOP_KERNEL(s.isa, linear_panels)(w, rows, finish, i * claim, std::min(w.panels, (i + 1) * claim));
    });
}

// Memory handed out piece by piece, each piece aligned to 64 bytes.
class Arena {
  public:
    static size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }
    // Two passes with the same calls: the first measures, the second hands out.
    explicit Arena(unsigned char* base) : base_(base) {}
    template <class T>
    T* take(size_t count) {
        T* const at = reinterpret_cast<T*>(base_ + used_);
        used_ += padded(count * sizeof(T));
        return at;
    }
    size_t used() const { return used_; }

  private:
    unsigned char* base_;
    size_t used_ = 0;
};

}  // namespace fastloop
