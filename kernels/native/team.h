// Threads that compute a step together.
//
// A step is a sequence of phases, each so many items of work. Threads claim items one by one, and a phase is over when
// its items are done, not when every thread has arrived: a thread that the system has put aside holds up the others only
// if it holds an item. When it runs again it finds the phases that it missed exhausted and catches up. Waiting for
// others' items spins for a bounded time and then gives the processor away: on a busy machine they need it to finish.
#pragma once

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <functional>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace triode {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// How to wait for another thread: spinning, then offering it the processor, then asleep.
class Patience {
  public:
    void wait() {
        if (waits_ < MAX_SPINS)
            relax();
        else if (waits_ < MAX_SPINS + MAX_YIELDS)
            std::this_thread::yield();
        else
            std::this_thread::sleep_for(std::chrono::microseconds(SLEEP_US));
        waits_++;
    }

  private:
    static constexpr int MAX_SPINS = 2000;
    static constexpr int MAX_YIELDS = 20;
    static constexpr int SLEEP_US = 30;

    int waits_ = 0;
};

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
        for (long item; (item = claim()) < items; mine++) work(item);
        finish(mine, items);
    }

    // Calls `work(item, next)`: `next` is what this thread does afterwards, which it can fetch; `items` or more is nothing.
    template <class Work>
    void share_ahead(long items, Work work) {
        long mine = 0;
        for (long item = claim(), next; item < items; item = next, mine++) {
            next = claim();
            work(item, next);
        }
        finish(mine, items);
    }

  private:
    long claim() { return phase_->claimed.fetch_add(1, std::memory_order_relaxed); }

    void finish(long mine, long items) {
        if (mine) phase_->done.fetch_add(mine, std::memory_order_release);
        Patience patience;
        while (phase_->done.load(std::memory_order_acquire) < items) patience.wait();
        phase_++;
    }

    Phase* phase_;
};

// Threads that wait for steps: the caller's and its helpers.
//
// A step does not wait for helpers to arrive: one that the system does not run misses it, and the others claim its items.
// It waits for those that are in it to leave. Between steps helpers spin for a bounded time, in which they give their
// processor to whoever wants it, and then sleep.
class Team {
  public:
    // `cpus`: where each helper stays, or null where the system is to choose. Throws if the system starts no more threads.
    Team(int num_helpers, const int32_t* cpus) {
        // Signals are for the threads that the host program knows.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (int i = 0; i < num_helpers; i++) {
                helpers_.emplace_back([this, i] { help(i + 1); });
                if (cpus) pin(helpers_.back(), cpus[i]);
            }
        } catch (...) {
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            end();
            throw;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    ~Team() { end(); }

    int size() const { return int(helpers_.size()) + 1; }

    // Called once, when helpers have begun with what is run next.
    std::function<void()> once_begun;

    // Calls `work(Worker&)` here and on the helpers that come in time. All phases are done when it returns.
    template <class Work>
    void run(Phase* phases, long num_phases, const Work& work) {
        for (long i = 0; i < num_phases; i++) new (phases + i) Phase{};
        auto call = [&](int index) {
            Worker worker(phases, index);
            work(worker);
        };
        call_ = [](const void* work, int index) { (*static_cast<const decltype(call)*>(work))(index); };
        work_ = &call;
        announce();
        if (once_begun) {
            once_begun();
            once_begun = nullptr;
        }
        call(0);
        job_.fetch_add(1);
        Patience patience;
        while (inside_.load()) patience.wait();
    }

  private:
    static constexpr int SPIN_US = 500;

    void end() {
        is_over_.store(true);
        announce();
        for (std::thread& helper : helpers_) helper.join();
    }

    // A job is open while the number is odd.
    void announce() {
        job_.fetch_add(1);
        if (asleep_.load()) futex(FUTEX_WAKE_PRIVATE, INT32_MAX);
    }

    void help(int index) {
        for (uint32_t seen = 0;;) {
            const uint32_t job = next(seen);
            if (is_over_.load()) return;
            inside_.fetch_add(1);
            // Whoever closes the job after this sees that somebody is inside.
            if (job_.load() == job) call_(work_, index);
            inside_.fetch_sub(1);
            seen = job;
        }
    }

    // An open job that is not `seen`.
    uint32_t next(uint32_t seen) {
        using Clock = std::chrono::steady_clock;
        auto is_new = [&](uint32_t job) { return job % 2 && job != seen; };
        const Clock::time_point end = Clock::now() + std::chrono::microseconds(SPIN_US);
        do {
            for (int i = 0; i < 100; i++, relax())
                if (const uint32_t job = job_.load(); is_new(job)) return job;
            std::this_thread::yield();
        } while (Clock::now() < end);
        for (;;) {
            asleep_.fetch_add(1);
            const uint32_t job = job_.load();
            if (!is_new(job)) futex(FUTEX_WAIT_PRIVATE, job);
            asleep_.fetch_sub(1);
            if (is_new(job)) return job;
        }
    }

    void futex(int operation, uint32_t value) { syscall(SYS_futex, &job_, operation, value, nullptr, nullptr, 0); }

    static void pin(std::thread& thread, int cpu) {
        cpu_set_t only;
        CPU_ZERO(&only);
        CPU_SET(cpu, &only);
        // A processor that is no longer allowed leaves the thread where it was.
        pthread_setaffinity_np(thread.native_handle(), sizeof only, &only);
    }

    alignas(64) std::atomic<uint32_t> job_{0};
    alignas(64) std::atomic<int> inside_{0};
    std::atomic<int> asleep_{0};
    std::atomic<bool> is_over_{false};
    void (*call_)(const void*, int) = nullptr;
    const void* work_ = nullptr;
    std::vector<std::thread> helpers_;
};

}  // namespace triode
