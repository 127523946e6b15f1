// Steps that are computed one after the other by a thread of their own, so that whoever orders them prepares the next one
// meanwhile. A step may need tokens that the one before it has yet to find: they never leave this side.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>

#include "model.h"
#include "team.h"

namespace triode {

class Pipeline {
  public:
    typedef void (*Compute)(const TriodeOrder& order);

    // Throws if the system starts no more threads.
    explicit Pipeline(Compute compute) : compute_(compute) {
        // Signals are for the threads that the host program knows.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            thread_ = std::thread([this] { run(); });
        } catch (...) {
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            throw;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    // What has been ordered is computed first.
    ~Pipeline() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            is_over_ = true;
        }
        ordered_.notify_one();
        thread_.join();
    }

    // Returns how many have been ordered. Whatever the order points to is there until it is done.
    int64_t submit(const TriodeOrder& order) {
        std::lock_guard<std::mutex> lock(mutex_);
        orders_.push_back(order);
        ordered_.notify_one();
        return ++num_ordered_;
    }

    // Whether so many are done, after waiting for at most so long; less than nothing is for ever.
    bool wait(int64_t count, int64_t microseconds) {
        std::unique_lock<std::mutex> lock(mutex_);
        auto are_done = [&] { return num_done_ >= count; };
        if (microseconds >= 0) return done_.wait_for(lock, std::chrono::microseconds(microseconds), are_done);
        done_.wait(lock, are_done);
        return true;
    }

  private:
    void run() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            ordered_.wait(lock, [&] { return is_over_ || !orders_.empty(); });
            if (orders_.empty()) return;
            const TriodeOrder order = orders_.front();
            orders_.pop_front();
            // Who waits for the order before this one may take our processor when told. The helpers go on meanwhile.
            if (num_told_ < num_done_)
                static_cast<Team*>(order.team)->once_begun = [this, count = num_done_] { tell(count); };
            lock.unlock();
            const auto start = std::chrono::steady_clock::now();
            compute_(order);
            *order.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
            lock.lock();
            // An order that is refused begins with nothing.
            static_cast<Team*>(order.team)->once_begun = nullptr;
            num_done_++;
            if (orders_.empty()) num_told_ = num_done_, done_.notify_all();
        }
    }

    void tell(int64_t count) {
        std::lock_guard<std::mutex> lock(mutex_);
        num_told_ = count;
        done_.notify_all();
    }

    const Compute compute_;
    std::mutex mutex_;
    std::condition_variable ordered_, done_;
    std::deque<TriodeOrder> orders_;
    int64_t num_ordered_ = 0, num_done_ = 0;
    int64_t num_told_ = 0;  // of those that are done
    bool is_over_ = false;
    std::thread thread_;
};

}  // namespace triode
