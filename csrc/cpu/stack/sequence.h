// Which rows of an (N, ...) array belong to which step, and the order in which a direction visits the steps.
#pragma once

#include <algorithm>
#include <vector>

#include "../../rnnfast.h"
#include "../runtime/threads.h"

namespace rnnfast {

class Sequence {
public:
    explicit Sequence(const Shape& shape)
        : T(shape.T), B(shape.B), sizes_(shape.batch_sizes), resets_(shape.resets), offsets_(shape.T + 1) {
        offsets_[0] = 0;
        for (int64_t t = 0; t < T; ++t) offsets_[t + 1] = offsets_[t] + size(t);
        if (!resets_) return;
        first_resets_.assign(B, T);
        for (int64_t t = T - 1; t >= 0; --t)
            for (int64_t b = 0; b < size(t); ++b)
                if (resets_[row(t) + b]) first_resets_[b] = t;
    }

    const int64_t T, B;
    int64_t N() const { return offsets_[T]; }
    // Sequences that are running at step t; none before the first step and after the last.
    int64_t size(int64_t t) const { return t < 0 || t >= T ? 0 : sizes_ ? sizes_[t] : B; }
    // Row of sequence 0 at step t.
    int64_t row(int64_t t) const { return offsets_[t]; }
    // Last step of sequence b.
    int64_t last(int64_t b) const {
        if (!sizes_) return T - 1;
        return std::partition_point(sizes_, sizes_ + T, [b](int64_t size) { return size > b; }) - sizes_ - 1;
    }
    // The resets of a step's rows, nullptr: none.
    const uint8_t* resets(int64_t t) const { return resets_ ? resets_ + row(t) : nullptr; }
    // Is step t of sequence b in an episode that was under way, with h0 and c0, when the sequence began?
    bool under_way(int64_t t, int64_t b) const { return t < first_reset(b); }
    // Step of the first reset, T if there is none.
    int64_t first_reset(int64_t b) const { return resets_ ? first_resets_[b] : T; }
    // Splits the batch into neighbouring groups of nearly the same number of rows.
    Range group(int64_t group, int64_t groups) const {
        if (!sizes_) return Range::part(B, group, groups);
        return {first_with(N() * group / groups), first_with(N() * (group + 1) / groups)};
    }

private:
    // The first b such that sequences [0, b) have at least `rows` rows.
    int64_t first_with(int64_t rows) const {
        int64_t b = 0;
        for (int64_t sum = 0; b < B && sum < rows; ++b) sum += last(b) + 1;
        return b;
    }

    const int64_t* sizes_;
    const uint8_t* resets_;
    std::vector<int64_t> offsets_;
    std::vector<int64_t> first_resets_;  // (B), if there are any
};

// Where the states before one step of a direction come from. A sequence that does not go on from the step before begins
// an episode: with h0 and c0 if it is under way, else with zeros.
struct Origin {
    int64_t count = 0;                // sequences that run at both steps
    int64_t row = 0;                  // of sequence 0 at the step before
    const uint8_t* resets = nullptr;  // between the two, nullptr: none

    bool goes_on(int64_t b) const { return b < count && !(resets && resets[b]); }
};

// One direction through a sequence: step s is at time t = time(s), and the step before is at time t - stride().
struct Direction {
    const Sequence& sequence;
    bool reverse;

    int64_t time(int64_t step) const { return reverse ? sequence.T - 1 - step : step; }
    int64_t stride() const { return reverse ? -1 : 1; }
    // Time at which sequence b ends in this direction.
    int64_t end(int64_t b) const { return reverse ? 0 : sequence.last(b); }
    // Time at which h0 and c0 of sequence b enter; -1: a reset comes first.
    int64_t start(int64_t b) const {
        if (reverse) return std::min(sequence.first_reset(b), sequence.last(b) + 1) - 1;
        return sequence.under_way(0, b) ? 0 : -1;
    }
    // Of the step at time t. After the last one nobody goes on.
    Origin origin(int64_t t) const {
        const int64_t before = t - stride(), later = std::max(t, before);
        if (std::min(t, before) < 0 || later >= sequence.T) return {};
        return {sequence.size(later), sequence.row(before), sequence.resets(later)};
    }
};

}  // namespace rnnfast
