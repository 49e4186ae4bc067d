// Back-propagation through time of a stack. Layer by layer from the top: the sweep backwards through the steps gives
// dz (N,G*H), and then everything else is one matrix product each over all N rows: dx = dz W_ih, dW = dz^T [x, h].
//
// The second derivative is the same pass once more. With tangents (dots) and the first-order gradients of the tangents
// (`first`), every product gets a second term of the same form,
//     dx = dz W_ih + dz_first W_ih_dot,    dW = dz^T [x, h] + dz_first^T [x_dot, h_dot],    and so on,
// and the cell's step adds its bend. Both terms live in `terms`; a first-order pass has one.
#pragma once

#include "reserve.h"
#include "run.h"

namespace rnnfast {

template <class T>
class BackwardRun : Run<T> {
    using Run<T>::s, Run<T>::R, Run<T>::G, Run<T>::N, Run<T>::sequence, Run<T>::kernel, Run<T>::plan, Run<T>::zeros,
        Run<T>::everyone, Run<T>::group_barriers;

public:
    // What the second-order pass builds on.
    struct Linear {
        Trace<T> dot;
        const std::vector<Parameters<const T*>>& parameters;  // tangents
        const BackwardRun& first;
    };

    // keep: leave dz, dh, dc and dr of every layer behind, as the `first` of a second-order pass.
    BackwardRun(const Shape& shape, const Past<T>& past, const Adjoint<T>& adjoint, bool keep, const Linear* linear,
                int threads);
    bool run() {
        return run_parallel(plan.threads(), [this](int thread) { work(this->share(thread)); });
    }

private:
    // One factor of each product: weights packed for the layer at hand, and rows that meet dz in dW.
    struct Term {
        Trace<T> trace;
        const std::vector<Parameters<const T*>>& parameters;
        const BackwardRun& from;  // whose dz and dr
        Buffer<T> x, h, hr;       // (D, ...) packed W_ih (G*H,I), W_hh (G*H,R), W_hr (P,H)
        Buffer<T> dropped;        // (N,D*R), input of the layer at hand after dropout
    };
    // Of one thread: row pointers, and a block of rows for the weight gradients.
    struct Scratch {
        Scratch(int64_t n, int64_t left_size, int64_t right_size)
            : a(n),
              init(n),
              gates(n),
              c(n),
              c_prev(n),
              h(n),
              z_dot(n),
              c_dot(n),
              c_dot_prev(n),
              dz_first(n),
              dc_first(n),
              dh_first(n),
              dh(n),
              dc(n),
              dz(n),
              dc_all(n),
              block(n),
              left(left_size),
              right(right_size) {}
        Buffer<const T*> a, init, gates, c, c_prev, h, z_dot, c_dot, c_dot_prev, dz_first, dc_first, dh_first;
        Buffer<T*> dh, dc, dz, dc_all;
        struct Row {
            int64_t t, b, row;
        };
        Buffer<Row> block;
        Buffer<T> left, right;
    };

    void work(const Share& my);
    void pack(int64_t l, int thread);
    void pack_share(const Columns& columns, int64_t K, const T* w, int64_t stride, int thread, T* packed);
    void bend_output_gradient(int64_t l, int thread);
    void sweep_backward(const Share& my, int64_t l, int64_t d);
    void backward_step(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch, bool carried);
    Product<T> unproject(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch);
    void lstm_step(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch, const Product<T>& product);
    void elman_step(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch, const Product<T>& product);
    void add_to_dz(const Share& my, int64_t l, int64_t d, int64_t t);
    void initial_state_gradient(const Share& my, int64_t l, int64_t d, const Range& columns);
    void hand_out(int64_t l, int thread);
    void drop(int64_t l, int thread);
    void input_gradient(int64_t l, int thread);
    void weight_gradients(int64_t l, int64_t d, int64_t group, int thread);
    void add_block(const Parameters<T*>& to, int64_t l, int64_t d, int64_t n, int thread, bool first);
    void add_outer(Scratch& at, const Range& rows, int64_t n, const T* left, int64_t stride, int64_t width, bool first,
                   T* w);

    bool wants_input(int64_t l) const { return l > 0 || adjoint.x; }
    const T* input(const Term& term, int64_t l) const {  // (N,I of the layer) or nullptr
        return l == 0 ? term.trace.x : past.dropout ? term.dropped.get() : term.trace.output(s, N, l - 1);
    }
    const T* output_gradient(int64_t l) const {  // (N,D*R) or nullptr
        return l == s.L - 1 ? adjoint.y : d_hidden[l % 2].get();
    }
    int64_t slot(int64_t l, int64_t d) const { return keep ? this->sweep(l, d) : d; }
    T* dz_row(int64_t l, int64_t d, int64_t row) const { return dz.get() + (slot(l, d) * N + row) * dz_stride; }
    T* dr_row(int64_t l, int64_t d, int64_t row) const { return dr.get() + (slot(l, d) * N + row) * s.P; }
    T* dh_row(int64_t l, int64_t d, int64_t row, int64_t b) const {
        return dh.get() + (keep ? this->sweep(l, d) * N + row : d * s.B + b) * s.H;
    }
    T* dc_all_row(int64_t l, int64_t d, int64_t row) const {
        return dc_all.get() + (this->sweep(l, d) * N + row) * s.H;
    }
    const T* c_previous(const Trace<T>& trace, const Direction& way, int64_t l, int64_t d, int64_t t, int64_t b) const {
        const T* cells = trace.cells + this->sweep(l, d) * N * s.H;
        return this->previous(way, t, b, cells, s.H, this->state(trace.c0, l, d, b, s.H));
    }
    const T* h_previous(const Trace<T>& trace, const Direction& way, int64_t l, int64_t d, int64_t t, int64_t b) const {
        return this->previous(way, t, b, trace.output(s, N, l) + d * R, s.D * R, this->state(trace.h0, l, d, b, R));
    }

    const Past<T>& past;
    const Adjoint<T>& adjoint;
    const bool keep;
    const Linear* const linear;
    const Columns units, outputs;  // of W_hr or the cell (H); of h (R)
    const int64_t GH, dz_stride;
    std::vector<Term> terms;
    Buffer<T> dz;                  // (D,N,G*H), rows dz_stride apart; kept: (L,D,N,G*H), and so on
    Buffer<T> dr;                  // (D,N,P), projected: dL/dh
    Buffer<T> dh, dc;              // (D,B,H), of the step at hand; kept: dh (L,D,N,H)
    Buffer<T> dc_all;              // kept: (L,D,N,H)
    Buffer<T> d_hidden[2];         // (N,D*R), dL/d output of the lower layers, by turns
    Buffer<T> bent;                // (N,D*R), second order: dL/d output with what the tangents add
    Buffer<T> no_dz;               // (G*H) zeros
    std::vector<Scratch> scratch;  // [threads]
};

}  // namespace rnnfast
