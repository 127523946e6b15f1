// Processes that compute one model together, each with its share of all heads and inner features.
//
// A sum over features that several ranks share is added up in memory that they share: each writes its part, all meet, and each
// adds the parts in the order of ranks, so that all go on with the same bits. There are two such places, used in turn: who
// writes to one has met everybody at the other since, and they are done with it.
#pragma once

#include "model.h"
#include "panel.h"
#include "team.h"

namespace triode {

class Ranks {
  public:
    // Which of a layer's two sums: behind attention, or behind the feed-forward network.
    enum Place { ATTENTION, FEED_FORWARD };

    explicit Ranks(const TriodeModel& model) : ranks_(model.ranks), stride_(rounded_up(model.hidden_size, PANEL)) {}

    bool are_many() const { return ranks_; }

    // This rank's part of a token's sum.
    float* mine(Place place, long token) const { return part(place, ranks_->rank, token); }

    // Waits until every rank has come as often as this one.
    void meet() const {
        const uint64_t now = arrivals(ranks_->rank).fetch_add(1, std::memory_order_acq_rel) + 1;
        for (long rank = 0; rank < ranks_->num_ranks; rank++) {
            Patience patience;
            while (arrivals(rank).load(std::memory_order_acquire) < now) patience.wait();
        }
    }

    // to += bias + all parts
    void add(Place place, long token, const TriodeMatrix& matrix, float* to) const {
        for (long i = 0; i < stride_; i += LANES) {
            Vec sum = load(part(place, 0, token) + i);
            for (long rank = 1; rank < ranks_->num_ranks; rank++) sum = sum + load(part(place, rank, token) + i);
            if (matrix.bias) sum = sum + load(matrix.bias + i);
            store(to + i, load(to + i) + sum);
        }
    }

  private:
    float* part(Place place, long rank, long token) const {
        const long index = (place * ranks_->num_ranks + rank) * ranks_->max_tokens + token;
        return static_cast<float*>(ranks_->sums) + index * stride_;
    }

    // Counters of different ranks do not share a cache line.
    std::atomic<uint64_t>& arrivals(long rank) const {
        return *reinterpret_cast<std::atomic<uint64_t>*>(static_cast<char*>(ranks_->arrivals) + rank * 64);
    }

    const TriodeRanks* ranks_;
    const long stride_;
};

}  // namespace triode
