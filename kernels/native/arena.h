// Working memory that is laid out anew for each step.
#pragma once

#include "panel.h"

namespace triode {

// Hands out aligned pieces of one allocation; from null it only counts.
class Arena {
  public:
    explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

    template <class N>
    N* take(long count) {
        char* at = base_ + used_;
        used_ += rounded_up(count * long(sizeof(N)), 64);
        return reinterpret_cast<N*>(at);
    }

    long used() const { return used_; }

  private:
    char* base_;
    long used_ = 0;
};

}  // namespace triode
