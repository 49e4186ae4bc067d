// What the forward pass and forward mode share: weights packed for the rows on their left, and the walk through time,
// chunk by chunk: all that does not wait for the step before is one product for the whole chunk, then follow its steps.
#pragma once

#include <algorithm>
#include <array>

#include "run.h"

namespace rnnfast {

// Of one layer and direction, each transposed; empty: zeros, or read where they lie.
template <class T>
struct PackedWeights {
    Buffer<T> x, h, hr;  // W_ih (I,input_rows), W_hh (R,recurrent_rows), W_hr (H,P)
    Buffer<T> bias;      // (G,H) b_ih + b_hh, each in the gates of its product
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

    // halves: rows of the products for each row of a step. bfloat16: as in Forward.
    TimeRun(const Shape& shape, int threads, int halves, bool bfloat16)
        : Run<T>(shape, Sweep::forward, threads),
          bfloat16(bfloat16),
          gates(this->gate_columns()),
          input_gates(gates.of(s.cell->input_gates)),
          recurrent_gates(gates.of(s.cell->recurrent_gates)),
          projected(Columns::of_matrix(s.P, kernel.lanes, plan.splits)),
          chunk_steps(std::max<int64_t>(1, std::min(s.T, chunk_rows / (halves * this->group_size())))) {}

    virtual void prepare(int thread) = 0;
    // Sums up what is known of z in steps [step0, step1).
    virtual void start_chunk(const Share& my, int64_t l, int64_t d, int64_t step0, int64_t step1,
                             const Range& panels) = 0;
    // Takes a step whose rows follow `first` ones of its chunk; -> how many they are.
    virtual int64_t take_step(const Share& my, int64_t l, int64_t d, int64_t step, int64_t first,
                              const Range& panels) = 0;
    virtual void start_sweep(const Share&, int64_t /*l*/, int64_t /*d*/, const Range& /*units*/) {}
    virtual void finish_sweep(const Share& my, int64_t l, int64_t d, const Range& units, const Range& outputs) = 0;

    // I: input size of the layer.
    PackedWeights<T> room_for(const Parameters<const T*>& p, int64_t I) const {
        return {Buffer<T>(p.w_ih ? input_gates.packed(I) : 0), Buffer<T>(p.w_hh ? recurrent_gates.packed(R) : 0),
                Buffer<T>(p.w_hr ? projected.packed(s.H) : 0), Buffer<T>(G * s.H)};
    }
    // This thread's part; nullptr: zeros.
    void pack(const Parameters<const T*>& p, int64_t I, int thread, const PackedWeights<T>& to) const {
        const int count = plan.threads();
        const Range z = Range::part(gates.panels, thread, count), r = Range::part(projected.panels, thread, count);
        const auto pack_gates = [&](const Columns& columns, const Slots& slots, const T* w, int64_t K, T* packed) {
            kernel.pack_transposed(columns, K, {&matrices_of(w, slots, K)[slots.first], bfloat16}, K, z.begin, z.end,
                                   packed);
        };
        pack_biases(p, Range::part(s.H, thread, count), to.bias.get());
        if (to.x) pack_gates(input_gates, s.cell->input_gates, p.w_ih, I, to.x.get());
        if (to.h) pack_gates(recurrent_gates, s.cell->recurrent_gates, p.w_hh, R, to.h.get());
        const void* const w_hr = p.w_hr;
        if (to.hr) kernel.pack_transposed(projected, s.H, {&w_hr, bfloat16}, s.H, r.begin, r.end, to.hr.get());
    }
    // Where each gate's rows of a weight (rows,K) are; nullptr: the weight is not for this gate.
    std::array<const void*, max_gates> matrices_of(const T* w, const Slots& slots, int64_t K) const {
        std::array<const void*, max_gates> gates{};
        const int64_t bytes = bfloat16 ? 2 : sizeof(T);
        for (int g = slots.first; w && g < slots.first + slots.count; ++g)
            gates[g] = reinterpret_cast<const char*>(w) + s.cell->torch_gates[g] * s.H * K * bytes;
        return gates;
    }
    // Rows of z start with the bias in those gates that the first product, which has it, does not fill.
    void start_others(const Columns& first, const Range& units, int64_t n, const T* const* bias, T* const* z) const {
        const int64_t begin = first.first, end = first.first + first.gates * s.H;
        for (int64_t gate = 0; gate < G * s.H; gate += s.H)
            if (gate < begin || gate >= end)
                for (int64_t r = 0; r < n; ++r) copy_columns(z[r] + gate, bias[r] + gate, units);
    }

    const bool bfloat16;
    const Columns gates, input_gates, recurrent_gates, projected;  // of z: all, those of W_ih, those of W_hh
    const int64_t chunk_steps;

private:
    void pack_biases(const Parameters<const T*>& p, const Range& units, T* bias) const {
        const auto of_gate = [&](const T* b, const Slots& slots, int64_t g) {
            const bool has_one = b && g >= slots.first && g < slots.first + slots.count;
            return has_one ? b + s.cell->torch_gates[g] * s.H : nullptr;
        };
        for (int64_t g = 0; g < G; ++g) {
            const T* const of_x = of_gate(p.b_ih, s.cell->input_gates, g);
            const T* const of_h = of_gate(p.b_hh, s.cell->recurrent_gates, g);
            T* const to = bias + g * s.H;
            for (int64_t j = units.begin; j < units.end; ++j) to[j] = (of_x ? of_x[j] : T(0)) + (of_h ? of_h[j] : T(0));
        }
    }

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
