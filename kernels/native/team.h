// Threads that compute a step together.
//
// A step is a sequence of phases. In a phase the threads claim items of work one by one, so that a thread which the
// system has put aside holds up no more than its current item; between phases they meet at a barrier. Waiting spins for
// a bounded time and then gives the processor away: on a busy machine the others need it to arrive.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(_WIN32)
#include <thread>
#else
#include <sched.h>
#endif

namespace triode {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

inline void give_way() {
#if defined(_WIN32)
    std::this_thread::yield();
#else
    sched_yield();
#endif
}

// One claim counter a cache line.
struct alignas(64) Counter {
    std::atomic<long> next;
};

class Team {
  public:
    // `counters` are as many as there are phases, all zero.
    explicit Team(Counter* counters) : counters_(counters) {}

    // To be called by each thread, with the number of threads that really run, before anything else.
    void meet(int size) {
        const uint32_t generation = generation_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            generation_.store(generation + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; spins++) {
            if (spins < MAX_SPINS)
                relax();
            else
                give_way();
        }
    }

    long claim(long phase) { return counters_[phase].next.fetch_add(1, std::memory_order_relaxed); }

  private:
    static constexpr int MAX_SPINS = 2000;

    Counter* counters_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
};

// One thread's place in the team.
class Worker {
  public:
    Worker(Team& team, int index, int size) : index(index), size(size), team_(team) {}

    const int index;
    const int size;

    // Calls `work(item)` for the items of this phase that nobody else has claimed, and ends the phase.
    template <class Work>
    void share(long items, Work work) {
        for (long item; (item = team_.claim(phase_)) < items;) work(item);
        team_.meet(size);
        phase_++;
    }

  private:
    Team& team_;
    long phase_ = 0;
};

}  // namespace triode
