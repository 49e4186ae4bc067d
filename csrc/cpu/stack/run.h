// What all runs through a stack have in common: who does what, and where the rows are.
#pragma once

#include <memory>
#include <vector>

#include "../kernels.h"
#include "../runtime/buffer.h"
#include "../runtime/plan.h"
#include "../runtime/threads.h"
#include "layout.h"
#include "sequence.h"

namespace rnnfast {

template <class T>
void copy_columns(T* to, const T* from, const Range& columns) {
    std::copy(from + columns.begin, from + columns.end, to + columns.begin);
}

// to = a * b
template <class T>
void multiply_columns(T* to, const T* a, const T* b, const Range& columns) {
    for (int64_t j = columns.begin; j < columns.end; ++j) to[j] = a[j] * b[j];
}

// to += from
template <class T>
void add_columns(T* to, const T* from, const Range& columns) {
    for (int64_t j = columns.begin; j < columns.end; ++j) to[j] += from[j];
}

// The share of one thread in every sweep (a sweep: one layer in one direction through time).
struct Share {
    int thread;
    Range directions;
    Range batch;        // its group's sequences
    int group;          // number of its group among all groups of all teams
    int split, splits;  // its part of the units
};

template <class T>
class Run {
protected:
    Run(const Shape& shape, Sweep sweep, int threads)
        : s(shape),
          R(shape.recurrent()),
          G(shape.gates()),
          sequence(shape),
          N(sequence.N()),
          kernel(kernels_for<T>(shape.H, shape.precision)),
          cell(kernel.cells[shape.cell->index]),
          plan(choose_plan(shape, sweep, threads, kernel.lanes, kernel.costs)),
          zeros(zeros_size(shape)),
          group_barriers(plan.directions * plan.row_groups) {
        std::fill(zeros.get(), zeros.get() + zeros_size(s), T(0));
        everyone.expect(plan.threads());
        for (Barrier& barrier : group_barriers) barrier.expect(plan.splits);
    }

    // Sequences of the largest group.
    int64_t group_size() const {
        int64_t largest = 1;
        for (int g = 0; g < plan.row_groups; ++g) {
            const Range batch = sequence.group(g, plan.row_groups);
            largest = std::max(largest, batch.end - batch.begin);
        }
        return largest;
    }

    Share share(int thread) const {
        const int team = thread / (plan.row_groups * plan.splits);
        const int group = thread / plan.splits;
        return {thread,
                Range::part(s.D, team, plan.directions),
                sequence.group(group % plan.row_groups, plan.row_groups),
                group,
                thread % plan.splits,
                plan.splits};
    }

    static int64_t zeros_size(const Shape& s) {
        return std::max({s.recurrent(), s.H * std::max(1, s.cell->unit_parameters), s.resets ? s.recurrent_rows() : 0});
    }

    Direction direction(int64_t d) const { return {sequence, d == 1}; }
    Range my_rows(const Share& my, int64_t t) const {
        return {my.batch.begin, std::max(my.batch.begin, std::min(my.batch.end, sequence.size(t)))};
    }
    // Calls body(t, b) for this thread's rows of some steps.
    template <class Body>
    void for_rows(const Share& my, const Direction& way, int64_t step0, int64_t step1, const Body& body) const {
        for (int64_t step = step0; step < step1; ++step) {
            const int64_t t = way.time(step);
            const Range batch = my_rows(my, t);
            for (int64_t b = batch.begin; b < batch.end; ++b) body(t, b);
        }
    }
    Range my_panels(const Share& my, const Columns& columns) const {
        return Range::part(columns.panels, my.split, my.splits);
    }
    static Range columns_of(const Columns& columns, const Range& panels) {
        return {columns.first_vector(panels.begin) * columns.lanes,
                std::min(columns.size, columns.first_vector(panels.end) * columns.lanes)};
    }
    int64_t index(int64_t l, int64_t d) const { return l * s.D + d; }  // of a layer and direction among all
    // Sequence b of a (L*D,B,size) state, or of zeros.
    const T* state(const T* start, int64_t l, int64_t d, int64_t b, int64_t size) const {
        return start ? start + (index(l, d) * s.B + b) * size : zeros.get();
    }
    // Of `rows` the one that step t of sequence b goes on from, or what it begins with: the initial state, or zeros.
    template <class P>
    P previous(const Origin& from, int64_t t, int64_t b, P rows, int64_t stride, P initial, P zeros) const {
        if (from.goes_on(b)) return rows + (from.row + b) * stride;
        return sequence.under_way(t, b) ? initial : zeros;
    }
    const T* previous(const Origin& from, int64_t t, int64_t b, const T* rows, int64_t stride, const T* initial) const {
        return previous<const T*>(from, t, b, rows, stride, initial, zeros.get());
    }

    // Which gate a row of a product's columns belongs to: panels of one vector of units for each gate, or plain ones.
    Columns gate_columns() const {
        return G > 1 ? Columns::of_gates(s.H, int(G), kernel.lanes)
                     : Columns::of_matrix(s.H, kernel.lanes, plan.splits);
    }
    // Some columns, counted from the first of the gates of a product, as rows of torch's weight, which has the gates in
    // another order: calls body(first column, number of columns, first row) for those that stay together.
    template <class Body>
    void for_rows_of_gates(const Slots& slots, const Range& columns, const Body& body) const {
        const int* const torch = s.cell->torch_gates + slots.first;
        for (int g = 0, next; g < slots.count; g = next) {
            for (next = g + 1; next < slots.count && torch[next] == torch[next - 1] + 1;) ++next;
            const int64_t begin = std::max(columns.begin, g * s.H), end = std::min(columns.end, next * s.H);
            if (begin < end) body(begin, end - begin, (torch[g] - g) * s.H + begin);
        }
    }

    // to = from * mask in some columns of this thread's rows; the pointers are to row 0, rows (D*R).
    void drop_columns(const Share& my, T* to, const T* from, const T* mask, const Range& columns) const {
        for (int64_t t = 0; t < s.T; ++t) {
            const Range batch = my_rows(my, t);
            for (int64_t b = batch.begin; b < batch.end; ++b) {
                const int64_t at = (sequence.row(t) + b) * s.D * R;
                multiply_columns(to + at, from + at, mask + at, columns);
            }
        }
    }

    const Shape& s;
    const int64_t R, G;
    const Sequence sequence;
    const int64_t N;
    const Kernels<T>& kernel;
    const CellKernels<T>& cell;
    const Plan plan;
    Buffer<T> zeros;  // a row of whatever may be absent
    Barrier everyone;
    std::vector<Barrier> group_barriers;
};

// Runs make(threads), or make(1) where that many threads cannot be had.
template <class Make>
void run_with(int threads, const Make& make) {
    if (!make(threads)->run()) make(1)->run();
}

}  // namespace rnnfast
