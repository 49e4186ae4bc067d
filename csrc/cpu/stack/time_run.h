// What the forward pass and forward mode share: weights packed for the rows on their left, and the walk through time,
// chunk by chunk: all that does not wait for the step before is one product for the whole chunk, then follow its steps.
#pragma once

#include <algorithm>

#include "run.h"

namespace rnnfast {

// Of one layer and direction, each transposed; empty: zeros, or read where they lie.
template <class T>
struct PackedWeights {
    Buffer<T> x, h, hr;  // W_ih (I,G*H), W_hh (R,G*H), W_hr (H,P)
    Buffer<T> bias;      // b_ih + b_hh (G*H)
};

template <class T>
class TimeRun : protected Run<T> {
public:
    virtual ~TimeRun() = default;
    bool run() {
        return run_parallel(this->plan.threads(), [this](int thread) { work(this->share(thread)); });
    }

protected:
    using Run<T>::s, Run<T>::R, Run<T>::G, Run<T>::N, Run<T>::kernel, Run<T>::plan, Run<T>::everyone,
        Run<T>::group_barriers;

    // halves: rows of the products for each row of a step.
    TimeRun(const Shape& shape, int threads, int halves)
        : Run<T>(shape, threads),
          gates(this->gate_columns()),
          projected(Columns::of_matrix(s.P, kernel.lanes, plan.splits)),
          chunk_steps(std::max<int64_t>(1, std::min(s.T, chunk_rows / (halves * this->group_size())))) {}

    virtual void prepare(int thread) = 0;
    // Sums up what is known of z in steps [step0, step1).
    virtual void start_chunk(const Share& my, int64_t l, int64_t d, int64_t step0, int64_t step1,
                             const Range& panels) = 0;
    // Takes a step whose rows follow `first` ones of its chunk; -> how many they are.
    virtual int64_t take_step(const Share& my, int64_t l, int64_t d, int64_t step, int64_t first,
                              const Range& panels) = 0;
    virtual void start_sweep(const Share& my, int64_t l, int64_t d, const Range& units) = 0;
    virtual void finish_sweep(const Share& my, int64_t l, int64_t d, const Range& units, const Range& outputs) = 0;

    static PackedWeights<T> room_for(const Parameters<const T*>& p, int64_t I, int64_t R, const Columns& gates,
                                     const Columns& projected, int64_t H) {
        return {Buffer<T>(p.w_ih ? gates.packed(I) : 0), Buffer<T>(p.w_hh ? gates.packed(R) : 0),
                Buffer<T>(p.w_hr ? projected.packed(H) : 0), Buffer<T>(gates.gates * H)};
    }
    // This thread's part; nullptr: zeros.
    void pack(const Parameters<const T*>& p, int64_t I, int thread, const PackedWeights<T>& to) const {
        const int count = plan.threads();
        const Range z = Range::part(gates.panels, thread, count), r = Range::part(projected.panels, thread, count);
        const Range units = Range::part(G * s.H, thread, count);
        for (int64_t j = units.begin; j < units.end; ++j)
            to.bias[j] = (p.b_ih ? p.b_ih[j] : T(0)) + (p.b_hh ? p.b_hh[j] : T(0));
        if (to.x) kernel.pack_transposed(gates, I, p.w_ih, I, z.begin, z.end, to.x.get());
        if (to.h) kernel.pack_transposed(gates, R, p.w_hh, R, z.begin, z.end, to.h.get());
        if (to.hr) kernel.pack_transposed(projected, s.H, p.w_hr, s.H, r.begin, r.end, to.hr.get());
    }

    const Columns gates, projected;
    const int64_t chunk_steps;

private:
    // Rows of x that go through W_ih together, so that its panels serve many rows also when the batch is small.
    static constexpr int64_t chunk_rows = 96;

    void work(const Share& my) {
        prepare(my.thread);
        everyone.wait();
        for (int64_t l = 0; l < s.L; ++l) {
            for (int64_t d = my.directions.begin; d < my.directions.end; ++d) sweep(my, l, d);
            if (l + 1 < s.L && plan.exchanges(s.D)) everyone.wait();
        }
    }
    void sweep(const Share& my, int64_t l, int64_t d) {
        const Range panels = this->my_panels(my, gates);
        const Range units = this->columns_of(gates, panels);
        const Range outputs = s.P ? this->columns_of(projected, this->my_panels(my, projected)) : units;
        start_sweep(my, l, d, units);
        for (int64_t step0 = 0; step0 < s.T; step0 += chunk_steps) {
            const int64_t step1 = std::min(s.T, step0 + chunk_steps);
            start_chunk(my, l, d, step0, step1, panels);
            int64_t first = 0;
            for (int64_t step = step0; step < step1; ++step) {
                first += take_step(my, l, d, step, first, panels);
                group_barriers[my.group].wait();
            }
        }
        finish_sweep(my, l, d, units, outputs);
    }
};

}  // namespace rnnfast
