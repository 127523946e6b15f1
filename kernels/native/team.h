// Threads that compute a step together.
//
// A step is a sequence of phases, each so many items of work. Threads claim items one by one, and a phase is over when
// its items are done, not when every thread has arrived: a thread that the system has put aside holds up the others only
// if it holds an item. When it runs again it finds the phases that it missed exhausted and catches up. Waiting for
// others' items spins for a bounded time and then gives the processor away: on a busy machine they need it to finish.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

namespace triode {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Items of one phase; the two counters do not share a cache line.
struct Phase {
    alignas(64) std::atomic<long> claimed;
    alignas(64) std::atomic<long> done;
};

// One thread's way through the phases.
class Worker {
  public:
    // `phases` are zero when the first thread begins.
    Worker(Phase* phases, int index) : index(index), phase_(phases) {}

    const int index;

    // Calls `work(item)` for the items of this phase that nobody else has claimed; all are done when it returns.
    //
    // Only within `work` may a thread read what the previous phases wrote: outside it the others may be far ahead.
    template <class Work>
    void share(long items, Work work) {
        long mine = 0;
        for (long item; (item = phase_->claimed.fetch_add(1, std::memory_order_relaxed)) < items; mine++) work(item);
        if (mine) phase_->done.fetch_add(mine, std::memory_order_release);
        for (int waits = 0; phase_->done.load(std::memory_order_acquire) < items; waits++) {
            if (waits < MAX_SPINS)
                relax();
            else if (waits < MAX_SPINS + MAX_YIELDS)
                std::this_thread::yield();
            else
                std::this_thread::sleep_for(std::chrono::microseconds(SLEEP_US));
        }
        phase_++;
    }

  private:
    static constexpr int MAX_SPINS = 2000;
    static constexpr int MAX_YIELDS = 20;
    static constexpr int SLEEP_US = 30;

    Phase* phase_;
};

}  // namespace triode
