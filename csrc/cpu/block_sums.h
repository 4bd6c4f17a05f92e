// The sums of the blocks of a call, which are added two by two, always the same two: by the thread that has the second one, while its own
// is in its cache. So they depend on the sizes alone, and as many live at a time as threads and levels need.
#pragma once

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "workspace.h"

namespace hlk {

class BlockSums {
public:
    // `floats` of each block, of which those from `zeroed` on begin with 0; the others are written by the block. Memory comes from `slots`,
    // which nobody else may use meanwhile.
    BlockSums(const Engine& engine, Slots& slots, int64_t blocks, int64_t floats, int64_t zeroed)
        : engine_(engine), slots_(slots), floats_(round_up(floats, max_lanes)), zeroed_(zeroed), of_(blocks), arrived_(blocks) {}

    // Memory of a block that begins.
    float* take(int64_t block) {
        float* sums = nullptr;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (free_.empty()) {
                sums = slots_.take<float>(floats_);
            } else {
                sums = free_.back();
                free_.pop_back();
            }
        }
        std::fill(sums + zeroed_, sums + floats_, 0.0f);
        return of_[block] = sums;
    }

    // A block has ended: adds its sums to its neighbour's or the other way round, theirs to those of the next two, and so on, as far as
    // those are there.
    void done(int64_t block) {
        const auto blocks = static_cast<int64_t>(of_.size());
        for (int64_t apart = 1; apart < blocks; apart *= 2) {
            const int64_t left = block / (2 * apart) * (2 * apart), right = left + apart;
            block = left;
            if (right >= blocks) continue;
            if (arrived_[right].fetch_add(1, std::memory_order_acq_rel) == 0) return;
            engine_.add(of_[left], of_[right], floats_);
            const std::lock_guard<std::mutex> lock(mutex_);
            free_.push_back(of_[right]);
        }
    }

    // Those of all blocks, once all have ended.
    const float* all() const { return of_[0]; }

private:
    const Engine& engine_;
    Slots& slots_;
    int64_t floats_, zeroed_;
    std::vector<float*> of_;                  // of each block
    std::vector<std::atomic<int>> arrived_;   // at a right block: how many of the two that meet there have ended
    std::vector<float*> free_;
    std::mutex mutex_;                        // of free_ and slots_
};

}  // namespace hlk
