// Which rows of an (N, ...) array belong to which step, and the order in which a direction visits the steps.
#pragma once

#include <algorithm>
#include <vector>

#include "../../rnnfast.h"
#include "../runtime/threads.h"

namespace rnnfast {

class Sequence {
public:
    explicit Sequence(const Shape& shape) : T(shape.T), B(shape.B), sizes_(shape.batch_sizes), offsets_(shape.T + 1) {
        offsets_[0] = 0;
        for (int64_t t = 0; t < T; ++t) offsets_[t + 1] = offsets_[t] + size(t);
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
    std::vector<int64_t> offsets_;
};

// One direction through a sequence: step s is at time t = time(s), and h_{s-1} comes from time t - stride().
struct Direction {
    const Sequence& sequence;
    bool reverse;

    int64_t time(int64_t step) const { return reverse ? sequence.T - 1 - step : step; }
    int64_t stride() const { return reverse ? -1 : 1; }
    // Times at which sequence b starts and ends in this direction.
    int64_t start(int64_t b) const { return reverse ? sequence.last(b) : 0; }
    int64_t end(int64_t b) const { return reverse ? 0 : sequence.last(b); }
};

}  // namespace rnnfast
